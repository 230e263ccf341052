"""Settings that a failover or a switchover makes for a moment, and that must never stay. Pure.

Whoever made them takes them back, and may die before. So each srd looks at its own sentinel and its own redis, and sets
back what has differed for longer than any failover or switchover needs it.
"""

from __future__ import annotations

from typing import Final

# A voted failover selects the next primary within 0.6 s (measured), and from then on the new primary must not be judged
# by so short a time: left at 0.2 s, 7 of 7 runs began a second failover against it.
DOWN_AFTER_SECONDS: Final = 3.0
# A switchover waits until every sentinel has seen the priority, then for replicas to be in step, then for the epoch.
PRIORITY_SECONDS: Final = 20.0


class Stray:
    """One setting: since when it is another than it should be."""

    def __init__(self, tolerated: float) -> None:
        self._tolerated = tolerated
        self._since: float | None = None

    def is_due(self, *, differs: bool, now: float) -> bool:
        """Return whether it is to be set back now; `now` in CLOCK_BOOTTIME seconds."""
        if not differs:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= self._tolerated

    def end_now(self) -> None:
        """Tolerate it no longer: what it was made for has been done."""
        self._since = float("-inf")
