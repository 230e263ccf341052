"""The lab as faults find it: who is primary, which process is which, and what is done to them.

What is asked here starts no process where nodes share a kernel, for a process costs tenths of a second in the lab: a
fault comes when it is said to come.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from support.stations import connected

from srd.supervise.adopt import REGISTER_NAME

HTTP: Final = ("127.0.0.1", 8080)
ANSWER_SECONDS: Final = 3.0
BETWEEN_SECONDS: Final = 0.3
COMMAND_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
# A redis' data and, while it rewrites them, once more; little enough to be filled at once.
DISK_MIB: Final = 96
STATE: Final = "/var/lib/srd"
FILLER: Final = f"{STATE}/filler"
LAB_LOGS: Final = Path("/var/log/lab")


class NotNowError(Exception):
    """A fault cannot be done as things are."""


class World(abc.ABC):
    """The cluster, whatever its nodes are made of."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        self.nodes = nodes
        self._pulled: Counter[str] = Counter()
        self._cables = threading.Lock()
        self.spared = {os.getpid()}  # the walk's own processes, which no fault may touch

    def get(self, node: str, path: str) -> tuple[int, bytes]:
        """Ask a node's srd, on the node itself; status 0 where it does not answer."""
        request = f"GET {path} HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError), connected(node, HTTP, ANSWER_SECONDS) as connection:
            connection.sendall(request.encode())
            with connection.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
            if head.startswith(b"HTTP/"):
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

    def on(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command on a node; return what it said. `NotNowError` where that is not to be had, or it fails."""
        return run("on", node, *command, check=check)

    def child(self, node: str, service: str) -> int:
        """Return the pid of a child; `NotNowError` where none runs."""
        with contextlib.suppress(OSError, ValueError):
            for record in json.loads(self.register(node))["children"]:
                if record["service"] == service and self.alive(node, record["pid"]):
                    return int(record["pid"])
        raise NotNowError(f"no {service} runs on {node}")

    @abc.abstractmethod
    def register(self, node: str) -> str:
        """Return what srd keeps of its children on disk; `OSError` or nothing where it does not."""

    @abc.abstractmethod
    def srd(self, node: str) -> int:
        """Return the pid of a srd; `NotNowError` where none runs."""

    @abc.abstractmethod
    def alive(self, node: str, pid: int) -> bool:
        """Whether a process is there and has not ended."""

    @abc.abstractmethod
    def send(self, node: str, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process, if it is still there."""

    @abc.abstractmethod
    def revive(self, node: str) -> None:
        """Do what a service manager does about a srd that has ended, where there is none."""

    @abc.abstractmethod
    def upgrade(self, node: str) -> None:
        """Have srd end alone, and another one take its place."""

    @abc.abstractmethod
    def power_off(self, node: str) -> None:
        """End all that runs on a node at once, with what was only in memory."""

    @abc.abstractmethod
    def power_on(self, node: str) -> None:
        """Boot it again."""

    @abc.abstractmethod
    def reboot(self, node: str) -> None:
        """Have a node end all that runs on it in order, and boot again."""

    @abc.abstractmethod
    def jump(self, nodes: tuple[str, ...], seconds: int) -> None:
        """Have the wall clock of nodes jump, or that of all where they share one."""

    @abc.abstractmethod
    def jump_back(self, nodes: tuple[str, ...], seconds: int) -> None:
        """Undo that."""

    @abc.abstractmethod
    def fill(self, node: str) -> None:
        """Leave no room in the file system of a node's state."""

    def undo(self, node: str, *command: str) -> None:
        """Run a command on a node that undoes a fault; a power cut may have done so before."""
        self.on(node, *command, check=False)

    def keep_logs(self, where: Path) -> None:
        """Copy the logs of all that ran into a directory."""
        for log in LAB_LOGS.glob("*.log"):
            shutil.copy(log, where / f"lab-{log.name}")


class Namespaces(World):
    """Nodes that are namespaces of one kernel, without a service manager. One that is `off` has no processes."""

    def __init__(self, nodes: tuple[str, ...], srd_pid: Callable[[str], int], start_srd: Callable[[str], None]) -> None:
        super().__init__(nodes)
        self._srd_pid = srd_pid
        self._start_srd = start_srd
        self._off: set[str] = set()
        self._asked: set[str] = set()  # to end, without an answer: a srd that was stopped ends when it goes on

    @staticmethod
    def give_disks(nodes: tuple[str, ...]) -> None:
        """Give each node a file system of its own for its state, before srd runs there."""
        for node in nodes:
            options = f"size={DISK_MIB}m,mode=0755"
            run("on", node, "mount", "-t", "tmpfs", "-o", options, "state", STATE)

    def register(self, node: str) -> str:
        return Path(f"/var/lab/{node}/run/srd", REGISTER_NAME).read_text()

    def srd(self, node: str) -> int:
        pid = self._srd_pid(node)
        if not alive(pid):
            raise NotNowError(f"no srd runs on {node}")
        return pid

    def alive(self, node: str, pid: int) -> bool:
        del node
        return alive(pid)

    def send(self, node: str, pid: int, number: signal.Signals) -> None:
        del node
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait_whole(self, seconds: float) -> tuple[float, list[str]]:
        def unmet() -> list[str]:
            for node in self._asked:
                self.revive(node)
            return self.not_whole()

        found = wait(unmet, seconds)
        self._asked.clear()
        return found

    def revive(self, node: str) -> None:
        if node not in self._off and not alive(self._srd_pid(node)):
            self._start_srd(node)

    def upgrade(self, node: str) -> None:
        pid = self.srd(node)
        try:
            self.on(node, "srd", "stop", "--keep-data-path")
        except NotNowError:
            self._asked.add(node)
            raise
        deadline = time.monotonic() + STOP_SECONDS
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.revive(node)

    def power_off(self, node: str) -> None:
        """Nothing that it had written is lost: nodes share a kernel here."""
        self.pull(node)
        self._off.add(node)
        for pid in self._processes(node):
            self.send(node, pid, signal.SIGKILL)
        flush = [f"ip xfrm {what} flush" for what in ("state", "policy")]
        flush += [f"{program}-legacy -{verb}" for program in ("iptables", "ip6tables") for verb in "FX"]
        self.on(node, "sh", "-c", "; ".join(flush))
        for path in Path(f"/var/lab/{node}/run/srd").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def power_on(self, node: str) -> None:
        # As srd-failclosed.service and srd.service do it: closed before the network is up.
        self.on(node, "srd", "close")
        # Sockets outlive their processes here: what they have sent since waits for a neighbour's address, unprotected.
        self.on(node, "ip", "neigh", "flush", "dev", "eth0")
        self.plug(node)
        self._off.remove(node)
        self.revive(node)

    def reboot(self, node: str) -> None:
        raise NotNowError(f"{node} has no service manager")

    def jump(self, nodes: tuple[str, ...], seconds: int) -> None:
        del nodes
        if "User Mode Linux" not in Path("/proc/cpuinfo").read_text():
            raise NotNowError("this kernel's clock is the machine's own")
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    def jump_back(self, nodes: tuple[str, ...], seconds: int) -> None:
        self.jump(nodes, -seconds)

    def fill(self, node: str) -> None:
        # It ends with an error, when there is no more room.
        self.on(node, "dd", "if=/dev/zero", f"of={FILLER}", "bs=1M", check=False)

    def keep_logs(self, where: Path) -> None:
        super().keep_logs(where)
        for node in self.nodes:
            for log in Path(f"/var/lab/{node}/var/log/srd").iterdir():
                shutil.copy(log, where / f"{node}-{log.name}")

    def _processes(self, node: str) -> list[int]:
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


def run(*command: str, stdin: str = "", check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
    """Run a command of the lab; return what it said."""
    try:
        done = subprocess.run(command, check=False, input=stdin, capture_output=True, text=True, timeout=seconds)
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
