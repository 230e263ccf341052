"""An append-only file that redis itself will not read any more, until it is written anew. Pure.

When the disk is full, redis writes part of a command, cuts that off again (ftruncate) and goes on when there is room.
Since 7.0 it has not opened the file for appending but once, at its start (aof.c, openNewIncrAofForAppend has no
O_APPEND), so after the first rewrite or full resync it goes on where it was, behind the part that it cut off: what is
between are zeros. Measured with 7.0.15: 62 bytes of a command written, 62 zeros in the file, and at the next start `Bad
file format reading the append only file`, for ever.

A disk that is full for less than the time between two looks, or while no srd runs, leaves the same (measured: redis was
well again 4 ms after there was room). Then the files are longer than redis takes them to be (`aof_current_size` counts
what it wrote and did not cut off again): by the 398 zeros of a file of 7,445 bytes that were measured.

BGREWRITEAOF writes what is in memory to a new file. So a redis that could not write to its file, and can again, is told
to do that, until it has been done.
"""

from __future__ import annotations

from typing import Final

from srd.ha.redis import LOG_FILE
from srd.state import Redis

# Between attempts, of which one may fail: for want of room, or of memory for the copy.
RETRY_SECONDS: Final = 10.0
# Should files be longer for a reason that is not known here, writing them anew does not help, and costs much.
FOUND_AGAIN_SECONDS: Final = 600.0


class Torn:
    """Whether the file of the redis that runs may be torn."""

    def __init__(self) -> None:
        self._run_id: str | None = None  # of the redis whose file it is; another one has read it
        self._told: float | None = None  # when it was last told to write it anew, in CLOCK_BOOTTIME seconds
        self._found = float("-inf")  # when the files were last found to be too long

    def is_due(self, redis: Redis, now: float) -> bool:
        """Return whether redis is to be told now to write its file anew; to be asked at each look at it.

        It is due until `told` is called, and again when what was told has failed.
        """
        if redis.unsaved == LOG_FILE:
            self._run_id, self._told = redis.run_id, None
            return False
        if redis.run_id != self._run_id or redis.rewriting:
            return False
        if self._told is not None:
            if redis.rewritten:
                self._run_id = None
                return False
            return now - self._told >= RETRY_SECONDS
        return True

    def found(self, run_id: str, now: float) -> None:
        """Take note that the files of that redis are longer than it takes them to be."""
        if now - self._found >= FOUND_AGAIN_SECONDS:
            self._run_id, self._told, self._found = run_id, None, now

    def told(self, now: float) -> None:
        """Take note that redis has taken the command."""
        self._told = now
