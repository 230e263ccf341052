"""The lab's cluster whose nodes are machines: a kernel and a disk each, systemd as PID 1, srd as a unit (KERNELS)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support.lab import HERE, PATIENCE_SECONDS, Lab

SERVICES = ("redis", "sentinel", "stunnel")


class Machines(Lab):
    """The cluster, and the power of its machines."""

    def srd(self, node: str, verb: str) -> dict[str, Any]:
        # What the command line asks too, whose start costs 2 s here.
        ask = ("curl", "-s", "-m", "10", "--unix-socket", "/run/srd/control.sock", f"http://srd/v1/{verb}")
        return json.loads(self.on(node, *ask, check=False).stdout or "{}")

    def power(self, verb: str, node: str) -> str:
        done = subprocess.run(
            ["power", verb, node], check=True, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS
        )
        return done.stdout.strip()

    def wait_off(self, node: str) -> float:
        return self.wait(lambda: self.power("state", node) == "off", f"{node} is off")

    def show(self, node: str, *names: str, unit: str = "srd") -> tuple[str, ...]:
        """Return properties of a unit, in the order asked for."""
        said = self.on(node, "systemctl", "show", "--property", ",".join(names), unit).stdout
        found = dict(line.split("=", 1) for line in said.splitlines())
        return tuple(found[name] for name in names)

    def moment(self, node: str, unit: str, name: str) -> float:
        """Return when a unit did something, in seconds since the boot."""
        (microseconds,) = self.show(node, f"{name}TimestampMonotonic", unit=unit)
        return int(microseconds) / 1e6

    def pids(self, node: str) -> dict[str, int]:
        return {service: child["pid"] for service, child in self.children(node).items()}

    def booted(self, node: str) -> bool:
        """Whether systemd has no more to start; what it started may be at work still."""
        said = self.on(node, "systemctl", "is-system-running", check=False).stdout.strip()
        return said in ("running", "degraded")

    def boots(self, node: str) -> str:
        return self.on(node, "cat", "/proc/sys/kernel/random/boot_id").stdout.strip()

    def journal(self, node: str, *arguments: str) -> list[dict[str, Any]]:
        """Return what srd logged, as far as it is srd's own words."""
        said = self.on(node, "journalctl", "--output", "cat", "--unit", "srd", *arguments).stdout
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def cluster() -> Lab:
    """Return the cluster of this lab: nodes that are networks of one kernel, or machines."""
    return Machines() if int(os.environ["LAB_KERNELS"]) else Lab()


@dataclass
class Written:
    """What a writing client has seen, once it has ended."""

    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def acknowledged(self) -> int:
        return int(self.figures["acknowledged"])

    @property
    def failed(self) -> int:
        return int(self.figures["failed"])


class Writing:
    """A client of the cluster that writes, through TLS and the balancer, and has each write confirmed by a replica."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, word: str) -> Any:
        """Have it say `count`, how many writes were acknowledged so far, or `missing`, which of them are not there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def writing() -> Iterator[tuple[Writing, Written]]:
    """Have a client write meanwhile; its figures are there afterwards."""
    written = Written()
    command = ["on", "client", "python3", "-I", "-S", str(HERE / "confirmed.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "writing\n"
            yield (client := Writing(process)), written
            written.figures = client.ask("end")
        finally:
            process.stdin.close()  # it ends then
