"""Packets of `srd verify`: those that it sends, and what one that was seen on the wire is. Pure.

Bytes begin with the IP header, as AF_PACKET's SOCK_DGRAM gives and takes them (packet(7)).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT
from srd.desired import ICMPV6, NEIGHBOUR_DISCOVERY_TYPES, TCP, UDP
from srd.model import IpAddress

ICMP: Final = 1
ESP: Final = 50
SYN: Final = 0x02
# The sequence number of a probe, "srdv": another node's `srd verify` knows it for what it is. It carries nothing.
PROBE_SEQUENCE: Final = 0x73726476
ECHO_REQUEST: Final = {4: 8, 6: 128}
ECHO_REPLY: Final = {4: 0, 6: 129}
_ICMP_PROTOCOL: Final = {4: ICMP, 6: ICMPV6}
_FRAGMENT: Final = 44
# Hop-by-hop, routing, destination options, mobility, HIP, shim6: each says its length in units of 8 bytes (RFC 8200).
_EXTENSIONS: Final = frozenset({0, 43, 60, 135, 139, 140})
_DF: Final = 0x4000

Pair = tuple[IpAddress, IpAddress]  # local, remote


class Kind(enum.StrEnum):
    """What a packet with a peer is."""

    ESP = "esp"
    EXEMPT = "exempt"
    PROBE = "probe"
    PLAINTEXT = "plaintext"


@dataclass(frozen=True, slots=True)
class Exemptions:
    """What may pass in plaintext, and the ports that never may; `bypass` holds (protocol number, port)."""

    protected: frozenset[int]
    bypass: frozenset[tuple[int, int]]
    udp_ports: frozenset[int] = frozenset()  # of ESP in UDP


@dataclass(frozen=True, slots=True)
class _Parsed:
    """One packet; `payload` is what follows its IP headers, `later` says that it is the middle of something."""

    source: bytes
    destination: bytes
    protocol: int
    payload: bytes
    later: bool = False


def judge(packet: bytes, peers: frozenset[bytes], exemptions: Exemptions) -> Kind | None:
    """Return what a packet is; None if neither end is one of `peers` (packed addresses) or it is not IP.

    What cannot be shown to be anything else is plaintext: a fragment without ports, a header cut short.
    """
    parsed = _parse(packet)
    if parsed is None or not {parsed.source, parsed.destination} & peers:
        return None
    if parsed.protocol == ESP:
        return Kind.ESP
    if parsed.later:
        return Kind.PLAINTEXT
    if parsed.protocol == ICMPV6 and parsed.payload[:1] and parsed.payload[0] in NEIGHBOUR_DISCOVERY_TYPES:
        return Kind.EXEMPT
    if parsed.protocol in (TCP, UDP) and len(parsed.payload) >= 4:  # noqa: PLR2004 - two ports
        return _by_ports(parsed, frozenset(struct.unpack_from("!HH", parsed.payload)), exemptions)
    return Kind.PLAINTEXT


def _by_ports(parsed: _Parsed, ports: frozenset[int], exemptions: Exemptions) -> Kind:
    if parsed.protocol == TCP:
        if ports & exemptions.protected:
            return Kind.PROBE if _is_probe(parsed.payload) else Kind.PLAINTEXT
        if KEYING_PORT in ports and any(port in KEYING_CLIENT_PORTS for port in ports):
            return Kind.EXEMPT
    # In UDP an SPI of 0 is IKE (RFC 3948 section 2.2).
    elif len(ports) == 1 and ports <= exemptions.udp_ports and parsed.payload[8:12].strip(b"\0"):
        return Kind.ESP
    return Kind.EXEMPT if any((parsed.protocol, port) in exemptions.bypass for port in ports) else Kind.PLAINTEXT


def _is_probe(segment: bytes) -> bool:
    return len(segment) == 20 and segment[4:8] == PROBE_SEQUENCE.to_bytes(4) and segment[13] == SYN  # noqa: PLR2004


def _parse(packet: bytes) -> _Parsed | None:
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:  # noqa: PLR2004 - IP version and header
        size = min((packet[0] & 0x0F) * 4, len(packet))
        later = int.from_bytes(packet[6:8]) & 0x1FFF != 0
        end = int.from_bytes(packet[2:4])
        return _Parsed(packet[12:16], packet[16:20], packet[9], packet[size:end], later)
    if version == 6 and len(packet) >= 40:  # noqa: PLR2004 - as above
        return _parse_v6(packet)
    return None


def _parse_v6(packet: bytes) -> _Parsed:
    source, destination, protocol = packet[8:24], packet[24:40], packet[6]
    payload = packet[40 : 40 + int.from_bytes(packet[4:6])]
    while protocol in _EXTENSIONS or protocol == _FRAGMENT:
        if len(payload) < 8:  # noqa: PLR2004 - the unit of these headers
            return _Parsed(source, destination, -1, b"")
        if protocol == _FRAGMENT:
            if int.from_bytes(payload[2:4]) & 0xFFF8:
                return _Parsed(source, destination, payload[0], payload[8:], later=True)
            protocol, payload = payload[0], payload[8:]
        else:
            protocol, payload = payload[0], payload[(payload[1] + 1) * 8 :]
    return _Parsed(source, destination, protocol, payload)


def syn(pair: Pair, source_port: int, port: int) -> bytes:
    """Return a TCP segment that opens a connection, as a whole IP packet."""
    segment = struct.pack("!HHIIBBHHH", source_port, port, PROBE_SEQUENCE, 0, 5 << 4, SYN, 64240, 0, 0)
    segment = segment[:16] + _checksum(_pseudo_header(pair, TCP, len(segment)) + segment) + segment[18:]
    return _ip_header(pair, TCP, len(segment)) + segment


def echo_request(pair: Pair, identifier: int, sequence: int) -> bytes:
    """Return an ICMP echo request without IP header, as a raw socket takes it. For IPv6 the kernel adds the sum."""
    version = pair[0].version
    message = struct.pack("!BBHHH", ECHO_REQUEST[version], 0, 0, identifier, sequence) + bytes(56)
    return message if version == 6 else message[:2] + _checksum(message) + message[4:]  # noqa: PLR2004 - IP version


def is_echo_reply(version: int, packet: bytes, identifier: int) -> bool:
    """Whether a raw ICMP socket has received an answer to `echo_request`; IPv4's come with their IP header."""
    message = packet[(packet[0] & 0x0F) * 4 :] if version == 4 and packet else packet  # noqa: PLR2004 - IP version
    return message[:1] == bytes([ECHO_REPLY[version]]) and message[4:6] == identifier.to_bytes(2)


def icmp_protocol(version: int) -> int:
    """Return the protocol number of a family's ICMP."""
    return _ICMP_PROTOCOL[version]


def _ip_header(pair: Pair, protocol: int, length: int) -> bytes:
    local, remote = pair
    if local.version == 6:  # noqa: PLR2004 - IP version
        return struct.pack("!IHBB", 6 << 28, length, protocol, 64) + local.packed + remote.packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, _DF, 64, protocol, 0) + local.packed + remote.packed
    return head[:10] + _checksum(head) + head[12:]


def _pseudo_header(pair: Pair, protocol: int, length: int) -> bytes:
    """Return what a TCP checksum covers besides the segment (RFC 9293 section 3.1, RFC 8200 section 8.1)."""
    addresses = pair[0].packed + pair[1].packed
    if pair[0].version == 6:  # noqa: PLR2004 - IP version
        return addresses + struct.pack("!II", length, protocol)
    return addresses + struct.pack("!HH", protocol, length)


def _checksum(data: bytes) -> bytes:
    """Return the Internet checksum (RFC 1071)."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2)


def describe(packet: bytes) -> str:
    """Return a packet in words, for a person who has to find out whose it is."""
    parsed = _parse(packet)
    if parsed is None:
        return f"{len(packet)} bytes that are not IP"
    name = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}.get(parsed.protocol, f"protocol {parsed.protocol}")
    text = f"{ip_address(parsed.source)} > {ip_address(parsed.destination)} {name}"
    if parsed.protocol in (TCP, UDP) and len(parsed.payload) >= 4 and not parsed.later:  # noqa: PLR2004 - two ports
        source, destination = struct.unpack_from("!HH", parsed.payload)
        text += f" {source} > {destination}"
    return text
