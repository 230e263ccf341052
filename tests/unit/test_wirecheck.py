"""tests/lab/wirecheck.py against captures made by hand: the proof of encryption rests on what it counts."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from lab import wirecheck

REDIS_1, REDIS_2, CLIENT = "192.168.205.10", "192.168.205.11", "192.168.205.30"
REDIS_1_V6, REDIS_2_V6 = "fd00:205::10", "fd00:205::11"
TCP, UDP, ESP, ICMP, ICMPV6, FRAGMENT, DESTINATION_OPTIONS = 6, 17, 50, 1, 58, 44, 60
ETHERNET, COOKED_V1, COOKED_V2 = 1, 113, 276


def ports(source: int, destination: int) -> bytes:
    return struct.pack("!HH", source, destination) + bytes(16)


def ipv4(protocol: int, payload: bytes, source: str = REDIS_1, destination: str = REDIS_2, fragment: int = 0) -> bytes:
    total = 20 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x45, 0, total, 1, fragment, 64, protocol, 0)
    return head + ip_address(source).packed + ip_address(destination).packed + payload


def ipv6(protocol: int, payload: bytes, source: str = REDIS_1_V6, destination: str = REDIS_2_V6) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
    return head + ip_address(source).packed + ip_address(destination).packed + payload


def ethernet(packet: bytes, tags: bytes = b"") -> bytes:
    ethertype = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
    return bytes(12) + tags + ethertype + packet


def pcap(*frames: bytes, link_type: int = ETHERNET, order: str = "<", keep: int = 65535) -> bytes:
    magic = 0xA1B2C3D4
    out = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 262144, link_type)
    for frame in frames:
        out += struct.pack(f"{order}IIII", 1_700_000_000, 250_000, min(keep, len(frame)), len(frame)) + frame[:keep]
    return out


def count(*packets: bytes) -> int:
    return len(list(wirecheck.plaintext(pcap(*map(ethernet, packets)))))


@pytest.mark.parametrize(
    "packet",
    [
        ipv4(ESP, bytes(40)),
        ipv6(ESP, bytes(40)),
        ipv4(ESP, bytes(40), fragment=0x2000),
        ipv4(ESP, bytes(40), fragment=185),
        ipv6(FRAGMENT, bytes([ESP, 0, 0x05, 0xC8, 0, 0, 0, 1]) + bytes(40)),
        ipv6(DESTINATION_OPTIONS, bytes([ESP, 0, 1, 4, 0, 0, 0, 0]) + bytes(40)),
        ipv4(UDP, struct.pack("!HHHHI", 4500, 4500, 48, 0, 0x1000) + bytes(36)),
        ipv4(TCP, struct.pack("!HH4sIBBHHH", 50000, 6379, b"srdv", 0, 0x50, 0x02, 0, 0, 0)),
        ipv4(TCP, ports(840, 849)),
        ipv4(TCP, ports(849, 847)),
        ipv6(TCP, ports(843, 849)),
        ipv4(TCP, ports(50000, 22)),
        ipv4(TCP, ports(22, 50000)),
        ipv6(ICMPV6, bytes([135]) + bytes(23)),
        ipv6(ICMPV6, bytes([136]) + bytes(23)),
        ipv4(TCP, ports(50000, 6379), source=CLIENT),
        ipv4(TCP, ports(8080, 50000), destination=CLIENT),
        ipv6(ICMPV6, bytes([143]) + bytes(20), destination="ff02::16"),
    ],
)
def test_esp_the_exemptions_and_other_stations_do_not_count(packet: bytes) -> None:
    assert count(packet) == 0


@pytest.mark.parametrize(
    ("packet", "description"),
    [
        (ipv4(TCP, ports(50000, 6379)), "192.168.205.10 > 192.168.205.11 tcp 50000 > 6379"),
        (ipv6(TCP, ports(6379, 50000)), "fd00:205::10 > fd00:205::11 tcp 6379 > 50000"),
        (ipv4(TCP, struct.pack("!HH4sIBBHHH", 1, 6379, b"srdv", 0, 0x50, 0x10, 0, 0, 0)), "tcp 1 > 6379"),
        (ipv4(TCP, struct.pack("!HH4sIBBHHH", 1, 6379, b"srdv", 0, 0x50, 0x02, 0, 0, 0) + b"x"), "tcp 1 > 6379"),
        (ipv4(TCP, ports(848, 849)), "tcp 848 > 849"),
        (ipv4(TCP, ports(839, 849)), "tcp 839 > 849"),
        (ipv4(TCP, ports(849, 849)), "tcp 849 > 849"),
        (ipv4(TCP, ports(840, 841)), "tcp 840 > 841"),
        (ipv4(UDP, ports(840, 849)), "udp 840 > 849"),
        (ipv4(UDP, ports(22, 22)), "udp 22 > 22"),
        (ipv4(UDP, ports(4500, 4500)), "udp 4500 > 4500"),
        (ipv4(UDP, ports(4500, 53)[:4] + bytes([1]) * 12), "udp 4500 > 53"),
        (ipv4(ICMP, bytes(16)), "icmp"),
        (ipv6(ICMPV6, bytes([128]) + bytes(7)), "icmp6"),
        (ipv4(ICMPV6, bytes([135]) + bytes(23)), "icmp6"),
        (ipv4(51, bytes(24)), "protocol 51"),
        (ipv4(4, ipv4(ESP, bytes(40))), "protocol 4"),
        (ipv4(TCP, ports(50000, 22), fragment=185), "tcp, later fragment"),
        (ipv6(FRAGMENT, bytes([TCP, 0, 0x05, 0xC8, 0, 0, 0, 1]) + ports(0, 22)), "tcp, later fragment"),
        (ipv6(FRAGMENT, bytes([TCP, 0, 0, 1, 0, 0, 0, 1]) + ports(1, 6379)), "tcp 1 > 6379"),
        (ipv6(FRAGMENT, bytes([ICMPV6, 0, 0x05, 0xC8, 0, 0, 0, 1]) + bytes([135, 0])), "later fragment"),
        (ipv6(DESTINATION_OPTIONS, b"\x32\x00"), "headers cut off"),
        (ipv4(TCP, b"\x00\x16"), "tcp, 2 bytes"),
        (ipv6(ICMPV6, b""), "icmp6, 0 bytes"),
    ],
)
def test_everything_else_between_nodes_counts(packet: bytes, description: str) -> None:
    found = list(wirecheck.plaintext(pcap(ethernet(packet))))

    assert [(finding.number, finding.seconds) for finding in found] == [(1, 1_700_000_000.25)]
    assert description in found[0].text


def test_ipv4_options_do_not_shift_the_ports() -> None:
    plain = ipv4(TCP, ports(50000, 22))
    with_options = bytes([0x46]) + plain[1:20] + bytes(4) + plain[20:]

    assert count(with_options) == 0


@pytest.mark.parametrize("tags", [b"\x81\x00\x00\x05", b"\x88\xa8\x00\x07\x81\x00\x00\x05"])
def test_vlan_tags_hide_nothing(tags: bytes) -> None:
    frames = [ethernet(ipv4(TCP, ports(1, 6379)), tags), ethernet(ipv4(ESP, bytes(40)), tags)]

    assert [finding.number for finding in wirecheck.plaintext(pcap(*frames))] == [1]


@pytest.mark.parametrize(
    ("link_type", "head"),
    [(COOKED_V1, bytes(14) + b"\x08\x00"), (COOKED_V2, b"\x08\x00" + bytes(18))],
)
def test_cooked_captures_are_read_as_ethernet_is(link_type: int, head: bytes) -> None:
    capture = pcap(head + ipv4(ESP, bytes(40)), head + ipv4(TCP, ports(1, 26379)), link_type=link_type)

    assert [finding.number for finding in wirecheck.plaintext(capture)] == [2]


def test_arp_and_unknown_ethertypes_are_not_ip() -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    experiment = bytes(12) + b"\x88\xb5" + ipv4(TCP, ports(1, 6379))

    assert list(wirecheck.plaintext(pcap(arp, experiment))) == []


def test_a_big_endian_file_is_read_too() -> None:
    assert len(list(wirecheck.plaintext(pcap(ethernet(ipv4(ICMP, bytes(8))), order=">")))) == 1


@pytest.mark.parametrize(("keep", "text"), [(14 + 12, "cut off before its addresses"), (14 + 22, "tcp, 2 bytes")])
def test_a_packet_cut_short_by_the_snapshot_length_counts(keep: int, text: str) -> None:
    capture = pcap(ethernet(ipv4(TCP, ports(50000, 22))), keep=keep)

    assert [text in finding.text for finding in wirecheck.plaintext(capture)] == [True]


def test_a_whole_frame_too_short_for_ip_is_between_nobody() -> None:
    assert count(ipv4(TCP, b"")[:12]) == 0


@pytest.mark.parametrize("missing", [1, 30, 60])
def test_a_file_that_ends_within_a_packet_is_refused(missing: int) -> None:
    capture = pcap(ethernet(ipv4(ESP, bytes(40))))

    with pytest.raises(wirecheck.CaptureError, match="ends within"):
        list(wirecheck.plaintext(capture[:-missing]))


@pytest.mark.parametrize("capture", [b"", b"\x0a\x0d\x0d\x0a" + bytes(40), pcap(link_type=127)])
def test_another_file_format_is_refused(capture: bytes) -> None:
    with pytest.raises(wirecheck.CaptureError):
        list(wirecheck.plaintext(capture))


def test_an_empty_capture_has_no_plaintext() -> None:
    assert list(wirecheck.plaintext(pcap())) == []
