"""Keeps one keyed connection with every peer: who connects, who is let in, from which ports.

A connection makes one generation of keys (protocol.py) and then stays open for heartbeats until the next one has taken
its place (peering.py). The end that leads connects from one of eight privileged ports; a node that has just come up
knocks at those that lead it, so that they need not find out by trying.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from ipaddress import ip_address
from typing import Any, Final, Protocol

import structlog

from srd.config import KEYING_CLIENT_PORTS, KEYING_PORT, Config, Node
from srd.desired import leg_addresses
from srd.ipsec.channel import Channel as TlsChannel
from srd.ipsec.channel import tls_context
from srd.ipsec.exchange import STEP_SECONDS, Exchange, Installer
from srd.ipsec.peering import RETRY_SECONDS, Peering
from srd.ipsec.protocol import Beat, KeyingError, leads
from srd.model import (
    Credentials,
    Endpoint,
    Identity,
    IpAddress,
    PermissionRefusedError,
    Role,
    SrdError,
    Suite,
    TimedOutError,
)
from srd.reconcile import boottime, contained
from srd.state import Channel, PeerReport, Store

log = structlog.get_logger(__name__)

# One SYN and its first repetition.
CONNECT_SECONDS: Final = 2.0
# Handshakes with peers at a time: more than any cluster opens at once, few enough to bound memory.
MAX_HANDSHAKES: Final = 256
BACKLOG: Final = 1024
ACCEPT_PAUSE_SECONDS: Final = 0.1


class Serials(Protocol):
    """By which certificate each peer's present keys were made; it outlives srd as the keys do."""

    def of(self, peer: str) -> int | None:
        """Return the certificate's serial number, None if nobody knows."""

    def note(self, peer: str, serial: int) -> None:
        """Remember it."""


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
        serials: Serials,
    ) -> None:
        self._config = config
        self._node = node
        self._credentials = credentials
        self._context = tls_context(credentials)
        self._identify = identify
        self._report = report
        self._mark = mark
        self._serials = serials
        self._write_channels = store.writer("channels")
        self._write_reports = store.writer("peers")
        self._channels: dict[str, Channel] = {}
        self._reports: dict[str, PeerReport] = {}
        # Accepted, and not yet served: a task that is cancelled before it begins cannot close what it was given.
        self._arrived: set[socket.socket] = set()
        self._handshakes = asyncio.Semaphore(MAX_HANDSHAKES)
        self._exchange = Exchange(config=config, node=node, boot_id=boot_id, grades=grades, installer=installer)
        self._wants_keys = wants_keys
        self._peerings: dict[str, Peering] = {}
        self._at: dict[IpAddress, Peering] = {}
        # Set while it runs: where the tasks of peers live, and those that connect.
        self._group: asyncio.TaskGroup | None = None
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._add(config.peers_of(node.name))

    def let_go(self, config: Config) -> None:
        """End everything with peers that a changed file does not have, or has otherwise."""
        wanted = {peer.name: peer for peer in config.peers_of(self._node.name)}
        for name, peering in list(self._peerings.items()):
            if wanted.get(name) != peering.peer:
                self._remove(name)

    def adopt(self, config: Config, credentials: Credentials) -> frozenset[str]:
        """Take a changed file and certificate in, and have new keys made where these call for it.

        Return the peers whose keys are no longer to be trusted: the caller gives them up.
        """
        self.let_go(config)
        former, self._config = self._config, config
        self._exchange.adopt(config)
        self._add([peer for peer in config.peers_of(self._node.name) if peer.name not in self._peerings])
        for name, peering in self._peerings.items():
            if peering.serials & config.revoked:
                peering.refuse(KeyingError("admit", name, "its certificate is revoked"))
        if credentials != self._credentials or former.suites != config.suites:
            self._credentials, self._context = credentials, tls_context(credentials)
            for peering in self._peerings.values():
                peering.renew()
        return self.distrusted()

    def distrusted(self) -> frozenset[str]:
        """Return the peers whose keys were made by a certificate that is revoked, or by nobody knows which."""
        if not self._config.revoked:
            return frozenset()
        return frozenset(
            name
            for name in self._peerings
            if (serial := self._serials.of(name)) is None or serial in self._config.revoked
        )

    def _trusted(self, identity: Identity) -> bool:
        return identity.serial not in self._config.revoked

    def _add(self, peers: Iterable[Node]) -> None:
        for peer in peers:
            peering = Peering(
                peer,
                make=self._exchange.make,
                beat=self._beat,
                wants_keys=self._wants_keys,
                trusted=self._trusted,
                keyed=self._serials.note,
                changed=self._changed,
                heard=self._heard,
            )
            self._peerings[peer.name] = peering
            self._at.update(dict.fromkeys(peer.addresses, peering))
            self._changed(peering.record)
            if self._group is not None:
                self._start(self._group, peering)

    def _remove(self, name: str) -> None:
        peering = self._peerings.pop(name)
        self._at = {address: other for address, other in self._at.items() if other is not peering}
        if (task := self._connecting.pop(name, None)) is not None:
            task.cancel()
        peering.end()
        self._channels = {other: record for other, record in self._channels.items() if other != name}
        self._reports = {other: report for other, report in self._reports.items() if other != name}
        self._write_channels(self._channels)
        self._write_reports(self._reports)

    def _start(self, group: asyncio.TaskGroup, peering: Peering) -> None:
        if leads(self._node, peering.peer):
            self._connecting[peering.peer.name] = group.create_task(self._lead(peering))
        else:
            group.create_task(self._knock(peering.peer))

    def listen(self) -> list[socket.socket]:
        """Bind the keying port on every address of this node; `KeyingError` says which one is taken."""
        return [self._bound(address, KEYING_PORT, listening=True) for address in self._node.addresses]

    async def run(self, listeners: list[socket.socket]) -> None:
        """Serve and connect until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                for listener in listeners:
                    loop.add_reader(listener, self._accept, listener, group)
                for peering in self._peerings.values():
                    self._start(group, peering)
                await asyncio.Event().wait()
            finally:
                self._group = None
                for listener in listeners:
                    loop.remove_reader(listener)
                for peering in self._peerings.values():
                    peering.close()
                for connection in self._arrived:
                    connection.close()

    async def renew(self, peers: Collection[str], wait: float) -> None:
        """Have new keys made with these peers; return when both ends use them, or after asking if `wait` is 0.

        Raises `KeyingError` for a peer that is none, `TimedOutError` after `wait` seconds.
        """
        if strangers := sorted(set(peers) - self._peerings.keys()):
            raise KeyingError("renew the keys with", ", ".join(strangers), "it is no peer of this node")
        renewed = {name: self._peerings[name].renew() for name in peers}
        if not wait:
            return
        try:
            async with asyncio.timeout(wait):
                for event in renewed.values():
                    await event.wait()
        except TimeoutError:
            late = ", ".join(name for name, event in renewed.items() if not event.is_set())
            raise TimedOutError(
                "renew the keys with", late, f"it took longer than {wait:g} s", "srd links says what fails"
            ) from None

    async def _lead(self, peering: Peering) -> None:
        """Lead for as long as the peer is one: a defect with one peer must not end the connections with the others."""
        lead = partial(peering.lead, partial(self._connect, peering.peer))
        while True:
            await contained(f"keying with {peering.peer.name}", lead)
            await asyncio.sleep(RETRY_SECONDS)

    # --- connections that come in

    def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        # Not loop.sock_accept: what it has accepted when it is cancelled is lost, and stays open.
        try:
            connection, (address, *_) = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, or the peer was gone before it was accepted
            log.warning("cannot accept a keying connection", error=error.strerror)
            self._look_away(listener, group)
            return
        connection.setblocking(False)
        peering = self._at.get(ip_address(address))
        if peering is None:
            # Not even a handshake's time: whoever is no peer must not take the places of peers.
            connection.close()
        elif leads(self._node, peering.peer):
            connection.close()
            peering.knock()
        else:
            self._arrived.add(connection)
            group.create_task(contained("keying connection", partial(self._serve, connection)))

    def _look_away(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        """Let what waits wait for a moment: looking again at once, nothing else would be done."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def look_again() -> None:
            if self._group is not None:
                loop.add_reader(listener, self._accept, listener, group)

        loop.call_later(ACCEPT_PAUSE_SECONDS, look_again)

    async def _serve(self, connection: socket.socket) -> None:
        """Let a connection in, or refuse it; then it is its peering's."""
        async with self._handshakes:
            self._arrived.discard(connection)
            channel = await self._channel(connection, accepted=True)
            try:
                peering = self._admit(await channel.handshake(self._identify, STEP_SECONDS), channel)
            except SrdError as error:
                log.warning("keying connection refused", address=channel.remote, error=str(error))
                channel.close()
                return
            except asyncio.CancelledError:
                channel.close()
                raise
        await peering.follow(channel)

    def _admit(self, identity: Identity, channel: TlsChannel) -> Peering:
        """Return the peering that a proven identity is part of: names, addresses and roles must agree."""
        peering = self._peerings.get(identity.node)
        if identity.cluster != self._config.cluster or peering is None:
            raise KeyingError("admit", f"{identity.cluster}/{identity.node}", "it is not a node of this cluster.toml")
        peer = peering.peer
        if not self._trusted(identity):
            error = KeyingError("admit", peer.name, f"its certificate {identity.serial:x} is revoked")
            peering.turned_away(error)
            raise error
        if set(identity.addresses) != set(peer.addresses):
            raise KeyingError("admit", peer.name, "its certificate is for other addresses than cluster.toml has")
        if channel.remote not in {str(address) for address in peer.addresses}:
            raise KeyingError("admit", peer.name, f"it connects from {channel.remote}, which is not its address")
        return peering

    # --- connections that go out

    async def _connect(self, peer: Node) -> TlsChannel:
        """Connect to a peer, and be sure that it is the one."""
        channel = await self._channel(await self._dial(peer), accepted=False)
        try:
            identity = await channel.handshake(self._identify, STEP_SECONDS)
            if self._admit(identity, channel).peer is not peer:
                raise KeyingError("admit", peer.name, f"{identity.node} answers at its address")
        except (SrdError, asyncio.CancelledError):
            channel.close()
            raise
        return channel

    async def _knock(self, peer: Node) -> None:
        """Tell the node that leads that this one is up. It connects by itself sooner or later, so one try is enough."""
        with contextlib.suppress(SrdError):
            (await self._dial(peer)).close()

    async def _dial(self, peer: Node) -> socket.socket:
        """Connect from one of the eight client ports; from the next one when the connection's four-tuple is taken."""
        local, remote = leg_addresses(self._node, peer)[0]
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

    async def _channel(self, connection: socket.socket, *, accepted: bool) -> TlsChannel:
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
        except OSError as error:
            connection.close()
            raise KeyingError("use", "a keying connection", error.strerror or "it broke") from error
        except asyncio.CancelledError:
            connection.close()
            raise
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
                # in a minute would otherwise use them up. Connections end when nobody needs them: nothing is lost.
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

    # --- what is said and shown

    def _beat(self, wants_keys: bool) -> Beat:  # noqa: FBT001 - a callback's one argument
        mine = self._report()
        return Beat(mine.version, mine.initialized, mine.role, mine.healthy, mine.offset, wants_keys)

    def _heard(self, peer: Node, beat: Beat) -> None:
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

    def _changed(self, record: Channel) -> None:
        self._channels = {**self._channels, record.peer: record}
        self._write_channels(self._channels)
