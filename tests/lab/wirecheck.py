"""Counts, in a capture of the lab's wire, the packets between two nodes that are neither ESP nor exempt.

ESP may be in UDP (4500 at both ends; a first word of 0 is IKE, RFC 3948 section 2.2). Exempt are the keying channel
(849/tcp against a client port of 840-847), neighbour solicitation and advertisement, the default of `ipsec.bypass`,
tcp/22, and the probe of `srd verify`: a SYN alone, without data, whose sequence number is "srdv". Whatever cannot be
shown to be exempt (a later fragment of TCP, a header cut short) counts as plaintext. ARP is not IP. Needs the standard
library only: it runs in the lab under any Python.

Formats: pcap of Ethernet, Linux cooked v1 and v2. Out of scope: pcapng, tunnels (they count as plaintext themselves).
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

# The lab's plan of addresses: redis-1 is .10, at most ten nodes; the balancer (.20) and clients are no nodes.
NODES: Final = frozenset(
    address.packed
    for host in range(10, 20)
    for address in (ip_address(f"192.168.205.{host}"), ip_address(f"fd00:205::{host}"))
)

MAGICS: Final = {  # first four bytes -> byte order; microseconds and nanoseconds
    b"\xd4\xc3\xb2\xa1": "<",
    b"\x4d\x3c\xb2\xa1": "<",
    b"\xa1\xb2\xc3\xd4": ">",
    b"\xa1\xb2\x3c\x4d": ">",
}
LINK_TYPES: Final = {1: (12, 14), 113: (14, 16), 276: (0, 20)}  # pcap link type -> (offset of EtherType, of payload)

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
VLAN_TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100})

TCP: Final = 6
UDP: Final = 17
ESP: Final = 50
ICMPV6: Final = 58
IPV6_FRAGMENT: Final = 44
IPV6_EXTENSIONS: Final = frozenset({0, 43, 60, 135, 139, 140})  # each says its length in units of 8 bytes
NEIGHBOUR_DISCOVERY: Final = frozenset({135, 136})
KEYING_SERVER: Final = 849
KEYING_CLIENTS: Final = range(840, 848)
ESP_IN_UDP: Final = 4500
BYPASSED_TCP: Final = frozenset({22})


class CaptureError(Exception):
    """The file is not a capture that can be judged."""


class Packet(NamedTuple):
    """One IP packet up to and including what follows its IP headers; `protocol` is -1 where that was cut off."""

    source: bytes
    destination: bytes
    protocol: int
    later_fragment: bool
    payload: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One packet in plaintext: its number in the file (from 1, as Wireshark counts), time and description."""

    number: int
    seconds: float
    text: str


def plaintext(capture: bytes) -> Iterator[Finding]:
    """Yield each packet between two nodes that is neither ESP nor exempt, in the order of the file."""
    for number, (seconds, link_type, frame, whole) in enumerate(_frames(capture), start=1):
        ethertype, body = _network_layer(link_type, frame)
        if ethertype not in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
            continue
        packet = _ipv4(body) if ethertype == ETHERTYPE_IPV4 else _ipv6(body)
        if packet is None:
            if not whole:  # who knows between whom it was
                yield Finding(number, seconds, "cut off before its addresses")
        elif packet.source in NODES and packet.destination in NODES and not _exempt(packet):
            yield Finding(number, seconds, _describe(packet))


def _frames(capture: bytes) -> Iterator[tuple[float, int, bytes, bool]]:
    """Yield (time, link type, captured bytes, whether they are all of the frame)."""
    order = MAGICS.get(capture[:4])
    if order is None or len(capture) < 24:
        raise CaptureError("not a pcap file")
    link_type: int = struct.unpack_from(f"{order}I", capture, 20)[0] & 0x0FFFFFFF
    if link_type not in LINK_TYPES:
        raise CaptureError(f"link type {link_type} is none of Ethernet, Linux cooked v1 and v2")
    fraction = 1e-9 if capture[:4] in (b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d") else 1e-6
    record = struct.Struct(f"{order}IIII")
    position = 24
    while position < len(capture):
        if position + record.size > len(capture):
            raise CaptureError("ends within the header of a packet")
        seconds, parts, captured, original = record.unpack_from(capture, position)
        position += record.size
        if position + captured > len(capture):
            raise CaptureError("ends within a packet")
        yield seconds + parts * fraction, link_type, capture[position : position + captured], captured >= original
        position += captured


def _network_layer(link_type: int, frame: bytes) -> tuple[int, bytes]:
    """Return EtherType and what it names, with VLAN tags taken off; EtherType 0 where the frame ends before it."""
    at, start = LINK_TYPES[link_type]
    ethertype = int.from_bytes(frame[at : at + 2])
    body = frame[start:]
    while ethertype in VLAN_TAGS:
        ethertype = int.from_bytes(body[2:4])
        body = body[4:]
    return ethertype, body


def _ipv4(body: bytes) -> Packet | None:
    if len(body) < 20:
        return None
    later_fragment = int.from_bytes(body[6:8]) & 0x1FFF != 0
    length = int.from_bytes(body[2:4])  # a short frame is padded behind it
    return Packet(body[12:16], body[16:20], body[9], later_fragment, body[(body[0] & 0x0F) * 4 : length])


def _ipv6(body: bytes) -> Packet | None:
    if len(body) < 40:
        return None
    source, destination, protocol, payload, later_fragment = body[8:24], body[24:40], body[6], body[40:], False
    while protocol in IPV6_EXTENSIONS or protocol == IPV6_FRAGMENT:
        if len(payload) < 8:
            return Packet(source, destination, -1, later_fragment, b"")
        if protocol == IPV6_FRAGMENT:
            length = 8
            later_fragment = int.from_bytes(payload[2:4]) & 0xFFF8 != 0
        else:
            length = (payload[1] + 1) * 8
        protocol, payload = payload[0], payload[length:]
        if later_fragment:  # what follows is the middle of something, no header
            break
    return Packet(source, destination, protocol, later_fragment, payload)


def _exempt(packet: Packet) -> bool:
    if packet.protocol == ESP:
        return True
    if packet.later_fragment:
        return False
    if packet.protocol == ICMPV6 and len(packet.source) == 16:
        return packet.payload[:1] != b"" and packet.payload[0] in NEIGHBOUR_DISCOVERY
    if packet.protocol == TCP and len(packet.payload) >= 4:
        source, destination = struct.unpack_from("!HH", packet.payload)
        keying = (source == KEYING_SERVER and destination in KEYING_CLIENTS) or (
            destination == KEYING_SERVER and source in KEYING_CLIENTS
        )
        probe = packet.payload[4:8] == b"srdv" and packet.payload[13:14] == b"\x02" and len(packet.payload) == 20
        return keying or probe or source in BYPASSED_TCP or destination in BYPASSED_TCP
    if packet.protocol == UDP and len(packet.payload) >= 12:
        ports, spi = struct.unpack_from("!HH", packet.payload), packet.payload[8:12]
        return ports == (ESP_IN_UDP, ESP_IN_UDP) and spi != bytes(4)
    return False


def _describe(packet: Packet) -> str:
    names = {TCP: "tcp", UDP: "udp", 1: "icmp", ICMPV6: "icmp6", -1: "headers cut off"}
    text = f"{ip_address(packet.source)} > {ip_address(packet.destination)} "
    text += names.get(packet.protocol, f"protocol {packet.protocol}")
    if packet.later_fragment:
        return f"{text}, later fragment"
    if packet.protocol in (TCP, UDP) and len(packet.payload) >= 4:
        source, destination = struct.unpack_from("!HH", packet.payload)
        text += f" {source} > {destination}"
    return f"{text}, {len(packet.payload)} bytes"


def main() -> int:
    """Print the number of packets in plaintext, and with -v each of them; 2 where the file cannot be judged."""
    parser = argparse.ArgumentParser(prog="wire plaintext", description="count plaintext packets between nodes")
    parser.add_argument("file", type=Path)
    parser.add_argument("-v", "--verbose", action="store_true", help="list them too")
    arguments = parser.parse_args()
    try:
        found = list(plaintext(arguments.file.read_bytes()))
    except (OSError, CaptureError) as error:
        print(f"wire plaintext: {arguments.file}: {error}", file=sys.stderr)
        return 2
    print(len(found))
    if arguments.verbose:
        for finding in found:
            print(f"{finding.number:>8} {finding.seconds:.6f} {finding.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
