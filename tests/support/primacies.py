"""Three nodes' primacies over real redises and real sentinels, in one process.

What the programs do is real; the nodes' srds ask one another by a call instead of the keying channel, and supervision
is the test's: it ends a redis and says so to the srd beside it, as the pidfd would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import redis.exceptions
from redis.asyncio import Redis as RawRedis

from srd.annals import Annals
from srd.ha.lease import PROMOTED_FLAG
from srd.ha.primacy import Primacy
from srd.ha.progress import Stock
from srd.model import Body, Endpoint, Paths, RefusedError, Role, Service
from srd.reconcile import boottime, until_first
from srd.state import Child, ChildState, Lease, PeerReport, Situation, Store, View
from support.sentinels import SECRETS, Cluster, raw, sentinel_client, until, whole

NAMES = ("n1", "n2", "n3")


class Srd:
    """One node's primacy, its view, and its word on whether its redis runs."""

    def __init__(self, cluster: Cluster, name: str, others: dict[str, Srd]) -> None:
        state = cluster.root / f"state-{name}"
        state.mkdir(exist_ok=True)
        self.annals = Annals(Paths(state, state, state, state), cluster.config.cluster)
        self.name = name
        self.node = cluster.config.node(name)
        self.config = cluster.config
        self.store = Store(boottime())
        self.others = others
        self.kept = 0
        self.write_children = self.store.writer("children")
        self.write_peers = self.store.writer("peers")
        self.write_drained = self.store.writer("drained")
        self.write_followed = self.store.writer("followed")
        self.write_pause = self.store.writer("pause")
        self.alive()
        self.primacy = Primacy(
            cluster.config,
            self.node,
            SECRETS,
            self.store,
            situation=self.situation,
            ask_peer=self.ask,
            wake=lambda: None,
            keep_data=self.keep_data,
            stock=self.stock,
            after=self.after,
            saved=self.annals.load(),
            save=self.annals.save,
        )

    async def keep_data(self) -> None:
        self.kept += 1

    async def stock(self) -> Stock:
        return Stock(self.name, data=True, able=True, ready=True, chosen=True)

    async def after(self, _end: str) -> int | None:
        return None

    def situation(self) -> Situation:
        return Situation(self.config, self.node, self.store.view(), boottime())

    async def ask(self, peer: str, topic: str, body: Body, _seconds: float) -> Body:
        if peer not in self.others:
            raise RefusedError("ask", peer, "it is gone")
        return await self.others[peer].primacy.answer(self.name, topic, body)

    def hear(self, other: Srd) -> None:
        """Take a heartbeat of another node's srd."""
        known, redis = self.store.view().peers, other.store.view().redis
        role, offset = (redis.role, redis.offset) if redis is not None else (Role.UNKNOWN, None)
        word = PeerReport(other.name, boottime(), "0", initialized=True, role=role, healthy=True, offset=offset)
        replid = redis.replid if redis is not None else ""
        word = replace(word, drained=other.store.view().drained, replid=replid)
        self.write_peers({**known, other.name: word})

    def alive(self) -> None:
        self.write_children({Service.REDIS: Child(ChildState.READY, pid=1)})

    def redis_died(self, *, asked: bool = False) -> None:
        self.write_children({Service.REDIS: Child(ChildState.BACKOFF, last_exit="killed by SIGKILL")})
        self.primacy.died(asked=asked)

    @property
    def lease(self) -> Lease | None:
        return self.store.view().lease

    def leads(self) -> bool:
        """Whether it would say yes to /primary now, as far as this wing has a say in it."""
        view, now = self.store.view(), boottime()
        is_primary = view.redis is not None and view.redis.role is Role.PRIMARY
        runs = view.children[Service.REDIS].pid is not None
        return runs and is_primary and not view.fenced and self.lease is not None and now < self.lease.expires

    async def until(self, predicate: Callable[[View], bool], seconds: float = 40) -> View:
        return await self.store.wait_for(predicate, seconds)


async def heartbeats(srd: Srd) -> None:
    while True:
        for other in srd.others.values():
            other.hear(srd)
        await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def running(*srds: Srd) -> AsyncIterator[None]:
    """Run them until the block ends; a defect of one fails the test."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(until_first(partial(heartbeats, srd), *srd.primacy.bodies)) for srd in srds]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for srd in srds:
                await srd.primacy.close()


async def three(cluster: Cluster) -> dict[str, Srd]:
    """Return three that do not run yet, over a cluster that does from now on and whose primary is n1's."""
    await whole(cluster)
    made: dict[str, Srd] = {}
    made.update({name: Srd(cluster, name, made) for name in NAMES})
    return made


class Watcher:
    """Looks every 5 ms who would say yes, and keeps every moment at which two would."""

    def __init__(self, srds: dict[str, Srd]) -> None:
        self._srds = srds
        self.doubles: list[tuple[float, list[str]]] = []

    async def run(self) -> None:
        while True:
            leaders = [name for name, srd in self._srds.items() if srd.leads()]
            if len(leaders) > 1:
                self.doubles.append((time.monotonic(), leaders))
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def watched(srds: dict[str, Srd], *names: str) -> AsyncIterator[None]:
    """Run these nodes' srds, and once n1 leads the block; no two of all may ever say yes at one instant."""
    watcher = Watcher(srds)
    async with running(*(srds[name] for name in names)), asyncio.TaskGroup() as group:
        if "n1" in names:
            await srds["n1"].until(lambda _: srds["n1"].leads())
        task = group.create_task(watcher.run())
        yield
        task.cancel()
    assert watcher.doubles == []


def show(**figures: float) -> None:
    """Print what was measured, in seconds, for people."""
    print(json.dumps({name: round(seconds, 3) for name, seconds in figures.items()}))  # noqa: T201


async def settled(cluster: Cluster, primary: Endpoint, seconds: float = 20, among: tuple[str, ...] = NAMES) -> None:
    """Wait until each of these sentinels names this primary, judges it as configured, and has ended its failover."""
    for name in among:
        async with sentinel_client(cluster, name) as asked:

            async def done(asked: object = asked) -> bool:
                answer = await asked.ask()  # type: ignore[attr-defined]
                own = answer.primary == primary and PROMOTED_FLAG not in answer.flags
                return own and answer.down_after == cluster.config.sentinel.down_after

            await until(done, seconds)


async def leader(srds: dict[str, Srd], among: tuple[str, ...], seconds: float = 20) -> Srd:
    async with asyncio.timeout(seconds):
        while True:
            found = [srds[name] for name in among if srds[name].leads()]
            if found:
                return found[0]
            await asyncio.sleep(0.005)


async def writes(cluster: Cluster, name: str, seconds: float = 10) -> None:
    client = raw(cluster, name)
    try:
        async with asyncio.timeout(seconds):
            while True:
                with contextlib.suppress(Exception):
                    await client.set("after", "1")
                    return
                await asyncio.sleep(0.005)
    finally:
        await client.aclose()


class Writer:
    """An application that writes without a pause, finds the primary by asking who says yes, and keeps its record."""

    def __init__(self, cluster: Cluster, srds: dict[str, Srd], number: int) -> None:
        self._cluster, self._srds, self._key = cluster, srds, f"writer:{number}"
        self.acknowledged: list[int] = []
        self.gap = 0.0
        self.ends = False  # redis-py loses a cancellation now and then

    async def run(self) -> None:
        value, last = 0, time.monotonic()
        client: RawRedis | None = None
        leading = ""
        while not self.ends:
            leader = next((name for name, srd in self._srds.items() if srd.leads()), None)
            if leader is None:
                await asyncio.sleep(0.001)
                continue
            if leader != leading or client is None:
                if client is not None:
                    await client.aclose()
                client, leading = raw(self._cluster, leader), leader
            value += 1
            try:
                await client.rpush(self._key, value)
            except redis.exceptions.RedisError:
                await asyncio.sleep(0)
                continue
            now = time.monotonic()
            self.gap, last = max(self.gap, now - last), now
            self.acknowledged.append(value)
        if client is not None:
            await client.aclose()

    async def lost(self, name: str) -> set[int]:
        client = raw(self._cluster, name)
        try:
            return set(self.acknowledged) - {int(value) for value in await client.lrange(self._key, 0, -1)}
        finally:
            await client.aclose()


@contextlib.asynccontextmanager
async def writing(cluster: Cluster, srds: dict[str, Srd], count: int = 4) -> AsyncIterator[list[Writer]]:
    writers = [Writer(cluster, srds, number) for number in range(count)]
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(writer.run())
        yield writers
        for writer in writers:
            writer.ends = True


async def told(cluster: Cluster, srd: Srd, priority: int) -> None:
    """Wait until a node's redis says that priority of itself, and every sentinel has seen it."""
    await srd.until(lambda view: view.redis is not None and view.redis.priority == priority)
    for name in NAMES:
        async with sentinel_client(cluster, name) as asked:

            async def seen(asked: object = asked) -> bool:
                shown = await asked.priorities(1)  # type: ignore[attr-defined]
                return bool(shown.get(cluster.endpoint(srd.name)) == priority)

            await until(seen)
