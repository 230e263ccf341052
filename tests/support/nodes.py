"""Real nodes on loopback for the tests of supervision: real bundles, real programs, directories of their own."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.asyncio
import redis.exceptions

from srd.cluster import Config, Node
from srd.desired import Start
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.sentinel import SentinelClient
from srd.model import NodeKind, Paths, Secrets, Service, SrdError
from srd.reconcile import Loop, boottime, until_first
from srd.state import ChildState, Situation, Store, View
from srd.supervise.adopt import REGISTER_NAME, Register, Verdict, look_up
from srd.supervise.programs import listen_endpoints
from srd.supervise.running import Timing
from srd.supervise.services import Services
from srd.systemd import FdStore, Notifier
from srd.trust.bundle import load_bundle
from support.clusters import cluster_toml, make_bundles, paths_of
from support.directories import passable
from support.patience import retrying

PATIENCE = 20.0
QUICK = Timing(start_timeout=10, probe_timeout=1, probe_interval=0.1, probe_failures=3, kill_timeout=5)

Client = redis.asyncio.Redis


def has_joined(node: Node, view: View) -> bool:
    """What the tests take for having been part of the cluster: the service that matters was ready once."""
    child = view.children.get(Service.REDIS if node.kind is NodeKind.REDIS else Service.SENTINEL)
    return child is not None and child.state is ChildState.READY


@dataclass
class Member:
    """One node: what it was given, and its supervisor when there is one."""

    config: Config
    node: Node
    paths: Paths
    secrets: Secrets
    start: Start
    deaths: list[Service] = field(default_factory=list)
    deposed: bool = False

    async def start_of_redis(self) -> Start:
        return self.start

    def client(self, service: Service = Service.REDIS, user: str | None = "srd", password: str | None = None) -> Client:
        port = self.config.redis.port if service is Service.REDIS else self.config.sentinel.port
        if service is Service.SENTINEL:
            user, password = None, self.secrets.sentinel_password.reveal()
        elif user == "srd":
            password = self.secrets.srd_password.reveal()
        return redis.asyncio.Redis(
            host=str(self.node.address),
            port=port,
            username=user,
            password=password,
            decode_responses=True,
            socket_timeout=5,
        )

    async def ask(self, *command: str, service: Service = Service.REDIS) -> Any:
        async with self.client(service) as client:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    def probe(self, service: Service) -> Callable[[], Awaitable[None]]:
        """Ask as srd does. redis-py's client would not do: cancelled while it closes, it leaves its connection open."""

        async def resp() -> None:
            client: RedisClient | SentinelClient
            if service is Service.REDIS:
                client = RedisClient(endpoint_of(self.config, self.node), self.secrets)
                question = client.ping
            else:
                client = SentinelClient(self.config, self.node, self.secrets)
                question = client.known
            try:
                await question()
            finally:
                await client.close()

        return resp

    def supervisor(
        self,
        wake: Callable[[], None],
        store: Store,
        timing: Timing = QUICK,
        handed: Iterable[tuple[str, int]] = (),
    ) -> Services:
        return Services(
            config=self.config,
            node=self.node,
            paths=self.paths,
            secrets=self.secrets,
            store=store,
            start=self.start_of_redis,
            probes={service: self.probe(service) for service in (Service.REDIS, Service.SENTINEL)},
            situation=lambda: Situation(self.config, self.node, store.view(), boottime()),
            joined=lambda: has_joined(self.node, store.view()),
            died=self.deaths.append,
            wake=wake,
            fds=FdStore(Notifier(None), handed),
            deposed=lambda: self.deposed,
            timing=timing,
        )

    @contextlib.asynccontextmanager
    async def supervised(
        self, timing: Timing = QUICK, *, leave: bool = False, handed: Iterable[tuple[str, int]] = ()
    ) -> AsyncIterator[Supervised]:
        """Run a supervisor; at the end its children end with it, unless they are to be left.

        `handed` is what a service manager has kept for it.
        """
        store = Store(boottime())
        loop: Loop | None = None
        services = self.supervisor(lambda: loop.wake() if loop else None, store, timing, handed)
        loop = Loop("services", services.reconcile, resync=5, timeout=PATIENCE)
        try:
            async with background(services.run, loop.run):
                try:
                    yield Supervised(self, services, store, loop)
                finally:
                    if not leave:
                        await services.stop_all()
        finally:
            services.release()

    def end_leftovers(self) -> None:
        """End what this node's register says is still there, and nothing else."""
        with contextlib.suppress(SrdError):
            for record in Register(self.paths.run_dir / REGISTER_NAME).load().values():
                found = look_up(record)
                if found.verdict is Verdict.ALIVE and found.pidfd is not None:
                    signal.pidfd_send_signal(found.pidfd, signal.SIGKILL)
                    os.close(found.pidfd)


@dataclass
class Supervised:
    """A node whose supervisor runs."""

    member: Member
    services: Services
    store: Store
    loop: Loop

    async def all_ready(self) -> View:
        return await self.until(
            lambda view: (
                set(view.children) == set(Service)
                and all(child.state is ChildState.READY for child in view.children.values())
            )
        )

    async def until(self, predicate: Callable[[View], bool]) -> View:
        return await self.store.wait_for(predicate, PATIENCE)

    def pid(self, service: Service) -> int:
        pid = self.store.view().children[service].pid
        assert pid is not None
        return pid

    def pids(self) -> dict[Service, int | None]:
        return {service: child.pid for service, child in self.store.view().children.items()}


@contextlib.contextmanager
def world(*, nodes: int = 1, redis_extra: str = "", edit: Callable[[str], str] = str) -> Iterator[list[Member]]:
    """Make the nodes of a cluster; the first one is to be primary, the others follow it. `edit` changes its file."""
    members: list[Member] = []
    with passable() as root:
        try:
            text = edit(cluster_toml(nodes=nodes, extra=sections(redis_extra)))
            for name, bundle in make_bundles(root, text).items():
                node = bundle.config.node(name)
                first = listen_endpoints(bundle.config, bundle.config.nodes[0], Service.REDIS)[0]
                start = Start() if not members else Start(primary=first)
                members.append(Member(bundle.config, node, paths_of(root, name), bundle.secrets, start))
            yield members
        finally:
            for member in members:
                member.end_leftovers()


def member_at(root: Path, name: str) -> Member:
    """Return a node of a cluster whose bundles were made before; it starts as primary."""
    paths = paths_of(root, name)
    bundle = load_bundle(paths, dt.datetime.now(dt.UTC))
    return Member(bundle.config, bundle.node, paths, bundle.secrets, Start())


def sections(redis_extra: str = "") -> str:
    """Return the tables of cluster.toml that make it run here, on free ports."""
    redis_port, sentinel_port, tls_port = free_ports(3)
    return (
        f'[redis]\nport = {redis_port}\nuser = "redis"\n{redis_extra}\n'
        f'[sentinel]\nport = {sentinel_port}\nuser = "redis"\ndown_after = 4\n'
        f'[tls]\nport = {tls_port}\nuser = "stunnel4"\n'
    )


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has on any loopback address now, below those that the kernel gives to clients."""
    found: list[int] = []
    candidate = 20000 + os.getpid() % 10000
    while len(found) < count:
        candidate = candidate + 1 if candidate < 32000 else 20000
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", candidate))
            except OSError:
                continue
        found.append(candidate)
    return found


@contextlib.asynccontextmanager
async def background(*bodies: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run the bodies side by side while the block runs; cancel and await them at its end."""
    task = asyncio.ensure_future(until_first(*bodies))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def freeze(pid: int) -> None:
    """Stop a child of this process as SIGSTOP does, and return when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


class NotYetError(SrdError):
    """The outside world is not as a test waits for it to be."""


async def eventually(check: Callable[[], Awaitable[bool]], what: str, seconds: float = PATIENCE) -> None:
    """Ask the outside world, which sends no events, until the answer is yes."""
    async for attempt in retrying(NotYetError, seconds=seconds):
        with attempt:
            if not await check():
                raise NotYetError("wait for", what, f"not within {seconds:g} s")
