"""What srd inherits as the first process of a container: processes whose own parent has ended.

The kernel gives them to process 1: a child of redis that outlives it, what `docker exec` leaves behind. When such a
process ends it stays a zombie, with a place in the process table, until process 1 asks for its status. Of srd's own
children, those whose status means something are asked for it within milliseconds, by whoever started them. So the
status of one that has been a zombie for `GRACE_SECONDS` means nothing to anyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from srd.supervise.adopt import start_time_of

GRACE_SECONDS: Final = 2.0

_PROC: Final = Path("/proc")


async def collect_orphans(grace: float = GRACE_SECONDS) -> None:
    """Collect every child that has ended and that nobody asks about, until cancelled."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGCHLD, ended.set)
    ended.set()  # some may have ended before there was a handler
    try:
        while True:
            await ended.wait()
            ended.clear()
            seen = await asyncio.to_thread(_zombies)
            while seen:
                await asyncio.sleep(grace)
                still = await asyncio.to_thread(_zombies)
                _collect(pid for pid, _ in seen & still)
                seen = still - seen
    finally:
        loop.remove_signal_handler(signal.SIGCHLD)


def _collect(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # somebody has asked after all
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)


def _zombies() -> set[tuple[int, int]]:
    """Return pid and start time of each child of this process that has ended and was not asked for its status."""
    found = set()
    for entry in _PROC.glob("[0-9]*"):
        pid = int(entry.name)
        # ChildProcessError is an OSError: no child of ours; the rest is of processes that are gone meanwhile.
        with contextlib.suppress(OSError, ValueError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                found.add((pid, start_time_of(pid)[1]))
    return found
