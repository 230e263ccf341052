"""How far this node's data has come: noted on disk while redis knows it, and said to other nodes when it may matter.

A note costs two looks at files and an fsync: at once when the epoch or the stream is another one, or the append-only
file was written anew, every 10 s while something is written, never while nothing is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import msgspec
import structlog

from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY
from srd.desired import Start
from srd.ha.lease import endpoint_of
from srd.ha.progress import NOTE_SECONDS, UNKNOWN_EPOCH, Progress, Stock, leading, may_exceed, number_of, seen
from srd.ha.steadiness import Steadiness
from srd.ha.successor import is_heard
from srd.model import Paths, RefusedError, Role, Service, SrdError
from srd.state import Child, ChildState, Redis, Situation
from srd.supervise import inventory
from srd.supervise.files import remove_own, write_private
from srd.supervise.inventory import Files
from srd.supervise.programs import owner_of

log = structlog.get_logger(__name__)

T = TypeVar("T")

FILE_NAME: Final = "progress.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """How long a redis' files were at a moment, and what it said of them before."""

    redis: Redis
    log: str
    size: int
    at: float

    def shows_a_hole(self, redis: Redis) -> bool:
        """Whether the files are longer than redis takes them to be, as it says later.

        Not the first file: redis opens that for appending, and may not count a base that it has made itself until it
        has written it anew (measured).
        """
        former = self.redis
        same = (former.run_id, former.rewrites) == (redis.run_id, redis.rewrites) and not redis.rewriting
        settled = same and redis.rewritten and number_of(self.log) > 1
        return settled and redis.log_bytes is not None and self.size > redis.log_bytes


class Ledger:
    """Keeps the note, and answers what this node has.

    `torn` is told of which redis the append-only file is found to have a hole (ha/torn.py), and when; it returns
    whether that is news.
    """

    def __init__(self, paths: Paths, situation: Callable[[], Situation], *, torn: Callable[[str, float], bool]) -> None:
        self._path = paths.state_dir / FILE_NAME
        self._directory = paths.service_dir(Service.REDIS)
        self._situation = situation
        self._torn = torn
        self._measured: Measured | None = None
        self._noted = self._load()
        self._noted_at = float("-inf")
        self._files = (0, False)  # how often redis had written its file anew by the last note, and whether it was at it
        self._steadiness = Steadiness()
        # Of its own: questions are given up and asked again, and a disk that hangs would keep each one's thread. Two:
        # the search for an end takes seconds on a cold disk, and who asks what is there meanwhile must have an answer.
        self._threads = ThreadPoolExecutor(2, "ledger")

    def _load(self) -> Progress | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Progress)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # not UTF-8 is a ValueError, too
            log.warning("how far the data has come is not known", file=str(self._path), reason=str(error))
            return None

    async def note(self) -> None:
        """One pass: write down how far redis has come, if that is news. `SrdError` when the disk does not take it."""
        s = self._situation()
        redis, child = s.view.redis, s.view.children.get(Service.REDIS)
        if redis is not None and not redis.loading and child is not None:
            self._steadiness.loaded(redis.run_id, child.lately, redis.answered)
        now = seen(s, self._noted)
        if now is None or redis is None:
            return
        self._compare(s, redis)
        is_news, has_appended = self._is_news(s, redis, now), self._has_appended(s, redis)
        if not (is_news or has_appended):
            return
        files = await self._apart(self._look)
        if has_appended:
            self._measured = Measured(redis, files.log, files.size, self._situation().now)
        if not is_news or redis.rewrite_scheduled or (redis.rewriting and files.unlisted):
            return  # after a full resync its files are the former ones, of which the former note is true
        now = replace(now, log=files.log, inode=files.inode, size=files.size)
        await self._apart(lambda: write_private(self._path, msgspec.json.encode(now)))
        self._noted, self._noted_at, self._files = now, s.now, (redis.rewrites, redis.rewriting)

    def _is_news(self, s: Situation, redis: Redis, now: Progress) -> bool:
        """Whether there is something to note: at once where the stream or the files are others, else now and then."""
        known = self._noted
        if known is None or not now.continues(known) or (redis.rewrites, redis.rewriting) != self._files:
            return True
        return s.now - self._noted_at >= NOTE_SECONDS and now.offset != known.offset

    def _has_appended(self, s: Situation, redis: Redis) -> bool:
        """Whether redis has appended something since its files were measured, a while ago."""
        if redis.log_bytes is None or redis.rewriting:
            return False
        measured = self._measured
        return measured is None or (s.now - measured.at >= NOTE_SECONDS and redis.log_bytes != measured.redis.log_bytes)

    def _compare(self, s: Situation, redis: Redis) -> None:
        """Compare how long the files were with what redis says later."""
        measured = self._measured
        if measured is None or redis.answered <= measured.at or not measured.shows_a_hole(redis):
            return
        if self._torn(redis.run_id, s.now):
            log.warning("redis' append-only file has a hole", bytes=measured.size, redis_bytes=redis.log_bytes)

    async def holds_data(self) -> bool:
        """Whether redis, which does not run, would load anything from its data directory; blocks.

        If not, the note is of what is lost. `SrdError` when nobody can tell.
        """
        holds = (await self._apart(self._look)).data
        if not holds and self._noted is not None:
            await self._apart(lambda: remove_own(self._path))
            self._noted = None
        return holds

    def weighed(self, start: Start) -> Start:
        """Say of a start as a replica whether this node may have what the primary has not, and whether that leads."""
        if start.primary is None:
            return start
        s = self._situation()
        report = leading(s, start.primary)
        led = report is not None and is_heard(s, s.config.node(report.node))
        return replace(start, keep=may_exceed(s, self._noted, start.primary), led=led)

    async def stock(self) -> Stock:
        """Return what this node has: in redis' memory while that knows it, otherwise on its disk."""
        files = await self._apart(self._look)
        s = self._situation()
        redis, child = s.view.redis, s.view.children.get(Service.REDIS)
        if redis is None and child is not None and child.pid is not None:
            raise RefusedError("say", "what redis has", "it runs and does not answer, and may have more than its disk")
        ready = redis is not None and not redis.loading and child is not None and child.state is ChildState.READY
        now = seen(s, self._noted)
        joined = s.view.initialized or self._noted is not None  # a newcomer's redis has made files, too
        come = now if now is not None else self._on_disk(s, files)
        chosen = ready and redis is not None and redis.role is Role.REPLICA
        chosen = chosen and redis is not None and redis.priority not in (NEVER_PRIORITY, PREFERRED_PRIORITY)
        return Stock(
            node=s.node.name,
            data=joined and (files.data or now is not None),
            able=_is_able(s) and not self._fails(s, child),
            ready=ready,
            chosen=chosen,
            epoch=come.epoch,
            replid=come.replid,
            offset=come.offset,
            end=files.end.hex(),
        )

    async def after(self, end: str) -> int | None:
        """Return how much this node's append-only file has after such an end, None if that is not in it."""
        try:
            wanted = bytes.fromhex(end)[-inventory.END_BYTES :]
        except ValueError:
            raise RefusedError("compare", "an end", "it is not hexadecimal") from None
        return await self._apart(lambda: self._as_redis(lambda: inventory.bytes_after(self._directory, wanted)))

    async def _apart(self, act: Callable[[], T]) -> T:
        """Do what blocks, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, act)

    def _fails(self, s: Situation, child: Child | None) -> bool:
        """Whether redis cannot be counted on: it cannot be started, has not loaded, or ends again and again."""
        if child is None:
            return False
        return (child.state is ChildState.BACKOFF and not child.lately) or self._steadiness.fails(child.lately, s.now)

    def _on_disk(self, s: Situation, files: Files) -> Progress:
        noted = self._noted if self._noted is not None else Progress()
        if s.config.appends:
            return noted.on_disk(files.log, files.inode, files.size)
        epoch = noted.epoch if files.replid == noted.replid else UNKNOWN_EPOCH
        return Progress(epoch, files.replid, files.offset)

    def _look(self) -> Files:
        appends = self._situation().config.appends
        return self._as_redis(lambda: inventory.look(self._directory, appends=appends))

    def _as_redis(self, act: Callable[[], T]) -> T:
        config = self._situation().config
        try:
            return owner_of(config, Service.REDIS).do(act)
        except OSError as error:
            directory, user = str(self._directory), config.redis.user
            raise SrdError("look into", directory, str(error.strerror), f"chown -R {user}: {directory}") from error


def _is_able(s: Situation) -> bool:
    """Whether nobody wants this node not to be primary; whom the sentinels name may have been chosen by hand."""
    never = s.config.node(s.node.name).priority == NEVER_PRIORITY
    return not s.view.drained and (not never or s.view.named == endpoint_of(s.config, s.node))
