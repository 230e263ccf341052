"""A walk: clients write and read while one fault after the other is done to the cluster; then all of it is judged."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from chaos.checker import judge
from chaos.faults import MACHINE_KINDS
from chaos.history import Fault, load, write
from chaos.plan import Draw, Plan, Step
from chaos.world import NotNowError, World, run

TESTS: Final = Path(__file__).parents[1]
# What a cluster may take to be whole again. A failover takes 6 s, Sentinel's second attempt 10 s more, a redis that
# died as primary waits 25 s for the sentinels, and the lab's one CPU makes more of all that.
RECOVERY_SECONDS: Final = 120.0
END_SECONDS: Final = 120.0
# A capture is kept in memory until it has been judged.
FAULTS_PER_CAPTURE: Final = 20
# Of five nodes on a busy machine it took more than a minute.
JUDGING_SECONDS: Final = 600.0


@dataclass
class Walk:
    """What a walk has come to. `recoveries` are the seconds from the end of each step until the cluster was whole."""

    plan: Plan
    recoveries: list[float] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)  # what the cluster lacked when its time was up
    captured: int = 0
    plaintext: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def violations(self) -> list[str]:
        """What must never be and was, a sentence each."""
        found: list[str] = list(self.figures["violations"])
        if self.lacks:
            found.append(f"not whole within {RECOVERY_SECONDS:.0f} s: {', '.join(self.lacks)}")
        if self.plaintext:
            found.append(f"{len(self.plaintext)} packets in plaintext: {self.plaintext[0]}")
        return found

    def document(self) -> dict[str, Any]:
        """Return all of it as one JSON object."""
        return {
            "nodes": self.plan.nodes,
            "faults": self.plan.faults,
            "whole": not self.lacks,
            "recovery_seconds": [round(seconds, 1) for seconds in self.recoveries],
            "captured_bytes": self.captured,
            "plaintext": self.plaintext,
        } | (self.figures | {"violations": self.violations})


class Walker:
    """Does the steps of a walk, and says so on standard output."""

    def __init__(self, world: World, walk: Walk, directory: Path) -> None:
        self._world = world
        self._walk = walk
        self._directory = directory
        self._capture = directory / "wire.pcap"
        self._began = time.monotonic()
        self._number = 0
        self._captures = 0
        self._hit: tuple[str, ...] = ()  # by the step before

    def go(self) -> None:
        """Do all steps, unless the cluster does not recover; leave nothing that a fault has done."""
        self._start_capture()
        with (self._directory / "faults.jsonl").open("w") as file:
            for step in self._walk.plan.steps:
                if not (step.impatient and self._hit) and not self._recovered():
                    break
                if self._number >= FAULTS_PER_CAPTURE * (1 + self._captures):
                    self._judge_capture()
                    self._start_capture()
                for fault in self._do(step):
                    write(file, fault)
                    file.flush()
                time.sleep(step.pause)
            else:
                self._recovered()
        self._judge_capture()

    def say(self, text: str) -> None:
        """Print a line, with the seconds since the walk began."""
        print(f"[{time.monotonic() - self._began:7.1f}] {text}", flush=True)  # noqa: T201 - figures for people

    def _recovered(self) -> bool:
        seconds, lacks = self._world.wait_whole(RECOVERY_SECONDS)
        self._walk.recoveries.append(seconds)
        self._walk.lacks = lacks
        self.say(f"whole after {seconds:.1f} s" if not lacks else f"NOT whole: {', '.join(lacks)}")
        return not lacks

    def _do(self, step: Step) -> Iterator[Fault]:
        """Begin the faults of a step, end each when its time is over, and yield it then."""
        nodes = self._world.by_role()
        under_way: list[tuple[float, ExitStack, Fault]] = []
        hit: tuple[str, ...] = ()
        for draw in step.draws:
            victims = self._victims(draw, nodes, goes_on=step.impatient)
            fault, stack = self._begin(draw, victims)
            under_way.append((fault.began + draw.seconds, stack, fault))
            if MACHINE_KINDS[draw.kind].impairs:
                hit = (*hit, *victims)
        self._hit = hit
        for until, stack, fault in sorted(under_way, key=lambda item: item[0]):
            time.sleep(max(0.0, until - time.monotonic()))
            stack.close()
            if not fault.skipped:
                self.say(f"end of {fault.number} {fault.name}")
            yield msgspec.structs.replace(fault, ended=time.monotonic())

    def _victims(self, draw: Draw, nodes: tuple[str, ...], *, goes_on: bool) -> tuple[str, ...]:
        if goes_on and self._hit and MACHINE_KINDS[draw.kind].impairs:
            return self._hit[: len(draw.victims)]
        return tuple(nodes[victim] for victim in draw.victims)

    def _begin(self, draw: Draw, victims: tuple[str, ...]) -> tuple[Fault, ExitStack]:
        self._number += 1
        began, stack, skipped = time.monotonic(), ExitStack(), ""
        try:
            stack.enter_context(MACHINE_KINDS[draw.kind].hold(self._world, victims, draw.choice))
        except NotNowError as reason:
            skipped = str(reason)
        fault = Fault(self._number, f"{draw.kind} {draw.choice}".strip(), victims, began, began, skipped=skipped)
        lasts = f"for {draw.seconds} s" if draw.seconds else ""
        self.say(f"{fault.number} {fault.name} {' '.join(victims)} {f'skipped: {skipped}' if skipped else lasts}")
        return fault, stack

    def _start_capture(self) -> None:
        run("wire", "start", str(self._capture))

    def _judge_capture(self) -> None:
        """End the capture; between two of them, when the cluster is whole, nobody looks for an instant."""
        run("wire", "stop")
        found = run("wire", "plaintext", str(self._capture), "-v", seconds=JUDGING_SECONDS).splitlines()
        self._walk.plaintext += found[1:]
        self._walk.captured += self._capture.stat().st_size
        self._captures += 1
        self._capture.unlink()


@contextlib.contextmanager
def clients(world: World, file: Path) -> Iterator[None]:
    """Have clients write and read, and nodes be asked, meanwhile; at the end they read every list once more."""
    command = [sys.executable, "-m", "chaos.clients", str(file), str(len(world.nodes) // 2), *world.nodes]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        world.spared.add(process.pid)
        yield
        process.communicate("end\n", timeout=END_SECONDS)
        assert process.returncode == 0


def walk_through(world: World, plan: Plan, directory: Path) -> Walk:
    """Do a walk in a cluster that is whole, and judge it; what it was and came to stays in the directory."""
    directory.mkdir(parents=True)
    (directory / "walk.json").write_text(plan.dump())
    walk = Walk(plan)
    history = directory / "clients.jsonl"
    with clients(world, history):
        Walker(world, walk, directory).go()
    lines = [line for file in (history, directory / "faults.jsonl") for line in file.read_text().splitlines()]
    walk.figures = judge(load(lines)).figures()
    (directory / "verdict.json").write_text(json.dumps(walk.document(), indent=1) + "\n")
    return walk


def keep(world: World, directory: Path, where: Path) -> None:
    """Copy a walk's history, and the logs of all that ran, out of the lab."""
    shutil.copytree(directory, where, dirs_exist_ok=True)
    (where / "logs").mkdir(exist_ok=True)
    world.keep_logs(where / "logs")
