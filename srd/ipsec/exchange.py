"""Carries the protocol out: messages over one channel, actions in the kernel, one generation for each connection."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from srd.cluster import Config, Node
from srd.desired import leg_addresses
from srd.ipsec.channel import Channel
from srd.ipsec.protocol import (
    LARGEST_SPI,
    SMALLEST_SPI,
    Action,
    Agree,
    Discard,
    End,
    Follower,
    Install,
    Leader,
    Pin,
    Say,
    Terms,
    leads,
)
from srd.ipsec.sas import Generation
from srd.ipsec.suites import prescribed
from srd.model import IpsecMode, SrdError, Suite

# A full handshake is 1.5 ms of CPU on each side; this is for a thousand peers at once, or a very slow machine.
STEP_SECONDS: Final = 10.0


class Installer(Protocol):
    """Where keys go; the mesh, or nowhere when ipsec.mode is off. What each step means is in `Mesh`."""

    async def sends(self, peer: str) -> tuple[int, ...]:
        """Return the SPIs that this node sends to the peer under."""

    async def agree(self, peer: str, sends: frozenset[int]) -> None:
        """The peer sends under these, and no exchange with it is under way."""

    async def install(self, generation: Generation) -> None:
        """Be able to receive and to send under the new keys."""

    async def pin(self, generation: Generation) -> None:
        """Send under them."""

    async def retire(self, peer: str) -> None:
        """Give up the old ones."""

    async def discard(self, generation: Generation) -> None:
        """Give up the new ones."""


class Unprotected:
    """What stands in the mesh's place when ipsec.mode is off: keys are agreed on and go nowhere."""

    async def sends(self, _peer: str) -> tuple[int, ...]:
        """Return no SPI: there are none."""
        return ()

    async def agree(self, peer: str, sends: frozenset[int]) -> None:
        """Do nothing."""

    async def install(self, generation: Generation) -> None:
        """Do nothing."""

    async def pin(self, generation: Generation) -> None:
        """Do nothing."""

    async def retire(self, peer: str) -> None:
        """Do nothing."""

    async def discard(self, generation: Generation) -> None:
        """Do nothing."""


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
        self._counted: dict[str, int] = {}

    def adopt(self, config: Config) -> None:
        """Make the next generations by this file."""
        self._config = config

    async def make(self, peer: Node, channel: Channel) -> Generation:
        """Make a generation of keys with the peer; returned when both ends send under it.

        Raises `KeyingError` when the peer or the connection fails, `SrdError` when the kernel does. Cancelled, it
        leaves what it has done: the next connection's greeting clears it up.
        """
        end = (Leader if leads(self._node, peer) else Follower)(await self._terms(peer), channel.export)
        try:
            await self._perform(end, end.start(), channel)
            while end.expects is not None:
                await self._perform(end, end.hear(await channel.receive(end.expects, STEP_SECONDS)), channel)
        except SrdError:
            await self._perform(end, end.lost(), channel)
            raise
        finally:
            self._counted[peer.name] = end.counted
        return end.result()

    async def _terms(self, peer: Node) -> Terms:
        legs = leg_addresses(self._node, peer) if self._config.ipsec.mode is IpsecMode.ESP else ()
        return Terms(
            cluster=self._config.cluster,
            me=self._node,
            peer=peer,
            boot_id=self._boot_id,
            legs=legs,
            grades=prescribed(self._grades, self._config.suites),
            udp_port=self._config.udp_port,
            prescribed=bool(self._config.suites),
            counted=self._counted.get(peer.name, 0),
            sends=await self._installer.sends(peer.name),
            spis=tuple(_new_spi() for _ in legs),
        )

    async def _perform(self, end: End, actions: Iterable[Action], channel: Channel) -> None:
        peer = end.terms.peer.name
        for action in actions:
            end.begin(action)
            match action:
                case Say(message):
                    await channel.send(message)
                case Agree(sends):
                    await self._installer.agree(peer, sends)
                case Install(generation):
                    await self._installer.install(generation)
                case Pin(generation):
                    await self._installer.pin(generation)
                case Discard(generation):
                    await self._installer.discard(generation)
                case _:
                    await self._installer.retire(peer)


def _new_spi() -> int:
    return SMALLEST_SPI + secrets.randbelow(LARGEST_SPI - SMALLEST_SPI + 1)
