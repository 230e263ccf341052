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

# Between attempts, of which one may fail: for want of room, or of memory for the copy. Each makes a file more, and asks
# for that memory again, so the pauses double.
RETRY_SECONDS: Final = 10.0
LONGEST_RETRY_SECONDS: Final = 640.0
# Should files be longer for a reason that is not known here, writing them anew does not help, and costs much.
FOUND_AGAIN_SECONDS: Final = 600.0


class Torn:
    """Whether the file of the redis that runs may be torn."""

    def __init__(self) -> None:
        self._run_id: str | None = None  # of the redis whose file it is; another one has read it
        self._told = False  # it has taken the command
        # All moments are CLOCK_BOOTTIME seconds.
        self._due, self._pause = float("-inf"), RETRY_SECONDS
        self._found = float("-inf")  # when the files were last found to be too long

    def is_due(self, redis: Redis, now: float) -> bool:
        """Return whether redis is to be told now to write its file anew; to be asked at each look at it.

        It is due until `told` or `refused` is called, and again, later, when what was told has failed.
        """
        if redis.unsaved == LOG_FILE:
            self._begin(redis.run_id)
            return False
        if redis.run_id != self._run_id or redis.rewriting:
            return False
        if self._told and redis.rewritten:
            self._run_id = None
            return False
        return now >= self._due

    def found(self, run_id: str, now: float) -> bool:
        """Take note that the files of that redis are longer than it takes them to be; return whether that is news."""
        if now - self._found < FOUND_AGAIN_SECONDS:
            return False
        self._begin(run_id)
        self._found = now
        return True

    def told(self, now: float) -> None:
        """Take note that redis has taken the command."""
        self._told = True
        self._put_off(now)

    def refused(self, now: float) -> None:
        """Take note that redis has not taken the command."""
        self._put_off(now)

    def _begin(self, run_id: str) -> None:
        self._run_id, self._told = run_id, False
        self._due, self._pause = float("-inf"), RETRY_SECONDS

    def _put_off(self, now: float) -> None:
        self._due, self._pause = now + self._pause, min(2 * self._pause, LONGEST_RETRY_SECONDS)
