"""What a node does besides protecting its links: its redis, sentinel and stunnel, and the watch over the cluster.

Wires the wings of supervision and of high availability to one another. A client has none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

from srd.annals import Annals
from srd.cluster import NEVER_PRIORITY, Config, Node
from srd.control import documents
from srd.desired import Start
from srd.ha import restart
from srd.ha.primacy import LONGEST_FAREWELL_SECONDS, Primacy
from srd.ha.rebuild import REBUILD_TOPIC, against_rebuild
from srd.ha.repair import Doctor
from srd.ledger import Ledger
from srd.maintenance import PAUSE_TOPIC, Maintenance
from srd.model import AskPeer, Body, Endpoint, Paths, RefusedError, Role, Secrets, Service, SrdError, TimedOutError
from srd.reconcile import Loop, boottime
from srd.rolling import RESTART_TOPIC, STATE_TOPIC, Restarts
from srd.setback import Setback
from srd.state import ChildState, Redis, Situation, Store, View, services_of
from srd.supervise.disks import Disks
from srd.supervise.services import Services
from srd.systemd import FdStore

RESYNC_SECONDS: Final = 0.5
# A start of all three children, on a machine where each takes seconds.
PASS_SECONDS: Final = 60.0

DISKS_RESYNC_SECONDS: Final = 5.0
DISKS_PASS_SECONDS: Final = 30.0

DOCTOR_RESYNC_SECONDS: Final = 60.0
DOCTOR_PASS_SECONDS: Final = 10.0

# A sentinel is asked about as often. A start of it may have to wait for a pass of all children.
CLOCK_RESYNC_SECONDS: Final = 0.5
CLOCK_PASS_SECONDS: Final = PASS_SECONDS

NOTING_SECONDS: Final = 1.0
NOTING_PASS_SECONDS: Final = 10.0

# As often as a heartbeat comes, which may say something new of it.
PAUSE_RESYNC_SECONDS: Final = 1.0
PAUSE_PASS_SECONDS: Final = 10.0

# redis is told of it by the next look at it, which is woken.
PRIORITY_SECONDS: Final = 3.0
# For another srd to have ended its sentinel, which has 5 s for that, after the pass that is under way there.
REBUILDING_SECONDS: Final = 30.0

Probe = Callable[[], Coroutine[Any, Any, None]]


class Duties:
    """The services of a node and their observer; the daemon runs `bodies` side by side."""

    def __init__(
        self,
        *,
        config: Config,
        node: Node,
        paths: Paths,
        secrets: Secrets,
        store: Store,
        situation: Callable[[], Situation],
        fds: FdStore,
        ask_peer: AskPeer,
        begin_anew: Callable[[], None],
    ) -> None:
        self._config, self._node = config, node
        self._situation = situation
        self._store, self._view = store, store.view
        annals = Annals(paths, config.cluster)
        self._ledger = Ledger(paths, situation, torn=self._note_torn)
        self._primacy = Primacy(
            config,
            node,
            secrets,
            store,
            situation=situation,
            ask_peer=ask_peer,
            wake=self._wake,
            keep_data=self._keep_data,
            stock=self._ledger.stock,
            after=self._ledger.after,
            saved=annals.load(),
            save=annals.save,
        )
        self._ask_peer = ask_peer
        self._doctor = Doctor(config, secrets, store.writer("findings"), rebuild=self._have_sentinel_rebuilt)
        self._maintenance = Maintenance(paths, store, ask_peer)
        self._services = Services(
            config=config,
            node=node,
            paths=paths,
            secrets=secrets,
            store=store,
            start=self._start_of_redis,
            probes=self._probes(),
            situation=situation,
            joined=lambda: restart.has_joined(node, store.view()),
            died=self._note_death,
            wake=self._wake,
            fds=fds,
            deposed=lambda: self._primacy.deposed,
        )
        self._restarts = Restarts(
            node,
            situation=situation,
            restart=self._services.restart,
            begin_anew=begin_anew,
            ask_peer=ask_peer,
        )
        self._loop = Loop("services", self._services.reconcile, resync=RESYNC_SECONDS, timeout=PASS_SECONDS)
        look = Disks(paths, store.writer("disks"), self._services.retry).reconcile
        disks = Loop("disks", look, resync=DISKS_RESYNC_SECONDS, timeout=DISKS_PASS_SECONDS)
        doctor = Loop("doctor", self._doctor.watch, resync=DOCTOR_RESYNC_SECONDS, timeout=DOCTOR_PASS_SECONDS)
        note = Loop("progress", self._ledger.note, resync=NOTING_SECONDS, timeout=NOTING_PASS_SECONDS)
        learn = Loop("pause", self._learn, resync=PAUSE_RESYNC_SECONDS, timeout=PAUSE_PASS_SECONDS)
        look = Setback(situation, self._services.restart).look
        clock = Loop("the sentinel's clock", look, resync=CLOCK_RESYNC_SECONDS, timeout=CLOCK_PASS_SECONDS)
        loops = (self._loop.run, disks.run, doctor.run, learn.run, note.run, clock.run)
        self.bodies = (*self._primacy.bodies, self._services.run, self._restarts.run, *loops)
        self.loops = (*self._primacy.loops, self._loop)

    def _note_torn(self, run_id: str, now: float) -> bool:
        return self._primacy.observer.torn.found(run_id, now)

    async def ready(self) -> None:
        """Return when the services have been looked at; they may wait for peers for long."""
        await self._loop.ready()

    async def adopt(self, config: Config) -> None:
        """Take a changed file in; what follows from the number of nodes, the observer sets in redis and sentinel."""
        self._config = config
        self._doctor.adopt(config)
        await self._primacy.adopt(config)
        await self._services.adopt(config)

    async def stop(self) -> None:
        """Move the primary away if it is here, then end the services in order."""
        await self._primacy.leave()
        await self._services.stop_all()
        await self._primacy.seen_to()

    async def close(self) -> None:
        """Close the connections by which it acts on other nodes."""
        await self._primacy.close()

    async def switch_over(self, to: str | None, *, dry_run: bool, by: str | None = None) -> Body:
        """Move the primary to another node; what is returned and raised is `Primacy.switch_over`'s.

        `by` says which process of this node has asked.
        """
        name = self._node.name
        return await self._primacy.moves.switch_over(to, dry_run=dry_run, by=f"{name} ({by})" if by else name)

    async def drain(self) -> documents.Document:
        """Take this node out of service, after the primary was moved away from it; what it answers is `moved`.

        That is None, or what `switch_over` answered. `SrdError` when the primary cannot be moved: nothing was changed.
        Asked again, it is done again.
        """
        if Service.REDIS not in services_of(self._node):
            reason = "it runs no redis, so nobody is led to it"
            raise RefusedError("drain", self._node.name, reason)
        moved = await self._primacy.moves.move_away()
        await self._maintenance.drain()
        return {"moved": moved, "known": await self._priority_is_told(lambda redis: redis.priority == NEVER_PRIORITY)}

    async def undrain(self) -> documents.Document:
        """Take this node into service again."""
        await self._maintenance.undrain()
        never = self._config.node(self._node.name).priority == NEVER_PRIORITY

        def again(redis: Redis) -> bool:
            return never or redis.role is Role.PRIMARY or redis.priority != NEVER_PRIORITY

        return {"known": await self._priority_is_told(again)}

    async def _priority_is_told(self, right: Callable[[Redis], bool]) -> bool:
        """Return whether redis, if it runs, tells the sentinels by now whether it may be primary."""
        self._primacy.look()
        try:
            await self._store.wait_for(lambda v: v.redis is None or right(v.redis), PRIORITY_SECONDS)
        except TimeoutError:
            return False
        return True

    async def pause(self, seconds: float) -> documents.Document:
        """Pause every srd of the cluster for so long, or with 0 end that; return who knows, and why others do not."""
        s = self._situation()
        told = await self._maintenance.pause(seconds, s)
        missed = {name: reason for name, reason in told.items() if reason is not None}
        return {"until_timestamp": self._view().pause.until, "told": sorted(told.keys() - missed), "missed": missed}

    async def _learn(self) -> None:
        await self._maintenance.learn(self._situation())

    async def answer(self, peer: str, topic: str, body: Body) -> Body:
        """Answer another node's srd; `RefusedError` says why not.

        A client is a member of the mesh and no part of the cluster: its certificate is an application's.
        """
        if not any(voter.name == peer for voter in self._config.voters):
            raise RefusedError("answer", topic, f"{peer} is a client, which has no say here")
        if topic == PAUSE_TOPIC:
            return await self._maintenance.told(body, self._situation())
        if topic in (RESTART_TOPIC, STATE_TOPIC):
            return self._restarts.answer(topic, body)
        if topic == REBUILD_TOPIC:
            try:
                await self._rebuild_sentinel(body)
            except RefusedError as error:
                return {"why": error.reason}
            return {}
        return await self._primacy.answer(peer, topic, body)

    async def restart(self, service: Service, *, force: bool, seconds: float) -> int:
        """End a service and have it started again; return its new pid when it is ready.

        Raises `RefusedError` for a service that this node has not, or for a primary's redis without `force`: its end
        is a failover. `TimedOutError` when it is not ready within so many seconds.
        """
        if service not in services_of(self._node):
            raise RefusedError("restart", service, f"{self._node.name} runs none")
        redis = self._view().redis
        if service is Service.REDIS and not force and redis is not None and redis.role is Role.PRIMARY:
            reason = "it is the primary's, so the cluster would fail over to another node"
            raise RefusedError("restart", service, reason, "--force does it all the same")
        former = self._view().children[service].pid
        await self._services.restart(service)

        def ready(view: View) -> bool:
            child = view.children[service]
            return child.state is ChildState.READY and child.pid not in (None, former)

        try:
            view = await self._store.wait_for(ready, seconds)
        except TimeoutError:
            child = self._view().children[service]
            reason = f"after {seconds:g} s it is {child.in_words}"
            raise TimedOutError("restart", service, reason, "srd children says more") from None
        return view.children[service].pid or 0

    async def on_node(self, node: str, topic: str, body: Body) -> Body:
        """Have a node of the cluster, this one or another, restart a program or say how it is: `Restarts.on`."""
        return await self._restarts.on(node, topic, body)

    async def examine(self, *, repair: bool, dry_run: bool) -> documents.Document:
        """Answer `srd doctor`: what is wrong with what the sentinels keep, and with `repair` what was done about it.

        With `dry_run` too, what would be done. `RefusedError` when a repair would do harm now.
        """
        done: tuple[str, ...] = ()
        if repair:
            mended = await self._doctor.repair(dry_run=dry_run)
            done, seen = mended.done, mended.after
        else:
            seen = await self._doctor.examine()
        return documents.examination(seen.findings, seen.unsettled, done)

    async def _have_sentinel_rebuilt(self, node: Node, wish: Body) -> None:
        if node == self._node:
            await self._rebuild_sentinel(wish)
            return
        answer = await self._ask_peer(node.name, REBUILD_TOPIC, wish, REBUILDING_SECONDS)
        if "why" in answer:
            raise RefusedError("rebuild", f"the sentinel of {node.name}", str(answer["why"]))

    async def _rebuild_sentinel(self, wish: Body) -> None:
        """Have this node's sentinel begin anew, as a doctor wishes; `RefusedError` where that is not so any more."""
        asked = boottime()

        def primary() -> Endpoint:
            s = self._situation()
            reason = against_rebuild(s, wish, asked)
            if reason is not None or s.view.named is None:
                raise RefusedError("rebuild", f"the sentinel of {self._node.name}", reason or "nobody is named")
            return s.view.named

        primary()  # a refusal need not wait for sentinel's turn
        await self._services.rebuild_sentinel(primary)

    @property
    def longest_stop(self) -> float:
        """How many seconds `stop` may take, a pass that it has to wait for included."""
        return LONGEST_FAREWELL_SECONDS + PASS_SECONDS + self._services.longest_stop

    def release(self) -> None:
        """Let go of the children without ending them."""
        self._services.release()

    def _wake(self) -> None:
        self._loop.wake()

    async def _keep_data(self) -> None:
        await self._services.keep_data()

    def _probes(self) -> dict[Service, Probe]:
        """Return how redis and sentinel are asked whether they do their jobs; only ha/ speaks to them."""
        probes: dict[Service, Probe] = {}
        observer = self._primacy.observer
        redis = observer.redis
        if redis is not None:
            probes[Service.REDIS] = redis.ping
        own = observer.sentinels.get(self._node.name)
        if own is not None:
            probes[Service.SENTINEL] = own.known
        return probes

    async def _start_of_redis(self) -> Start:
        child = self._view().children.get(Service.REDIS)
        runs = child is not None and child.pid is not None
        # To look costs a thread that becomes redis' user, 5 ms; of one that runs it is known.
        try:
            holds_data = runs or await self._ledger.holds_data()
        except SrdError as error:
            return Start(hold=str(error))  # the sentinel is needed all the same
        return self._ledger.weighed(self._primacy.start(holds_data=holds_data))

    def _note_death(self, service: Service) -> None:
        """Remember that redis ended, and as what: a primary that died is not simply started again."""
        if service is Service.REDIS:
            child = self._view().children.get(service)
            self._primacy.died(asked=child is not None and child.state is ChildState.STOPPING)
