"""Moves the primary to another node on purpose: no acknowledged write is lost, and writes stop for some 10 ms.

The primary's srd does it, in this order (A is the primary, B its successor, S one sentinel):

1. B is preferred (replica-priority), and a majority of the sentinels, S among them, has seen that. As many other
   replicas as A can spare follow B already, which passes A's stream on: without a replica B would refuse writes at
   first (min-replicas-to-write). B's srd is told that it is about to lead, so that what is left of the lease, counted
   from then, can be handed over in step 5 without a question back.
2. A: CLIENT PAUSE WRITE. What clients send from now on waits, and is not acknowledged.
3. B has all that A has: the offsets are equal, 1 to 4 ms later. Not within `CATCH_UP_SECONDS`: everything is undone.
4. A's srd stops using its lease: /primary says no here. A becomes the replica of nobody. From now on nobody
   acknowledges a write.
5. B's srd is given the rest of the lease in one word. It tells B: REPLICAOF NO ONE, and says yes to /primary. The
   replicas that followed B already come back to it by themselves.
6. A: its clients' connections end, the pause with them: what waited was never done, and its client is told so.
7. B's srd has A and the other replicas follow B: 0.1 s later, when the clients are there, or at once if B has not as
   many replicas yet as a write needs; then A's srd does not wait for that either, before step 6. Whoever misses that,
   because it hangs, follows when the sentinels name B (ha/fence.py).
8. The sentinels vote for a new epoch, and are told that B is primary in it (ha/naming.py): 0.1 s later, too, and
   one after the other. Where that fails, S is told SENTINEL FAILOVER: it selects B by its priority, finds it promoted,
   and makes an epoch. One sentinel only, because two that are told promote two.

Measured elsewhere and not done: SENTINEL FAILOVER alone leaves the old primary taking writes for 11 s (53,000 to 61,000
of 90,000 lost); a pause that outlasts the failover writes what waited to the old primary when it ends (24,000 lost);
redis' own FAILOVER tells no sentinel, which undo it half a minute later.

Whoever stops A's srd meanwhile waits: steps 4 to 8 are done to their end, and each has its bound. Where A does not
take step 4 (a redis that hangs), or B's srd says that B has not taken step 5, A is primary again, with its own lease.
Should B do later what it was told, nobody is led to it, and the sentinels make a replica of it (sentinel.c,
+convert-to-slave). Where B's srd does not answer in step 5 it may have the lease, so there is no way back: A tells B
itself, and where it does not hear from that either, the sentinels are to choose, and A is primary again only when what
it has given has ended. If A's srd is killed between 4 and 5 there is no primary, and Sentinel makes one after
`down_after` and two of its own looks (a primary that reports being a replica is down); nobody has acknowledged a write
meanwhile. If it is killed after 5, B's srd has A follow, and B named.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from srd.changes import ChangeKind
from srd.cluster import LEASE_SECONDS, Node
from srd.ha.custody import Custody
from srd.ha.fleet import Fleet, answering, on_all
from srd.ha.lease import endpoint_of
from srd.ha.losses import Loss, Losses
from srd.ha.naming import have_named, is_named, make_epoch
from srd.ha.preparation import attach, prefer, prefer_no_more
from srd.ha.promotion import CLIENTS_SECONDS, HEIR_TOPIC, SUCCEED_SECONDS, SUCCEED_TOPIC
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.sentinel import SentinelClient
from srd.ha.successor import choose, obstacles
from srd.model import AskPeer, RefusedError, Role, SrdError
from srd.reconcile import boottime, to_its_end
from srd.state import Situation

log = structlog.get_logger(__name__)

STEP_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 0.05
# Longer than all of it takes, shorter than `down_after`: a paused primary answers no sentinel's hello.
PAUSE_MILLISECONDS: Final = 3000
CATCH_UP_SECONDS: Final = 1.0
# For a redis that hangs to be primary again; by then the sentinels have voted for another one.
RETURN_SECONDS: Final = 10.0
# What of it is done to its end, whatever happens: a word to a srd that hangs, two demands on a redis that does, its
# return when what it has given away has ended, and ten more steps.
FINISHING_SECONDS: Final = RETURN_SECONDS + SUCCEED_SECONDS + LEASE_SECONDS + 12 * STEP_SECONDS
# Between two sentinels that are told whom to name. With all at once clients on the lab's one CPU had no answer for
# 33 to 76 ms, more often than not longer than for the move itself.
APART_SECONDS: Final = 0.05
# Of a SENTINEL FAILOVER, which is what takes long: the sentinel's own steps, 0.3 s, and the second until its INFO.
NAMING_SECONDS: Final = 8.0
# Not at once, nor often: just then every client opens a new connection.
NAMING_LOOK_SECONDS: Final = 0.2


class UnheardError(SrdError):
    """The successor may be primary, and may have the lease: nobody there can be asked."""


@dataclass(frozen=True, slots=True)
class Switched:
    """What a switchover came to: who is primary now, for how long nobody took writes, and how long all of it took."""

    successor: str
    gap_seconds: float
    seconds: float
    named: bool  # whether a majority of the sentinels has taken it up


@dataclass(frozen=True, slots=True)
class _Ready:
    """Since when the successor's srd is ready, and whether its redis has as many replicas as a write needs."""

    since: float
    attended: bool


class Switchover:
    """Switches over from this node, and has that written down.

    `judge` has the lease judged again at once, `look` everything asked again.
    """

    def __init__(
        self,
        fleet: Fleet,
        node: Node,
        *,
        custody: Custody,
        losses: Losses,
        situation: Callable[[], Situation],
        ask_peer: AskPeer,
        judge: Callable[[], None],
        look: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._node = node
        self._custody = custody
        self._losses = losses
        self._situation = situation
        self._ask_peer = ask_peer
        self._judge = judge
        self._look = look
        self._busy = asyncio.Lock()

    async def settled(self) -> None:
        """Return when none is under way."""
        async with self._busy:
            pass

    def choose(self, wanted: str | None) -> Node:
        """Return whom it would go to now; `RefusedError` when it would not go."""
        return choose(self._situation(), wanted)

    async def run(self, wanted: str | None, *, cause: str, by: str) -> Switched:
        """Move the primary; `SrdError` when it stays where it was, or, where redis hangs, what was done about it.

        `cause` and `by` are what is written down of it: why, and who has asked.
        """
        if self._busy.locked():
            raise RefusedError("switch over from", self._node.name, "another switchover is under way")
        async with self._busy:
            began = boottime()
            successor = self.choose(wanted)
            old, new = self._fleet.redises[self._node.name], self._fleet.redises[successor.name]
            log.warning("switching over", source=self._node.name, to=successor.name)
            try:
                sentinels = await prefer(self._fleet, self._node, successor)
                await attach(self._fleet, self._situation(), successor)
                own = endpoint_of(self._fleet.config, self._node)
                loss = Loss(ChangeKind.SWITCHOVER, own, began, cause, by)
                gap = await self._hand_over(successor, old, new, sentinels, loss)
                named = await self._is_named(successor)
            except (SrdError, asyncio.CancelledError):
                await self._reattach()
                raise
            finally:
                await _quietly(prefer_no_more(self._fleet, successor))
                self._look()
            done = Switched(successor.name, gap, boottime() - began, named)
            log.warning("switched over", to=successor.name, gap_ms=round(gap * 1000, 1), named=named)
            return done

    async def _reattach(self) -> None:
        """Have every replica follow this node's redis again, if that is still the primary, and named."""
        s = self._situation()
        if s.view.named != endpoint_of(s.config, self._node) or self._lease_left() <= 0:
            return  # somebody else may lead by now, and they are that one's
        with contextlib.suppress(RespError):
            if await self._fleet.redises[self._node.name].role(STEP_SECONDS) is Role.PRIMARY:
                await self._fleet.have_follow(self._node, STEP_SECONDS)

    async def _hand_over(
        self, successor: Node, old: RedisClient, new: RedisClient, sentinels: Sequence[SentinelClient], loss: Loss
    ) -> float:
        """Carry steps 2 to 8 out; return for how many seconds no write was taken."""
        await self._refreshed()
        if found := obstacles(self._situation(), successor):  # seconds have passed since that was asked
            raise RefusedError("switch over to", successor.name, "; ".join(found))
        endpoint = endpoint_of(self._fleet.config, successor)
        ready = await self._announce(successor)
        paused = boottime()
        try:
            await _caught_up(successor, await old.pause_writes(PAUSE_MILLISECONDS, STEP_SECONDS), new)
        except (SrdError, asyncio.CancelledError):
            await _quietly(old.resume(STEP_SECONDS))
            raise

        async def exchange_roles() -> float:
            self._losses.note(loss)
            try:
                await self._demote(successor, old)
                await self._have_it_succeed(successor, new, ready)
            except UnheardError:
                await self._let_them_choose(successor, old, sentinels)
                raise
            except SrdError:
                self._losses.stayed()
                await self._lead_again(old)
                raise
            if ready is None or not ready.attended:
                await _quietly(old.follow(endpoint, STEP_SECONDS))
            gap = boottime() - paused
            self._losses.handed_over(gap)
            await _quietly(old.end_clients(STEP_SECONDS))
            await asyncio.sleep(CLIENTS_SECONDS)
            told = answering(self._fleet.sentinels, self._situation().view)
            if not await have_named(self._fleet.config, told, loss.primary, endpoint, apart=APART_SECONDS):
                await make_epoch(sentinels, loss.primary)
            return gap

        # Half of it is no primary at all.
        return await to_its_end(exchange_roles())

    async def _demote(self, successor: Node, old: RedisClient) -> None:
        """Say no to /primary, then be no primary."""
        if self._custody.give(successor.name, boottime()) <= 0:
            raise SrdError("switch over to", successor.name, "this node's lease has ended meanwhile")
        self._judge()
        await old.step_down(STEP_SECONDS)

    async def _announce(self, successor: Node) -> _Ready | None:
        """Have the successor's srd get ready; None where it is not known to be."""
        try:
            answer = await self._ask_peer(successor.name, HEIR_TOPIC, {}, STEP_SECONDS)
        except SrdError as error:
            log.info("the successor's srd does not get ready; it leads when the sentinels name it", error=str(error))
            return None
        return _Ready(boottime(), attended=answer.get("attended") is True)

    async def _have_it_succeed(self, successor: Node, new: RedisClient, ready: _Ready | None) -> None:
        """Have the successor's srd make it the primary, with the rest of the lease; do it from here where it is silent.

        `UnheardError` when it may have done so and nobody there answers, `SrdError` when it has not.
        """
        if ready is None:
            await _promote(successor, new)
            return
        ask = partial(self._ask_peer, successor.name, SUCCEED_TOPIC, self._custody.tell(ready.since))
        try:
            answer = await ask(SUCCEED_SECONDS)
        except SrdError as error:
            log.warning("the successor's srd does not answer; its redis is told from here", error=str(error))
            try:
                await _promote(successor, new)
            except SrdError as unheard:
                raise UnheardError("promote", successor.name, unheard.reason) from unheard
            with contextlib.suppress(SrdError):
                await ask(STEP_SECONDS)  # new keys may have cut it short: it is not too late for the lease
            return
        if answer.get("led") is not True:
            self._custody.declined()
            reason = f"{answer.get('why')}; the primary is to stay where it was"
            raise SrdError("promote", successor.name, reason)

    async def _let_them_choose(self, successor: Node, old: RedisClient, sentinels: Sequence[SentinelClient]) -> None:
        """Have the sentinels choose where the successor may lead, and neither its srd nor its redis can be asked.

        A third node's, if there is one: it may be this node that is cut off. Its redis leads again only when what the
        successor was given has ended, and has no lease before custody.ASSURANCE_SECONDS are over.
        """
        await _quietly(old.end_clients(STEP_SECONDS))
        third = [one for one in sentinels if one.node not in (self._node.name, successor.name)]
        await make_epoch(third or sentinels, endpoint_of(self._fleet.config, self._node))
        await asyncio.sleep(max(0.0, self._custody.given_until - boottime()))
        if await self._lead_again(old):
            self._losses.stayed()
            await self._fleet.have_follow(self._node, STEP_SECONDS)

    async def _lead_again(self, old: RedisClient) -> bool:
        """Have this node's redis be the primary that it was, unless the sentinels name another one by then.

        Return whether it is. One that hangs is told until it answers: what it was told before is done before that.
        """
        leads = False
        own = endpoint_of(self._fleet.config, self._node)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_SECONDS):
                while self._situation().view.named in (None, own):
                    with contextlib.suppress(RespError):
                        leads = await old.role(STEP_SECONDS) is Role.PRIMARY
                        if leads:
                            break
                        await old.lead(STEP_SECONDS)
                    await asyncio.sleep(LOOK_SECONDS)
        self._custody.take_back()
        self._judge()
        await _quietly(old.resume(STEP_SECONDS))
        return leads

    async def _refreshed(self) -> None:
        """Have as much left of the lease as can be: the successor needs it until the sentinels name it."""
        self._look()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STEP_SECONDS):
                while self._lease_left() < self._fleet.config.primary_lease - 2 * LOOK_SECONDS:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_SECONDS / 5)

    def _lease_left(self) -> float:
        s = self._situation()
        return s.view.lease.expires - s.now if s.view.lease is not None else 0.0

    async def _is_named(self, successor: Node) -> bool:
        """Wait until a majority of the sentinels names the successor; return whether it does."""
        endpoint = endpoint_of(self._fleet.config, successor)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAMING_SECONDS):
                while True:
                    await asyncio.sleep(NAMING_LOOK_SECONDS)
                    seen = await on_all(self._fleet.sentinels, lambda one: one.ask(STEP_SECONDS))
                    if is_named(self._fleet.config, seen, endpoint):
                        return True
        log.error("the sentinels do not name the successor", successor=successor.name, seconds=NAMING_SECONDS)
        return False


async def _promote(successor: Node, new: RedisClient) -> None:
    """Make the successor a primary."""
    try:
        await new.lead(STEP_SECONDS)
    except RespError as error:
        raise SrdError("promote", successor.name, str(error)) from error


async def _caught_up(successor: Node, paused: tuple[Role, int], new: RedisClient) -> None:
    """Return when the successor has all that the primary had written when it was paused."""
    own_role, own = paused
    try:
        async with asyncio.timeout(CATCH_UP_SECONDS):
            while True:
                their_role, theirs = await new.position(STEP_SECONDS)
                if (their_role, own_role) != (Role.REPLICA, Role.PRIMARY):
                    raise SrdError(
                        "switch over to", successor.name, "somebody else has changed who is primary meanwhile"
                    )
                if theirs >= own:
                    return
                await asyncio.sleep(0)
    except TimeoutError:
        reason = f"it has not caught up within {CATCH_UP_SECONDS:g} s; everything is as it was"
        raise SrdError("switch over to", successor.name, reason) from None


async def _quietly(step: Coroutine[Any, Any, None]) -> None:
    """Do what need not succeed: srd sets it right by itself later."""
    try:
        await step
    except RespError as error:
        log.warning("not done", error=str(error))
