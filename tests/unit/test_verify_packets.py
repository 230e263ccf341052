"""What `srd verify` takes a packet for."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from srd.desired import ICMPV6, TCP, UDP
from srd.verify.packets import (
    ESP,
    ICMP,
    Exemptions,
    Kind,
    describe,
    echo_request,
    is_echo_reply,
    judge,
    syn,
)

LOCAL, REMOTE, OUTSIDER = ip_address("192.0.2.1"), ip_address("192.0.2.2"), ip_address("192.0.2.9")
LOCAL6, REMOTE6 = ip_address("2001:db8::1"), ip_address("2001:db8::2")
PEERS = frozenset({REMOTE.packed, REMOTE6.packed})
EXEMPT = Exemptions(frozenset({6379, 26379}), frozenset({(TCP, 22), (UDP, 123)}), udp_ports=frozenset({4500}))
FRAGMENT, OPTIONS = 44, 60


def ports(source: int, destination: int, rest: bytes = bytes(16)) -> bytes:
    return struct.pack("!HH", source, destination) + rest


def v4(protocol: int, payload: bytes, fragment: int = 0, remote: str = str(REMOTE)) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0)
    return head + LOCAL.packed + ip_address(remote).packed + payload


def v6(protocol: int, payload: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + REMOTE6.packed + LOCAL6.packed + payload


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (v4(ESP, bytes(40)), Kind.ESP),
        (v4(ESP, bytes(40), fragment=185), Kind.ESP),
        (v6(FRAGMENT, bytes([ESP, 0, 0x05, 0xC8, 0, 0, 0, 1]) + bytes(40)), Kind.ESP),
        (v4(UDP, ports(4500, 4500, bytes(4) + b"\0\0\x10\0" + bytes(30))), Kind.ESP),
        (v4(UDP, ports(4500, 4500)), Kind.PLAINTEXT),
        (v4(UDP, ports(4500, 53, bytes(4) + b"\0\0\x10\0" + bytes(30))), Kind.PLAINTEXT),
        (v4(TCP, ports(840, 849)), Kind.EXEMPT),
        (v6(TCP, ports(849, 847)), Kind.EXEMPT),
        (v4(TCP, ports(839, 849)), Kind.PLAINTEXT),
        (v4(TCP, ports(849, 849)), Kind.PLAINTEXT),
        (v4(TCP, ports(22, 50000)), Kind.EXEMPT),
        (v4(UDP, ports(123, 123)), Kind.EXEMPT),
        (v4(UDP, ports(22, 50000)), Kind.PLAINTEXT),
        (v4(TCP, ports(22, 6379)), Kind.PLAINTEXT),
        (v4(TCP, ports(6379, 849)), Kind.PLAINTEXT),
        (v6(OPTIONS, bytes([TCP, 0, 1, 4, 0, 0, 0, 0]) + ports(22, 50000)), Kind.EXEMPT),
        (v6(OPTIONS, bytes([TCP, 0])), Kind.PLAINTEXT),
        (v4(TCP, ports(22, 50000), fragment=185), Kind.PLAINTEXT),
        (v4(ICMP, bytes(64)), Kind.PLAINTEXT),
        (v6(ICMPV6, bytes([135]) + bytes(23)), Kind.EXEMPT),
        (v6(ICMPV6, bytes([128]) + bytes(63)), Kind.PLAINTEXT),
        (v4(ICMPV6, b""), Kind.PLAINTEXT),
        (syn((LOCAL, REMOTE), 40000, 6379), Kind.PROBE),
        (syn((LOCAL6, REMOTE6), 40000, 26379), Kind.PROBE),
        (syn((LOCAL, REMOTE), 40000, 8080), Kind.PLAINTEXT),
        (syn((LOCAL, REMOTE), 40000, 6379)[:-1] + b"x" + b"data", Kind.PROBE),  # padding of the link is no data
        (v4(TCP, syn((LOCAL, REMOTE), 40000, 6379)[20:] + b"data"), Kind.PLAINTEXT),
        (v4(ICMP, bytes(64), remote=str(OUTSIDER)), None),
        (b"", None),
        (b"\x45" + bytes(10), None),
    ],
)
def test_a_packet_is_what_it_can_be_shown_to_be_and_else_plaintext(packet: bytes, kind: Kind | None) -> None:
    assert judge(packet, PEERS, EXEMPT) == kind


def total(data: bytes) -> int:
    """The ones' complement sum, 0xFFFF where the checksum in the data is right."""
    found = sum(word for (word,) in struct.iter_unpack("!H", data))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return found


def test_the_sums_of_what_is_sent_are_right() -> None:
    packet = syn((LOCAL, REMOTE), 40000, 6379)
    assert total(packet[:20]) == 0xFFFF
    assert total(LOCAL.packed + REMOTE.packed + struct.pack("!HH", TCP, 20) + packet[20:]) == 0xFFFF
    packet = syn((LOCAL6, REMOTE6), 40000, 6379)
    assert total(LOCAL6.packed + REMOTE6.packed + struct.pack("!II", 20, TCP) + packet[40:]) == 0xFFFF
    assert total(echo_request((LOCAL, REMOTE), 77, 1)) == 0xFFFF


def test_only_an_answer_to_ones_own_question_counts() -> None:
    answer = struct.pack("!BBHHH", 0, 0, 0, 77, 1)
    assert is_echo_reply(4, v4(ICMP, answer), 77)
    assert not is_echo_reply(4, v4(ICMP, answer), 78)
    assert not is_echo_reply(4, v4(ICMP, echo_request((LOCAL, REMOTE), 77, 1)), 77)
    assert not is_echo_reply(4, b"", 77)
    assert is_echo_reply(6, struct.pack("!BBHHH", 129, 0, 0, 77, 1), 77)


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (v4(TCP, ports(50000, 6379)), "192.0.2.1 > 192.0.2.2 tcp 50000 > 6379"),
        (v6(ICMPV6, bytes(8)), "2001:db8::2 > 2001:db8::1 icmpv6"),
        (v4(132, bytes(8)), "192.0.2.1 > 192.0.2.2 protocol 132"),
        (v4(TCP, ports(1, 2), fragment=185), "192.0.2.1 > 192.0.2.2 tcp"),
        (b"abc", "3 bytes that are not IP"),
    ],
)
def test_a_packet_is_described_to_a_person(packet: bytes, text: str) -> None:
    assert describe(packet) == text
