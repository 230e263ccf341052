"""SA generations: one TLS 1.3 connection with mutual certificates per generation, keys from its exporter.

As NTS keys NTP (RFC 8915): nothing home-made. The node with the smaller name connects and leads, so two ends never
collide. Make before break, over the one connection:

    leader                                   follower
    PREPARE  (SPI to receive on)       ->
                                             install inbound, install outbound (inert: nothing is pinned to it)
                                       <-    PREPARED (SPI to receive on)
    install inbound, outbound; pin outbound
    COMMIT                             ->
                                             pin outbound; its old inbound keys stay for the grace
                                       <-    COMMITTED
    retire old keys
    DONE                               ->    retire old keys

Nobody sends under keys that the other end cannot receive. Before the leader pins, a failure leaves both ends sending
under the old keys; after it, the follower can already receive the new ones, so a broken connection between any two of
these steps loses nothing, and the next connection makes the next generation.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from typing import Annotated, Final, Protocol

from msgspec import Meta

from srd.config import Config, Node
from srd.desired import leg_addresses
from srd.ipsec.channel import Channel, KeyingError, Message
from srd.ipsec.sas import Generation, KeyedLeg
from srd.ipsec.suites import KEY_BYTES, SALT_BYTES, choose
from srd.model import IpAddress, IpsecMode, SrdError, Suite

PROTOCOL: Final = 1
EXPORTER_LABEL: Final = b"EXPORTER-srd-esp"
SMALLEST_SPI: Final = 0x1000  # RFC 4303 section 2.1 reserves those below 256
LARGEST_SPI: Final = 0xFFFF_FFFF
# A full handshake is 1.5 ms of CPU on each side; this is for a thousand peers at once, or a very slow machine.
STEP_SECONDS: Final = 10.0

# One a second for nine million years. A count without a bound is one that a peer can drive out of its eight bytes.
Count = Annotated[int, Meta(ge=0, le=1 << 48)]


class Hello(Message, frozen=True):
    """Who I am in this boot, the last generation that I know of, and what my kernel can do."""

    protocol: int
    boot_id: str
    generation: Count
    grades: dict[str, int]


class Prepare(Message, frozen=True):
    """The leader's offer: a new generation, its suite, and an SPI to reach the leader at, for each address pair."""

    generation: Count
    suite: str
    spis: list[int]


class Prepared(Message, frozen=True):
    """The follower can receive and send; the SPIs are those to reach it at."""

    generation: Count
    spis: list[int]


class Commit(Message, frozen=True):
    """The leader sends under the new keys."""

    generation: Count


class Committed(Message, frozen=True):
    """So does the follower."""

    generation: Count


class Done(Message, frozen=True):
    """Both have switched; old keys may go."""

    generation: Count


class Installer(Protocol):
    """Where keys go; the mesh, or nowhere when ipsec.mode is off. What each step means is in `Mesh`."""

    async def install_inbound(self, generation: Generation) -> None:
        """Receive under the new keys."""

    async def install_outbound(self, generation: Generation) -> None:
        """Be able to send under them."""

    async def pin(self, generation: Generation) -> None:
        """Send under them."""

    async def retire(self, peer: str) -> None:
        """Give up the old ones."""

    async def discard(self, generation: Generation) -> None:
        """Give up the new ones."""


class Exchange:
    """Makes generations with peers, one at a time for each; remembers only how far it has counted."""

    def __init__(
        self, *, config: Config, node: Node, boot_id: str, grades: Mapping[Suite, int], installer: Installer
    ) -> None:
        self._config = config
        self._node = node
        self._boot_id = boot_id
        self._grades = dict(grades)
        self._installer = installer
        self._counted = {peer.name: 0 for peer in config.peers_of(node.name)}

    async def follow(self, peer: Node, channel: Channel) -> Generation:
        """Answer the peer's new generation; returned when both ends send under it."""
        if not peer.name < self._node.name:
            raise KeyingError("follow", peer.name, "the node with the smaller name leads, which is this one")
        theirs = await self._hello(peer, channel)
        suite, reason = choose(_suites(theirs.grades), self._grades)
        prepare = await channel.receive(Prepare, STEP_SECONDS)
        if prepare.suite != suite or prepare.generation <= self._counted[peer.name]:
            raise KeyingError("follow", peer.name, "it offers another suite or an old generation")
        mine = [_new_spi() for _ in self._legs(peer)]
        self._check_spis(peer, prepare.spis, len(mine))
        generation = Generation(
            peer=peer.name,
            number=prepare.generation,
            suite=suite,
            suite_reason=reason,
            legs=self._derive(channel, peer, theirs.boot_id, prepare, list(zip(mine, prepare.spis, strict=True))),
        )
        self._counted[peer.name] = prepare.generation
        await self._install(generation)
        await channel.send(Prepared(prepare.generation, mine))
        await self._expect(peer, channel, Commit, generation)
        await self._installer.pin(generation)
        await channel.send(Committed(prepare.generation))
        await self._expect(peer, channel, Done, generation)
        await self._installer.retire(peer.name)
        return generation

    async def lead(self, peer: Node, channel: Channel) -> Generation:
        """Offer the peer a new generation; returned when both ends send under it."""
        theirs = await self._hello(peer, channel)
        suite, reason = choose(self._grades, _suites(theirs.grades))
        mine = [_new_spi() for _ in self._legs(peer)]
        prepare = Prepare(max(self._counted[peer.name], theirs.generation) + 1, suite, mine)
        self._counted[peer.name] = prepare.generation
        await channel.send(prepare)
        prepared = await channel.receive(Prepared, STEP_SECONDS)
        self._check_spis(peer, prepared.spis, len(mine))
        generation = Generation(
            peer=peer.name,
            number=prepare.generation,
            suite=suite,
            suite_reason=reason,
            legs=self._derive(channel, peer, theirs.boot_id, prepare, list(zip(mine, prepared.spis, strict=True))),
        )
        await self._install(generation)
        await self._installer.pin(generation)
        await channel.send(Commit(generation.number))
        await self._expect(peer, channel, Committed, generation)
        await self._installer.retire(peer.name)
        await channel.send(Done(generation.number))
        return generation

    async def _hello(self, peer: Node, channel: Channel) -> Hello:
        grades = {str(suite): grade for suite, grade in self._grades.items()}
        await channel.send(Hello(PROTOCOL, self._boot_id, self._counted[peer.name], grades))
        theirs: Hello = await channel.receive(Hello, STEP_SECONDS)
        if theirs.protocol != PROTOCOL:
            raise KeyingError("speak with", peer.name, f"it speaks version {theirs.protocol}, this node {PROTOCOL}")
        return theirs

    async def _expect(self, peer: Node, channel: Channel, kind: type[Commit | Committed | Done], g: Generation) -> None:
        message = await channel.receive(kind, STEP_SECONDS)
        if message.generation != g.number:
            raise KeyingError("follow", peer.name, f"it speaks of generation {message.generation}, not {g.number}")

    async def _install(self, generation: Generation) -> None:
        try:
            await self._installer.install_inbound(generation)
            await self._installer.install_outbound(generation)
        except SrdError:
            await self._installer.discard(generation)
            raise

    def _legs(self, peer: Node) -> tuple[tuple[IpAddress, IpAddress], ...]:
        return leg_addresses(self._node, peer) if self._config.ipsec.mode is IpsecMode.ESP else ()

    def _check_spis(self, peer: Node, spis: list[int], count: int) -> None:
        if len(spis) != count or not all(SMALLEST_SPI <= spi <= LARGEST_SPI for spi in spis):
            raise KeyingError("key", peer.name, "it names SPIs that cannot be")

    def _derive(
        self, channel: Channel, peer: Node, boot_id: str, prepare: Prepare, spis: list[tuple[int, int]]
    ) -> tuple[KeyedLeg, ...]:
        """Export the keys of both directions of each address pair.

        The context binds everything that the two must agree on (RFC 5705 section 4): cluster, sender and receiver
        with their boots and addresses, generation, suite, the SPI of this direction and that of the other.
        """
        length = KEY_BYTES + SALT_BYTES

        def key(sender: tuple[str, ...], receiver: tuple[str, ...], spi: int, other_spi: int) -> bytes:
            texts = [text.encode() for text in (self._config.cluster, *sender, *receiver, prepare.suite)]
            packed = b"".join(struct.pack(">H", len(text)) + text for text in texts)
            numbers = struct.pack(">QII", prepare.generation, spi, other_spi)
            return channel.export(EXPORTER_LABEL, packed + numbers, length)

        legs = []
        for (local, remote), (spi_in, spi_out) in zip(self._legs(peer), spis, strict=True):
            me, them = (self._node.name, self._boot_id, str(local)), (peer.name, boot_id, str(remote))
            key_in, key_out = key(them, me, spi_in, spi_out), key(me, them, spi_out, spi_in)
            legs.append(KeyedLeg(local, remote, spi_in, spi_out, key_in, key_out))
        return tuple(legs)


def _suites(grades: Mapping[str, int]) -> dict[Suite, int]:
    """Return what a peer offers of the suites that this version knows."""
    return {suite: grades[suite] for suite in Suite if suite in grades}


def _new_spi() -> int:
    return SMALLEST_SPI + secrets.randbelow(LARGEST_SPI - SMALLEST_SPI + 1)
