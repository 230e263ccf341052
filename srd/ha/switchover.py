"""Moves the primary to another node on purpose: no acknowledged write is lost, and writes stop for some 10 ms.

The primary's srd does it, in this order (A is the primary, B its successor, S one sentinel):

1. B is preferred (replica-priority), and S has seen that. As many other replicas as A can spare follow B already, which
   passes A's stream on: without a replica B would refuse writes at first (min-replicas-to-write).
2. A: CLIENT PAUSE WRITE. What clients send from now on waits, and is not acknowledged.
3. B has all that A has: the offsets are equal, 1 to 4 ms later. Not within `CATCH_UP_SECONDS`: everything is undone.
4. A's srd stops using its lease: /primary says no here. A: REPLICAOF B. From now on nobody acknowledges a write.
5. B: REPLICAOF NO ONE. B's srd takes the rest of the lease, says yes to /primary, and has the replicas follow.
6. A: its clients' connections end, the pause with them: what waited was never done, and its client is told so.
7. S: SENTINEL FAILOVER. It selects B by its priority, finds it promoted, and makes the epoch by which all sentinels
   come to name B. Asked of one sentinel only, because two that are asked promote two.

Measured elsewhere and not done: SENTINEL FAILOVER alone leaves the old primary taking writes for 11 s (53,000 to 61,000
of 90,000 lost); a pause that outlasts the failover writes what waited to the old primary when it ends (24,000 lost);
redis' own FAILOVER tells no sentinel, which undo it half a minute later.

If A's srd dies between 4 and 5 there is no primary, and Sentinel makes one after `down_after` and two of its own looks
(a primary that reports being a replica is down); nobody has acknowledged a write meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final

import structlog

from srd.changes import ChangeKind
from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY, Config, Node
from srd.ha.custody import Custody
from srd.ha.fleet import Fleet, on_all
from srd.ha.lease import FAILOVER_FLAG, endpoint_of, fresh
from srd.ha.losses import Loss, Losses
from srd.ha.promotion import REIGN_TOPIC
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError, UnexpectedReplyError
from srd.ha.sentinel import SentinelClient
from srd.model import AskPeer, RefusedError, Role, SrdError
from srd.reconcile import boottime
from srd.state import Redis, Situation

log = structlog.get_logger(__name__)

STEP_SECONDS: Final = 1.0
# A sentinel sees a priority by its next INFO, once a second.
PREFERENCE_SECONDS: Final = 3.0
ATTACHING_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 0.05
# Longer than all of it takes, shorter than `down_after`: a paused primary answers no sentinel's hello.
PAUSE_MILLISECONDS: Final = 3000
CATCH_UP_SECONDS: Final = 1.0
# How far behind a successor may be: what a link carries in far less than the pause.
LAG_BYTES: Final = 1 << 20
LAG_SECONDS: Final = 1
REPORT_SECONDS: Final = 2.5
# The sentinel's own steps, 0.3 s, and the second until its INFO.
NAMING_SECONDS: Final = 8.0


@dataclass(frozen=True, slots=True)
class Switched:
    """What a switchover came to: who is primary now, for how long nobody took writes, and how long all of it took."""

    successor: str
    gap_seconds: float
    seconds: float
    named: bool  # whether a majority of the sentinels has taken it up


def is_heard(s: Situation, node: Node) -> bool:
    """Return whether the srd of another node has said something lately."""
    report = s.view.peers.get(node.name)
    return report is not None and s.now - report.received <= REPORT_SECONDS


def obstacles(s: Situation, successor: Node) -> list[str]:
    """Return, in words, what speaks against moving the primary from this node to another one now. Pure."""
    found = _own_obstacles(s)
    redis, name, endpoint = s.view.redis, successor.name, endpoint_of(s.config, successor)
    report, channel = s.view.peers.get(name), s.view.channels.get(name)
    if channel is not None and not channel.connected:
        found.append(f"the keying channel to {name} is down")
    if report is None or not is_heard(s, successor):
        found.append(f"the srd of {name} is not heard")
    elif not report.healthy:
        found.append(f"{name} says that it does not do its job")
    if report is not None and report.drained:
        found.append(f"{name} is drained")
    replica = next((r for r in redis.replicas if r.endpoint == endpoint), None) if redis is not None else None
    if replica is None or replica.state != "online" or redis is None:
        found.append(f"the redis of {name} is no replica that is in step")
    elif replica.lag_seconds > LAG_SECONDS or redis.offset - replica.offset > LAG_BYTES:
        found.append(f"the redis of {name} is {redis.offset - replica.offset} bytes and {replica.lag_seconds} s behind")
    return found


def _own_obstacles(s: Situation) -> list[str]:
    redis, lease = s.view.redis, s.view.lease
    if redis is None or redis.role is not Role.PRIMARY or lease is None or not lease.held or s.now >= lease.expires:
        return [f"{s.node.name} is not the primary that a majority of the sentinels names"]
    answers = fresh(s.config, s.view.sentinels, s.now).values()
    if any(FAILOVER_FLAG in answer.flags for answer in answers):
        return ["the sentinels are replacing the primary already"]
    naming = sum(1 for answer in answers if answer.primary == endpoint_of(s.config, s.node) and not answer.tilt)
    if naming < s.config.majority:
        return [f"{naming} of {len(s.config.voters)} sentinels name it; {s.config.majority} are a majority"]
    return ["it takes no writes now, being fenced"] if s.view.fenced else []


def choose(s: Situation, wanted: str | None) -> Node:
    """Return whom to move the primary to; `RefusedError` says what speaks against it, or against each."""
    candidates = [node for node in s.config.redis_nodes if node != s.node and wanted in (None, node.name)]
    if wanted is None:
        candidates = [node for node in candidates if node.priority != NEVER_PRIORITY]
    if not candidates:
        reason = f"there is no other node that runs redis and is named {wanted}" if wanted else "there is no other node"
        raise RefusedError("switch over to", wanted or "another node", reason, "srd list shows the nodes")
    against = {node: obstacles(s, node) for node in candidates}
    fit = [node for node in candidates if not against[node]]
    if not fit:
        reasons = dict.fromkeys(reason for found in against.values() for reason in found)
        raise RefusedError("switch over to", wanted or "another node", "; ".join(reasons), "srd status says more")
    return min(fit, key=lambda node: (node.priority, -_offset(s.view.redis, s.config, node)))


def _offset(redis: Redis | None, config: Config, node: Node) -> int:
    endpoint = endpoint_of(config, node)
    return next((r.offset for r in redis.replicas if r.endpoint == endpoint), 0) if redis is not None else 0


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

    def choose(self, wanted: str | None) -> Node:
        """Return whom it would go to now; `RefusedError` when it would not go."""
        return choose(self._situation(), wanted)

    async def run(self, wanted: str | None, *, cause: str, by: str) -> Switched:
        """Move the primary; `SrdError` when it stays where it was, with everything as it was.

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
                sentinel = await self._prefer(successor, new)
                await self._attach(successor, new)
                own = endpoint_of(self._fleet.config, self._node)
                with self._noted(Loss(ChangeKind.SWITCHOVER, own, began, cause, by)):
                    gap = await self._hand_over(successor, old, new)
                self._losses.handed_over(gap)
                named = await self._have_it_named(successor, sentinel)
            except (SrdError, asyncio.CancelledError):
                await self._reattach()
                raise
            finally:
                await _quietly(new.keep_priority(successor.priority, STEP_SECONDS))
                self._look()
            done = Switched(successor.name, gap, boottime() - began, named)
            log.warning("switched over", to=successor.name, gap_ms=round(gap * 1000, 1), named=named)
            return done

    @contextlib.contextmanager
    def _noted(self, loss: Loss) -> Iterator[None]:
        """Have a change of primary put down to this; unless it ends in an error."""
        self._losses.note(loss)
        try:
            yield
        except (SrdError, asyncio.CancelledError):
            self._losses.stayed()
            raise

    async def _prefer(self, successor: Node, new: RedisClient) -> SentinelClient:
        """Prefer the successor; return a sentinel that knows and that can make the epoch."""
        await new.keep_priority(PREFERRED_PRIORITY, STEP_SECONDS)
        endpoint = endpoint_of(self._fleet.config, successor)
        try:
            async with asyncio.timeout(PREFERENCE_SECONDS):
                while True:
                    seen = await on_all(self._fleet.sentinels, lambda one: one.priorities(STEP_SECONDS))
                    ready = [name for name, shown in seen.items() if shown.get(endpoint) == PREFERRED_PRIORITY]
                    if len(ready) >= self._fleet.config.majority:
                        return self._fleet.sentinels[self._node.name if self._node.name in ready else ready[0]]
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            reason = f"the sentinels do not see its priority within {PREFERENCE_SECONDS:g} s; nothing was changed"
            raise SrdError("switch over to", successor.name, reason) from None

    async def _attach(self, successor: Node, new: RedisClient) -> None:
        """Have replicas follow the successor that the primary can do without; return when they are in step, or soon."""
        config = self._fleet.config
        others = [name for name in self._fleet.redises if name not in (self._node.name, successor.name)]
        redis = self._situation().view.redis
        attached = {r.endpoint for r in redis.replicas if r.state == "online"} if redis is not None else set()
        in_step = [name for name in others if endpoint_of(config, config.node(name)) in attached]
        spared = in_step[: max(0, len(attached) - max(1, config.min_replicas_to_write))]
        clients = {name: self._fleet.redises[name] for name in spared}
        moved = await on_all(clients, lambda one: one.follow(endpoint_of(config, successor), STEP_SECONDS))
        with contextlib.suppress(TimeoutError, RespError):
            async with asyncio.timeout(ATTACHING_SECONDS):
                while not await _online(new, len(moved)):  # noqa: ASYNC110 - redis announces no replica
                    await asyncio.sleep(LOOK_SECONDS)

    async def _reattach(self) -> None:
        """Have every replica follow this node's redis again, if that is the primary still."""
        with contextlib.suppress(RespError):
            if await self._fleet.redises[self._node.name].role(STEP_SECONDS) is Role.PRIMARY:
                await self._fleet.have_follow(self._node, STEP_SECONDS)

    async def _hand_over(self, successor: Node, old: RedisClient, new: RedisClient) -> float:
        """Carry steps 2 to 6 out; return for how many seconds no write was taken."""
        await self._refreshed()
        if found := obstacles(self._situation(), successor):  # seconds have passed since that was asked
            raise RefusedError("switch over to", successor.name, "; ".join(found))
        paused = boottime()
        try:
            await old.pause_writes(PAUSE_MILLISECONDS, STEP_SECONDS)
            await _caught_up(successor, old, new)
            await self._demote(successor, old)
        except (SrdError, asyncio.CancelledError):
            await _quietly(old.resume(STEP_SECONDS))
            raise
        try:
            await new.lead(STEP_SECONDS)
        except RespError as error:
            # It may have been done all the same: to take the old one back now could make two.
            reason = f"{error}; {self._node.name} is a replica by now, and the sentinels make one of both primary"
            raise SrdError("promote", successor.name, reason) from error
        try:
            await self._ask_peer(successor.name, REIGN_TOPIC, {"former": self._node.name}, STEP_SECONDS)
        except SrdError as error:
            log.warning("the successor's srd does not answer; it leads when the sentinels name it", error=str(error))
        gap = boottime() - paused
        await _quietly(old.end_clients(STEP_SECONDS))
        await _quietly(old.resume(STEP_SECONDS))
        return gap

    async def _demote(self, successor: Node, old: RedisClient) -> None:
        """Say no to /primary, then be a replica; undone when redis refuses."""
        if self._custody.give(successor.name, boottime()) <= 0:
            raise SrdError("switch over to", successor.name, "this node's lease has ended meanwhile")
        self._judge()
        try:
            await old.follow(endpoint_of(self._fleet.config, successor), STEP_SECONDS)
        except (SrdError, asyncio.CancelledError):
            # Whether it was done or not, and nobody has been promoted: it is the primary.
            await _quietly(old.lead(STEP_SECONDS))
            self._custody.take_back()
            self._judge()
            raise

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

    async def _have_it_named(self, successor: Node, sentinel: SentinelClient) -> bool:
        """Have a sentinel make the epoch, and wait until a majority names the successor."""
        endpoint = endpoint_of(self._fleet.config, successor)
        others = [one for one in self._fleet.sentinels.values() if one is not sentinel]
        for one in (sentinel, *others):
            try:
                await one.fail_over(STEP_SECONDS)
                break
            except RespError as error:
                log.warning("a sentinel refuses", sentinel=one.node, error=str(error))
                # One that did not answer may have begun, and one that says so has: two that do it make one epoch twice.
                if not isinstance(error, UnexpectedReplyError) or "INPROG" in str(error):
                    break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAMING_SECONDS):
                while True:
                    seen = await on_all(self._fleet.sentinels, lambda one: one.ask(STEP_SECONDS))
                    if sum(1 for said in seen.values() if said.primary == endpoint) >= self._fleet.config.majority:
                        return True
                    await asyncio.sleep(LOOK_SECONDS)
        log.error("the sentinels do not name the successor", successor=successor.name, seconds=NAMING_SECONDS)
        return False


async def _caught_up(successor: Node, old: RedisClient, new: RedisClient) -> None:
    try:
        async with asyncio.timeout(CATCH_UP_SECONDS):
            while True:
                (their_role, theirs), (own_role, own) = (
                    await new.position(STEP_SECONDS),
                    await old.position(STEP_SECONDS),
                )
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


async def _online(redis: RedisClient, replicas: int) -> bool:
    seen = await redis.observe(STEP_SECONDS)
    return sum(replica.state == "online" for replica in seen.replicas) >= replicas


async def _quietly(step: Coroutine[Any, Any, None]) -> None:
    """Do what need not succeed: srd sets it right by itself later."""
    try:
        await step
    except RespError as error:
        log.warning("not done", error=str(error))
