"""The fence: a primary that may have been replaced takes no writes, and soon takes them as its successor's replica.

Two of them. redis' own needs no srd: `min-replicas-to-write` (cluster.py) and `min-replicas-max-lag` of 2 s end the
writes 2.1 to 2.9 s after a cut (measured; at most 4 s by replication.c: the lag is counted in whole seconds, once a
second). srd's comes sooner: no majority for `FENCE_SECONDS`, and redis is told to refuse every write (ha/redis.py,
`FENCED`) and its clients' connections are ended. It falls closed, and stays when srd dies.

Who counts for the majority: the nodes whose sentinel answers or whose srd is heard, and this node itself. A srd that is
heard beside a sentinel that is down is no danger, for without a majority of sentinels nobody is promoted; and a primary
that is fenced because two sentinels crashed would serve nobody for nothing. Silence is proven by a question that was
asked, and not answered, at least so long ago: a srd that did not come to ask fences nobody.

A redis that has stepped down in a switchover (ha/switchover.py) follows nobody until it is told whom. Where it missed
that word, because it hung say, that is whom a majority names, if it is another node.

The fence is lifted by a majority that names this node still, and that was asked afterwards. Where it names another,
this node's redis follows that one: Sentinel would do the same 2 s later (four publish periods), after a promotion by
hand 11 s later with its own pace, and what is written until then is lost (53,000 of 90,000 writes, measured).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from srd.cluster import Node
from srd.ha.lease import endpoint_of
from srd.ha.redis import FENCED, RedisClient
from srd.model import Endpoint, Role
from srd.state import Redis, Situation, Store, View

log = structlog.get_logger(__name__)

# A question every 0.5 s and an answer within 0.5 s: three that are missing are no accident.
FENCE_SECONDS: Final = 1.5


def cut_off(s: Situation) -> bool:
    """Return whether this node is known to hear of no majority."""
    reached = sum(1 for voter in s.config.voters if voter == s.node or _in_touch(s.view, voter, s.now))
    return reached < s.config.majority


def _in_touch(view: View, voter: Node, now: float) -> bool:
    silent, report = view.silent.get(voter.name), view.peers.get(voter.name)
    if silent is None or now - silent < FENCE_SECONDS:
        return True
    return report is not None and now - report.received < FENCE_SECONDS


def demanded(s: Situation, redis: Redis) -> int:
    """Return how many replicas redis should demand of a write.

    A primary that serves is asked for more only once it has them: a file with two more nodes must not stop the writes
    until these have come.
    """
    wanted = s.config.min_replicas_to_write
    if redis.role is Role.REPLICA:
        return wanted
    held = s.view.lease is not None and s.view.lease.held and s.now < s.view.lease.expires
    if cut_off(s) or (redis.min_replicas_to_write >= FENCED and not held):
        return FENCED
    fewer = wanted < redis.min_replicas_to_write
    return wanted if fewer or redis.online >= wanted else redis.min_replicas_to_write


def awaited(s: Situation, redis: Redis) -> Endpoint | None:
    """Return whom a redis that follows nobody should follow: whom a majority names, if that is another node's."""
    lost = redis.role is Role.REPLICA and redis.primary is None
    return s.view.named if lost and s.view.named != endpoint_of(s.config, s.node) else None


class Fence:
    """Keeps what the local redis demands of a write true, and makes it follow who replaced it."""

    def __init__(
        self,
        client: RedisClient,
        store: Store,
        *,
        situation: Callable[[], Situation],
        wake: Callable[[], None],
        keep_data: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._situation = situation
        self._write = store.writer("fenced")
        self._wake = wake
        self._keep_data = keep_data
        self._acted = 0.0
        self._reigned = False  # this node's redis is the primary that a majority has named
        self._followed = False  # it was seen as a replica, so what an earlier srd has seen is no news

    async def reconcile(self) -> None:
        """Compare and put right; `RespError` when redis does not take it. A second pass does nothing."""
        s = self._situation()
        redis = s.view.redis
        # What redis said before it was last told something is no news.
        if redis is None or redis.answered < self._acted:
            return
        replaced, wanted = self._successor(s, redis), demanded(s, redis)
        self._write(redis.role is Role.PRIMARY and (replaced is not None or wanted >= FENCED))
        followed = awaited(s, redis)
        if replaced is None and followed is None and wanted == redis.min_replicas_to_write:
            return
        if followed is not None:
            log.warning("following", primary=str(followed), why="it has stepped down, and follows nobody")
            await self._keep_data()  # whom it handed over to has it all, but this may be somebody else
            await self._client.follow(followed)
        elif replaced is not None:
            log.warning("following", primary=str(replaced), why="a majority of the sentinels names it")
            await self._client.shut()
            await self._keep_data()  # what only this node has taken may be replaced by what that one sends
            await self._client.give_way(replaced)
        elif wanted >= FENCED:
            log.warning("fenced", why="no majority of the nodes is heard")
            await self._client.shut()
        else:
            log.info("fence", replicas=wanted, before=redis.min_replicas_to_write)
            await self._client.keep_fence(wanted)
        self._acted = self._situation().now
        self._wake()

    def _successor(self, s: Situation, redis: Redis) -> Endpoint | None:
        """Return whom a majority names instead of this node, whose redis was their primary and does not know yet.

        A primary that they have never named has just been promoted: they name its predecessor for a while more. One
        that was there before this srd had been named, unless an earlier srd last saw it follow another.
        """
        primary = s.view.named
        reigns = primary == endpoint_of(s.config, s.node)
        self._followed |= redis.role is Role.REPLICA
        reigned = self._reigned or (s.view.followed is False and not self._followed)
        self._reigned = redis.role is Role.PRIMARY and (reigns or reigned)
        return primary if self._reigned and not reigns else None
