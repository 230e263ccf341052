"""Where a cluster runs: in the lab, a network for each node; or on the loopback of a network of its own."""

from __future__ import annotations

import abc
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from support.namespace import CLONE_NEWNET, call, run, unshare

TESTS: Final = Path(__file__).parents[2]
BALANCER, CLIENT = "lb", "client"
LAST_WORDS: Final = 4000  # characters of a log
END_SECONDS: Final = 30.0  # redis waits for its replicas, then it saves


class Place(abc.ABC):
    """Stations that have addresses, and programs that are started on them and ended with it."""

    def __init__(self, root: Path, nodes: Sequence[str]) -> None:
        self.root = root
        self.nodes = tuple(nodes)
        self._started: list[subprocess.Popen[bytes]] = []

    @abc.abstractmethod
    def address(self, station: str) -> str: ...

    @abc.abstractmethod
    def command(self, station: str, *words: str) -> list[str]:
        """Return what runs a command on a station, as the process that is started for it."""

    def start(self, name: str, station: str, *words: str, environment: dict[str, str] | None = None) -> int:
        """Start a program; its output is in NAME.log. Return its pid."""
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(station, *words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        self._started.append(process)
        return process.pid

    def kill(self, pid: int) -> None:
        """End a program that was started here, with SIGKILL."""
        process = next(process for process in self._started if process.pid == pid)
        process.kill()
        process.wait(END_SECONDS)
        self._started.remove(process)

    def writer(self, password: str, prefix: str, **how: float) -> Writing:
        """Start a writer on the client; return once its first write was acknowledged."""
        arguments = [str(how.get(name, 0)) for name in ("pause", "wait", "count")]
        python = (sys.executable, "-m", "bench.primacy.writer", prefix, *arguments)
        environment = {**os.environ, "REDISCLI_AUTH": password, "PYTHONPATH": str(TESTS)}
        return Writing(self.command(CLIENT, *python), environment)

    def end(self) -> None:
        """End everything that was started, the last one first."""
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END_SECONDS)
        self._started.clear()


class InLab(Place):
    """The lab's stations; a node's cable can be pulled, and the wire be partitioned."""

    def address(self, station: str) -> str:
        return socket.gethostbyname(station)

    def command(self, station: str, *words: str) -> list[str]:
        return ["on", station, *words]

    @contextlib.contextmanager
    def silent(self, node: str) -> Iterator[float]:
        """Pull a node's cable meanwhile; yields since when it is out."""
        run("ip", "link", "set", f"w-{node}", "down")
        try:
            yield time.monotonic()
        finally:
            run("ip", "link", "set", f"w-{node}", "up")

    @contextlib.contextmanager
    def partitioned(self, minority: Sequence[str]) -> Iterator[float]:
        """Let these stations and the others not hear one another meanwhile; yields since when they do not.

        That is when nft has ended, as it is done at its very end: on a busy machine its start alone takes a second.
        """
        others = [station for station in (*self.nodes, BALANCER, CLIENT) if station not in minority]
        near, far = (", ".join(f'"w-{station}"' for station in side) for side in (minority, others))
        rules = [f"iifname {{ {a} }} oifname {{ {b} }} drop" for a, b in ((near, far), (far, near))]
        chain = "table bridge primacy { chain forward { type filter hook forward priority 0;"
        text = "\n".join([chain, *rules, "}", "}"])
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, capture_output=True)
        try:
            yield time.monotonic()
        finally:
            run("nft", "delete", "table", "bridge", "primacy")


class OnLoopback(Place):
    """All stations are addresses of the loopback of the network that this process is in."""

    def address(self, station: str) -> str:
        return "127.0.1.20" if station == BALANCER else f"127.0.1.{self.nodes.index(station) + 1}"

    def command(self, _station: str, *words: str) -> list[str]:
        return [*words]


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Have this thread, and what it starts, in a network of its own meanwhile: its loopback and nothing else."""
    with Path("/proc/thread-self/ns/net").open() as home:
        unshare(CLONE_NEWNET)
        try:
            run("ip", "link", "set", "lo", "up")
            yield
        finally:
            call("setns", home.fileno(), CLONE_NEWNET)


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """Add the last words of everything that ran to a failure."""
    try:
        yield
    except AssertionError as error:
        error.add_note(
            "\n".join(f"{path.name}: {path.read_text()[-LAST_WORDS:]}" for path in sorted(root.glob("*.log")))
        )
        raise


@dataclass(frozen=True)
class Written:
    """What a writer did: CLOCK_MONOTONIC of each acknowledged write by its number."""

    tried: int
    acknowledged: dict[int, float] = field(repr=False)
    last_error: str = ""

    def gap(self) -> float:
        """Return the longest time between two acknowledged writes in seconds."""
        times = list(self.acknowledged.values())
        return max(after - before for before, after in itertools.pairwise(times))

    def gap_at(self, moment: float) -> float:
        """Return the time between the last acknowledged write before a moment and the first one after it."""
        times = list(self.acknowledged.values())
        return next(after - before for before, after in itertools.pairwise(times) if before <= moment < after)


class Writing:
    """A writer that runs."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == "writing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_back(self) -> None:
        """Wait until writes that failed are acknowledged again."""
        assert self._read() == "back"

    def tried(self) -> int:
        """Return how many writes it has tried."""
        return int(self._ask("tried"))

    def cut(self) -> float:
        """Have it go on over another connection; return at what CLOCK_MONOTONIC it closed the one that it had."""
        return float(self._ask("cut"))

    def end(self) -> Written:
        """Have it write no more."""
        said = self._ask("end")
        return Written(said["tried"], dict(said["acknowledged"]), said["last_error"])

    def missing(self) -> list[int]:
        """Return which of the acknowledged writes the primary has not."""
        return list(self._ask("missing"))

    def _ask(self, word: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        while (line := self._read()) == "back":
            pass
        return json.loads(line)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the writer has ended"
        return line.strip()
