"""The unit files as the service manager judges them, and the second net with the rights that they leave."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clusters import dual_stack_toml, make_bundles
from support.machine import CHECKOUT, INSTALL, Machine, machine

UNITS = CHECKOUT / "srd/units"
NAMES = ("srd.service", "srd-failclosed.service")
# Tenths of systemd's own measure, in which up to 4.9 is OK. What is left is the network, root, and becoming others.
MOST_EXPOSED = "23"
# Where this checkout may lie: /tmp or a home directory.
REACHABLE = "[Service]\nPrivateTmp=no\nProtectHome=no\n"
# What `srd close` does is what srd does first of all; without ESP in the kernel it gets no further.
ONCE = "Type=oneshot\nRestart=no\nWatchdogSec=0\nRemainAfterExit=yes\n"
CLOSE_INSTEAD = f"[Service]\n{ONCE}ExecStart=\nExecStart=/opt/srd/bin/srd close\n"
WITHOUT_NFT = "[Service]\nInaccessiblePaths=/usr/sbin/nft\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A node of three, closed to plaintext by nobody yet; nothing of srd runs."""
    root = tmp_path_factory.mktemp("bundles")
    make_bundles(root, dual_stack_toml(3))
    with machine() as made:
        there = Path(f"/proc/{made.init}/root")
        shutil.copytree(root / "bundles" / "redis-1", there / "etc/srd")
        (there / "opt/srd").symlink_to(CHECKOUT / ".venv")
        for unit in NAMES:
            made.write(f"/etc/systemd/system/{unit}.d/checkout.conf", REACHABLE)
        made.run(*INSTALL)
        yield made


@pytest.mark.parametrize("unit", NAMES)
def test_a_unit_exposes_no_more_than_it_must(unit: str) -> None:
    command = ("systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={MOST_EXPOSED}")
    judged = subprocess.run((*command, UNITS / unit), check=False, capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_nothing_in_the_units_is_wrong(node: Machine) -> None:
    judged = subprocess.run(
        node.inside("systemd-analyze", "verify", "--man=no", *NAMES), check=False, capture_output=True, text=True
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", NAMES)
@pytest.mark.parametrize("keeper", ["nftables", "iptables-legacy"])
def test_policies_and_the_second_net_can_be_put_with_the_rights_of_the_unit(
    node: Machine, unit: str, keeper: str
) -> None:
    drop_in = (CLOSE_INSTEAD if unit == "srd.service" else "") + (WITHOUT_NFT if keeper != "nftables" else "")
    node.write(f"/etc/systemd/system/{unit}.d/test.conf", drop_in)
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "restart", unit, check=False)
    said = node.run("journalctl", "--no-pager", "--output=cat", "--unit", unit, "--boot")
    assert node.show(unit, "Result") == "success", said
    assert f"redis-1 is closed to plaintext with 2 peers (second net: {keeper})" in said
    assert "192.0.2.2" in node.run("ip", "xfrm", "policy")
    shown = {"nftables": ("nft", "list", "table", "inet", "srd"), "iptables-legacy": ("iptables-legacy-save",)}
    assert "192.0.2.2" in node.run(*shown[keeper])
    node.run("systemctl", "stop", unit)
    node.run("/opt/srd/bin/srd", "teardown", "--yes")


def test_the_accounts_of_the_children_are_made_where_no_package_has(node: Machine) -> None:
    for name in ("redis", "stunnel4"):
        node.run("userdel", name)
    node.run(*INSTALL)
    for name in ("redis", "stunnel4"):
        assert f"uid={node.run('id', '-u', name).strip()}({name})" in node.run("id", name)


def test_what_was_installed_can_be_removed(node: Machine) -> None:
    removed = node.run("/opt/srd/bin/srd", "uninstall")
    assert removed.startswith("run  systemctl disable srd.service srd-failclosed.service\n")
    assert node.show("srd.service", "LoadState") == "not-found"
    assert "ca.crt" in node.run("ls", "/etc/srd")
