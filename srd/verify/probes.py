"""The three proofs of `srd verify`: probes go in ESP, a plaintext one is refused, and nothing else is on the wire.

They are taken at the kernel and the wire themselves, not from what the daemon says of them.

1. Echo requests to the peer: all must be answered, what its SAs have carried, both ways, must grow by as many packets,
   and nothing with the peer may be seen on the wire meanwhile that is neither ESP nor exempt.
2. Two segments that open a connection are sent below IPsec, as anybody on the wire could. The first, to the keying
   channel's port, is exempt and must be answered: it shows that such a frame arrives at all. The second, to a protected
   port, must not be, neither in plaintext nor in ESP.
3. A packet socket counts what passes between this node and its peers and is neither ESP nor exempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import secrets
import socket
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT
from srd.desired import TCP
from srd.ipsec import xfrm
from srd.ipsec.policies import owns_reqid
from srd.model import IpAddress, SrdError
from srd.verify.filters import answer_filter, plaintext_filter
from srd.verify.packets import (
    Exemptions,
    Kind,
    Pair,
    describe,
    echo_request,
    is_echo_reply,
    judge,
    syn,
)
from srd.verify.sockets import icmp_socket, lost, packet_socket, raw_socket, sending_socket, way_to

ECHOES: Final = 5
ECHO_SECONDS: Final = 3.0
# A rekey between two readings of the counters may take an SA and its count away.
COUNT_TRIES: Final = 3
ANSWER_SECONDS: Final = 2.0
# Twice: one that is lost must not pass for one that is refused.
SYNS: Final = 2
EXAMPLES: Final = 5
_EPHEMERAL_PORTS: Final = range(32768, 60999)
_READ_BYTES: Final = 2048


@dataclass(frozen=True, slots=True)
class Encrypted:
    """What became of echo requests to a peer: how many were sent and answered, what its SAs carried meanwhile.

    `seen` is how many packets with the peer were on the wire in plaintext at the time.
    """

    sent: int
    answered: int
    carried_out: int
    carried_in: int
    seen: int

    @property
    def proven(self) -> bool:
        """All of them were answered, the SAs carried as many both ways, and none was seen outside."""
        return self.answered == self.sent <= min(self.carried_out, self.carried_in) and not self.seen


class Plaintext(enum.StrEnum):
    """What became of a plaintext probe."""

    REFUSED = "refused"
    ANSWERED = "answered"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The outcome of a plaintext probe, and why it could not be tried."""

    outcome: Plaintext
    reason: str = ""


@dataclass(slots=True)
class Watched:
    """What passed between this node and its peers outside ESP. `lost` packets were not judged."""

    counts: Counter[Kind] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    lost: int = 0


async def encrypted(kernel: xfrm.XfrmSocket, pair: Pair, exemptions: Exemptions) -> Encrypted:
    """Send echo requests, and compare them with what the pair's SAs have carried and with what was on the wire."""
    peers = frozenset({pair[1].packed})
    found = Encrypted(0, 0, 0, 0, 0)
    for _ in range(COUNT_TRIES):
        with packet_socket(plaintext_filter(peers, exemptions.udp_ports)) as wire:
            before = await _carried(kernel, pair)
            answered = await _echo(pair)
            after = await _carried(kernel, pair)
            seen = sum(judge(packet, peers, exemptions) is Kind.PLAINTEXT for packet in _queued(wire))
        found = Encrypted(ECHOES, answered, after[0] - before[0], after[1] - before[1], seen)
        if found.proven or seen:
            break
    return found


def _queued(wire: socket.socket) -> Iterator[bytes]:
    """Yield what a socket has received so far."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield wire.recv(_READ_BYTES)


async def _carried(kernel: xfrm.XfrmSocket, pair: Pair) -> tuple[int, int]:
    """Return how many packets the SAs of a pair have carried, out and in."""
    sas = [sa for sa in await kernel.sas() if owns_reqid(sa.reqid)]
    ways = (pair, pair[::-1])
    out, into = (sum(sa.packets for sa in sas if (sa.source, sa.destination) == way) for way in ways)
    return out, into


async def _echo(pair: Pair) -> int:
    """Return how many of `ECHOES` requests were answered."""
    identifier = secrets.randbelow(1 << 16)
    answered = 0
    loop = asyncio.get_running_loop()
    with icmp_socket(pair) as opened, contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ECHO_SECONDS):
            for sequence in range(ECHOES):
                # A policy without keys drops silently, one that blocks says so.
                with contextlib.suppress(OSError):
                    await loop.sock_sendto(opened, echo_request(pair, identifier, sequence), (str(pair[1]), 0))
            while answered < ECHOES:
                packet, sender = await loop.sock_recvfrom(opened, _READ_BYTES)
                answered += sender[0] == str(pair[1]) and is_echo_reply(pair[0].version, packet, identifier)
    return answered


async def plaintext(pair: Pair, port: int) -> Refusal:
    """Try to open a connection to a protected port of the peer below IPsec."""
    try:
        return await _plaintext(pair, port)
    except SrdError as error:
        return Refusal(Plaintext.NOT_TRIED, str(error))
    except OSError as error:  # an interface that went down, say
        return Refusal(Plaintext.NOT_TRIED, error.strerror or "the frame could not be sent")


async def _plaintext(pair: Pair, port: int) -> Refusal:
    way = await way_to(pair)
    # One that the keying channel uses at the moment is answered too (RFC 5961 section 4), and not disturbed.
    if not await _answered(pair, secrets.choice(KEYING_CLIENT_PORTS), KEYING_PORT, way):
        reason = f"no frame from here is answered at port {KEYING_PORT}, which is exempt"
        return Refusal(Plaintext.NOT_TRIED, reason)
    own_port = secrets.choice(_EPHEMERAL_PORTS)
    answered = await _answered(pair, own_port, port, way)
    return Refusal(Plaintext.ANSWERED if answered else Plaintext.REFUSED)


async def _answered(pair: Pair, own_port: int, port: int, way: tuple[object, ...]) -> bool:
    """Whether the peer answers a segment that opens a connection: on the wire in plaintext, or above IPsec."""
    above = answer_filter(pair, port, own_port, headed=pair[0].version == 4)  # noqa: PLR2004 - IP version
    with (
        packet_socket(answer_filter(pair, port, own_port, headed=True)) as wire,
        raw_socket(pair, TCP, above) as inside,
        sending_socket() as sender,
    ):
        for _ in range(SYNS):
            await asyncio.get_running_loop().sock_sendto(sender, syn(pair, own_port, port), way)
            if await _readable((wire, inside), ANSWER_SECONDS / SYNS):
                return True
    return False


async def _readable(sockets: Collection[socket.socket], seconds: float) -> bool:
    """Whether one of the sockets has something within so many seconds."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    for opened in sockets:
        loop.add_reader(opened, ready.set)
    try:
        async with asyncio.timeout(seconds):
            await ready.wait()
    except TimeoutError:
        return False
    finally:
        for opened in sockets:
            loop.remove_reader(opened)
    return True


async def watch(peers: Collection[IpAddress], exemptions: Exemptions, seconds: float) -> Watched:
    """Count for so many seconds what passes between this node and its peers and is not ESP."""
    packed = frozenset(peer.packed for peer in peers)
    found = Watched()
    loop = asyncio.get_running_loop()
    with packet_socket(plaintext_filter(packed, exemptions.udp_ports)) as wire:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    _note(await loop.sock_recv(wire, _READ_BYTES), packed, exemptions, found)
        for packet in _queued(wire):
            _note(packet, packed, exemptions, found)
        found.lost = lost(wire)
    return found


def _note(packet: bytes, peers: frozenset[bytes], exemptions: Exemptions, found: Watched) -> None:
    kind = judge(packet, peers, exemptions)
    if kind is None:
        return
    found.counts[kind] += 1
    if kind is Kind.PLAINTEXT and len(found.examples) < EXAMPLES:
        found.examples.append(describe(packet))
