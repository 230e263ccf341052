"""The kernel's tables -> `Link`s, as status, metrics and health show them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from srd.cluster import Node
from srd.desired import leg_addresses
from srd.ipsec import xfrm
from srd.ipsec.policies import UNKEYED_SPI
from srd.ipsec.sas import Generation, is_worn
from srd.model import IpAddress, Suite
from srd.state import Link, LinkLeg


@dataclass(frozen=True, slots=True)
class Keys:
    """What is remembered of a generation once the kernel has it: no key."""

    pins: Mapping[IpAddress, int]  # the peer's address -> outbound SPI
    receives: frozenset[int]  # the inbound SPIs
    suite: Suite | None
    suite_reason: str | None

    @classmethod
    def of(cls, generation: Generation) -> Keys:
        """Forget the keys themselves."""
        return cls(
            pins={leg.remote: leg.spi_out for leg in generation.legs},
            receives=frozenset(leg.spi_in for leg in generation.legs),
            suite=generation.suite,
            suite_reason=generation.suite_reason,
        )


# A peer that is trusted no more: nothing is sent, nothing is received.
NO_KEYS: Final = Keys(pins={}, receives=frozenset(), suite=None, suite_reason=None)


@dataclass(frozen=True, slots=True)
class Observed:
    """One pass' view of the kernel. `exposed` are addresses of peers whose policies are not all srd's."""

    pins: Mapping[IpAddress, int] = field(default_factory=dict)
    exposed: frozenset[IpAddress] = frozenset()
    # By (source, destination), each pair's SAs.
    sas: Mapping[tuple[IpAddress, IpAddress], tuple[xfrm.SaInfo, ...]] = field(default_factory=dict)


def grouped(sas: Iterable[xfrm.SaInfo]) -> Mapping[tuple[IpAddress, IpAddress], tuple[xfrm.SaInfo, ...]]:
    """Sort SAs by their addresses."""
    found: dict[tuple[IpAddress, IpAddress], tuple[xfrm.SaInfo, ...]] = {}
    for sa in sas:
        way = (sa.source, sa.destination)
        found[way] = (*found.get(way, ()), sa)
    return found


def link(node: Node, peer: Node, keys: Keys | None, seen: Observed) -> Link:
    """Return a link as the kernel has it. `keys` None, after a restart: the newest SAs stand for what is in use."""
    pairs = leg_addresses(node, peer)
    outbound = {remote: _sent_under(seen, local, remote) for local, remote in pairs}
    legs = tuple(_leg(seen, keys, local, remote, outbound[remote]) for local, remote in pairs)
    suite = keys.suite if keys is not None else _suite(sa for sa in outbound.values() if sa is not None)
    return Link(peer=peer.name, legs=legs, suite=suite, suite_reason=keys.suite_reason if keys is not None else None)


def fresh_link(peer: str, generation: Generation, seen: Observed) -> Link:
    """Return the link of a generation that the kernel has just taken: nothing has passed under it."""
    legs = tuple(
        LinkLeg(leg.local, leg.remote, leg.spi_in, leg.spi_out, policies=leg.remote not in seen.exposed)
        for leg in generation.legs
    )
    return Link(peer=peer, legs=legs, suite=generation.suite, suite_reason=generation.suite_reason)


def _sent_under(seen: Observed, local: IpAddress, remote: IpAddress) -> xfrm.SaInfo | None:
    pin = seen.pins.get(remote, UNKEYED_SPI)
    return next((sa for sa in seen.sas.get((local, remote), ()) if sa.spi == pin), None)


def _leg(
    seen: Observed, keys: Keys | None, local: IpAddress, remote: IpAddress, outbound: xfrm.SaInfo | None
) -> LinkLeg:
    received = [
        sa for sa in seen.sas.get((remote, local), ()) if not sa.larval and (keys is None or sa.spi in keys.receives)
    ]
    inbound = max(received, key=lambda sa: sa.add_timestamp, default=None)
    return LinkLeg(
        local=local,
        remote=remote,
        spi_in=inbound.spi if inbound is not None else None,
        spi_out=outbound.spi if outbound is not None else None,
        policies=remote not in seen.exposed,
        bytes_in=inbound.bytes if inbound is not None else 0,
        packets_in=inbound.packets if inbound is not None else 0,
        bytes_out=outbound.bytes if outbound is not None else 0,
        packets_out=outbound.packets if outbound is not None else 0,
        replay_drops=inbound.replay_drops + inbound.replay_window_drops if inbound is not None else 0,
        integrity_failures=inbound.integrity_failures if inbound is not None else 0,
        worn=any(is_worn(sa) for sa in (inbound, outbound) if sa is not None),
    )


def _suite(sas: Iterable[xfrm.SaInfo]) -> Suite | None:
    for sa in sas:
        if sa.aead in list(Suite):
            return Suite(sa.aead)
    return None
