"""What the srd of a redis that is promoted does at once, instead of letting it become known by and by.

In a switchover (ha/switchover.py) the former primary's srd has announced it: this one makes its redis the primary, and
is given the rest of the lease with that word (`Promotion.succeed`). Otherwise it is the sentinels that promote it.

The leader of a failover says whom it has chosen (+selected-slave), then sends SLAVEOF NO ONE, and learns by its next
INFO, up to a second later, that it is done; only then does it tell the other sentinels, and moves the other replicas.
Meanwhile there is a primary that nobody is led to, and that takes no writes for want of a replica
(min-replicas-to-write): 1.16 s measured, 0.20 s when the replicas were told at once.

So the srd beside the chosen one asks the former primary's srd for the rest of its lease (ha/custody.py), and watches
for the moment when ROLE says master: only then it has that lease. At that moment it also has the other replicas follow.
Not before: a replica whose own primary is gone refuses them (-NOMASTERLINK, replication.c), and they would try again a
second later. And it has all sentinels name its redis (ha/naming.py), as the leader would a second later: where the
former primary's srd gives no lease, this one leads only when a majority of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

from srd.cluster import Node
from srd.ha.custody import ASSURANCE_SECONDS, Custody, Offer
from srd.ha.fleet import Fleet, answering
from srd.ha.lease import endpoint_of
from srd.ha.naming import have_choice_known, have_named
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.sentinel import SELECTED, Event
from srd.model import AskPeer, Body, Endpoint, Role, SrdError
from srd.reconcile import boottime, contained
from srd.state import Redis, Store, View

log = structlog.get_logger(__name__)

LEASE_TOPIC: Final = "lease"
HEIR_TOPIC: Final = "heir"
SUCCEED_TOPIC: Final = "succeed"
# The leader sends SLAVEOF NO ONE at its next tick, 0.05 to 0.1 s after its choice; it gives up after failover-timeout.
PROMOTION_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.01
STEP_SECONDS: Final = 0.5
CLAIM_SECONDS: Final = 1.0
# For its predecessor to have this node named: that begins CLIENTS_SECONDS later, a sentinel that hangs costs 0.5 s, and
# to tell ten of them takes another 0.45 s. The lease lasts longer.
NAMED_SECONDS: Final = 1.1
# Just after a switchover every client opens a new connection: replicas that come meanwhile, and sentinels that take
# another primary in, would have them wait.
CLIENTS_SECONDS: Final = 0.1
# Less of a lease than this, once this node's redis is primary, ends before a majority can have named it, on a busy
# machine: clients would be led here and away again. It counts as none.
WORTHWHILE_SECONDS: Final = 0.5
# Whoever did not hear whom to follow is told again: a leader that is done with its failover tells nobody, and the
# sentinels set a replica right failover-timeout after they have seen it (sentinel.c, +fix-slave-config).
AGAIN_SECONDS: Final = 0.5
# Until the answer of a successor: its redis is told, and asked once more if that was not heard.
SUCCEED_SECONDS: Final = 2 * STEP_SECONDS + 0.5


class Promotion:
    """Follows a promotion of this node's redis through. `run` and `gather` are two of the daemon's bodies.

    `look` has this node's redis asked again soon, `observed` takes in what it has said, `judge` has the lease judged at
    once.
    """

    def __init__(
        self,
        fleet: Fleet,
        node: Node,
        *,
        store: Store,
        custody: Custody,
        ask_peer: AskPeer,
        look: Callable[[], None],
        observed: Callable[[Redis], object],
        judge: Callable[[], None],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._node = node
        self._custody = custody
        self._ask_peer = ask_peer
        self._look = look
        self._observed = observed
        self._judge = judge
        self._selected = asyncio.Event()
        self._followers = asyncio.Event()
        self._former: Endpoint | None = None
        self._leader = ""  # of the failover: the node whose sentinel has chosen this one
        self._expected: tuple[str, float] | None = None  # who is about to switch over to this node, known since when
        self._attended = False  # there are as many replicas as a write needs

    def heard(self, event: Event) -> None:
        """Take note of what a sentinel has announced: whom a leader has chosen, and whose place that one takes."""
        chosen, former = selection(event)
        if chosen == endpoint_of(self._fleet.config, self._node):
            self._former, self._leader = former, event.node
            self._selected.set()

    async def run(self) -> None:
        """Wait for a promotion of this node's redis, and follow it through; again and again, until cancelled."""
        while True:
            await self._selected.wait()
            self._selected.clear()
            await contained("promotion", self._follow_through)

    async def _follow_through(self) -> None:
        if _leads(self._store.view()):
            return  # it was switched over to, and the sentinels come to know
        async with asyncio.TaskGroup() as group:
            offer = group.create_task(self._ask_for_lease())
            group.create_task(self._fleet.reach(STEP_SECONDS))
            promoted = await _promoted(self._fleet.redises[self._node.name])
            if promoted is None:
                return
            self._look()
            group.create_task(contained("promotion", self._gather))
            group.create_task(contained("promotion", partial(self._have_it_known, offer)))
            self._take(await offer, promoted)
            self._judge()
            self._take(await self._ask_for_lease(), promoted)  # once more: that srd takes note of when this one leads
            self._judge()

    async def _have_it_known(self, offer: asyncio.Task[Offer | None]) -> None:
        """Have the sentinels name this node; where clients come by a lease that it is given, after they have come."""
        former, leader, gone = self._former, self._leader, self._predecessor()
        # Where not even the sentinel answers, a srd is not waited for.
        silent = gone is not None and gone.name in self._store.view().silent
        done, _ = await asyncio.wait((offer,), timeout=0 if silent else CLIENTS_SECONDS)
        given = offer.result() if done else None
        if given is not None and given.left(boottime()) >= WORTHWHILE_SECONDS:
            await asyncio.sleep(CLIENTS_SECONDS)
        config, sentinels = self._fleet.config, answering(self._fleet.sentinels, self._store.view())
        own = endpoint_of(config, self._node)
        if former is not None and await have_choice_known(config, sentinels, leader, former, own):
            log.info("the sentinels are told", leader=leader)

    async def expect(self, former: str, _: Body) -> Body:
        """Be ready for a primary that is about to switch over to this node: what it gives then is counted from now.

        Return whether this node's redis is `attended`: has as many replicas as a write needs.
        """
        await self._fleet.reach(STEP_SECONDS)
        seen = await self._fleet.redises[self._node.name].observe(STEP_SECONDS)
        self._attended = seen.online >= seen.min_replicas_to_write
        self._expected = former, boottime()
        return {"attended": self._attended}

    async def succeed(self, former: str, body: Body) -> Body:
        """Make this node's redis the primary in place of one that is a replica by now; return whether this node `led`.

        `body` says what is left of that one's lease, from when it was `expect`ed. Clients are cut off there by this
        answer, and it is here that they knock at once. A no, and `why`, is for good: the lease was not taken.
        """
        expected = self._expected
        offer = self._offer(former, expected[1], body) if expected is not None and expected[0] == former else None
        if offer is None or offer.left(boottime()) <= 0:
            return {"led": False, "why": "its srd does not expect that, or it comes too late"}
        try:
            seen = await self._fleet.redises[self._node.name].lead(STEP_SECONDS)
        except RespError as error:
            return {"led": False, "why": str(error)}
        promoted = boottime()
        self._take(offer, promoted)
        # What the observer has asked before that, it may have been told by a replica.
        self._observed(dataclasses.replace(seen, answered=promoted))
        self._former = endpoint_of(self._fleet.config, self._fleet.config.node(former))
        self._expected = None
        self._followers.set()
        await asyncio.sleep(0)  # the balancer's checks are answered in this turn: before clients are sent here
        return {"led": True}

    async def gather(self) -> None:
        """Have the replicas follow whenever this node has succeeded, and the sentinels name it; until cancelled."""
        while True:
            await self._followers.wait()
            self._followers.clear()
            async with asyncio.TaskGroup() as group:
                group.create_task(contained("promotion", self._see_to_its_name))
                if self._attended:
                    await asyncio.sleep(CLIENTS_SECONDS)
                await contained("promotion", self._gather)

    async def _see_to_its_name(self) -> None:
        """Have the sentinels name this node where its predecessor does not: its srd may have ended just then."""
        own, former = endpoint_of(self._fleet.config, self._node), self._former
        try:
            await self._store.wait_for(lambda view: view.named == own, NAMED_SECONDS)
        except TimeoutError:
            if former is not None and _leads(self._store.view()):
                told = answering(self._fleet.sentinels, self._store.view())
                await have_named(self._fleet.config, told, former, own)
                self._look()

    def _predecessor(self) -> Node | None:
        """Return the node whose place this one takes; None if that is none of the cluster's."""
        return self._fleet.config.node_at(self._former.address) if self._former is not None else None

    async def _ask_for_lease(self) -> Offer | None:
        """Ask the former primary's srd for what is left of its lease; None if it does not give it."""
        former = self._predecessor()
        if former is None or former == self._node:
            return None
        asked = boottime()
        try:
            answer = await self._ask_peer(former.name, LEASE_TOPIC, {}, CLAIM_SECONDS)
        except SrdError as error:
            log.info("no lease from the former primary", peer=former.name, why=str(error))
            return None
        return self._offer(former.name, asked, answer)

    def _offer(self, source: str, since: float, body: Body) -> Offer | None:
        """Return what these words give, from a moment on; None if they are no such words, or give more than can be."""
        seconds, assured = body.get("seconds"), body.get("assured", 0.0)
        if not isinstance(seconds, (int, float)) or not isinstance(assured, (int, float)):
            return None
        offer = Offer(source, since, seconds, min(assured, ASSURANCE_SECONDS))
        valid = seconds >= 0 and offer.left(boottime()) <= self._fleet.config.primary_lease
        return offer if valid else None

    def _take(self, offer: Offer | None, promoted: float) -> None:
        if offer is None:
            return
        if offer.left(promoted) < WORTHWHILE_SECONDS:
            offer = dataclasses.replace(offer, seconds=0.0)
        self._custody.take(offer, promoted=promoted)
        log.info("lease", source=offer.source, seconds=round(offer.seconds, 3), assured=round(offer.assured, 3))

    async def _gather(self) -> None:
        """Have the replicas follow; whoever is there and has not heard it is told again, while this one is primary."""
        config, former, gone = self._fleet.config, self._former, self._predecessor()
        until = boottime() + config.sentinel.failover_timeout
        followers = await self._fleet.have_follow(self._node, STEP_SECONDS)
        log.info("promoted", replicas=followers)
        waiting = {node.name for node in config.redis_nodes if node not in (self._node, gone)} - {*followers}
        while waiting - self._store.view().silent.keys() and boottime() < until:
            await asyncio.sleep(AGAIN_SECONDS)
            if not self._is_to_be_primary(former):
                return
            waiting -= {*await self._fleet.have_follow(self._node, STEP_SECONDS, waiting)}

    def _is_to_be_primary(self, former: Endpoint | None) -> bool:
        """Whether this node's redis is the primary, nobody has fenced it, and nobody else was promoted since."""
        view, own = self._store.view(), endpoint_of(self._fleet.config, self._node)
        news = self._selected.is_set() or self._followers.is_set() or view.named not in (None, former, own)
        return view.redis is not None and view.redis.role is Role.PRIMARY and not view.fenced and not news


async def _promoted(own: RedisClient) -> float | None:
    """Return from when on this node's redis is known to be primary; None if it does not become it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PROMOTION_SECONDS):
            while True:
                with contextlib.suppress(RespError):
                    if await own.role(STEP_SECONDS) is Role.PRIMARY:
                        return boottime()
                await asyncio.sleep(LOOK_SECONDS)
    return None


def _leads(view: View) -> bool:
    return view.redis is not None and view.redis.role is Role.PRIMARY and view.lease is not None and view.lease.held


def selection(event: Event) -> tuple[Endpoint | None, Endpoint | None]:
    """Return whom a sentinel has chosen and whose place that one takes; None for both in any other event.

    `+selected-slave slave 10.0.0.2:6379 10.0.0.2 6379 @ orders 10.0.0.1 6379` (sentinel.c, sentinelEvent "%@").
    """
    words = event.payload.split()
    if event.name != SELECTED or len(words) != 8 or words[4] != "@":  # noqa: PLR2004 - as above
        return None, None
    with contextlib.suppress(ValueError):
        return _endpoint(words[2], words[3]), _endpoint(words[6], words[7])
    return None, None


def _endpoint(host: str, port: str) -> Endpoint:
    return Endpoint(ipaddress.ip_address(host), int(port))
