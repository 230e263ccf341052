"""Secrets handed over by the service manager: srd reads them, its children get copies, a restart takes new ones in."""

from __future__ import annotations

import datetime as dt
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles
from support.machine import CHECKOUT, INSTALL, Machine, machine
from support.unit import healthy, pids

from srd.trust.issuing import renew_node

SOURCES = "/root/secrets"
HANDED_OVER = ("node.crt", "node.key", "tls.crt", "tls.key")
# Where this checkout may lie: /tmp or a home directory.
REACHABLE = "PrivateTmp=no\nProtectHome=no\n"
DROP_IN = (
    "[Service]\n"
    + REACHABLE
    + "".join(f"LoadCredential={name}:{SOURCES}/{name}\n" for name in HANDED_OVER)
    + f"LoadCredentialEncrypted=secrets.toml:{SOURCES}/secrets.toml\n"
)
CONFIGURATIONS = {
    "redis": "/var/lib/srd/redis/redis.conf",
    "sentinel": "/var/lib/srd/sentinel/sentinel.conf",
    "stunnel": "/run/srd/stunnel/stunnel.conf",
}
SERVED = "openssl s_client -connect 127.0.1.1:6380 </dev/null 2>/dev/null | openssl x509 -noout -serial"


@dataclass(frozen=True)
class Node:
    """A machine whose srd has its secrets from the service manager, and where its bundle is made."""

    machine: Machine
    bundles: Path

    @property
    def bundle(self) -> Path:
        return self.bundles / "redis-1"

    def hand_over(self) -> None:
        """Put the bundle's certificates and keys where the service manager takes them from."""
        for name in HANDED_OVER:
            self.machine.write(f"{SOURCES}/{name}", (self.bundle / name).read_text())

    def served(self) -> str:
        return self.machine.run("sh", "-c", SERVED)

    def of_bundle(self) -> str:
        given = ("openssl", "x509", "-noout", "-serial", "-in")
        self.machine.write("/root/tls.crt", (self.bundle / "tls.crt").read_text())
        return self.machine.run(*given, "/root/tls.crt")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A cluster of one, without IPsec; /etc/srd has no secret, and that of the passwords is nowhere in plaintext."""
    root = tmp_path_factory.mktemp("bundles")
    make_bundles(root, cluster_toml(nodes=1))
    with machine() as made:
        node = Node(made, root / "bundles")
        there = Path(f"/proc/{made.init}/root")
        (there / "etc/srd").mkdir(mode=0o700)
        for name in ("cluster.toml", "ca.crt"):
            shutil.copy(node.bundle / name, there / "etc/srd")
        node.hand_over()
        made.write("/root/plain", (node.bundle / "secrets.toml").read_text())
        made.run(
            "systemd-creds",
            "encrypt",
            "--with-key=host",
            "--name=secrets.toml",
            "/root/plain",
            f"{SOURCES}/secrets.toml",
        )
        made.run("rm", "/root/plain")
        (there / "opt/srd").symlink_to(CHECKOUT / ".venv")
        made.write("/etc/systemd/system/srd.service.d/credentials.conf", DROP_IN)
        made.run(*INSTALL)
        made.run("systemctl", "start", "srd", check=False)
        assert made.show("srd", "ActiveState") == "active", made.run("journalctl", "--no-pager", "--unit", "srd")
        made.wait(lambda: healthy(made), "it does its job")
        yield node


def test_no_child_is_given_a_path_to_what_was_handed_over(node: Node) -> None:
    found = pids(node.machine)
    assert set(found) == {"redis", "sentinel", "stunnel"}
    for service, pid in found.items():
        looked = (
            f"cat /proc/{pid}/cmdline /proc/{pid}/environ; readlink /proc/{pid}/fd/*; cat {CONFIGURATIONS[service]}"
        )
        seen = node.machine.run("sh", "-c", looked)
        assert f"/var/log/srd/{service}.log" in seen
        assert "credentials" not in seen.lower(), service


def test_a_restart_takes_renewed_secrets_in_under_the_same_children_and_a_reload_does_not(node: Node) -> None:
    assert node.machine.run("find", "/var/lib/srd", "/etc/srd", "-name", "*.key") == "", "no key is on a disk"
    before, former = pids(node.machine), node.served()
    assert former == node.of_bundle()
    renew_node(node.bundles, "redis-1", dt.datetime.now(dt.UTC))
    node.hand_over()
    node.machine.run("/opt/srd/bin/srd", "reload")
    assert node.served() == former
    node.machine.run("systemctl", "restart", "srd")
    node.machine.wait(lambda: healthy(node.machine), "it does its job")
    assert pids(node.machine) == before
    node.machine.wait(lambda: node.served() == node.of_bundle() != former, "stunnel has the new certificate")


def test_srd_check_sees_what_the_unit_would_when_it_is_given_the_same(node: Node) -> None:
    alone = node.machine.fails("/opt/srd/bin/srd", "check")
    assert "/etc/srd/node.crt" in alone.stderr
    properties = [line for line in DROP_IN.splitlines() if line.startswith("LoadCredential")]
    given = [word for line in properties for word in ("--property", line)]
    run = ("systemd-run", "--quiet", "--pipe", "--wait", *given, "/opt/srd/bin/srd", "check")
    assert node.machine.run(*run) == "this node can run\n", shlex.join(run)
