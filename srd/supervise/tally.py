"""How a child's processes have ended: the cause of each, how often each cause, and when lately."""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

# More than what makes a child flapping (conditions.py).
_REMEMBERED: Final = 20
_CGROUP: Final = Path("/proc/self/cgroup")
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_VMSTAT: Final = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended: in words, and as one of a small set of labels."""

    words: str
    label: str

    def because(self, words: str, label: str) -> End:
        """Return the end with its cause put first."""
        return End(f"{words} ({self.words})", label)


NOT_STARTED: Final = "not started"
# A program that ends so says why in its log: redis, that it cannot read its files.
REFUSAL: Final = "status 1"
UNSEEN: Final = End("it ended while no srd was there", "unseen")


def end_of(pidfd: int) -> End:
    """Collect how a process ended; of one that was adopted nobody can say, its status went to its new parent."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return End("unknown, it was adopted", "unknown")
    if result is None:
        return End("unknown, its status is not there", "unknown")
    if result.si_code == os.CLD_EXITED:
        return End(f"exit status {result.si_status}", f"status {result.si_status}")
    name = signal.Signals(result.si_status).name if result.si_status in set(signal.Signals) else str(result.si_status)
    return End(f"killed by {name}", name)


def oom_kills() -> int:
    """Return how often the kernel has killed for want of memory: in srd's control group, or on the whole machine.

    memory.events of control groups version 2 where the group has the memory controller, else /proc/vmstat (4.13).
    """
    for file in (_own_cgroup() / "memory.events", _VMSTAT):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        counts = dict(line.split() for line in lines)
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return 0


@functools.cache  # asked for at every answer of every child, and srd stays in its group
def _own_cgroup() -> Path:
    try:
        lines = _CGROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _CGROUP_ROOT
    unified = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return _CGROUP_ROOT.joinpath(*unified)


class Tally:
    """The ends of one child."""

    def __init__(self) -> None:
        self._causes: Counter[str] = Counter()
        self._last: str | None = None
        self._lately: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, end: End, now: float | None) -> None:
        """Count an end; `now` is None for one that is no sign of trouble: asked for by srd, or seen by nobody."""
        self._causes[end.label] += 1
        self._last = end.words
        if now is not None:
            self._lately.append(now)

    @property
    def causes(self) -> Mapping[str, int]:
        """How often the child has ended, by label."""
        return MappingProxyType(dict(self._causes))

    @property
    def last(self) -> str | None:
        """The last end, in words."""
        return self._last

    @property
    def lately(self) -> tuple[float, ...]:
        """When the child ended unasked, CLOCK_BOOTTIME seconds, the last times only."""
        return tuple(self._lately)
