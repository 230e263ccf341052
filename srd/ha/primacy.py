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
from srd.cluster import LEASE_SECONDS, Config, Node
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
from srd.ha.moves import LONGEST_LEAVE_SECONDS, SWITCHOVER_TOPIC, Moves
from srd.ha.observe import Observer
from srd.ha.progress import Stock
from srd.ha.promotion import HEIR_TOPIC, LEASE_TOPIC, SUCCEED_TOPIC, Promotion
from srd.ha.redis import RedisClient
from srd.ha.restart import Death
from srd.ha.switchover import Switchover
from srd.model import AskPeer, Body, Endpoint, RefusedError, Role, Secrets, SrdError
from srd.reconcile import Loop, boottime, contained
from srd.state import Redis, Situation, Store, View

log = structlog.get_logger(__name__)

# How often it is looked whether the primary is to be fenced, or replaced: at what is known, nobody is asked for it.
# While everybody answers nothing can become due.
WATCH_SECONDS: Final = 0.1
CALM_SECONDS: Final = 1.0
FENCE_PASS_SECONDS: Final = 5.0
COMPARING_SECONDS: Final = 0.5
# A choice of the sentinels is waited for, and before that for them to see who has most.
REPLACING_SECONDS: Final = 15.0
ENDING_TOPIC: Final = "ending"
ENDING_SECONDS: Final = 0.5
# With what the other nodes are told then, and the vote that follows the end of redis.
LONGEST_FAREWELL_SECONDS: Final = LONGEST_LEAVE_SECONDS + ENDING_SECONDS + REPLACING_SECONDS


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
        self._config, self._node, self._store, self._situation = config, node, store, situation
        self._custody = Custody()
        self._ask_peer = ask_peer
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
        bequest = Bequest(custody=self._custody, losses=self._losses, situation=situation, judge=self._judge)
        self._answers: dict[str, Callable[[str, Body], Awaitable[Body]]] = {
            LEASE_TOPIC: bequest.answer,
            ENDING_TOPIC: self._answer_ending,
            HISTORY_TOPIC: self._answer_history,
            STOCK_TOPIC: self._cold.answer_stock,
            AFTER_TOPIC: self._cold.answer_after,
        }
        own = self._fleet.redises.get(node.name)
        switchover: Switchover | None = None
        if own is not None:
            switchover, promotion = self._of_redis(own, keep_data)
            hearers.append(promotion.heard)
        self.moves = Moves(self._fleet, node, switchover=switchover, situation=situation, ask_peer=ask_peer)
        self._answers[SWITCHOVER_TOPIC] = self.moves.answer
        self.bodies.append(self.moves.run)
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
        self._primary: Endpoint | None = None  # as the watches have last looked at it
        store.on_change(self._stir)
        self.loops = (self.observer.loop,)

    def _of_redis(self, own: RedisClient, keep_data: Callable[[], Awaitable[None]]) -> tuple[Switchover, Promotion]:
        """Make the parts of a node that has redis, and have them run; return those that others use."""
        promotion = Promotion(
            self._fleet,
            self._node,
            store=self._store,
            custody=self._custody,
            ask_peer=self._ask_peer,
            look=self._look_at_redis,
            observed=self._take_in,
            judge=self._judge,
        )
        switchover = Switchover(
            self._fleet,
            self._node,
            custody=self._custody,
            losses=self._losses,
            situation=self._situation,
            ask_peer=self._ask_peer,
            judge=self._judge,
            look=self.look,
        )
        fence = Fence(own, self._store, situation=self._situation, wake=self.look, keep_data=keep_data)
        fencing = Loop("fence", fence.reconcile, resync=self._pace, timeout=FENCE_PASS_SECONDS)
        comparing = Loop("cold start", self._cold.reconcile, resync=COMPARING_SECONDS, timeout=REPLACING_SECONDS)
        self._answers |= {HEIR_TOPIC: promotion.expect, SUCCEED_TOPIC: promotion.succeed}
        self._watches.append(fencing)
        self.bodies += [comparing.run, fencing.run, promotion.run, promotion.gather, self._have_it_replaced]
        return switchover, promotion

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

    async def leave(self) -> None:
        """Move the primary away, if it is here, because this node is about to stop; tell the others if it stays."""
        if not await self.moves.leave():
            await self.farewell()

    async def answer(self, peer: str, topic: str, body: Body) -> Body:
        """Answer another node's srd; `RefusedError` says why not. A client's has no say in who is primary."""
        if all(voter.name != peer for voter in self._config.voters):
            raise RefusedError("answer", topic, f"{peer} runs no sentinel of this cluster")
        answer = self._answers.get(topic)
        if answer is None:
            raise RefusedError("answer", topic, "this srd knows no such question")
        return await answer(peer, body)

    async def _answer_ending(self, peer: str, _: Body) -> Body:
        own = endpoint_of(self._config, self._config.node(peer))
        self._losses.note(Loss(ChangeKind.OPERATOR, own, boottime(), f"srd was stopped on {peer}", peer))
        return {}

    async def _answer_history(self, peer: str, body: Body) -> Body:
        return self._chronicle.answer(peer, body)

    def _look_at_redis(self) -> None:
        self.observer.loop.wake()

    def _take_in(self, seen: Redis) -> None:
        self.observer.take_in(seen)

    def _judge(self) -> None:
        self.observer.judge()

    async def _is_succeeded(self, own: Endpoint) -> bool:
        """Return whether the sentinels come to name another node, while one may lead by what was given to it."""

        def decided(view: View) -> bool:
            return view.named not in (None, own) or not self._custody.may_lead(boottime())

        with contextlib.suppress(TimeoutError):
            await self._store.wait_for(decided, LEASE_SECONDS)
        return self._situation().view.named not in (None, own)

    async def _have_it_replaced(self) -> None:
        """Whenever this node's redis has died as the primary: have the sentinels choose another at once.

        Not while a successor may lead already, to whom it was switched over: they name that one soon, and whom they
        chose now would take its place.
        """
        while True:
            await self._died.wait()
            self._died.clear()
            own = endpoint_of(self._config, self._node)
            if self._custody.may_lead(boottime()) and await self._is_succeeded(own):
                self._seen_to.set()
                continue
            since = self._death.at if self._death is not None else None
            replace = partial(self.failover.replace, self._node, "its redis has ended", since=since)
            await contained("failover", replace)
            self._seen_to.set()
            await asyncio.sleep(UNFIT_SECONDS)
            if self._situation().view.named == own:
                await contained("failover", replace)  # they may not have been of one mind, and it is told again
