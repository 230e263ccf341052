"""srd's image in containers, run by the command of docs/container.md: the first process, its children, their end."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from support.containers import Containers
from support.lab import no_plaintext, xfrm

CHECKOUT = Path(__file__).parents[2]
SERVICES = ("redis", "sentinel", "stunnel")
# What the documented command grants; a container that is killed for taking longer ends with 137.
STOP_SECONDS = 60
USERS = {"redis": 6379, "sentinel": 6379, "stunnel": 6380}


def status_of(lab: Containers, node: str, pid: int) -> dict[str, str]:
    """Return /proc/PID/status of a process in a node's container."""
    text = lab.inside(node, "cat", f"/proc/{pid}/status")
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))


def catches_sigterm(lab: Containers, node: str) -> bool:
    """Whether process 1 has a handler for it; without one it would not get it."""
    status = lab.inside(node, "cat", "/proc/1/status", check=False)
    return any(int(caught, 16) & 1 << 14 for caught in re.findall(r"^SigCgt:\t(\w+)$", status, re.MULTILINE))


def processes(lab: Containers, node: str) -> dict[int, str]:
    """Return the state letter of each process in a node's container."""
    text = lab.inside(node, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null", check=False)
    return {int(pid): state for pid, state in re.findall(r"^(\d+) \(.*\) (\S) ", text, re.MULTILINE)}


def write(lab: Containers, key: str, value: str) -> None:
    """Write to the primary through TLS and the balancer, and have a replica confirm it."""
    said = lab.on("client", "redis-cli", stdin=f"set {key} {value}\nwait 1 5000\n").stdout.split()
    assert said[0] == "OK", said
    assert int(said[1]) >= 1, said


def read(lab: Containers, key: str) -> str:
    return lab.on("client", "redis-cli", "get", key, check=False).stdout.strip()


def test_every_node_is_healthy_by_the_images_own_check(lab: Containers) -> None:
    for node in lab.nodes:
        lab.wait(lambda node=node: lab.healthy(node), f"{node} is healthy")


def test_srd_is_the_first_process_with_the_units_capabilities_and_its_children_have_none(lab: Containers) -> None:
    srd = status_of(lab, "redis-1", 1)
    unit = (CHECKOUT / "srd/units/srd.service").read_text()
    (granted,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    documented = re.findall(r"--cap-add ([A-Z_]+)", (CHECKOUT / "docs/container.md").read_text())
    assert {f"CAP_{name}" for name in documented} == set(granted.split())
    assert int(srd["CapBnd"], 16).bit_count() == len(set(documented))
    assert (srd["Name"], srd["NoNewPrivs"], srd["Seccomp"]) == ("srd", "1", "2")
    for service, child in lab.children("redis-1").items():
        status = status_of(lab, "redis-1", child["pid"])
        assert {int(status[f"Cap{which}"], 16) for which in ("Inh", "Prm", "Eff", "Amb")} == {0}, (service, status)
        assert set(status["Uid"].split()) == {str(USERS[service])}
        assert set(status["Gid"].split()) == {str(USERS[service])}
        assert status["Groups"].strip() == ""
        assert status["PPid"] == "1"


def test_nothing_can_be_written_but_in_the_volumes_and_in_memory(lab: Containers) -> None:
    mounts = [line.split() for line in lab.inside("redis-1", "cat", "/proc/mounts").splitlines()]
    writable = {target for _, target, kind, options, *_ in mounts if "ro" not in options.split(",") and kind != "proc"}
    engines = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv"}
    volumes = {"/run/srd", "/var/lib/srd", "/var/log/srd"}
    memory = {"/run", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/dev/pts", "/dev/mqueue"}
    assert writable - engines - memory == volumes


def test_orphans_are_collected_and_the_ends_of_srds_own_children_are_still_told(lab: Containers) -> None:
    orphans = lab.inside("redis-1", "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 4 & echo $!; done").split()
    parents = {status_of(lab, "redis-1", int(pid))["PPid"] for pid in orphans[:2]}
    assert parents == {"1"}
    # As its user: root has no CAP_KILL in there.
    stunnel = lab.children("redis-1")["stunnel"]["pid"]
    lab.podman("redis-1", "exec", "--user", str(USERS["stunnel"]), "srd", "sh", "-c", f"kill -ABRT {stunnel}")
    lab.wait(lambda: not set(map(int, orphans)) & set(processes(lab, "redis-1")), "the orphans are gone")
    lab.wait(lambda: "Z" not in processes(lab, "redis-1").values(), "nothing is left behind")
    assert lab.children("redis-1")["stunnel"]["last_exit"] == "killed by SIGABRT"
    lab.wait_whole()


def test_a_hangup_is_a_reload(lab: Containers) -> None:
    log = Path("/var/log/lab/srd-redis-1.log")
    before = log.read_text().count('"event": "reloaded"')
    lab.podman("redis-1", "kill", "--signal", "HUP", "srd")
    lab.wait(lambda: log.read_text().count('"event": "reloaded"') == before + 1, "it takes the bundle in again")
    assert set(lab.children("redis-1")) == set(SERVICES)


def test_a_stop_ends_the_children_in_order_and_a_start_brings_the_node_back(lab: Containers) -> None:
    lab.wait_whole()
    node = next(node for node in lab.nodes if node != lab.primary())
    logs = Path(f"/var/lab/{node}/var/log/srd")
    started = time.monotonic()
    lab.podman(node, "stop", "srd")
    took = time.monotonic() - started
    assert lab.inspect(node, ".State.ExitCode") == "0", "SIGTERM, and no SIGKILL"
    assert took < STOP_SECONDS
    assert "User requested shutdown" in (logs / "redis.log").read_text()
    assert "bye bye" in (logs / "redis.log").read_text()
    assert "proto esp" in xfrm(lab, node, "policy"), "the node is closed"
    lab.start_srd(node)
    lab.wait_whole()
    print(f"\npodman stop: {took:.1f} s")  # noqa: T201


def test_a_stop_while_srd_starts_is_not_missed(lab: Containers) -> None:
    """A cluster.toml that never ends keeps it at its start, on a machine that is no node."""
    lab.on("client", "mkfifo", "/etc/srd/cluster.toml")
    with subprocess.Popen(["on", "client", str(CHECKOUT / "tests/image/run-node"), "client"]) as run:
        lab.wait(lambda: catches_sigterm(lab, "client"), "it runs")
        assert not lab.healthy("client")
        started = time.monotonic()
        lab.podman("client", "stop", "srd")
        took = time.monotonic() - started
        assert run.wait(60) == 0, "SIGTERM, and no SIGKILL"
    print(f"\npodman stop: {took:.1f} s")  # noqa: T201
    assert took < STOP_SECONDS


@pytest.mark.parametrize("how", ["restarted", "killed", "killed and made anew"])
def test_the_primarys_container_ends_and_no_confirmed_write_is_lost(lab: Containers, how: str) -> None:
    lab.wait_whole()
    node = lab.primary()
    write(lab, "kept", how.replace(" ", "-"))
    if how == "restarted":
        lab.podman(node, "stop", "srd")
    else:
        lab.podman(node, "kill", "--signal", "KILL", "srd")
        # Nothing of it is left, as the death of a container's first process is the death of all.
        lab.wait(lambda: lab.inspect(node, ".State.Running") == "false", "it has ended")
    assert not lab.reaches(node, node, 6379)
    assert "proto esp" in xfrm(lab, node, "policy"), "the node is closed"
    if how == "killed and made anew":
        lab.podman(node, "rm", "srd")
    lab.start_srd(node)
    took = lab.wait(lab.whole, "the cluster is whole")
    print(f"\n{how}: whole after {took:.0f} s, the primary is {'another' if lab.primary() != node else 'the same'}")  # noqa: T201
    assert read(lab, "kept") == how.replace(" ", "-")


def test_no_packet_between_nodes_was_in_plaintext(lab: Containers, wire: Path) -> None:
    """Over the whole run; the last test of this directory."""
    del lab
    no_plaintext(wire)
