"""Who is primary, as far as this node has a say in it: watches, fences, has a dead primary replaced, takes over.

Wires the parts of this wing to one another. A node without redis, an arbiter, watches and hurries the sentinels only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from srd.cluster import Config, Node
from srd.ha.custody import Custody
from srd.ha.failover import Failover
from srd.ha.fence import Fence
from srd.ha.fleet import Fleet
from srd.ha.lease import endpoint_of
from srd.ha.observe import Observer
from srd.ha.promotion import LEASE_TOPIC, AskPeer, Promotion
from srd.ha.restart import Death
from srd.model import Body, RefusedError, Role, Secrets, Service
from srd.reconcile import Loop, contained
from srd.state import Situation, Store

# How often it is looked whether the primary is to be fenced, or replaced: at what is known, nobody is asked for it.
WATCH_SECONDS: Final = 0.1
FENCE_PASS_SECONDS: Final = 5.0
# A choice of the sentinels is waited for, and before that for them to see who has most.
REPLACING_SECONDS: Final = 15.0


class Primacy:
    """The parts, and what the daemon runs of them: `bodies` side by side.

    `situation` is asked for every judgement, `ask_peer` asks another node's srd, `wake` is called at each event.
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
    ) -> None:
        self._config, self._node, self._situation = config, node, situation
        self._custody = Custody()
        self._fleet = Fleet(config, secrets)
        self._died = asyncio.Event()  # this node's redis, as a primary
        self.failover = Failover(self._fleet, situation=situation, wake=self.look)
        hearers = [self.failover.heard]
        silence = Loop("silence", self.failover.watch, resync=WATCH_SECONDS, timeout=REPLACING_SECONDS)
        self.bodies: list[Callable[[], Coroutine[Any, Any, None]]] = [silence.run]
        own = self._fleet.redises.get(node.name)
        if own is not None:
            promotion = Promotion(self._fleet, node, custody=self._custody, ask_peer=ask_peer, wake=self.look)
            hearers.append(promotion.heard)
            fence = Fence(own, store, situation=situation, wake=self.look)
            fencing = Loop("fence", fence.reconcile, resync=WATCH_SECONDS, timeout=FENCE_PASS_SECONDS)
            self.bodies += [fencing.run, promotion.run, self._have_it_replaced]
        self.observer = Observer(config, node, secrets, store, wake=(wake,), heard=hearers, custody=self._custody)
        self.bodies.append(self.observer.run)
        self.loops = (self.observer.loop,)

    def adopt(self, config: Config) -> None:
        """Act on a changed file from now on; what follows from the number of nodes, redis and sentinel are told."""
        self._config = config
        self._fleet.adopt(config)
        self.observer.adopt(config)

    async def close(self) -> None:
        """Close the connections by which it acts; those by which it watches end with its bodies."""
        await self._fleet.close()

    def look(self) -> None:
        """Have everything asked again soon."""
        self.observer.wake()

    def died(self) -> Death:
        """Take note that this node's redis has ended; return when, and as what. A primary is replaced at once."""
        death = self.observer.death()
        if death.as_role is Role.PRIMARY and len(self._config.redis_nodes) > 1:
            self._died.set()
        return death

    @property
    def deposed(self) -> bool:
        """Whether this node's redis was primary when it last answered, and a majority names another one now."""
        lease = self._situation().view.lease
        named = lease.primary if lease is not None else None
        return self.observer.last_role is Role.PRIMARY and named not in (None, endpoint_of(self._config, self._node))

    async def answer(self, peer: str, topic: str, _body: Body) -> Body:
        """Answer another node's srd; `RefusedError` says why not."""
        if topic != LEASE_TOPIC:
            raise RefusedError("answer", topic, "this srd knows no such question")
        return {"seconds": self._give_lease(peer)}

    def _give_lease(self, peer: str) -> float:
        """Give what is left of this node's lease to the node whose redis was promoted; return for how many seconds."""
        s = self._situation()
        child, redis, lease = s.view.children.get(Service.REDIS), s.view.redis, s.view.lease
        runs = child is not None and child.pid is not None
        if runs and (redis is None or redis.role is not Role.REPLICA):
            raise RefusedError("give", "the lease", f"the redis of {s.node.name} may be primary itself")
        named = lease.primary if lease is not None else None
        heir = s.config.node(peer)
        others = named not in (None, endpoint_of(s.config, s.node), endpoint_of(s.config, heir))
        seconds = 0.0 if others else self._custody.give(peer, s.now)
        if seconds <= 0:
            raise RefusedError("give", "the lease", f"{s.node.name} has none")
        self.look()
        return seconds

    async def _have_it_replaced(self) -> None:
        """Whenever this node's redis has died as the primary: have the sentinels choose another at once."""
        while True:
            await self._died.wait()
            self._died.clear()
            await contained("failover", partial(self.failover.replace, self._node, "its redis has ended"))
