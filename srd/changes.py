"""What a change of primary is: a value, with what follows from it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from srd.model import Endpoint


class ChangeKind(enum.StrEnum):
    """How another node came to be primary. Where nodes know different things, the later one here is believed."""

    FIRST = "first"  # the first one that this history knows of
    UNSEEN = "unseen"  # found afterwards; nobody has said how it came about
    UNKNOWN = "unknown"  # it happened before everyone's eyes, and nothing that announced it was heard
    OUTSIDE = "outside"  # SENTINEL FAILOVER, asked for by nobody's srd
    SENTINEL = "sentinel"  # Sentinel's own failover, after down-after
    SILENT = "silent"  # the node had fallen silent, and its peers had the sentinels replace it
    CRASH = "crash"  # its redis had ended, and the srd beside it had the sentinels replace it
    OPERATOR = "operator"  # its redis was ended on purpose: srd restart, srd stop
    SWITCHOVER = "switchover"


# With these, nobody took a write from the loss of the old primary on; an outside one leaves it taking writes.
_WRITES_ENDED: Final = frozenset({ChangeKind.SENTINEL, ChangeKind.SILENT, ChangeKind.CRASH, ChangeKind.OPERATOR})


@dataclass(frozen=True, slots=True)
class RoleChange:
    """One change of who is primary: what this node saw of it, and what the others have told.

    `at_timestamp` is Unix seconds, to show to people: when the new primary led, or, with `before`, when it was found to
    have done so before. `by` is who had it done: nodes, and where a person asked, that one. What is unknown is None.
    """

    at_timestamp: float
    epoch: int
    previous: Endpoint | None
    current: Endpoint
    kind: ChangeKind = ChangeKind.UNKNOWN
    before: bool = False
    cause: str | None = None
    by: tuple[str, ...] = ()
    # From the loss of the old primary (its end, the first ping without a reply, the wish) to the new one's lease.
    duration_seconds: float | None = None
    # For how long nobody took a write, where that was measured as a whole.
    gap_seconds: float | None = None
    # From the new primary's lease until it had the replicas that a write needs.
    settling_seconds: float | None = None
    # Up to where the old primary's stream is known to have gone, how long before the loss that was, and from where the
    # new one went on. `complete`: the old one has written nothing that the new one lacks.
    known_offset: int | None = None
    known_age_seconds: float | None = None
    taken_offset: int | None = None
    complete: bool = False

    @property
    def write_gap_seconds(self) -> float | None:
        """For how long nobody took a write: measured, or from the loss until the new primary leads and has replicas."""
        if self.gap_seconds is not None or self.kind not in _WRITES_ENDED:
            return self.gap_seconds
        if self.duration_seconds is None or self.settling_seconds is None:
            return None
        return self.duration_seconds + self.settling_seconds

    @property
    def lost_bytes(self) -> int | None:
        """How much of the old primary's stream the new one lacks: exactly if `complete`, at least so much if not."""
        if self.complete:
            return 0
        if self.known_offset is None or self.taken_offset is None:
            return None
        return max(0, self.known_offset - self.taken_offset)

    @property
    def facts(self) -> dict[str, object]:
        """What is shown of it besides its epoch, its moment and whom it was from and to; what is unknown is None."""
        return {
            "kind": self.kind,
            "before": self.before,
            "cause": self.cause,
            "by": list(self.by),
            "duration_seconds": _milliseconds(self.duration_seconds),
            "write_gap_seconds": _milliseconds(self.write_gap_seconds),
            "lost_bytes": self.lost_bytes,
            "lost_exactly": self.complete,
            "known_offset": self.known_offset,
            "known_age_seconds": _milliseconds(self.known_age_seconds),
            "taken_offset": self.taken_offset,
        }


def _milliseconds(seconds: float | None) -> float | None:
    return round(seconds, 3) if seconds is not None else None
