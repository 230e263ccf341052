"""The lab as faults find it: who is primary, which process is which, and what is done to them.

What is asked here starts no process, which costs tenths of a second in the lab: a fault comes when it is said to come.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from support.namespace import inside

from srd.supervise.adopt import REGISTER_NAME

HTTP: Final = ("127.0.0.1", 8080)
ANSWER_SECONDS: Final = 3.0
BETWEEN_SECONDS: Final = 0.3
COMMAND_SECONDS: Final = 60.0
# A redis' data and, while it rewrites them, once more; little enough to be filled at once.
DISK_MIB: Final = 96
STATE: Final = "/var/lib/srd"


class NotNowError(Exception):
    """A fault cannot be done as things are."""


class World:
    """The cluster. No fault may touch processes that are `spared`, the walk's own; a node that is `off` has none."""

    def __init__(self, nodes: tuple[str, ...], srd_pid: Callable[[str], int], start_srd: Callable[[str], None]) -> None:
        self.nodes = nodes
        self._srd_pid = srd_pid
        self._start_srd = start_srd
        self._pulled: Counter[str] = Counter()
        self._cables = threading.Lock()
        self.off: set[str] = set()
        self.spared = {os.getpid()}

    @staticmethod
    def give_disks(nodes: tuple[str, ...]) -> None:
        """Give each node a file system of its own for its state, before srd runs there."""
        for node in nodes:
            options = f"size={DISK_MIB}m,mode=0755"
            run("on", node, "mount", "-t", "tmpfs", "-o", options, "state", STATE)

    def get(self, node: str, path: str) -> tuple[int, bytes]:
        """Ask a node's srd, on the node itself; status 0 where it does not answer."""
        with inside(node):
            connection = socket.socket()
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(HTTP)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
            return int(head.split(b" ", 2)[1]), body
        return 0, b""

    def primary(self) -> str | None:
        """Return the node that says so, if one does."""
        return next((node for node in self.nodes if self.get(node, "/primary")[0] == 200), None)

    def by_role(self) -> tuple[str, ...]:
        """Return the nodes, the primary first; in their own order where there is none."""
        primary = self.primary()
        return tuple(sorted(self.nodes, key=lambda node: (node != primary, node)))

    def not_whole(self) -> list[str]:
        """Return what keeps the cluster from being whole."""
        found = []
        primaries = [node for node in self.nodes if self.get(node, "/primary")[0] == 200]
        if len(primaries) != 1:
            found.append(f"primary: {' '.join(primaries) or 'none'}")
        for node in self.nodes:
            status, body = self.get(node, "/srd")
            if status != 200:
                found.append(f"{node}: no answer")
                continue
            conditions: list[dict[str, Any]] = json.loads(body)["conditions"]
            found += [f"{node}: {condition['code']} {condition['subject']}" for condition in conditions]
        return found

    def wait_whole(self, seconds: float) -> tuple[float, list[str]]:
        """Wait until the cluster is whole; return how long that took, and what it lacked when the time was up."""
        return wait(self.not_whole, seconds)

    def pull(self, node: str) -> None:
        """Pull a node's cable out."""
        with self._cables:
            self._pulled[node] += 1
            run("ip", "link", "set", f"w-{node}", "down")

    def plug(self, node: str) -> None:
        """Plug it in again, unless somebody else has pulled it as well."""
        with self._cables:
            self._pulled[node] -= 1
            if not self._pulled[node]:
                run("ip", "link", "set", f"w-{node}", "up")

    def child(self, node: str, service: str) -> int:
        """Return the pid of a child that runs."""
        register = Path(f"/var/lab/{node}/run/srd") / REGISTER_NAME
        with contextlib.suppress(OSError, ValueError):
            for record in json.loads(register.read_text())["children"]:
                if record["service"] == service and alive(record["pid"]):
                    return int(record["pid"])
        raise NotNowError(f"no {service} runs on {node}")

    def srd(self, node: str) -> int:
        """Return the pid of a srd that runs."""
        pid = self._srd_pid(node)
        if not alive(pid):
            raise NotNowError(f"no srd runs on {node}")
        return pid

    def start_srd(self, node: str) -> None:
        """Start it as a service manager would, unless it runs or the node is off."""
        if node not in self.off and not alive(self._srd_pid(node)):
            self._start_srd(node)

    def processes(self, node: str) -> list[int]:
        """Return the pids of all that runs in a node's network."""
        network = Path(f"/run/netns/{node}").stat().st_ino
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/net").stat().st_ino == network:
                    found.append(int(process.name))
        return [pid for pid in found if pid not in self.spared]


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(*command: str, stdin: str = "", check: bool = True) -> str:
    """Run a command of the lab; return what it said."""
    try:
        done = subprocess.run(
            command, check=False, input=stdin, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NotNowError(str(error)) from error
    if check and done.returncode:
        raise NotNowError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def wait(unmet: Callable[[], list[str]], seconds: float) -> tuple[float, list[str]]:
    """Ask until nothing is unmet; return how long that took, and what still was when the time was up."""
    began = time.monotonic()
    while (what := unmet()) and time.monotonic() - began < seconds:
        time.sleep(BETWEEN_SECONDS)
    return time.monotonic() - began, what
