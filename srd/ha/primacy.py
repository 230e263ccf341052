"""Who is primary, as far as this node has a say in it: watches, fences, has a dead primary replaced, takes over.

Wires the parts of this wing to one another. A node without redis, an arbiter, watches and hurries the sentinels only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

import structlog

from srd.changes import ChangeKind
from srd.cluster import Config, Node
from srd.desired import Start
from srd.ha import restart
from srd.ha.bequest import Bequest
from srd.ha.chronicle import HISTORY_TOPIC, Chronicle
from srd.ha.coldstart import AFTER_TOPIC, STOCK_TOPIC, ColdStart
from srd.ha.custody import Custody
from srd.ha.failover import UNFIT_SECONDS, Failover, silent_since
from srd.ha.fence import Fence
from srd.ha.fleet import Fleet
from srd.ha.history import History
from srd.ha.lease import endpoint_of
from srd.ha.losses import Loss, Losses
from srd.ha.observe import Observer
from srd.ha.progress import Stock
from srd.ha.promotion import HEIR_TOPIC, LEASE_TOPIC, REIGN_TOPIC, Promotion
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.restart import Death
from srd.ha.switchover import FINISHING_SECONDS, Switched, Switchover
from srd.model import AskPeer, Body, Endpoint, RefusedError, Role, Secrets, SrdError
from srd.reconcile import Loop, boottime, contained
from srd.state import Situation, Store

log = structlog.get_logger(__name__)

# How often it is looked whether the primary is to be fenced, or replaced: at what is known, nobody is asked for it.
# While everybody answers nothing can become due.
WATCH_SECONDS: Final = 0.1
CALM_SECONDS: Final = 1.0
FENCE_PASS_SECONDS: Final = 5.0
COMPARING_SECONDS: Final = 0.5
# A choice of the sentinels is waited for, and before that for them to see who has most.
REPLACING_SECONDS: Final = 15.0
SWITCHOVER_TOPIC: Final = "switchover"
ENDING_TOPIC: Final = "ending"
ENDING_SECONDS: Final = 0.5
# For all of its steps, each of which has a bound.
SWITCHOVER_SECONDS: Final = 30.0
# For a node that stops: the manager waits for it, and the others replace a primary that stops as one that has died.
LEAVING_SECONDS: Final = 10.0
# With a switchover that hangs just then, what the other nodes are told, and the vote that follows the end of redis.
LONGEST_LEAVE_SECONDS: Final = LEAVING_SECONDS + FINISHING_SECONDS + ENDING_SECONDS + REPLACING_SECONDS
# Of what another srd says of who has asked it.
MOST_TOLD: Final = 100


class Primacy:
    """The parts, and what the daemon runs of them: `bodies` side by side.

    `situation` is asked for every judgement, `ask_peer` asks another node's srd, `wake` is called at each event,
    `keep_data` before redis' files may be replaced by another node's. `stock` and `after` say what this node has
    (ha/coldstart.py). `saved` is the history that an earlier srd has kept, `save` keeps it and blocks.
    """

    def __init__(
        self,
        config: Config,
        node: Node,
        secrets: Secrets,
        store: Store,
        *,
        situation: Callable[[], Situation],
        ask_peer: AskPeer,
        wake: Callable[[], None],
        keep_data: Callable[[], Awaitable[None]],
        stock: Callable[[], Awaitable[Stock]],
        after: Callable[[str], Awaitable[int | None]],
        saved: History = (),
        save: Callable[[History], None] = lambda _: None,
    ) -> None:
        self._config, self._node, self._situation = config, node, situation
        self._custody = Custody()
        self._ask_peer = ask_peer
        self._wanted: asyncio.Queue[tuple[str | None, str, asyncio.Future[Switched]]] = asyncio.Queue(1)
        self._promotion: Promotion | None = None
        self._switchover: Switchover | None = None
        self._fleet = Fleet(config, secrets)
        self._died = asyncio.Event()  # this node's redis, as a primary
        self._seen_to = asyncio.Event()  # the sentinels have been told of it, or are to find out by themselves
        self._seen_to.set()
        self._losses = Losses(endpoint_of(config, node), view=store.view, clock=boottime)
        self._chronicle = Chronicle(
            self._fleet, node, store, losses=self._losses, ask_peer=ask_peer, saved=saved, save=save
        )
        self.failover = Failover(
            self._fleet,
            situation=situation,
            wake=self.look,
            hurrying=self._note_silence,
            own_stream=lambda: self.observer.last_replid,
        )
        hearers = [self.failover.heard, self._losses.heard]
        silence = Loop("silence", self.failover.watch, resync=self._pace, timeout=REPLACING_SECONDS)
        self._watches = [silence]
        self.bodies: list[Callable[[], Coroutine[Any, Any, None]]] = [silence.run, *self._chronicle.bodies]
        self._death: Death | None = None
        self._cold = ColdStart(
            self.failover,
            situation=situation,
            ask_peer=ask_peer,
            stock=stock,
            after=after,
            died=lambda: self._death,
            wake=wake,
        )
        own = self._fleet.redises.get(node.name)
        if own is not None:
            comparing = Loop("cold start", self._cold.reconcile, resync=COMPARING_SECONDS, timeout=REPLACING_SECONDS)
            self.bodies.append(comparing.run)
            promotion = Promotion(
                self._fleet,
                node,
                store=store,
                custody=self._custody,
                ask_peer=ask_peer,
                look=self._look_at_redis,
                judge=self._judge,
            )
            self._promotion = promotion
            hearers.append(promotion.heard)
            self._switchover = Switchover(
                self._fleet,
                node,
                custody=self._custody,
                losses=self._losses,
                situation=situation,
                ask_peer=ask_peer,
                judge=self._judge,
                look=self.look,
            )
            fence = Fence(own, store, situation=situation, wake=self.look, keep_data=keep_data)
            fencing = Loop("fence", fence.reconcile, resync=self._pace, timeout=FENCE_PASS_SECONDS)
            self._watches.append(fencing)
            self.bodies += [
                fencing.run,
                promotion.run,
                promotion.gather,
                self._have_it_replaced,
                partial(self._switch_all, self._switchover),
            ]
        self.observer = Observer(
            config,
            node,
            secrets,
            store,
            wake=(wake,),
            heard=hearers,
            judged=self._chronicle.judged,
            custody=self._custody,
        )
        self.bodies.append(self.observer.run)
        self._bequest = Bequest(custody=self._custody, losses=self._losses, situation=situation, judge=self._judge)
        self._answers: dict[str, Callable[[str, Body], Awaitable[Body]]] = {
            LEASE_TOPIC: self._answer_lease,
            SWITCHOVER_TOPIC: self._answer_switchover,
            ENDING_TOPIC: self._answer_ending,
            HISTORY_TOPIC: self._answer_history,
            STOCK_TOPIC: self._cold.answer_stock,
            AFTER_TOPIC: self._cold.answer_after,
        }
        if self._promotion is not None:
            self._answers |= {HEIR_TOPIC: self._promotion.expect, REIGN_TOPIC: self._promotion.succeed}
        self._store = store
        self._primary: Endpoint | None = None  # as the watches have last looked at it
        store.on_change(self._stir)
        self.loops = (self.observer.loop,)

    def _pace(self) -> float:
        view = self._store.view()
        waiting = any(answer.unanswered is not None for answer in view.sentinels.values())
        return WATCH_SECONDS if view.silent or view.fenced or waiting else CALM_SECONDS

    def _stir(self) -> None:
        """Have the watches look when somebody has fallen silent, or when the sentinels name another primary."""
        primary = self._store.view().named
        if primary != self._primary or self._pace() == WATCH_SECONDS:
            self._primary = primary
            for watch in self._watches:
                watch.wake()

    async def adopt(self, config: Config) -> None:
        """Act on a changed file from now on; what follows from the number of nodes, redis and sentinel are told."""
        self._config = config
        self.observer.adopt(config)
        await self._fleet.adopt(config)

    async def close(self) -> None:
        """Close the connections by which it acts; those by which it watches end with its bodies."""
        await self._fleet.close()

    def look(self) -> None:
        """Have everything asked again soon."""
        self.observer.wake()

    def died(self, *, asked: bool = False) -> Death:
        """Take note that this node's redis has ended; return when, and as what. A primary is replaced at once.

        `asked` says whether srd was asked to end it.
        """
        self._death = death = self.observer.death()
        if death.as_role is Role.PRIMARY:
            kind = ChangeKind.OPERATOR if asked else ChangeKind.CRASH
            own = endpoint_of(self._config, self._node)
            self._losses.note(Loss(kind, own, death.at, by=self._node.name))
            if len(self._config.redis_nodes) > 1:
                self._seen_to.clear()
                self._died.set()
        return death

    def start(self, *, holds_data: bool) -> Start:
        """Decide how this node's redis may start now: `restart.start`."""
        return restart.start(self._situation(), self._death, holds_data=holds_data, census=self._cold.census)

    async def farewell(self) -> None:
        """Tell the other nodes that the primary's redis, which is here, is about to be ended on purpose.

        After that there is no srd here that could say why it was replaced.
        """

        async def tell(peer: str) -> None:
            with contextlib.suppress(SrdError):  # then it takes this node for silent
                await self._ask_peer(peer, ENDING_TOPIC, {}, ENDING_SECONDS)

        async with asyncio.TaskGroup() as group:
            for voter in self._config.voters:
                if voter != self._node:
                    group.create_task(tell(voter.name))

    async def seen_to(self) -> None:
        """Return when the other nodes' sentinels have chosen in place of this node's redis, if that ended as primary.

        To leave before that would take them the haste in the middle of a vote, and the next one comes 10 s later.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPLACING_SECONDS):
                await self._seen_to.wait()

    def _note_silence(self, primary: Node, why: str) -> None:
        """Write down that this node has a silent primary replaced; of its own, that its redis has ended is known."""
        s, endpoint = self._situation(), endpoint_of(self._config, primary)
        if primary != self._node:
            since = silent_since(s.config, s.view.sentinels, endpoint, s.now)
            began = s.now if since is None else since
            self._losses.note(Loss(ChangeKind.SILENT, endpoint, began, why, self._node.name))

    @property
    def deposed(self) -> bool:
        """Whether this node's redis was primary when it last answered, and a majority names another one now.

        One that this srd has not heard yet was primary if an earlier srd has not seen it in step with another since.
        """
        view, role = self._situation().view, self.observer.last_role
        reigned = role is Role.PRIMARY or (role is Role.UNKNOWN and view.followed is False)
        return reigned and view.named not in (None, endpoint_of(self._config, self._node))

    async def switch_over(self, to: str | None, *, dry_run: bool, by: str | None = None) -> Body:
        """Move the primary to a node, or to the fittest; by the primary's srd, wherever this is asked, and by whom.

        Return `from`, `to`, and after it was done `gap_seconds`, `seconds` and whether it is `named` by the sentinels.
        `SrdError` says what speaks against it, or what went wrong.
        """
        by = by if by is not None else self._node.name
        s = self._situation()
        named = s.view.named
        primary = s.config.node_at(named.address) if named is not None else None
        if primary is None:
            raise RefusedError("switch over", "the primary", "no majority of the sentinels names one")
        if primary != self._node:
            body: Body = {"to": to, "dry_run": dry_run, "by": by}
            return await self._ask_peer(primary.name, SWITCHOVER_TOPIC, body, SWITCHOVER_SECONDS)
        if self._switchover is None:
            raise RefusedError("switch over from", self._node.name, "it runs no redis")
        if dry_run:
            return {"from": self._node.name, "to": self._switchover.choose(to).name}
        done: asyncio.Future[Switched] = asyncio.get_running_loop().create_future()
        try:
            self._wanted.put_nowait((to, by, done))
        except asyncio.QueueFull:
            raise RefusedError("switch over from", self._node.name, "another switchover is under way") from None
        # Whoever asks may go away, its connection may be replaced by new keys: what has begun goes on to its end.
        switched = await asyncio.shield(done)
        return {
            "from": self._node.name,
            "to": switched.successor,
            "gap_seconds": switched.gap_seconds,
            "seconds": switched.seconds,
            "named": switched.named,
        }

    async def leave(self) -> None:
        """Move the primary away, if it is here, because this node is about to stop; where that is refused, say why."""
        own = self._fleet.redises.get(self._node.name)
        if self._switchover is None or own is None:
            return
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                await self._switchover.settled()
                if not await _leads(own):
                    return
                await self._switchover.run(None, cause="srd was stopped", by=self._node.name)
                return
        except TimeoutError:
            log.warning("stopping as the primary", why=f"a switchover took longer than {LEAVING_SECONDS:g} s")
        except SrdError as error:
            log.warning("stopping as the primary", why=str(error))
        await self.farewell()

    async def move_away(self) -> Body | None:
        """Move the primary to the fittest other node if it is here; return what `switch_over` does, None if it is not.

        `SrdError` says why it stays.
        """
        s = self._situation()
        own, redis = endpoint_of(s.config, s.node), s.view.redis
        named = s.view.named
        if named == own:
            return await self.switch_over(None, dry_run=False, by=f"{s.node.name} (srd drain)")
        if redis is not None and redis.role is Role.PRIMARY:
            reason = f"its redis is primary, and the sentinels name {named or 'no one primary'}"
            raise RefusedError("move the primary from", s.node.name, reason, "srd status says more")
        return None

    async def _switch_all(self, switchover: Switchover) -> None:
        """Do the switchovers that are asked for, one at a time."""
        while True:
            to, by, done = await self._wanted.get()
            defect = await contained("switchover", partial(self._switch, switchover, to, by, done))
            if defect is not None:
                done.set_exception(SrdError("switch over from", self._node.name, defect))

    async def _switch(self, switchover: Switchover, to: str | None, by: str, done: asyncio.Future[Switched]) -> None:
        cause = "srd switchover" if to is None else f"srd switchover --to {to}"
        try:
            done.set_result(await switchover.run(to, cause=cause, by=by))
        except SrdError as error:
            done.set_exception(error)

    async def answer(self, peer: str, topic: str, body: Body) -> Body:
        """Answer another node's srd; `RefusedError` says why not. A client's has no say in who is primary."""
        if all(voter.name != peer for voter in self._config.voters):
            raise RefusedError("answer", topic, f"{peer} runs no sentinel of this cluster")
        answer = self._answers.get(topic)
        if answer is None:
            raise RefusedError("answer", topic, "this srd knows no such question")
        return await answer(peer, body)

    async def _answer_lease(self, peer: str, _: Body) -> Body:
        return self._bequest.answer(peer)

    async def _answer_switchover(self, peer: str, body: Body) -> Body:
        to, by = body.get("to"), body.get("by")
        return await self.switch_over(
            to if isinstance(to, str) else None,
            dry_run=body.get("dry_run") is True,
            by=by[:MOST_TOLD] if isinstance(by, str) else peer,
        )

    async def _answer_ending(self, peer: str, _: Body) -> Body:
        own = endpoint_of(self._config, self._config.node(peer))
        self._losses.note(Loss(ChangeKind.OPERATOR, own, boottime(), f"srd was stopped on {peer}", peer))
        return {}

    async def _answer_history(self, peer: str, body: Body) -> Body:
        return self._chronicle.answer(peer, body)

    def _look_at_redis(self) -> None:
        self.observer.loop.wake()

    def _judge(self) -> None:
        self.observer.judge()

    async def _have_it_replaced(self) -> None:
        """Whenever this node's redis has died as the primary: have the sentinels choose another at once."""
        while True:
            await self._died.wait()
            self._died.clear()
            since = self._death.at if self._death is not None else None
            replace = partial(self.failover.replace, self._node, "its redis has ended", since=since)
            await contained("failover", replace)
            self._seen_to.set()
            await asyncio.sleep(UNFIT_SECONDS)
            if self._situation().view.named == endpoint_of(self._config, self._node):
                await contained("failover", replace)  # they may not have been of one mind, and it is told again


async def _leads(redis: RedisClient) -> bool:
    """Whether a redis answers that it is primary."""
    try:
        return await redis.role() is Role.PRIMARY
    except RespError:
        return False
