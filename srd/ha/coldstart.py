"""Whose data a cluster goes on with in which no redis that runs has all of it: after a power cut of all nodes, say.

The sentinels name a primary, P (ha/restart.py). Its disk need not have the most: each disk lacks the last second
(appendfsync everysec), one may be empty, put back from a backup, or cut short. Whoever follows P copies P's data, so P
must not be started before it has been compared with the others; and the sentinels, who know of no disk, must not elect
just anyone while P is down. Hence:

* A redis that is started as a replica says replica-priority 0 of itself until it has been in step with a primary (or
  was promoted): no sentinel promotes it, whatever becomes of srd. What was in step all along, in memory, can be.
* P's srd asks the others what they have (ha/progress.py), and has redis started as primary if nobody has more. If
  somebody has, P's redis stays down, that node is preferred, and the sentinels elect it as they would replace any dead
  primary (ha/failover.py): by a vote, in a new epoch. So there are no two primaries, by the proof in ha/restart.py:
  here a start is only ever put off, and a candidate named.
* Who is not heard is waited for, `COMPANY_SECONDS` from when a majority is there: machines do not boot at once. Then
  those decide that are there; a node that comes later keeps a copy of its files before it follows.
* If P itself is not heard, the first redis node that is does the same for it: once the time is over, the one with most
  of those that are there is elected.

Where a replica that may be promoted is there, a P that is silent is the sentinels' business. A P that was restarted
in its place before anybody missed it asks all the same: what a replica has in memory may be more than P's disk has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY, Node
from srd.ha.failover import Failover, silent_since
from srd.ha.lease import endpoint_of
from srd.ha.progress import UNKNOWN_EPOCH, Stock, is_ahead, stock_of
from srd.ha.restart import Census, Death, is_first_boot, known_primary
from srd.ha.successor import is_heard
from srd.model import AskPeer, Body, NodeKind, Role, Service, SrdError
from srd.state import Situation, View

log = structlog.get_logger(__name__)

STOCK_TOPIC: Final = "stock"
AFTER_TOPIC: Final = "after"
# From when this node knows whom a majority names, for the others to come. Sentinels that see P down try to elect at
# once, in vain, and again after twice failover_timeout: with 5 s each, 15 s after their start. By then it is decided.
COMPANY_SECONDS: Final = 12.0
# An append-only file is searched meanwhile: 256 MiB at most, on a cold disk.
ANSWER_SECONDS: Final = 5.0
# A redis that has just died is replaced by who was in step: nothing is to be asked then, and much to be done.
REPLACING_SECONDS: Final = 3.0
# Three lost heartbeats: a srd that is no longer heard is not waited for.
HEARD_SECONDS: Final = 5.0


def arranges(s: Situation, death: Death | None) -> bool:
    """Whether it is this node's turn to find out who has most. Pure."""
    primary = known_primary(s)
    node = s.config.node_at(primary.address) if primary is not None else None
    if primary is None or node is None or s.node.kind is not NodeKind.REDIS or len(s.config.redis_nodes) == 1:
        return False
    if is_first_boot(s):
        return False
    if node == s.node:
        child = s.view.children.get(Service.REDIS)
        missed = death is None or s.now >= death.at + s.config.sentinel.down_after + REPLACING_SECONDS
        return child is not None and child.pid is None and (missed or _never_answered(death))
    if is_in_touch(s, node) or silent_since(s.config, s.view.sentinels, primary, s.now) is None:
        return False
    first = next((other for other in s.config.redis_nodes if other == s.node or is_in_touch(s, other)), None)
    return first == s.node and _unproven(s.view)


def _never_answered(death: Death | None) -> bool:
    """Whether redis ended before it had loaded its data, so that nobody can have been in step with it."""
    return death is not None and death.as_role is Role.UNKNOWN


def _unproven(view: View) -> bool:
    """Whether this node's redis has not been in step since it was started, or is not there."""
    redis = view.redis
    if redis is None:
        return True
    return redis.priority in (NEVER_PRIORITY, PREFERRED_PRIORITY) and redis.role is Role.REPLICA and not redis.link_up


def is_in_touch(s: Situation, node: Node) -> bool:
    """Whether a peer's srd is connected and speaks."""
    channel = s.view.channels.get(node.name)
    return channel is not None and channel.connected and is_heard(s, node, HEARD_SECONDS)


class ColdStart:
    """Finds out who has most, when that is this node's turn, and has that one lead. `census` is what was found.

    `stock` is what this node has, `after` how much of its append-only file follows an end. `died` is how this node's
    redis ended, if it did.
    """

    def __init__(
        self,
        failover: Failover,
        *,
        situation: Callable[[], Situation],
        ask_peer: AskPeer,
        stock: Callable[[], Awaitable[Stock]],
        after: Callable[[str], Awaitable[int | None]],
        died: Callable[[], Death | None],
        wake: Callable[[], None],
    ) -> None:
        self._failover, self._situation, self._ask_peer = failover, situation, ask_peer
        self._stock, self._after, self._died, self._wake = stock, after, died, wake
        self._since: float | None = None
        self._said: Census | None = None
        self.census: Census | None = None

    async def reconcile(self) -> None:
        """Ask and compare, if it is this node's turn; have another elected, if that has most."""
        s = self._situation()
        if not arranges(s, self._died()):
            self._since = self.census = None
            return
        if self._since is None:
            self._since = s.now
        stocks = await self._ask_all(s)
        s = self._situation()
        if not arranges(s, self._died()):
            self._since = self.census = None
            return
        self.census = await self._judge(s, stocks)
        if self.census != self._said:
            self._said = self.census
            log.info("compared", stocks={name: _in_words(stock) for name, stock in stocks.items()})
            self._wake()
        ahead = self.census.ahead
        primary = known_primary(s)
        former = s.config.node_at(primary.address) if primary is not None else None
        if ahead is None or former is None or not stocks[ahead].ready or s.paused:
            return
        if former != s.node and any(stock.chosen for name, stock in stocks.items() if name != s.node.name):
            return  # the sentinels need no help
        await self._failover.replace(former, f"{ahead} has the most data", since=None, prefer=ahead)

    async def answer_stock(self, _peer: str, _: Body) -> Body:
        """Answer another node that compares: what this node has."""
        return (await self._stock()).body()

    async def answer_after(self, _peer: str, body: Body) -> Body:
        """Answer another node that compares: how much this node has after an end."""
        return {"after": await self._after(str(body.get("end", "")))}

    async def _ask_all(self, s: Situation) -> dict[str, Stock]:
        """Return what each redis node has that answers, this one included."""

        async def ask(name: str) -> Stock | None:
            try:
                return stock_of(name, await self._ask_peer(name, STOCK_TOPIC, {}, ANSWER_SECONDS))
            except SrdError as error:
                log.info("a node does not say what it has", peer=name, why=str(error))
                return None

        others = [node.name for node in s.config.redis_nodes if node != s.node and is_in_touch(s, node)]
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                own = await self._stock()
        except (SrdError, TimeoutError) as error:
            log.info("this node does not know what it has", why=str(error) or "its disk does not answer")
            own = Stock(s.node.name)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(name)) for name in others]
        found = [own, *(task.result() for task in asked)]
        return {stock.node: stock for stock in found if stock is not None}

    async def _judge(self, s: Situation, stocks: Mapping[str, Stock]) -> Census:
        missing = tuple(node.name for node in s.config.redis_nodes if node.name not in stocks)
        waited = s.now - (self._since if self._since is not None else s.now)
        if missing and waited < COMPANY_SECONDS:
            return Census(awaited=missing)
        own = known_primary(s) == endpoint_of(s.config, s.node)
        others = [stocks[node.name] for node in s.config.redis_nodes if node.name in stocks and node != s.node]
        if own:  # whom the sentinels name, unless another has more
            if stocks[s.node.name].data:
                others = [stock for stock in others if _has_been_in_step(stock)]
            best = await self._most([stocks[s.node.name], *others])
        else:
            best = await self._most([stock for stock in (stocks[s.node.name], *others) if _has_been_in_step(stock)])
        alone = not missing and not any(stock.chosen for stock in stocks.values())
        if best is None:
            empty = not missing and not any(stock.data for stock in stocks.values())
            if empty and self._said != Census(empty=True, alone=alone):
                log.warning("every node is empty: the cluster begins with an empty data set")
            return Census(empty=empty, alone=alone)
        return Census(alone=alone) if own and best.node == s.node.name else Census(ahead=best.node)

    async def _most(self, stocks: Sequence[Stock]) -> Stock | None:
        """Return who has most of those that can lead, the first one if that is not known; None if there is none."""
        best: Stock | None = None
        for stock in stocks:
            if not stock.able or not stock.data:
                continue
            if best is None:
                best = stock
                continue
            async with asyncio.TaskGroup() as group:
                theirs = group.create_task(self._bytes_after(stock.node, best.end))
                mine = group.create_task(self._bytes_after(best.node, stock.end))
            if is_ahead(stock, best, they_have_more=theirs.result(), i_have_more=mine.result()):
                best = stock
        return best

    async def _bytes_after(self, node: str, end: str) -> int | None:
        """Return how much follows that end in a node's append-only file; None if that is not known."""
        if not end:
            return None
        try:
            if node == self._situation().node.name:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await self._after(end)
            answer = await self._ask_peer(node, AFTER_TOPIC, {"end": end}, ANSWER_SECONDS)
        except (SrdError, TimeoutError) as error:
            log.info("a node does not compare", peer=node, why=str(error) or "its disk does not answer")
            return None
        after = answer.get("after")
        return after if isinstance(after, int) else None


def _has_been_in_step(stock: Stock) -> bool:
    """Whether what it has was once a primary's; otherwise it may be an empty data set that its redis has made.

    Where the one that the sentinels name is there, and has nothing itself, that is no worse. Where not, it is awaited.
    A snapshot that names its stream is one of a primary, or of a replica that was in touch with one.
    """
    return stock.epoch != UNKNOWN_EPOCH or bool(stock.replid)


def _in_words(stock: Stock) -> Body:
    return {**stock.body(), "end": len(stock.end) // 2}
