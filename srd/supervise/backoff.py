"""The pauses between the ends of a child and its next starts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from srd.reconcile import boottime
from srd.supervise.machine import failures_after, restart_pause


class Backoff:
    """How often in a row a child has ended, and the pause that follows from it; `over` is called at a pause's end."""

    def __init__(self, over: Callable[[], None]) -> None:
        self._over = over
        self._failures = 0
        self._timer: asyncio.TimerHandle | None = None
        self.until: float | None = None  # CLOCK_BOOTTIME seconds, while there is a pause

    def ended(self, ready_seconds: float | None, *, expected: bool) -> None:
        """Count an end of a child that was ready for so long (None: never); an expected one is no failure."""
        self._failures = 0 if expected else failures_after(self._failures, ready_seconds)

    def begin(self) -> None:
        """Begin the pause that is due now."""
        pause = restart_pause(self._failures, random.uniform(-1, 1))  # noqa: S311 - jitter
        self.until = boottime() + pause
        self._timer = asyncio.get_running_loop().call_later(pause, self._end)

    def cut_short(self) -> None:
        """End the pause now, if there is one, as if its time had come."""
        if self._timer is not None:
            self._end()

    def cancel(self) -> None:
        """Forget the pause, if there is one."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.until = None

    def _end(self) -> None:
        self.cancel()
        self._over()
