"""The lab's cluster as a person at its keyboard sees it, for tests that run inside the lab."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from srd.control import client

HERE = Path(__file__).parents[1] / "lab"
CAPTURE = Path("/var/lab/suite.pcap")
FAMILIES = (4, 6)  # of addresses that every station has
# The lab has one slow CPU: what takes a second elsewhere may take ten.
PATIENCE_SECONDS = 120.0
BETWEEN_SECONDS = 0.5
COUNT_KEYS = "local n = 0 for i = ARGV[2], ARGV[3] - 1 do n = n + redis.call('exists', ARGV[1] .. i) end return n"
# A script holds redis up, on the lab's slow CPU for long enough to lose the lease and with it this very connection.
COUNTED_AT_ONCE = 1000


@dataclass(frozen=True)
class Answer:
    """An HTTP answer of a node's :8080."""

    status: int
    body: Any


class Lab:
    """The cluster as a person at its keyboard sees it."""

    nodes = tuple(f"redis-{number}" for number in range(1, int(os.environ["LAB_NODES"]) + 1))

    def __init__(self) -> None:
        # By node, what tests have made the kernel count on purpose.
        self.excused: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.lasting: frozenset[str] = frozenset()

    def on(
        self, station: str, *command: str, stdin: str = "", check: bool = True, seconds: float = PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["on", station, *command], check=False, input=stdin, capture_output=True, text=True, timeout=seconds
        )
        if check and done.returncode != 0:
            pytest.fail(f"{station}: {' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def address(self, station: str, family: int = 4) -> str:
        """Return its address of a family: both have the same last number."""
        address = socket.gethostbyname(station)
        return address if family == 4 else f"fd00:205::{address.rpartition('.')[2]}"

    def srd(self, node: str, verb: str) -> dict[str, Any]:
        # The exit status tells health; what it says is wanted here, and that is nothing while no srd runs.
        return json.loads(self.on(node, "srd", verb, "-o", "json", check=False).stdout or "{}")

    def get(self, node: str, path: str) -> Answer:
        said = self.on(
            "client", "curl", "-s", "-m", "5", "-w", "\n%{http_code}", f"http://{node}:8080{path}", check=False
        )
        body, _, status = said.stdout.rpartition("\n")
        return Answer(int(status), json.loads(body) if body[:1] in ("{", "[") else body)

    def reaches(self, station: str, node: str, port: int) -> bool:
        """Whether a TCP connection is completed within three seconds."""
        connect = ("timeout", "3", "bash", "-c", f"exec 3<>/dev/tcp/{node}/{port}")
        return self.on(station, *connect, check=False).returncode == 0

    def primaries(self) -> list[str]:
        return [node for node in self.nodes if self.get(node, "/primary").status == 200]

    def primary(self) -> str:
        (node,) = self.primaries()
        return node

    def children(self, node: str) -> dict[str, dict[str, Any]]:
        return {child["service"]: child for child in self.srd(node, "children")["children"]}

    def conditions(self) -> list[str]:
        found = []
        for node in self.nodes:
            answer = self.get(node, "/srd")
            if answer.status != 200:
                found.append(f"{node}: no answer")
                continue
            found += [f"{node}: {condition['code']} {condition['subject']}" for condition in answer.body["conditions"]]
        return found

    def _texts(self) -> str:
        """Return what the nodes say of each condition, and what a child that ends again and again says of itself."""
        said = {node: self.get(node, "/srd").body for node in self.nodes}
        held = {node: body["conditions"] for node, body in said.items() if isinstance(body, dict)}
        texts = []
        for node, conditions in held.items():
            for each in conditions:
                texts.append(f"{node}: {each['text']}")
                if each["code"] == "child_flapping":
                    texts.append(self.on(node, "srd", "logs", each["subject"], check=False).stdout)
        return "\n".join(texts)

    def wait(self, what: Callable[[], bool], why: str, seconds: float = PATIENCE_SECONDS) -> float:
        """Wait for a condition; return how long it took, fail with `why` if it does not come."""
        started = time.monotonic()
        while not what():
            if time.monotonic() - started > seconds:
                pytest.fail(f"not within {seconds:.0f} s: {why}; {self.conditions()}\n{self._texts()}")
            time.sleep(BETWEEN_SECONDS)
        return time.monotonic() - started

    def whole(self) -> bool:
        """Whether nothing is wrong but what a test has asked for, by the codes in `lasting`."""
        found = [condition for condition in self.conditions() if condition.split()[1] not in self.lasting]
        return not found and len(self.primaries()) == 1

    def wait_whole(self) -> None:
        self.wait(self.whole, "the cluster is whole")

    @contextlib.contextmanager
    def excusing(self, node: str) -> Iterator[None]:
        """Do something on purpose meanwhile that a node's kernel counts as an error."""
        before = Counter(xfrm_errors(self, node))
        try:
            yield
        finally:
            self.excused[node].update(Counter(xfrm_errors(self, node)) - before)

    def start_srd(self, node: str) -> None:
        """Start srd again as a service manager would."""
        subprocess.run([str(HERE / "cluster"), "start", node], check=True, timeout=PATIENCE_SECONDS)

    def srd_pid(self, node: str) -> int:
        return int(Path(f"/run/lab/srd-{node}.pid").read_text())


def writer(*arguments: str) -> subprocess.Popen[str]:
    """Start a client that writes, lab/writer.py; return when its first write was acknowledged."""
    command = ["on", "client", "python3", "-I", "-S", str(HERE / "writer.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a writer has counted."""
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return json.loads(output)


def kept(lab: Lab, done: dict[str, Any]) -> int:
    """Return how many of a writer's acknowledged writes the primary has."""
    found = 0
    for first in range(0, done["acknowledged"], COUNTED_AT_ONCE):
        last = min(first + COUNTED_AT_ONCE, done["acknowledged"])
        counted = ("eval", COUNT_KEYS, "0", done["prefix"], str(first), str(last))
        said = lab.on("client", "redis-cli", *counted, check=False)
        assert said.returncode == 0, f"{said.stdout}{said.stderr}; {lab.conditions()}"
        found += int(said.stdout)
    return found


def capturing() -> Path:
    """Begin the capture of the wire; return where it goes."""
    subprocess.run(["wire", "start", str(CAPTURE)], check=True)
    return CAPTURE


def bring_up() -> None:
    """Start the cluster; return when it is whole."""
    done = subprocess.run([str(HERE / "cluster"), "up"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def no_plaintext(capture: Path) -> None:
    """End the capture, in which every packet between two nodes must be in ESP."""
    subprocess.run(["wire", "stop"], check=True)
    found = subprocess.run(["wire", "plaintext", str(capture), "-v"], check=False, capture_output=True, text=True)
    # Counted, not printed: to print a packet is to look up its interface, a system call for each.
    esp = subprocess.run(["tcpdump", "-nr", str(capture), "--count", "esp"], check=True, capture_output=True, text=True)
    protected = int(esp.stdout.split()[0])
    print(f"\n{protected} packets in ESP; in plaintext: {found.stdout.strip()}")  # noqa: T201
    assert protected > 1000
    assert found.stdout.split()[0] == "0", found.stdout


def xfrm(lab: Lab, node: str, what: str) -> str:
    return lab.on(node, "ip", "xfrm", what).stdout


def spis(lab: Lab, node: str) -> set[str]:
    return set(re.findall(r"spi (0x[0-9a-f]+)", xfrm(lab, node, "state")))


def xfrm_errors(lab: Lab, node: str) -> dict[str, int]:
    """The counters of /proc/net/xfrm_stat that are not zero."""
    text = lab.on(node, "cat", "/proc/net/xfrm_stat").stdout
    return {name: int(value) for name, value in (line.split() for line in text.splitlines()) if value != "0"}


@dataclass
class Flow:
    """What became of a flow of pings, once it has ended."""

    sent: int = 0
    missing: list[int] = field(default_factory=list)  # numbers of those that were not answered

    @property
    def lost(self) -> int:
        return len(self.missing)


@contextlib.contextmanager
def pinging(node: str, peer: str, interval: str) -> Iterator[Flow]:
    """Have a node ping another meanwhile, every so many seconds."""
    flow = Flow()
    command = ["on", node, "ping", "-i", interval, peer]
    # A file: a pipe that nobody reads meanwhile holds a thousand lines, and then ping stops.
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output) as process:
            try:
                yield flow
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        output.seek(0)
        said = output.read()
    answered = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl=", said)}
    (sent,) = re.findall(r"(\d+) packets transmitted", said)
    # The last one may have been under way when the flow was ended.
    flow.sent = int(sent)
    flow.missing = [number for number in range(1, flow.sent) if number not in answered]


def rekey(node: str, peer: str) -> None:
    """Do what `srd rekey PEER --wait` does on a node, without starting a process."""
    seconds = PATIENCE_SECONDS
    socket = Path(f"/var/lab/{node}/run/srd/control.sock")
    answer = client.post(socket, f"/v1/rekey?peer={peer}&wait={seconds:g}", timeout=seconds)
    assert list(answer["peers"]) == [peer]


def edited(lab: Lab, nodes: tuple[str, ...], text: str) -> None:
    """Give nodes another cluster.toml and have them take it in."""
    for node in nodes:
        Path(f"/var/lab/{node}/etc/srd/cluster.toml").write_text(text)
        lab.on(node, "srd", "reload")
