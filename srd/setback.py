"""A sentinel whose clock has gone back is started anew, because it waits until that clock is where it was.

Sentinel counts by the wall clock (sentinel.c, mstime), and pings and asks INFO when so and so long has passed since it
last did. After a jump back it does neither until the clock has caught up: an hour, if the clock was an hour ahead. Of a
primary that hangs it hears nothing then, and of a replica that it has promoted itself it never learns that, so that it
gives the failover up, and the next one too. TILT, which it goes into, ends after its own time and changes none of this.
One that is started anew has no such memories; its epochs, its vote and whom it knows are on its disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from srd.model import Service
from srd.state import Situation

log = structlog.get_logger(__name__)

# It is in TILT for 5 s in any case, and what is less than this it waits out in that.
SETBACK_SECONDS: Final = 2.0


class Setback:
    """Looks at what this node's sentinel says of its clock; `restart` ends a child and has it started again."""

    def __init__(self, situation: Callable[[], Situation], restart: Callable[[Service], Awaitable[None]]) -> None:
        self._situation = situation
        self._restart = restart
        self._restarted = float("-inf")

    async def look(self) -> None:
        """Look once. During a pause nothing is done."""
        s = self._situation()
        answer = s.view.sentinels.get(s.node.name)
        if answer is None or answer.asked <= self._restarted or answer.set_back < SETBACK_SECONDS or s.paused:
            return
        log.warning("the clock of the sentinel has gone back, so it is started anew", seconds=answer.set_back)
        await self._restart(Service.SENTINEL)
        self._restarted = self._situation().now
