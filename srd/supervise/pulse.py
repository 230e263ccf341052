"""Why a child that runs does not answer: it is stopped, traced, slow or hung. Pure, but for `read_pulse`.

Dead is another matter: that the pidfd says. What tells slow from hung is whether the main thread, which is redis',
sentinel's and stunnel's event loop, has had any time on a CPU between two questions, or waits for a disk: an idle redis
runs its clock ten times a second, a blocked one not at all.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srd.state import Symptom
from srd.supervise.adopt import start_time_of

_STOPPED: Final = "T"  # proc_pid_stat(5)
_TRACED: Final = "t"
_ON_DISK: Final = "D"
_PROC: Final = Path("/proc")
_UTIME_INDEX: Final = 11  # fields 14 and 15, counted from the state, which is field 3


class Remedy(enum.StrEnum):
    """What to do about a child that does not answer."""

    WAIT = "wait"
    RESUME = "resume"  # SIGCONT
    END = "end"  # SIGTERM, and after a short grace SIGKILL; then it is started again
    KILL = "kill"  # SIGKILL at once: it must not run another instruction


@dataclass(frozen=True, slots=True)
class Pulse:
    """A process' state letter, and how long its main thread has run; only that it changes counts."""

    letter: str
    ran: int


def read_pulse(pid: int, proc: Path = _PROC) -> Pulse | None:
    """Return the pulse of a process; None when it cannot be read, because it has just ended, say."""
    try:
        letter, _ = start_time_of(pid, proc)
        return Pulse(letter, _ran(pid, proc))
    except (OSError, ValueError):
        return None


def _ran(pid: int, proc: Path) -> int:
    """Return nanoseconds (/proc/PID/schedstat), or clock ticks where the kernel counts no finer."""
    try:
        return int((proc / str(pid) / "schedstat").read_text(encoding="ascii").split()[0])
    except (OSError, IndexError):
        fields = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return sum(map(int, fields[_UTIME_INDEX : _UTIME_INDEX + 2]))


class Silence:
    """One spell in which a child does not answer, from the first question without an answer on.

    Times are CLOCK_BOOTTIME seconds. `hung_after` seconds without any sign of life are a hang.
    """

    def __init__(self, now: float, *, hung_after: float) -> None:
        self.since = now
        self._still_since = now
        self._ran: int | None = None
        self._hung_after = hung_after

    def judge(self, pulse: Pulse | None, now: float) -> Symptom:
        """Say what is the matter, by one more look."""
        if pulse is None:
            return Symptom.SLOW  # whether it has ended is for the pidfd to say
        if pulse.letter in (_STOPPED, _TRACED, _ON_DISK) or pulse.ran != self._ran:
            self._still_since = now
        self._ran = pulse.ran
        if pulse.letter == _STOPPED:
            return Symptom.STOPPED
        if pulse.letter == _TRACED:
            return Symptom.TRACED
        return Symptom.HUNG if now - self._still_since >= self._hung_after else Symptom.SLOW


def remedy(symptom: Symptom, seconds: float, *, slow_limit: float | None, deposed: bool) -> Remedy:
    """Decide what to do about a child that has been silent for so many seconds.

    `slow_limit` is for how long it may be slow; None, for redis: it may be busy with a script or with its disk, and
    ending it would lose what is not saved. `deposed`: it was primary, and another is by now. Such a redis would go on
    with the writes that its clients have sent meanwhile, so it does not run again.
    """
    if symptom is Symptom.STOPPED:
        return Remedy.KILL if deposed else Remedy.RESUME
    if symptom is Symptom.HUNG:
        return Remedy.END
    if symptom is Symptom.SLOW and slow_limit is not None and seconds >= slow_limit:
        return Remedy.END
    return Remedy.WAIT
