"""Another IPsec on the same host: strongSwan between a node and a host outside the mesh. Neither disturbs the other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lab import FAMILIES, Lab, xfrm

OUTSIDER = "lb"
CHILD = "outside"
SECRET = "a secret of theirs, not of srd"
PLUGINS = "random nonce drbg aes sha1 sha2 hmac kdf gmp pem kernel-netlink socket-default vici"
# What traffic changes of an SA; the rest of it is what its owner made.
COUNTERS = re.compile(r"^\s+(anti-replay (esn )?context:|seq-hi |replay_window |\s*[0-9a-f]{8}).*\n", re.MULTILINE)


class StrongSwan:
    """strongSwan on the node and on the host outside; its files are in a directory of the test's."""

    def __init__(self, lab: Lab, node: str, directory: Path) -> None:
        self.lab = lab
        self.node = node
        self._directory = directory
        self.addresses = {station: lab.address(station) for station in (node, OUTSIDER)}

    def _file(self, station: str, name: str) -> Path:
        return self._directory / f"{station}.{name}"

    def _configure(self, station: str, peer: str) -> None:
        self._file(station, "strongswan.conf").write_text(
            f"charon-systemd {{\n load = {PLUGINS}\n"
            f" plugins {{\n vici {{ socket = unix://{self._file(station, 'vici')} }}\n }}\n"
            f" filelog {{\n log {{\n path = {self._file(station, 'log')}\n flush_line = yes\n }}\n }}\n}}\n"
        )
        self._file(station, "swanctl.conf").write_text(
            f"connections {{\n {CHILD} {{\n version = 2\n proposals = aes128-sha256-modp2048\n"
            f" local_addrs = {self.addresses[station]}\n remote_addrs = {self.addresses[peer]}\n"
            f" local {{\n auth = psk\n id = {station}\n }}\n remote {{\n auth = psk\n id = {peer}\n }}\n"
            f" children {{\n {CHILD} {{\n mode = transport\n esp_proposals = aes256gcm16\n }}\n }}\n }}\n}}\n"
            f'secrets {{\n ike {{\n secret = "{SECRET}"\n }}\n}}\n'
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # The host outside is the balancer, which goes on asking. While one of the two has strongSwan's policies
            # already, or still, and the other has not, its packets come in plaintext, and are dropped and counted.
            stack.enter_context(self.lab.excusing(self.node))
            for station, peer in ((self.node, OUTSIDER), (OUTSIDER, self.node)):
                self._configure(station, peer)
                stack.enter_context(self._charon(station))
            yield

    @contextlib.contextmanager
    def _charon(self, station: str) -> Iterator[None]:
        configuration = f"STRONGSWAN_CONF={self._file(station, 'strongswan.conf')}"
        with subprocess.Popen(["on", station, "env", configuration, "/usr/sbin/charon-systemd"]) as charon:
            try:
                self.lab.wait(lambda: self._answers(station), f"charon runs on {station}")
                self.swanctl(station, "--load-all", "--file", str(self._file(station, "swanctl.conf")))
                yield
            finally:
                charon.send_signal(signal.SIGTERM)

    def swanctl(self, station: str, *arguments: str, check: bool = True) -> int:
        uri = f"unix://{self._file(station, 'vici')}"
        return self.lab.on(station, "swanctl", *arguments, "--uri", uri, check=check).returncode

    def _answers(self, station: str) -> bool:
        return self.swanctl(station, "--stats", check=False) == 0

    def spis(self) -> set[str]:
        text = "".join(text for what, text in theirs(self.lab, self.node) if what == "state")
        return set(re.findall(r" spi (0x[0-9a-f]+)", text))


Entry = tuple[str, str]  # of the SAs or the policies, and its text without what traffic changes


def entries(lab: Lab, node: str) -> list[Entry]:
    """Return all SAs and policies of a node."""
    found = []
    for what in ("state", "policy"):
        texts = re.split(r"^(?=src )", xfrm(lab, node, what), flags=re.MULTILINE)
        found += [(what, COUNTERS.sub("", text)) for text in texts if text]
    return sorted(found)


def theirs(lab: Lab, node: str) -> list[Entry]:
    """Return strongSwan's: those for the host outside, and of its sockets."""
    outsider = lab.address(OUTSIDER)
    return [entry for entry in entries(lab, node) if outsider in entry[1] or "socket " in entry[1]]


def ours(lab: Lab, node: str) -> list[Entry]:
    """Return all others."""
    outsider = lab.address(OUTSIDER)
    return [entry for entry in entries(lab, node) if outsider not in entry[1] and "socket " not in entry[1]]


def leaves_as_esp(lab: Lab, node: str, spis: set[str]) -> None:
    """Ping the host outside, and see on the wire that it goes under these SPIs and nothing goes otherwise."""
    between = f"ip host {lab.address(node)} and ip host {lab.address(OUTSIDER)}"
    command = ["tcpdump", "-i", f"w-{OUTSIDER}", "-n", "-l", "-c", "6", between]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as capture:
        assert capture.stderr is not None
        while "listening on" not in capture.stderr.readline():
            assert capture.poll() is None
        assert "3 received" in lab.on(node, "ping", "-c", "3", lab.address(OUTSIDER)).stdout
        said, _ = capture.communicate(timeout=60)
    lines = said.splitlines()
    assert len(lines) == 6
    assert {spi for line in lines for spi in re.findall(r"ESP\(spi=(0x[0-9a-f]+)", line)} <= spis, said
    assert all("ESP(" in line for line in lines), said


@pytest.fixture
def node(lab: Lab) -> str:
    """A replica's: srd is restarted on it."""
    lab.wait_whole()
    return next(node for node in lab.nodes if node != lab.primary())


def test_strongswan_to_a_host_outside_and_srd_leave_each_other_alone(lab: Lab, node: str, tmp_path: Path) -> None:
    mine = settled(lab, node)
    strongswan = StrongSwan(lab, node, tmp_path)
    with strongswan.running():
        strongswan.swanctl(node, "--initiate", "--child", CHILD)
        leaves_as_esp(lab, node, strongswan.spis())
        assert ours(lab, node) == mine
        lab.wait_whole()

        before = theirs(lab, node)
        priorities = {priority for _, text in before for priority in re.findall(r" priority (\d+)", text)}
        print(f"\nstrongSwan's policies have the priorities {sorted(priorities)}")  # noqa: T201 - figures for people
        assert [what for what, _ in before].count("state") == 2
        assert len(strongswan.spis()) == 2
        assert [what for what, _ in before].count("policy") > 2

        def untouched() -> bool:
            return theirs(lab, node) == before

        lab.on(node, "srd", "rekey", "--wait")
        assert untouched()
        lab.on(node, "srd", "reload")
        assert untouched()
        os.kill(lab.srd_pid(node), signal.SIGTERM)
        lab.wait(lambda: not Path(f"/proc/{lab.srd_pid(node)}").exists(), "srd has ended")
        assert untouched()
        leaves_as_esp(lab, node, strongswan.spis())
        lab.start_srd(node)
        lab.wait_whole()
        assert untouched()
        leaves_as_esp(lab, node, strongswan.spis())

        mine, old = settled(lab, node), strongswan.spis()
        strongswan.swanctl(node, "--rekey", "--child", CHILD)
        lab.wait(lambda: len(new := strongswan.spis()) == 2 and not new & old, "strongSwan has new keys")
        leaves_as_esp(lab, node, strongswan.spis())
        assert ours(lab, node) == mine
    lab.wait(lambda: not theirs(lab, node), "strongSwan has gone")
    assert ours(lab, node) == mine
    lab.wait_whole()


def settled(lab: Lab, node: str) -> list[Entry]:
    """Return what is srd's once the grace of former keys has ended: one SA in each direction with each peer."""
    sas = 2 * (len(lab.nodes) - 1) * len(FAMILIES)
    lab.wait(lambda: sum(entry[0] == "state" for entry in ours(lab, node)) == sas, "former keys are gone")
    return ours(lab, node)


def test_a_foreign_policy_before_srds_is_a_critical_condition_and_stays(lab: Lab, node: str) -> None:
    peer = next(other for other in lab.nodes if other != node)
    selector = ("src", lab.address(node), "dst", lab.address(peer), "proto", "udp", "dport", "9")
    mine = settled(lab, node)
    lab.on(node, "ip", "xfrm", "policy", "add", *selector, "dir", "out", "priority", "10", "action", "allow")
    try:
        foreign = [entry for entry in ours(lab, node) if entry not in mine]
        assert len(foreign) == 1
        lab.wait(lambda: any("foreign_policy" in text for text in lab.conditions()), "it is seen")
        (found,) = (c for c in lab.get(node, "/srd").body["conditions"] if c["code"] == "foreign_policy")
        assert found["severity"] == "critical"
        assert lab.address(peer) in found["subject"]
        assert lab.on(node, "srd", "status", check=False).returncode == 20
        # By that policy it would leave in plaintext; the second net has it, as the capture shows in the end.
        lab.on(node, "bash", "-c", f"echo plaintext >/dev/udp/{lab.address(peer)}/9", check=False)
        lab.on(node, "srd", "rekey", peer, "--wait")
        lab.on(node, "srd", "reload")
        assert [entry for entry in ours(lab, node) if entry in foreign] == foreign
    finally:
        lab.on(node, "ip", "xfrm", "policy", "delete", *selector, "dir", "out")
    lab.wait_whole()
