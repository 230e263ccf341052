"""`srd verify` below IPsec: what its filters let through in the kernel, and what it makes of an answer."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from support.namespace import in_namespace

from srd.desired import ICMPV6, TCP, UDP
from srd.verify import probes, sockets
from srd.verify.filters import answer_filter
from srd.verify.packets import ESP, Exemptions, Kind, Pair, syn
from srd.verify.probes import Plaintext
from srd.verify.sockets import sending_socket, way_to

HERE, THERE, OTHER = (ip_address(f"192.0.2.{number}") for number in (1, 2, 9))
HERE6, THERE6, OTHER6 = (ip_address(f"2001:db8::{number}") for number in (1, 2, 9))
EXEMPT = Exemptions(frozenset({6379}), frozenset({(TCP, 22)}), udp_ports=frozenset({4500}))
# A host that listens on the keying port and on redis', until it is told to end.
LISTEN = """
import socket
kept = [
    socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (849, 6379)
]
print(flush=True)
input()
"""
MANY = frozenset(ip_address("198.18.0.0") + number for number in range(1000))


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


def wire() -> None:
    """A link whose other end is in the same host, which therefore answers nothing."""
    ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
    ip("addr", "add", f"{HERE}/24", "dev", "d0")
    ip("addr", "add", f"{HERE6}/64", "dev", "d0", "nodad")
    for end in ("lo", "d0", "d1"):
        ip("link", "set", end, "up")
    for neighbour in (THERE, THERE6):
        ip("neigh", "add", str(neighbour), "lladdr", "02:00:00:00:00:02", "dev", "d0", "nud", "permanent")


def packets(pair: Pair) -> Iterator[tuple[bytes, Kind | None]]:
    """Yield packets from the first address of the pair to the second, and what they are to be taken for."""
    ports = struct.pack("!HH", 4500, 4500)
    for protocol, payload, kind in (
        (ESP, bytes(40), None),
        (UDP, ports + bytes(4) + b"\0\0\x10\0" + bytes(30), None),
        (UDP, ports + bytes(40), Kind.PLAINTEXT),
        (UDP, struct.pack("!HH", 4500, 53) + bytes(40), Kind.PLAINTEXT),
        (TCP, struct.pack("!HH", 22, 50000) + bytes(16), Kind.EXEMPT),
        (TCP, struct.pack("!HH", 50000, 6379) + bytes(16), Kind.PLAINTEXT),
        (132, bytes(40), Kind.PLAINTEXT),
    ):
        if pair[0].version == 4:
            head = struct.pack("!BBHHHBBH", 0x46, 0, 24 + len(payload), 1, 0, 64, protocol, 0)
            yield head + pair[0].packed + pair[1].packed + bytes(4) + payload, kind  # with an option
        else:
            head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
            yield head + pair[0].packed + pair[1].packed + payload, kind
    yield syn(pair, 40000, 6379), Kind.PROBE


async def seen(packet: bytes, way: tuple[object, ...]) -> probes.Watched:
    """What a watch makes of one packet that is sent meanwhile, among the addresses of a thousand peers."""
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(probes.watch({THERE, THERE6, *MANY}, EXEMPT, 0.1))
        await asyncio.sleep(0)  # it watches from its first step on
        with sending_socket() as sender:
            sender.sendto(packet, way)
    return watching.result()


@in_namespace
async def test_the_kernel_hands_over_what_is_not_esp_with_a_peer_and_nothing_else() -> None:
    wire()
    for here, there, other in ((HERE, THERE, OTHER), (HERE6, THERE6, OTHER6)):
        way = await way_to((here, there))
        for pair in ((here, there), (there, here)):
            for packet, kind in packets(pair):
                found = await seen(packet, way)
                # Once as it leaves d0, once as it comes in at d1.
                assert found.counts == ({} if kind is None else {kind: 2}), (packet, found)
                assert found.lost == 0
                assert bool(found.examples) == (kind is Kind.PLAINTEXT)
        for packet, _ in packets((here, other)):
            assert not (await seen(packet, way)).counts


@in_namespace
async def test_neighbour_discovery_is_exempt_and_other_icmpv6_is_not() -> None:
    wire()
    way = await way_to((HERE6, THERE6))
    for kind, expected in ((135, Kind.EXEMPT), (136, Kind.EXEMPT), (128, Kind.PLAINTEXT)):
        head = struct.pack("!IHBB", 6 << 28, 24, ICMPV6, 255)
        found = await seen(head + HERE6.packed + THERE6.packed + bytes([kind]) + bytes(23), way)
        assert found.counts[expected] == 2


@in_namespace
async def test_a_frame_that_does_not_arrive_is_not_taken_for_a_refusal() -> None:
    wire()
    for pair in ((HERE, THERE), (HERE6, THERE6)):
        refusal = await probes.plaintext(pair, 6379)
        assert refusal.outcome is Plaintext.NOT_TRIED
        assert "is answered at port 849" in refusal.reason
    ip("neigh", "del", str(THERE), "dev", "d0")
    assert "no link address of 192.0.2.2" in (await probes.plaintext((HERE, THERE), 6379)).reason


@in_namespace
async def test_who_lets_plaintext_in_is_found_out_and_who_does_not_too() -> None:
    """Against a host without IPsec, in a namespace of its own: an open port, a closed one, and one that is mute."""
    ip("netns", "add", "there")
    try:
        ip("link", "add", "d0", "type", "veth", "peer", "name", "d1", "netns", "there")
        for prefix, device, addresses in (((), "d0", (HERE, HERE6)), (("-n", "there"), "d1", (THERE, THERE6))):
            for address in addresses:
                bits = ("24",) if address.version == 4 else ("64", "nodad")
                ip(*prefix, "addr", "add", f"{address}/{bits[0]}", "dev", device, *bits[1:])
            ip(*prefix, "link", "set", device, "up")
        command = ("ip", "netns", "exec", "there", "python3", "-c", LISTEN)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdout.readline()
        for pair in ((HERE, THERE), (HERE6, THERE6)):
            with socket.socket(socket.AF_INET if pair[0].version == 4 else socket.AF_INET6) as friend:
                friend.connect((str(pair[1]), 849))  # and so the neighbour is known
            assert (await probes.plaintext(pair, 6379)).outcome is Plaintext.ANSWERED
            assert (await probes.plaintext(pair, 26379)).outcome is Plaintext.ANSWERED, "a reset is an answer"
            program = "iptables" if pair[0].version == 4 else "ip6tables"
            rule = (f"{program}-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "6379", "-j", "DROP")
            subprocess.run(("ip", "netns", "exec", "there", *rule), check=True)  # noqa: ASYNC221 - a test's own host
            assert (await probes.plaintext(pair, 6379)).outcome is Plaintext.REFUSED
        process.stdin.write(b"\n")
        await process.wait()
    finally:
        ip("netns", "del", "there")


@in_namespace
async def test_what_came_before_the_filter_is_no_answer() -> None:
    ip("link", "set", "lo", "up")
    here = ip_address("127.0.0.1")
    really = sockets.attach

    def late(made: socket.socket, program: bytes) -> None:
        with socket.create_server((str(here), 0)) as server:
            socket.create_connection(server.getsockname()).close()
        really(made, program)

    nobody = answer_filter((here, here), 9, 9, headed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "attach", late)
        with sockets.raw_socket((here, here), TCP, nobody) as inside, sockets.packet_socket(nobody) as on_the_wire:
            for opened in (inside, on_the_wire):
                with pytest.raises(BlockingIOError):
                    opened.recv(1)
