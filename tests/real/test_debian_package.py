"""The Debian package on a machine with systemd: installed, enabled, upgraded under clients, removed, purged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles
from support.machine import CHECKOUT, Machine, machine
from support.unit import URL, Checks, back, healthy, lives, pids

STATE = ("/etc/srd", "/var/lib/srd", "/var/log/srd")
FOREIGN_REDIS = """
[Service]
User=redis
ExecStart=@/usr/bin/redis-check-rdb redis-server --port 6379 --bind 127.0.1.1 --dir /tmp
[Install]
WantedBy=multi-user.target
"""
BUILD_SECONDS = 300.0

# Each test goes on where the one before has left the machine, as the life of an installation does.
pytestmark = pytest.mark.timeout(BUILD_SECONDS + 120)


@dataclass(frozen=True)
class Packages:
    """Two packages, the next one of a checkout that is a day later."""

    first: Path
    next: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    commit = ("git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct")
    moment = int(subprocess.run(commit, check=True, capture_output=True, text=True).stdout)
    return Packages(*(built(tmp_path_factory.mktemp("package"), moment + days * 86400) for days in (0, 1)))


def built(directory: Path, moment: int) -> Path:
    """Build a package of this checkout, as of a moment."""
    build = (CHECKOUT / "packaging/build-deb", directory)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment)}
    done = subprocess.run(build, check=False, capture_output=True, text=True, timeout=BUILD_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    (package,) = directory.glob("srd_*.deb")
    return package


@pytest.fixture(scope="module")
def node(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with both packages in /root and a bundle of a cluster of one, without IPsec; srd was never there."""
    root = tmp_path_factory.mktemp("bundles")
    make_bundles(root, cluster_toml(nodes=1))
    with machine() as made:
        there = Path(f"/proc/{made.init}/root")
        shutil.copy(packages.first, there / "root/first.deb")
        shutil.copy(packages.next, there / "root/next.deb")
        shutil.copytree(root / "bundles" / "redis-1", there / "root/redis-1")
        # Images of containers have one that forbids packages to start anything; a machine has none.
        (there / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
        yield made


def apt(node: Machine, *arguments: str) -> str:
    return node.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", *arguments)


def test_an_installation_enables_and_starts_nothing(node: Machine) -> None:
    apt(node, "install", "/root/first.deb")
    for unit in ("srd", "srd-failclosed"):
        assert (node.show(unit, "UnitFileState"), node.show(unit, "ActiveState")) == ("disabled", "inactive")
    assert node.run("stat", "-c", "%a", "/etc/srd") == "700\n"
    assert node.run("srd", "version").startswith("srd ")
    assert "maxmemory" in node.run("cat", "/usr/share/doc/srd/config/cluster.reference.toml")
    assert "apt remove srd" in node.fails("srd", "uninstall").stderr
    wrong = node.fails("srd", "check")
    assert "/etc/srd/cluster.toml" in wrong.stderr


def test_a_service_that_holds_a_port_is_named_with_the_way_to_be_rid_of_it(node: Machine) -> None:
    node.run("cp", "-a", "/root/redis-1/.", "/etc/srd/")
    node.write("/etc/systemd/system/redis-server.service", FOREIGN_REDIS)
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "enable", "--now", "redis-server")
    pid = node.show("redis-server", "MainPID")
    node.wait(lambda: node.run("ss", "-Hltn", "sport = :6379") != "", "it listens")
    complaint = node.fails("srd", "check").stderr
    assert f"pid {pid} (redis-check-rdb of redis-server.service) does already" in complaint
    # srd itself, as its unit, may see no other user's descriptors; it says the same.
    node.run("systemctl", "start", "srd", check=False)
    assert f"pid {pid} (redis-check-rdb of redis-server.service)" in node.run(
        "journalctl", "--no-pager", "--unit", "srd"
    )
    _, _, remedy = complaint.strip().rpartition("; ")
    assert remedy == "systemctl disable --now redis-server"
    node.run(*remedy.split())


def test_enabled_and_started_it_does_its_job_and_is_whole(node: Machine) -> None:
    assert node.run("srd", "check") == "this node can run\n"
    node.run("systemctl", "enable", "--now", "srd-failclosed", "srd")
    node.wait(lambda: healthy(node), "it does its job")
    assert set(pids(node)) == {"redis", "sentinel", "stunnel"}
    # What root's Python has imported meanwhile has left nothing that the package does not know.
    assert node.run("dpkg", "--verify", "srd") == ""
    kept = set(node.run("dpkg", "--listfiles", "srd").splitlines())
    assert set(node.run("find", "/usr/lib/srd").splitlines()) <= kept


def version(node: Machine) -> str:
    return node.run("dpkg-query", "-W", "-f", "${Version}", "srd")


def test_an_upgrade_keeps_the_children_and_no_check_is_refused(node: Machine) -> None:
    before, former, former_version = pids(node), node.show("srd", "MainPID"), version(node)
    with Checks(node) as checks:
        apt(node, "install", "/root/next.deb")
        node.wait(lambda: back(node, former), "the next srd does its job")
    assert version(node) > former_version
    assert pids(node) == before
    assert checks.answers
    assert checks.refused() == []
    assert node.show("srd", "UnitFileState") == "enabled"


def test_it_is_not_removed_from_under_children_that_nobody_else_would_end(node: Machine) -> None:
    before = pids(node)
    node.run("srd", "stop", "--keep-data-path")
    assert "run without a srd" in node.fails("dpkg", "--remove", "srd").stderr
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node), "it does its job")
    assert pids(node) == before


def test_a_removal_stops_the_children_and_leaves_what_is_the_nodes(node: Machine) -> None:
    before = pids(node)
    said = apt(node, "remove", "srd")
    assert "Removing srd" in said
    assert not any(lives(node, pid) for pid in before.values())
    assert node.fails("curl", "-s", URL).returncode == 7, "curl's for a connection that was refused"
    assert node.show("srd", "LoadState") == "not-found"
    assert node.fails("ls", "/usr/lib/srd", "/etc/systemd/system/multi-user.target.wants/srd.service")
    assert "dump.rdb" in node.run("ls", "/var/lib/srd/redis")
    assert "node.key" in node.run("ls", "/etc/srd")


def test_a_purge_leaves_nothing_of_srd(node: Machine) -> None:
    apt(node, "purge", "srd")
    for path in (*STATE, "/run/srd", "/etc/logrotate.d/srd"):
        assert node.fails("ls", path), path
