"""A node on loopback with real keying and a real mesh on a table of the kernel's rules, and ends that misbehave.

Of four nodes `redis-3` is the target. `redis-2` is honest and leads it. `redis-1`, which leads it too, and `redis-4`,
which it leads, belong to whoever is up to no good: their certificates are valid.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from srd.cluster import KEYING_PORT, Node
from srd.ipsec.channel import Channel, tls_context
from srd.ipsec.exchange import Exchange, Installer
from srd.ipsec.mesh import GRACE_SECONDS, Mesh
from srd.ipsec.protocol import KeyingError, Message
from srd.model import Credentials
from srd.reconcile import boottime
from srd.state import Store
from srd.trust.authority import identify
from srd.trust.bundle import Bundle
from support.clusters import cluster_toml, make_bundles
from support.kernel import FakeKernel
from support.keyings import SOFTWARE_AES, esp, keying_of, running

LEADING, HONEST, TARGET, LED = "redis-1", "redis-2", "redis-3", "redis-4"
LENGTH = struct.Struct(">I")
# In pieces, each a TLS record of its own; whether there can be an answer.
Said = tuple[list[bytes], bool]
# What the target does with an input takes milliseconds; one that it still waits with has got it stuck.
STUCK_SECONDS = 8.0
# Keys and warnings: a key that is shown is shown at once.
REMEMBERED = 64


class Journal:
    """Hears every line that is logged, and notes what none may have: a traceback, a secret."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self.faults: list[str] = []
        self.warnings = 0
        self.last_warnings: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=REMEMBERED)
        self.lines = 0
        self.keys: collections.deque[str] = collections.deque(maxlen=REMEMBERED)
        self._secrets = []
        for bundle in bundles:
            self._secrets += bundle.credentials.key.reveal().split("\n")[1:-2]
            names = (field.name for field in dataclasses.fields(bundle.secrets))
            self._secrets += [getattr(bundle.secrets, name).reveal() for name in names]

    def saw_key(self, key: bytes) -> None:
        """A key that is in use: it may show in no form."""
        self.keys += (key.hex(), repr(key)[2:-1], base64.b64encode(key).decode())

    def __call__(self, _logger: Any, _method: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        self.lines += 1
        line = repr(entry)
        if entry["level"] == "warning":
            self.warnings += 1
            self.last_warnings.append(dict(entry))
        if entry["level"] not in ("debug", "info", "warning") or entry.get("exc_info"):
            self.faults.append(f"a traceback: {line}: {entry.get('exc_info')!r}")
        if found := [secret for secret in (*self._secrets, *self.keys) if secret in line]:
            self.faults.append(f"a secret ({len(found)}) in: {line}")
        raise structlog.DropEvent

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what srd logs, and what asyncio says of tasks and transports."""
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.faults.append(record.getMessage())  # type: ignore[method-assign]
        structlog.configure(processors=[structlog.stdlib.add_log_level, self], cache_logger_on_first_use=False)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # that nobody reads any more is no news
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            logging.getLogger("asyncio").setLevel(logging.NOTSET)
            structlog.reset_defaults()


class WatchedKernel(FakeKernel):
    """Tells the journal of every key that it is given."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    async def add_sa(self, sa: Any) -> None:
        await super().add_sa(sa)
        self._journal.saw_key(sa.aead.key)


class Machine:
    """One node's kernel and the mesh that keeps it; time stands still there but for `passes`."""

    def __init__(self, bundle: Bundle, journal: Journal) -> None:
        self.kernel = WatchedKernel(journal)
        self.now = boottime()
        self.mesh = Mesh(
            config=bundle.config,
            node=bundle.node,
            socket=self.kernel,
            store=Store(0.0),
            wake=lambda: None,
            clock=lambda: self.now,
        )

    async def passes(self) -> None:
        """Make the pass that comes once the grace of old keys has ended."""
        self.now += GRACE_SECONDS + 1
        await self.mesh.reconcile()
        self.kernel.changes.clear()

    def keys_with(self, peer: Node) -> dict[Any, bytes]:
        """Return the keys of both directions with a peer."""
        sas = self.kernel._sas.items()
        return {where: sa.aead.key for where, sa in sas if {sa.source, sa.destination} & set(peer.addresses)}

    @property
    def sas(self) -> int:
        return len(self.kernel._sas)


def cast(root: Path) -> dict[str, Bundle]:
    """Return the bundles of the four."""
    return {name: esp(bundle) for name, bundle in make_bundles(root, cluster_toml(nodes=4)).items()}


def without_others(bundle: Bundle) -> Bundle:
    """Return the bundle of a node that knows of itself and the target."""
    nodes = tuple(node for node in bundle.config.nodes if node.name in (bundle.node.name, TARGET))
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, nodes=nodes))


class Ground:
    """The target and the honest node, keyed; `store` and `kernel` are the target's."""

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        self.bundles = {name: bundle if name == TARGET else without_others(bundle) for name, bundle in bundles.items()}
        self.journal = Journal(bundles.values())
        self.machines = {name: Machine(bundle, self.journal) for name, bundle in self.bundles.items()}
        self.keying, self.store = keying_of(self.bundles[TARGET], self, SOFTWARE_AES)
        self.honest, self.honest_store = keying_of(self.bundles[HONEST], self, SOFTWARE_AES)

    def of(self, node: str) -> Mesh:
        return self.machines[node].mesh

    def node(self, name: str) -> Node:
        return self.bundles[name].node

    @property
    def target(self) -> Machine:
        return self.machines[TARGET]

    @contextlib.asynccontextmanager
    async def standing(self) -> AsyncIterator[Ground]:
        with self.journal.listening():
            for machine in self.machines.values():
                await machine.passes()
            async with running(self.keying, self.honest):
                await self.honest_store.wait_for(lambda view: view.channels[TARGET].connected, 20)
                await self.store.wait_for(lambda view: view.channels[HONEST].connected, 20)
                yield self

    async def keyed_with(self, name: str, seconds: float) -> None:
        """Have a real node come up, and see it keyed within so many seconds."""
        keying, store = keying_of(self.bundles[name], self, SOFTWARE_AES)
        before = self.store.view().channels[name].keyings
        async with running(keying):
            await store.wait_for(lambda view: view.channels[TARGET].connected, seconds)
            await self.store.wait_for(lambda view: view.channels[name].keyings > before, seconds)
            await self.same_keys(name)

    async def same_keys(self, name: str) -> None:
        """See that what one end sends under, the other can receive."""
        for sender, receiver in ((name, TARGET), (TARGET, name)):
            sends = await self.of(sender).sends(receiver)
            assert sends
            for spi in sends:
                where = (self.node(receiver).address, spi)
                assert self.machines[sender].kernel._sas[where].aead == self.machines[receiver].kernel._sas[where].aead


class Adversary:
    """An end at the address of one of the bad nodes, with any certificate."""

    def __init__(self, ground: Ground, name: str, credentials: Credentials | None = None) -> None:
        self.ground = ground
        self.name = name
        self.bundle = ground.bundles[name]
        self.address = str(self.bundle.node.address)
        self.context = tls_context(credentials or self.bundle.credentials)
        self._queue: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._server: asyncio.Server | None = None

    async def call(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the target."""
        target = str(self.ground.node(TARGET).address)
        return await asyncio.open_connection(target, KEYING_PORT, local_addr=(self.address, 0))

    async def called(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Knock, and be connected to."""
        _, writer = await self.call()
        writer.transport.abort()
        return await self._queue.get()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._queue.put((reader, writer))

        server = await asyncio.start_server(accept, self.address, KEYING_PORT)
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()
            while not self._queue.empty():
                self._queue.get_nowait()[1].transport.abort()

    def exchange(self, installer: Installer) -> Exchange:
        """Return what makes keys as the node itself would."""
        bundle = self.bundle
        return Exchange(
            config=bundle.config,
            node=bundle.node,
            boot_id=f"boot-of-{bundle.node.name}",
            grades=SOFTWARE_AES,
            installer=installer,
        )

    async def make(self, channel: Channel, installer: Installer) -> None:
        """Shake hands and make a generation of keys; `KeyingError` when the target does not want to."""
        await channel.handshake(identify, STUCK_SECONDS)
        await self.exchange(installer).make(self.ground.node(TARGET), channel)


def framed(body: bytes) -> bytes:
    """Return a message's bytes as the channel has them."""
    return LENGTH.pack(len(body)) + body


async def emptied(reader: asyncio.StreamReader) -> None:
    """Read until the other end has closed."""
    with contextlib.suppress(OSError):
        while await reader.read(1 << 16):
            pass


def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection instead of ending it."""
    connection = writer.get_extra_info("socket")
    if connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Saying(Channel):
    """A channel that says something else in the place of one message: `instead` is a step, counted from 0."""

    def __init__(self, *args: Any, instead: Mapping[int, Callable[[Message], Said]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instead = instead
        self.said = 0

    async def send(self, message: Message) -> None:
        step, self.said = self.said, self.said + 1
        if step not in self.instead:
            await super().send(message)
            return
        pieces, goes_on = self.instead[step](message)
        try:
            for piece in pieces:
                self._tls.sendall(piece)
                await self._flush()
        except OSError:
            goes_on = False
        if not goes_on:
            raise KeyingError("go on with", self.remote, "the rest is silence")
