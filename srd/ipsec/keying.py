"""Keeps one keyed connection with every peer: who connects, who is let in, from which ports.

A connection makes one generation of keys (protocol.py) and then stays open for heartbeats until the next one has taken
its place (peering.py). The end that leads connects from one of eight privileged ports; a node that has just come up
knocks at those that lead it, so that they need not find out by trying.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from ipaddress import ip_address
from typing import Any, Final, Protocol

import structlog

from srd.cluster import Config, Node
from srd.ipsec.channel import Channel as TlsChannel
from srd.ipsec.channel import tls_context
from srd.ipsec.exchange import STEP_SECONDS, Exchange, Installer
from srd.ipsec.peering import RETRY_SECONDS, Peering
from srd.ipsec.protocol import Beat, KeyingError, leads
from srd.ipsec.sockets import Sockets
from srd.ipsec.strangers import STRANGER_SECONDS, Strangers
from srd.model import Body, Credentials, Identity, IpAddress, NodeKind, Pause, Role, SrdError, Suite, TimedOutError
from srd.reconcile import boottime, contained
from srd.state import Channel, PeerReport, Store

log = structlog.get_logger(__name__)

# Handshakes with peers at a time: more than any cluster opens at once, few enough to bound memory.
MAX_HANDSHAKES: Final = 256
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
        join: Callable[[Identity], Awaitable[None]],
        answer: Callable[[str, str, Body], Awaitable[Body]],
    ) -> None:
        self._config = config
        self._node = node
        self._credentials = credentials
        self._context = tls_context(credentials)
        self._identify = identify
        self._report = report
        self._sockets = Sockets(node, mark)
        self._serials = serials
        self._join = join
        self._answer = answer
        self._write_channels = store.writer("channels")
        self._write_reports = store.writer("peers")
        self._channels: dict[str, Channel] = {}
        self._reports: dict[str, PeerReport] = {}
        # Accepted, and not yet served: a task that is cancelled before it begins cannot close what it was given.
        self._arrived: set[socket.socket] = set()
        self._handshakes = asyncio.Semaphore(MAX_HANDSHAKES)
        self._strangers = Strangers(store.writer("keying_refusals"))
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
        renewed = credentials != self._credentials
        if renewed or (former.suites, former.udp_port) != (config.suites, config.udp_port):
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
                answer=self._answer,
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
        return self._sockets.listen()

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

    async def ask(self, peer: str, topic: str, body: Body, seconds: float) -> Body:
        """Ask another node's srd; `KeyingError` when there is no answer within so many seconds, or a refusal."""
        peering = self._peerings.get(peer)
        if peering is None:
            raise KeyingError(f"ask about the {topic}", peer, "it is no peer of this node")
        return await peering.ask(topic, body, seconds)

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
        if peering is not None and leads(self._node, peering.peer):
            connection.close()
            peering.knock()
            return
        if peering is None and not self._strangers.enter(address):
            connection.close()
            return
        self._arrived.add(connection)
        group.create_task(contained("keying connection", partial(self._serve, connection, address, peering)))

    def _look_away(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        """Let what waits wait for a moment: looking again at once, nothing else would be done."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def look_again() -> None:
            if self._group is not None:
                loop.add_reader(listener, self._accept, listener, group)

        loop.call_later(ACCEPT_PAUSE_SECONDS, look_again)

    async def _serve(self, connection: socket.socket, address: str, caller: Peering | None) -> None:
        """Let a connection in, or refuse it; then it is its peering's. `caller` is the peer at that address, if any."""
        async with self._strangers.placed(address) if caller is None else self._handshakes:
            self._arrived.discard(connection)
            channel = await self._channel(connection, accepted=True)
            try:
                identity = await self._prove(channel, STRANGER_SECONDS if caller is None else STEP_SECONDS)
                if identity.kind is NodeKind.CLIENT:
                    await self._join(identity)
                peering = self._admit(identity)
            except SrdError as error:
                channel.close()
                if caller is not None:
                    caller.turned_away(error)
                else:
                    self._strangers.turn_away(address, str(error))
                return
            except asyncio.CancelledError:
                channel.close()
                raise
        await peering.follow(channel)

    async def _prove(self, channel: TlsChannel, seconds: float) -> Identity:
        """Shake hands; return who the other end is, if its certificate holds here and now, whoever the nodes are."""
        identity = await channel.handshake(self._identify, seconds)
        if identity.cluster != self._config.cluster:
            raise KeyingError("admit", f"{identity.cluster}/{identity.node}", "it is of another cluster")
        if not self._trusted(identity):
            raise KeyingError("admit", identity.node, f"its certificate {identity.serial:x} is revoked")
        if channel.remote not in {str(address) for address in identity.addresses}:
            raise KeyingError("admit", identity.node, f"it connects from {channel.remote}, which is not its address")
        return identity

    def _admit(self, identity: Identity) -> Peering:
        """Return the peering that a proven identity is part of: names, addresses and kinds must agree."""
        peering = self._peerings.get(identity.node)
        if peering is None:
            raise KeyingError("admit", identity.node, "it is not a node of this cluster.toml")
        peer = peering.peer
        if set(identity.addresses) != set(peer.addresses):
            raise KeyingError("admit", peer.name, "its certificate is for other addresses than cluster.toml has")
        if identity.kind is not peer.kind:
            raise KeyingError("admit", peer.name, f"its certificate is for a {identity.kind}, not a {peer.kind}")
        return peering

    # --- connections that go out

    async def _connect(self, peer: Node) -> TlsChannel:
        """Connect to a peer, and be sure that it is the one."""
        channel = await self._channel(await self._sockets.dial(peer), accepted=False)
        try:
            identity = await self._prove(channel, STEP_SECONDS)
            if self._admit(identity).peer is not peer:
                raise KeyingError("admit", peer.name, f"{identity.node} answers at its address")
        except (SrdError, asyncio.CancelledError):
            channel.close()
            raise
        return channel

    async def _knock(self, peer: Node) -> None:
        """Tell the node that leads that this one is up. It connects by itself sooner or later, so one try is enough."""
        with contextlib.suppress(SrdError):
            (await self._sockets.dial(peer)).close()

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

    # --- what is said and shown

    def _beat(self, wants_keys: bool) -> Beat:  # noqa: FBT001 - a callback's one argument
        mine = self._report()
        return Beat(
            mine.version,
            mine.initialized,
            mine.role,
            mine.healthy,
            mine.offset,
            wants_keys,
            drained=mine.drained,
            pause_number=mine.pause.number,
            pause_until=mine.pause.until,
            replid=mine.replid,
        )

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
            drained=beat.drained,
            pause=Pause(beat.pause_number, beat.pause_until),
            replid=beat.replid,
        )
        self._reports = {**self._reports, peer.name: report}
        self._write_reports(self._reports)

    def _changed(self, record: Channel) -> None:
        self._channels = {**self._channels, record.peer: record}
        self._write_channels(self._channels)
