"""srd as a systemd unit: its death, a restart and a hung srd are noticed by nobody, a stop is a stop."""

from __future__ import annotations

import datetime as dt
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machine import Machine
from support.unit import PORT, URL, Checks, ask, back, conditions, healthy, lives, pids, srd, unit_node

from srd.trust.issuing import renew_node

SERVICES = ("redis", "sentinel", "stunnel")
TLS_CLIENT = ("openssl", "s_client", "-connect", "127.0.1.1:6380", "-CAfile", "/etc/srd/ca.crt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def bundles(root: Path) -> Path:
    return root / "bundles"


@pytest.fixture(scope="module")
def node(root: Path) -> Iterator[Machine]:
    with unit_node(root) as made:
        yield made


@pytest.mark.parametrize("how", ["killed", "restarted", "hung", "terminated"])
def test_the_children_outlive_srd_and_no_check_is_refused(node: Machine, how: str) -> None:
    before, former = pids(node), node.show("srd", "MainPID")
    assert set(before) == set(SERVICES)
    with Checks(node) as checks:
        if how == "restarted":
            node.run("systemctl", "restart", "srd")
        else:
            # A SIGTERM that no stop of the unit has sent: by hand, or by the manager when a start took too long.
            node.run("kill", {"killed": "-KILL", "hung": "-STOP", "terminated": "-TERM"}[how], former)
        took = node.wait(lambda: back(node, former), "the next srd does its job")
    print(f"\n{how}: back within {took:.1f} s, {len(checks.answers)} checks, refused: {checks.refused()}")  # noqa: T201
    assert pids(node) == before
    assert all(child["adopted"] for child in srd(node, "children")["children"])  # type: ignore[attr-defined]
    # The connections that the dead one had accepted end with it; whoever comes after that waits.
    assert len(checks.refused()) <= (how not in ("restarted", "terminated"))


@pytest.mark.parametrize("how", ["killed", "restarted"])
def test_an_agent_check_waits_for_the_next_srd_and_is_told_what_the_node_is(node: Machine, how: str) -> None:
    ask_agent = ("bash", "-c", "exec 3<>/dev/tcp/127.0.1.1/8081 && echo primary >&3 && cat <&3")
    assert node.run(*ask_agent) == "up ready\n"
    former = node.show("srd", "MainPID")
    node.run(*(("systemctl", "restart", "--no-block", "srd") if how == "restarted" else ("kill", "-KILL", former)))
    answers = []
    while node.show("srd", "MainPID") in (former, "0") or not answers:
        # One that the former srd holds ends without a word; haproxy keeps what it was told last.
        answers.append(node.run(*ask_agent, check=False))
    answers.append(node.run(*ask_agent))
    assert set(answers) <= {"up ready\n", ""}
    assert answers[-1] == "up ready\n"
    node.wait(lambda: back(node, former), "the next srd does its job")


def test_a_stop_that_meets_a_srd_which_still_starts_is_a_stop(node: Machine) -> None:
    before, former = pids(node), node.show("srd", "MainPID")
    node.run("kill", "-KILL", former)
    node.wait(lambda: starts(node, former), "the next srd can be stopped")
    node.run("systemctl", "stop", "srd")
    left = [service for service, pid in before.items() if lives(node, pid)]
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node), "it does its job")
    assert left == []


def starts(node: Machine, former: str) -> bool:
    """Whether another srd than the former one has come as far as to have a handler for SIGTERM."""
    pid = node.show("srd", "MainPID")
    caught = node.run("sed", "-n", r"s/^SigCgt:\t//p", f"/proc/{pid}/status", check=False)
    return pid not in (former, "0") and bool(int(caught or "0", 16) & 1 << (signal.SIGTERM - 1))


def test_stunnel_is_started_again_by_a_srd_that_did_not_start_it_and_nobody_is_refused(node: Machine) -> None:
    before, former = pids(node), node.show("srd", "MainPID")
    node.run("kill", "-KILL", former)
    node.wait(lambda: back(node, former), "the next srd does its job")
    # Stopped, it takes nobody; its successor serves whoever has connected meanwhile.
    node.run("kill", "-STOP", str(before["stunnel"]))
    with subprocess.Popen(
        node.inside(*TLS_CLIENT), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as client:
        node.run("kill", "-KILL", str(before["stunnel"]))
        said, _ = client.communicate(timeout=30)
    assert "Verify return code: 0 (ok)" in said
    assert {service for service in SERVICES if pids(node)[service] != before[service]} == {"stunnel"}


def test_a_child_is_restarted_when_asked_and_the_primarys_redis_only_by_force(node: Machine) -> None:
    before = pids(node)
    said = node.run("/opt/srd/bin/srd", "restart", "stunnel")
    after = pids(node)
    assert said == f"stunnel is ready, pid {after['stunnel']}\n"
    assert {service for service in SERVICES if after[service] != before[service]} == {"stunnel"}
    refused = node.fails("/opt/srd/bin/srd", "restart", "redis")
    assert (refused.returncode, "fail over to another node" in refused.stderr) == (40, True), refused
    assert pids(node) == after


def test_logs_are_rotated_under_the_children_and_go_on(node: Machine) -> None:
    before, log = pids(node), "/var/log/srd/redis.log"
    assert "Ready to accept connections" in node.run("cat", log)
    node.run("logrotate", "--force", "/etc/logrotate.d/srd")
    assert "Ready to accept connections" in node.run("cat", f"{log}.1")
    ask(node, "bgsave")
    node.wait(lambda: "DB saved on disk" in node.run("cat", log), "redis writes on")
    assert "\0" not in node.run("cat", log)
    assert pids(node) == before


def test_a_reload_says_what_it_has_taken_in_and_the_manager_can_ask_for_it(node: Machine, bundles: Path) -> None:
    assert node.run("srd", "reload") == "taken in: nothing has changed\n"
    file = node.run("cat", "/etc/srd/cluster.toml")
    renew_node(bundles, "redis-1", dt.datetime.now(dt.UTC))
    for name in ("node.crt", "node.key", "tls.crt", "tls.key"):
        node.write(f"/etc/srd/{name}", (bundles / "redis-1" / name).read_text())
    node.write("/etc/srd/cluster.toml", file + "[http]\nmax_connections = 100\n[trust]\nrevoked = ['ab']\n")
    said = node.run("srd", "reload")
    assert said == "taken in: trusted no more ab; new certificates node, tls; changed settings\n"
    node.write("/etc/srd/cluster.toml", file)
    node.run("systemctl", "reload", "srd")
    assert node.run("srd", "reload") == "taken in: nothing has changed\n"
    node.write("/etc/srd/cluster.toml", "")
    node.fails("systemctl", "reload", "srd")
    node.write("/etc/srd/cluster.toml", file)
    assert node.show("srd", "ActiveState") == "active"


@pytest.mark.parametrize("wrong", ["it is not TOML", "it is another cluster's"])
def test_a_cluster_toml_that_is_wrong_ends_no_supervision(node: Machine, wrong: str) -> None:
    before, file = pids(node), node.run("cat", "/etc/srd/cluster.toml")
    other = file + "[half" if wrong == "it is not TOML" else file.replace('cluster = "', 'cluster = "not-')
    node.write("/etc/srd/cluster.toml", other)
    for _ in range(2):  # what the first one runs by is there for the second one
        former = node.show("srd", "MainPID")
        node.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "srd")
        node.wait(lambda former=former: back(node, former), "the next srd does its job")  # type: ignore[misc]
    assert pids(node) == before
    assert conditions(node) == {
        "bundle_changed": "cluster.toml: not what srd runs by; srd reload takes it in, or says why not"
    }
    assert "cluster.toml" in node.fails("/opt/srd/bin/srd", "reload").stderr
    node.write("/etc/srd/cluster.toml", file)
    node.run("/opt/srd/bin/srd", "reload")
    assert conditions(node) == {}


def test_a_redis_that_runs_by_a_former_file_is_said_until_it_is_started_anew(node: Machine) -> None:
    before, file = pids(node), node.run("cat", "/etc/srd/cluster.toml")
    node.write("/etc/srd/cluster.toml", file + '[redis]\nsettings = { maxmemory = "64mb" }\n')
    try:
        former = node.show("srd", "MainPID")
        node.run("systemctl", "restart", "srd")
        node.wait(lambda: back(node, former), "the next srd does its job")
        assert pids(node) == before
        assert "srd restart redis" in conditions(node)["child_outdated"]
        node.run("srd", "restart", "redis", "--force")
        assert conditions(node) == {}
        assert ask(node, "CONFIG", "GET", "maxmemory").split() == ["maxmemory", str(64 << 20)]
    finally:
        node.write("/etc/srd/cluster.toml", file)
    former = node.show("srd", "MainPID")
    node.run("systemctl", "restart", "srd")
    node.wait(lambda: back(node, former), "the next srd does its job")
    node.run("srd", "restart", "redis", "--force")
    assert conditions(node) == {}


def test_a_port_that_somebody_holds_is_waited_for_by_a_node_that_has_had_it(node: Machine) -> None:
    before = pids(node)
    node.run("/opt/srd/bin/srd", "stop", "--keep-data-path")
    holder = f"import http.server as h; h.HTTPServer(('127.0.1.1', {PORT}), h.BaseHTTPRequestHandler).serve_forever()"
    node.run("systemd-run", "--unit=stranger", "/usr/bin/python3", "-c", holder)
    node.wait(lambda: f":{PORT}" in node.run("ss", "-Hltn"), "it listens")
    node.run("systemctl", "start", "--no-block", "srd")
    said = ("journalctl", "--no-pager", "--unit", "srd", "--grep", "stranger.service. does already")
    node.wait(lambda: node.run(*said, check=False) != "", "srd says who has its port")
    assert node.show("srd", "ActiveState") == "activating"
    node.run("systemctl", "stop", "stranger")
    node.wait(lambda: healthy(node), "it does its job")
    assert node.show("srd", "NRestarts") == "0"
    assert pids(node) == before


def test_a_second_srd_says_that_one_runs_already(node: Machine) -> None:
    refused = node.fails("srd", "run")
    assert (refused.returncode, "it runs on this node already" in refused.stderr) == (78, True), refused


def test_srd_is_not_uninstalled_while_it_runs(node: Machine) -> None:
    refused = node.fails("/opt/srd/bin/srd", "uninstall", "--purge")
    assert (refused.returncode, "systemctl stop srd" in refused.stderr) == (40, True), refused
    assert node.show("srd", "LoadState") == "loaded"
    assert "node.key" in node.run("ls", "/etc/srd")


def test_a_stop_can_leave_the_children_to_the_next_srd(node: Machine) -> None:
    before = pids(node)
    assert node.run("/opt/srd/bin/srd", "stop", "--keep-data-path") == "srd is stopped; its children run on\n"
    assert node.show("srd", "ActiveState") == "inactive"
    assert all(lives(node, pid) for pid in before.values())
    assert "Verify return code: 0 (ok)" in node.run("sh", "-c", f"{shlex.join(TLS_CLIENT)} </dev/null")
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node), "it does its job again")
    assert pids(node) == before


@pytest.mark.parametrize("stop", [("systemctl", "stop", "srd"), ("/opt/srd/bin/srd", "stop")])
def test_a_stop_ends_the_children_and_a_start_brings_them_back(node: Machine, stop: tuple[str, ...]) -> None:
    before = pids(node)
    node.run(*stop)
    assert node.show("srd", "ActiveState") == "inactive"
    assert node.show("srd", "Result") == "success"
    assert not any(lives(node, pid) for pid in before.values())
    assert node.fails("curl", "-s", URL).returncode == 7, "curl's for a connection that was refused"
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node), "it does its job again")
    assert not set(pids(node).values()) & set(before.values())


def capabilities(node: Machine, pid: int) -> dict[str, str]:
    lines = node.run("cat", f"/proc/{pid}/status").splitlines()
    return {line.split(":")[0]: line.split(":")[1].strip() for line in lines}


def test_the_children_run_as_their_users_without_a_capability(node: Machine) -> None:
    users = {"redis": "redis", "sentinel": "redis", "stunnel": "stunnel4"}
    for service, pid in pids(node).items():
        status = capabilities(node, pid)
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}, service
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), service
        uid = node.run("id", "-u", users[service]).strip()
        assert set(status["Uid"].split()) == {uid}, service
