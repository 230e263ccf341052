"""The life of a child as a table: state x event -> state and actions. Pure.

Three things are kept apart. Whether a child is *wanted* is decided in desired.py and not known here. Its *state* is
this table's. Whether it is *ready* is what its probe says, and comes in as an event. An event that a state has no entry
for is late (the child ended before it was noticed to be ready, say) and is ignored on purpose.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from srd.reconcile import backoff_seconds
from srd.state import ChildState


class Event(enum.StrEnum):
    """What can happen to a child."""

    START = "start"  # it is wanted, and nothing that it needs is missing
    ADOPT = "adopt"  # it was found running, left by an earlier srd
    REFUSED = "refused"  # it could not be started at all
    ANSWERED = "answered"  # its probe succeeded
    SILENT = "silent"  # its probe has failed for too long
    HUNG = "hung"  # silent, and nothing but an end helps
    STOP = "stop"  # it is no longer wanted
    GRACE_OVER = "grace_over"  # it was asked to end and has not
    EXITED = "exited"  # it ended
    PAUSE_OVER = "pause_over"  # the pause after its last end is over


class Action(enum.StrEnum):
    """What the runner has to do for a transition, in order."""

    SPAWN = "spawn"
    TERMINATE = "terminate"
    KILL = "kill"
    PAUSE = "pause"
    END_PAUSE = "end_pause"


_S: Final = ChildState
_E: Final = Event
_A: Final = Action

TABLE: Final[Mapping[tuple[ChildState, Event], tuple[ChildState, tuple[Action, ...]]]] = MappingProxyType({
    (_S.STOPPED, _E.START): (_S.STARTING, (_A.SPAWN,)),
    (_S.STOPPED, _E.ADOPT): (_S.STARTING, ()),
    (_S.STARTING, _E.REFUSED): (_S.BACKOFF, (_A.PAUSE,)),
    (_S.STARTING, _E.ANSWERED): (_S.READY, ()),
    (_S.STARTING, _E.SILENT): (_S.DEGRADED, ()),
    (_S.STARTING, _E.STOP): (_S.STOPPING, (_A.TERMINATE,)),
    (_S.STARTING, _E.EXITED): (_S.BACKOFF, (_A.PAUSE,)),
    (_S.READY, _E.SILENT): (_S.DEGRADED, ()),
    (_S.READY, _E.STOP): (_S.STOPPING, (_A.TERMINATE,)),
    (_S.READY, _E.EXITED): (_S.BACKOFF, (_A.PAUSE,)),
    # Not for being silent alone: a redis that loads its data or runs a long script would lose more by that.
    (_S.DEGRADED, _E.HUNG): (_S.DEGRADED, (_A.TERMINATE,)),
    (_S.DEGRADED, _E.GRACE_OVER): (_S.DEGRADED, (_A.KILL,)),
    (_S.DEGRADED, _E.ANSWERED): (_S.READY, ()),
    (_S.DEGRADED, _E.STOP): (_S.STOPPING, (_A.TERMINATE,)),
    (_S.DEGRADED, _E.EXITED): (_S.BACKOFF, (_A.PAUSE,)),
    (_S.STOPPING, _E.REFUSED): (_S.STOPPED, ()),
    (_S.STOPPING, _E.GRACE_OVER): (_S.STOPPING, (_A.KILL,)),
    (_S.STOPPING, _E.EXITED): (_S.STOPPED, ()),
    (_S.BACKOFF, _E.STOP): (_S.STOPPED, (_A.END_PAUSE,)),
    (_S.BACKOFF, _E.PAUSE_OVER): (_S.STOPPED, ()),
})  # fmt: skip

RUNNING: Final = frozenset({ChildState.STARTING, ChildState.READY, ChildState.DEGRADED})


def transition(state: ChildState, event: Event) -> tuple[ChildState, tuple[Action, ...]]:
    """Return the next state and what to do; an event that does not belong to the state changes nothing."""
    return TABLE.get((state, event), (state, ()))


# A child that was ready for this long was well: what it dies of now is not what it died of before.
STABLE_SECONDS: Final = 60.0


def failures_after(failures: int, ready_seconds: float | None) -> int:
    """Return how many ends in a row there are after one more, of a child that was ready for that long (None: never)."""
    return 1 if ready_seconds is not None and ready_seconds >= STABLE_SECONDS else failures + 1


def restart_pause(failures: int, jitter: float) -> float:
    """Return the pause before the next start: none after the first end, then the back-off of the house."""
    return backoff_seconds(failures - 1, jitter)
