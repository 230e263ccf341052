"""Generations of keys, and what srd's SAs are in the kernel's terms; policies.py is the same for policies. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final

from srd.ipsec import xfrm
from srd.ipsec.policies import reqid_of
from srd.model import IpAddress, Suite

# Soft limits ask for new keys; the hard ones are the kernel's own, for when srd is gone for good. Amount: AES-GCM keeps
# a margin of 2^-60 up to about 390 GB under one key. Time: NIST SP 800-77r1's 8 hours.
LIFETIME: Final = xfrm.Lifetime(
    soft_bytes=256 << 30,
    hard_bytes=320 << 30,
    soft_packets=1 << 31,
    hard_packets=(1 << 32) - (1 << 20),
    hard_seconds=8 * 3600,
)


@dataclass(frozen=True, slots=True)
class KeyedLeg:
    """One address pair with the keys of both directions: 32 bytes and the 4 of the salt. Never shows them."""

    local: IpAddress
    remote: IpAddress
    spi_in: int
    spi_out: int
    key_in: bytes = field(repr=False)
    key_out: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Generation:
    """The keys of one TLS connection: one pair of SAs for each address pair of a link."""

    peer: str
    number: int
    suite: Suite
    suite_reason: str
    legs: tuple[KeyedLeg, ...]
    udp_port: int | None = None  # of ESP in UDP, at both ends

    @property
    def spis(self) -> frozenset[int]:
        """Every SPI of this generation, both directions."""
        return frozenset(spi for leg in self.legs for spi in (leg.spi_in, leg.spi_out))


def inbound_sa(generation: Generation, leg: KeyedLeg) -> xfrm.Sa:
    """Return the SA to receive under."""
    return _sa(generation, xfrm.Direction.IN, (leg.remote, leg.local), leg.spi_in, leg.key_in)


def outbound_sa(generation: Generation, leg: KeyedLeg) -> xfrm.Sa:
    """Return the SA to send under."""
    return _sa(generation, xfrm.Direction.OUT, (leg.local, leg.remote), leg.spi_out, leg.key_out)


def _sa(
    generation: Generation, direction: xfrm.Direction, way: tuple[IpAddress, IpAddress], spi: int, key: bytes
) -> xfrm.Sa:
    source, destination = way
    return xfrm.Sa(
        source=source,
        destination=destination,
        spi=spi,
        reqid=reqid_of(generation.peer),
        aead=xfrm.Aead(generation.suite, key),
        direction=direction,
        # The kernel looks an inbound SA up by destination and SPI alone: the selector is what keeps one peer from
        # sending under its own keys with another's source address.
        selector=xfrm.Selector(ip_network(source), ip_network(destination)),
        lifetime=LIFETIME,
        encapsulation=xfrm.UdpEncapsulation(generation.udp_port, generation.udp_port) if generation.udp_port else None,
    )


def is_worn(sa: xfrm.SaInfo) -> bool:
    """Whether a soft limit of the SA's own is reached; the kernel says so in one event only, which may be lost."""
    limits = ((sa.bytes, sa.lifetime.soft_bytes), (sa.packets, sa.lifetime.soft_packets))
    return any(soft is not None and carried >= soft for carried, soft in limits)
