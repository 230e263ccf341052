"""Keeps one keyed connection with every peer: who connects, who is let in, when keys are renewed, heartbeats.

The node with the smaller name connects, from one of eight privileged ports, and leads. A connection makes one
generation of keys (exchange.py) and then stays open for heartbeats until the next one has taken its place.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any, Final

import structlog

from srd.config import KEYING_CLIENT_PORTS, KEYING_PORT, Config, Node
from srd.desired import leg_addresses
from srd.ipsec.channel import Channel as TlsChannel
from srd.ipsec.channel import KeyingError, Message, tls_context
from srd.ipsec.exchange import STEP_SECONDS, Exchange, Installer
from srd.ipsec.sas import Generation
from srd.model import (
    Credentials,
    Endpoint,
    Identity,
    IpAddress,
    PermissionRefusedError,
    Role,
    SrdError,
    Suite,
)
from srd.reconcile import boottime, contained, persistently, until_first
from srd.state import Channel, PeerReport, Store

log = structlog.get_logger(__name__)

CONNECT_SECONDS: Final = 5.0
BEAT_SECONDS: Final = 1.0
# Three lost beats and the time that a busy machine may need to get to them.
SILENCE_SECONDS: Final = 5.0
REKEY_SECONDS: Final = 3600.0
REKEY_JITTER: Final = 0.1
# Connections that are not yet a known peer's: more than any cluster opens at once, few enough to bound memory.
MAX_STRANGERS: Final = 256
BACKLOG: Final = 1024


class Beat(Message, frozen=True):
    """I am alive, and this is how I am. `wants_keys` asks the leader for a new generation."""

    version: str
    initialized: bool
    role: str
    healthy: bool
    offset: int | None
    wants_keys: bool


class Keying:
    """Keeps one keyed connection with every peer."""

    def __init__(
        self,
        *,
        config: Config,
        node: Node,
        credentials: Credentials,
        identify: Callable[[Any], Identity],
        boot_id: str,
        grades: Mapping[Suite, int],
        installer: Installer,
        store: Store,
        report: Callable[[], PeerReport],
        wants_keys: Callable[[str], bool],
        mark: int | None,
    ) -> None:
        self._config = config
        self._node = node
        self._context = tls_context(credentials)
        self._identify = identify
        self._exchange = Exchange(config=config, node=node, boot_id=boot_id, grades=grades, installer=installer)
        self._report = report
        self._wants_keys = wants_keys
        self._mark = mark
        self._peers = {peer.name: peer for peer in config.peers_of(node.name)}
        self._addresses = {address for peer in self._peers.values() for address in peer.addresses}
        self._live: dict[str, TlsChannel] = {}
        self._strangers = asyncio.Semaphore(MAX_STRANGERS)
        now = boottime()
        self._channels = {name: Channel(peer=name, connected=False, since=now) for name in self._peers}
        self._reports: dict[str, PeerReport] = {}
        self._write_channels = store.writer("channels")
        self._write_reports = store.writer("peers")
        self._write_channels(self._channels)

    def listen(self) -> list[socket.socket]:
        """Bind the keying port on every address of this node; `KeyingError` says which one is taken."""
        return [self._bound(address, KEYING_PORT, listening=True) for address in self._node.addresses]

    async def run(self, listeners: list[socket.socket]) -> None:
        """Serve and connect until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for listener in listeners:
                    group.create_task(self._accept(listener, group))
                for peer in self._peers.values():
                    if self._node.name < peer.name:
                        group.create_task(self._lead(peer, group))
        finally:
            for channel in self._live.values():
                channel.close()

    # --- the follower

    async def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._strangers.acquire()
            try:
                connection, (address, *_) = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the peer was gone before it was accepted
                self._strangers.release()
                log.warning("cannot accept a keying connection", error=error.strerror)
                await asyncio.sleep(0.1)
                continue
            if ip_address(address) not in self._addresses:
                # Not even a handshake's time: whoever is no peer must not take the places of peers.
                self._strangers.release()
                connection.close()
                continue
            group.create_task(contained("keying connection", partial(self._serve, connection)))

    async def _serve(self, connection: socket.socket) -> None:
        """Answer one connection: from a stranger to a peer, through a generation, to the end of its heartbeats."""
        peer: Node | None = None
        try:
            channel = await self._open(connection, accepted=True)
        except (OSError, asyncio.CancelledError):
            self._strangers.release()
            connection.close()
            raise
        try:
            try:
                peer = self._admit(await channel.handshake(self._identify, STEP_SECONDS), channel)
            finally:
                self._strangers.release()
            generation = await self._exchange.follow(peer, channel)
        except SrdError as error:
            if peer is not None:
                self._failed(peer, error)
            else:
                log.warning("keying connection refused", address=channel.remote, error=str(error))
        else:
            self._established(peer, channel, generation)
            await self._hold(peer, channel, asyncio.Event())  # the leader decides when
        finally:
            channel.close()

    def _admit(self, identity: Identity, channel: TlsChannel) -> Node:
        """Return the node of the file that a proven identity is, or refuse: names, addresses and roles must agree."""
        peer = self._peers.get(identity.node)
        if identity.cluster != self._config.cluster or peer is None:
            raise KeyingError("admit", f"{identity.cluster}/{identity.node}", "it is not a node of this cluster.toml")
        if set(identity.addresses) != set(peer.addresses):
            raise KeyingError("admit", peer.name, "its certificate is for other addresses than cluster.toml has")
        if channel.remote not in {str(address) for address in peer.addresses}:
            raise KeyingError("admit", peer.name, f"it connects from {channel.remote}, which is not its address")
        return peer

    # --- the leader

    async def _lead(self, peer: Node, group: asyncio.TaskGroup) -> None:
        policy = persistently(SrdError, note=partial(self._failed, peer))
        while True:
            channel: TlsChannel = await policy(self._keyed, peer)
            due = asyncio.Event()
            group.create_task(contained("keying connection", partial(self._hold, peer, channel, due)))
            await due.wait()

    async def _keyed(self, peer: Node) -> TlsChannel:
        """Connect and make a generation of keys."""
        local, remote = leg_addresses(self._node, peer)[0]
        channel = await self._open(await self._dial(local, remote), accepted=False)
        try:
            identity = await channel.handshake(self._identify, STEP_SECONDS)
            if self._admit(identity, channel) is not peer:
                raise KeyingError("admit", peer.name, f"{identity.node} answers at its address")
            self._established(peer, channel, await self._exchange.lead(peer, channel))
        except (SrdError, asyncio.CancelledError):
            channel.close()
            raise
        return channel

    async def _dial(self, local: IpAddress, remote: IpAddress) -> socket.socket:
        """Connect from one of the eight client ports; from the next one when the connection's four-tuple is taken."""
        target = Endpoint(remote, KEYING_PORT)
        for port in random.sample(KEYING_CLIENT_PORTS, len(KEYING_CLIENT_PORTS)):
            connection = self._bound(local, port, listening=False)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await asyncio.get_running_loop().sock_connect(connection, (str(remote), KEYING_PORT))
            except TimeoutError:
                connection.close()
                raise KeyingError("connect to", str(target), f"no answer within {CONNECT_SECONDS:g} s") from None
            except OSError as error:
                connection.close()
                if error.errno != errno.EADDRNOTAVAIL:
                    raise KeyingError("connect to", str(target), error.strerror or "refused") from error
            except asyncio.CancelledError:
                connection.close()
                raise
            else:
                return connection
        raise KeyingError("connect to", str(target), "all eight client ports are in use with this peer")

    async def _hold(self, peer: Node, channel: TlsChannel, due: asyncio.Event) -> None:
        """Exchange heartbeats until the connection fails or the next one has taken its place.

        `due` is set when either end needs new keys, when these are old, and at the end. Making new ones may take
        many attempts: meanwhile the heartbeats go on, and their silence is noticed.
        """
        # Each pair at a time of its own, so that a mesh never renews all its keys at once.
        old_at = boottime() + REKEY_SECONDS * (1 - random.uniform(0, REKEY_JITTER))  # noqa: S311 - no secret

        async def listen() -> None:
            while True:
                beat: Beat = await channel.receive(Beat, SILENCE_SECONDS)
                self._note(peer, beat)
                if beat.wants_keys:
                    due.set()

        async def speak() -> None:
            while self._live.get(peer.name) is channel:
                report = self._report()
                wants_keys = self._wants_keys(peer.name)
                await channel.send(
                    Beat(report.version, report.initialized, report.role, report.healthy, report.offset, wants_keys)
                )
                if wants_keys or boottime() >= old_at:
                    due.set()
                await asyncio.sleep(BEAT_SECONDS)

        try:
            await until_first(listen, speak)
        except KeyingError as error:
            if self._live.get(peer.name) is channel:
                del self._live[peer.name]
                self._failed(peer, error)
                channel.close()
        finally:
            due.set()

    def _established(self, peer: Node, channel: TlsChannel, generation: Generation) -> None:
        before = self._live.get(peer.name)
        self._live[peer.name] = channel
        if before is not None:
            before.close()
        now = boottime()
        known = self._channels[peer.name]
        self._update(
            replace(
                known,
                connected=True,
                since=known.since if known.connected else now,
                generation=generation.number,
                established=now,
                group=channel.group,
                suite=generation.suite,
                suite_reason=generation.suite_reason,
                keyings=known.keyings + 1,
                last_error=None,
            )
        )
        log.info(
            "keys installed",
            peer=peer.name,
            generation=generation.number,
            suite=generation.suite,
            why=generation.suite_reason,
            group=channel.group,
        )

    def _failed(self, peer: Node, error: BaseException) -> None:
        known = self._channels[peer.name]
        connected = peer.name in self._live
        text = str(error)
        # A peer that is down for a day is one line, not one for every attempt.
        if text != known.last_error:
            log.warning("keying failed", peer=peer.name, error=text)
        self._update(
            replace(
                known,
                connected=connected,
                since=known.since if connected == known.connected else boottime(),
                failures=known.failures + 1,
                last_error=text,
            )
        )

    def _update(self, channel: Channel) -> None:
        self._channels = {**self._channels, channel.peer: channel}
        self._write_channels(self._channels)

    def _note(self, peer: Node, beat: Beat) -> None:
        try:
            role = Role(beat.role)
        except ValueError:
            role = Role.UNKNOWN
        report = PeerReport(
            node=peer.name,
            received=boottime(),
            version=beat.version,
            initialized=beat.initialized,
            role=role,
            healthy=beat.healthy,
            offset=beat.offset,
        )
        self._reports = {**self._reports, peer.name: report}
        self._write_reports(self._reports)

    async def _open(self, connection: socket.socket, *, accepted: bool) -> TlsChannel:
        reader, writer = await asyncio.open_connection(sock=connection)
        return TlsChannel(reader, writer, self._context, accepted=accepted)

    def _bound(self, address: IpAddress, port: int, *, listening: bool) -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._mark is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            if not listening:
                # Closing resets instead of lingering 60 s in TIME_WAIT: with eight client ports, eight reconnections
                # in a minute would otherwise use them up. Every message is answered, so a reset loses nothing.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.bind((str(address), port))
            if listening:
                made.listen(BACKLOG)
        except OSError as error:
            made.close()
            kind = PermissionRefusedError if error.errno in (errno.EACCES, errno.EPERM) else KeyingError
            subject = f"{Endpoint(address, port)}"
            raise kind("use", subject, error.strerror or "refused", "it is the keying channel's port") from error
        return made
