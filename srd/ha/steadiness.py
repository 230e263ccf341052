"""Whether a node's redis can be counted on, by how its processes have ended lately. Pure.

One that ends before it has its data will do so again, until somebody mends its files; once it has them, that is over.
One that ends again and again with its data is not to be counted on either, for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FAILING_ENDS: Final = 3
FAILING_SECONDS: Final = 60.0


class Steadiness:
    """What this srd has seen of them. All moments are CLOCK_BOOTTIME seconds; `ends` are those unasked, in order."""

    def __init__(self) -> None:
        self._run_id: str | None = None
        self._loaded: float | None = None  # when one was last seen to have its data
        self._over: frozenset[float] = frozenset()  # ends of redises that never had it, before one that had

    def loaded(self, run_id: str, ends: Sequence[float], now: float) -> None:
        """Take note that the redis that runs has its data."""
        if run_id != self._run_id:
            self._over = frozenset(ends) & self._over | frozenset(self._in_vain(ends))
            self._run_id = run_id
        self._loaded = now

    def fails(self, ends: Sequence[float], now: float) -> bool:
        """Return whether it cannot be counted on."""
        lately = {moment for moment in ends if now - moment < FAILING_SECONDS}
        return bool(lately & set(self._in_vain(ends))) or len(lately - self._over) >= FAILING_ENDS

    def _in_vain(self, ends: Sequence[float]) -> Sequence[float]:
        """Return the ends since one was last seen to have its data, without the first: its own, unless srd ended it."""
        if self._loaded is None:
            return ends
        return [moment for moment in ends if moment > self._loaded][1:]
