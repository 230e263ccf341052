"""The XFRM sockets where the kernel has ESP: run pytest on this in the lab (`LAB_BARE=1 tests/lab/boot SCRIPT`).

Two network namespaces with a link between them, left (10.0.0.1, fd00::1) and right (10.0.0.2, fd00::2); packets go from
left to right. `ip -s xfrm state` is the independent witness of what is installed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from support.namespace import inside, ip, run

from srd.ipsec.xfrm import (
    Action,
    Aead,
    AlreadyExistsError,
    Direction,
    Expired,
    Lifetime,
    Mark,
    MissingError,
    NotSupportedError,
    Policy,
    Sa,
    SaChanged,
    SaDeleted,
    Selector,
    Template,
    XfrmError,
    XfrmEvents,
    XfrmSocket,
    probe_esp,
    try_aead,
)

GCM = "rfc4106(gcm(aes))"
CHACHA = "rfc7539esp(chacha20,poly1305)"
IPV4 = (ip_address("10.0.0.1"), ip_address("10.0.0.2"))
IPV6 = (ip_address("fd00::1"), ip_address("fd00::2"))
REQID = 20481
SPI = 0x10000001
PORT = 4000
HAS_SA_DIR = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 10)
Address = IPv4Address | IPv6Address


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    names = ("xfrm-left", "xfrm-right")
    for name in names:
        run("ip", "netns", "add", name)
    run("ip", "-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
    for name, *addresses in zip(names, IPV4, IPV6, strict=True):
        ip(name, "link", "set", "wire", "up")
        for address, bits in zip(addresses, ("24", "64"), strict=True):
            ip(name, "addr", "add", f"{address}/{bits}", "dev", "wire", *(("nodad",) if bits == "64" else ()))
    for name, other, *addresses in zip(names, reversed(names), reversed(IPV4), reversed(IPV6), strict=True):
        (link,) = re.findall(r"link/ether (\S+)", ip(other, "link", "show", "wire"))
        for address in addresses:
            ip(name, "neigh", "replace", str(address), "lladdr", link, "dev", "wire", "nud", "permanent")
    yield names
    for name in names:
        run("ip", "netns", "delete", name)


@dataclass
class Pair:
    """The kernels of both hosts, and what happens on the right one."""

    left: XfrmSocket
    right: XfrmSocket
    events: XfrmEvents
    names: tuple[str, str]


@pytest.fixture
async def pair(hosts: tuple[str, str]) -> AsyncIterator[Pair]:
    kernels, events = (XfrmSocket(), XfrmSocket()), XfrmEvents()
    for name, kernel in zip(hosts, kernels, strict=True):
        with inside(name):
            await kernel.sad_count()
    with inside(hosts[1]):
        await events.__aenter__()
    yield Pair(*kernels, events, hosts)
    for opened in (*kernels, events):
        opened.close()


def outbound(addresses: tuple[Address, Address] = IPV4, suite: str = GCM, **changes: object) -> Sa:
    """Return the SA as the left host has it."""
    left, right = addresses
    values: dict[str, object] = {
        "source": left,
        "destination": right,
        "spi": SPI,
        "reqid": REQID,
        "aead": Aead(suite, secrets.token_bytes(36)),
        "direction": Direction.OUT,
        "selector": Selector(ip_network(left), ip_network(right)),
    }
    return Sa(**(values | changes))


def inbound(sa: Sa) -> Sa:
    """Return the same as the right host has it."""
    return replace(sa, direction=Direction.IN)


def protect(sa: Sa, direction: Direction) -> Policy:
    spi = sa.spi if direction is Direction.OUT else 0
    return Policy(sa.selector, direction, Action.ALLOW, 1000, 8 + direction, (Template(sa.reqid, spi=spi),))


async def connect(pair: Pair, sa: Sa) -> None:
    await pair.right.add_policy(protect(sa, Direction.IN))
    await pair.left.add_policy(protect(sa, Direction.OUT))
    await pair.right.add_sa(inbound(sa))
    await pair.left.add_sa(sa)


@contextmanager
def link(pair: Pair, addresses: tuple[Address, Address]) -> Iterator[tuple[socket.socket, socket.socket]]:
    family = socket.AF_INET if addresses[0].version == 4 else socket.AF_INET6
    with inside(pair.names[0]):
        sender = socket.socket(family, socket.SOCK_DGRAM)
    with inside(pair.names[1]):
        receiver = socket.socket(family, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((str(addresses[1]), PORT))
        receiver.settimeout(5)
        sender.connect((str(addresses[1]), PORT))
        yield sender, receiver


async def next_of(events: XfrmEvents, kind: type) -> object:
    async with asyncio.timeout(20):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError("the events ended")


def numbers(text: str, pattern: str) -> tuple[str, ...]:
    (found,) = re.findall(pattern, text)
    return found if isinstance(found, tuple) else (found,)


async def test_the_kernel_has_both_suites(pair: Pair) -> None:
    assert await probe_esp(pair.left, [CHACHA, "rfc4106(none(aes))", GCM]) == (CHACHA, GCM)
    assert await pair.left.sas() == []
    with pytest.raises(NotSupportedError, match="AEAD in the kernel"):
        await try_aead(pair.left, "rfc4106(none(aes))")
    with pytest.raises(XfrmError) as refused:
        await try_aead(pair.left, GCM, key_bytes=35)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("suite", [GCM, CHACHA])
@pytest.mark.parametrize("addresses", [IPV4, IPV6], ids=["ipv4", "ipv6"])
async def test_packets_pass_and_iproute2_reads_what_we_read(
    pair: Pair, suite: str, addresses: tuple[Address, Address]
) -> None:
    lifetime = Lifetime(soft_bytes=1 << 38, hard_bytes=320 << 30, hard_packets=4000, soft_seconds=60, hard_seconds=70)
    sa = outbound(addresses, suite, lifetime=lifetime)
    await connect(pair, sa)
    with link(pair, addresses) as (sender, receiver):
        for number in range(3):
            sender.send(b"%d" % number)
            assert receiver.recv(10) == b"%d" % number
    (info,) = await pair.right.sas()
    assert info == await pair.right.get_sa(sa.destination, sa.spi)
    assert (info.source, info.destination, info.spi, info.reqid) == (sa.source, sa.destination, sa.spi, sa.reqid)
    assert (info.aead, info.key_bits, info.icv_bits) == (suite, 288, 128)
    assert (info.selector, info.lifetime, info.mode) == (sa.selector, lifetime, sa.mode)
    assert (info.esn, info.replay_window, info.packets, info.sequence) == (True, 1024, 3, 3)
    assert (info.replay_drops, info.integrity_failures, info.larval) == (0, 0, False)
    assert sa.aead.key.hex() not in repr(info)
    text = ip(pair.names[1], "-s", "xfrm", "state")
    assert numbers(text, r"src (\S+) dst (\S+)\n") == (str(info.source), str(info.destination))
    assert numbers(text, r"spi 0x\w+\((\d+)\) reqid (\d+)\(") == (str(info.spi), str(info.reqid))
    assert numbers(text, r"aead (\S+) 0x(\w+) \((\d+) bits\) (\d+)") == (suite, sa.aead.key.hex(), "288", "128")
    assert numbers(text, r"replay_window (\d+), bitmap-length (\d+)") == ("1024", "32")
    assert numbers(text, r"seq-hi 0x0, seq 0x(\w+),") == (f"{info.sequence:x}",)
    assert numbers(text, r"limit: soft (\d+)\(bytes\), hard (\d+)\(bytes\)") == (str(1 << 38), str(320 << 30))
    assert numbers(text, r"limit: soft \(INF\)\(packets\), hard (\d+)\(packets\)") == ("4000",)
    assert numbers(text, r"expire add: soft (\d+)\(sec\), hard (\d+)\(sec\)") == ("60", "70")
    assert numbers(text, r"(\d+)\(bytes\), (\d+)\(packets\)\n") == (str(info.bytes), "3")
    (sent,) = await pair.left.sas()
    assert (sent.output_sequence, sent.packets, sent.bytes) == (3, 3, info.bytes)


async def test_a_key_that_the_kernel_sends_is_gone_before_it_is_queued(pair: Pair) -> None:
    sa = inbound(outbound())
    with inside(pair.names[1]):
        plain = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
    with plain:
        plain.bind((0, 4))  # XFRMGRP_SA
        await pair.right.add_sa(sa)
        assert sa.aead.key in plain.recv(65536)
    core = pair.events._core
    assert core is not None
    async with asyncio.timeout(10):
        queued = await core.msg_queue.root.get()
    assert sa.spi.to_bytes(4, "big") in queued
    assert sa.aead.key[:8] not in queued
    assert sa.aead.name.encode() in queued


async def test_ours_is_what_iproute2_installs(pair: Pair) -> None:
    sa = outbound(direction=Direction.IN, lifetime=Lifetime(hard_packets=40))
    await pair.right.add_sa(sa)
    words = (
        f"src {sa.source} dst {sa.destination} proto esp spi {SPI:#x} reqid {REQID} mode transport replay-window 1024 "
    )
    words += f"flag esn sel src {sa.source}/32 dst {sa.destination}/32 limit packet-hard 40"
    ip(pair.names[0], "xfrm", "state", "add", *words.split(), "aead", GCM, f"0x{sa.aead.key.hex()}", "128")
    ours, theirs = (re.sub(r"add \S+ \S+ use", "add TIME use", ip(n, "-s", "xfrm", "state")) for n in pair.names[::-1])
    assert ours.replace("\tdir in\n", "") == theirs
    (mine,), (other,) = await pair.right.sas(), await pair.left.sas()
    assert replace(other, add_timestamp=0, direction=None) == replace(mine, add_timestamp=0, direction=None)


async def test_the_outbound_window_follows_the_kernel(pair: Pair) -> None:
    sa = outbound()
    await pair.left.add_sa(sa)
    info = await pair.left.get_sa(sa.destination, sa.spi)
    assert (info.esn, info.replay_window) == (True, 0 if HAS_SA_DIR else 1)
    assert info.direction is (Direction.OUT if HAS_SA_DIR else None)
    if not HAS_SA_DIR:
        with inside(pair.names[0]):
            newer = XfrmSocket(sa_direction=True)
            await newer.sad_count()
        async with newer:
            with pytest.raises(XfrmError, match="ESN replay window must be > 0"):
                await newer.add_sa(replace(sa, spi=SPI + 1))


async def test_an_update_of_a_complete_sa_keeps_its_key(pair: Pair) -> None:
    sa = outbound()
    await connect(pair, sa)
    renewed = replace(inbound(sa), aead=Aead(GCM, secrets.token_bytes(36)), lifetime=Lifetime(hard_packets=100))
    await pair.right.update_sa(renewed)
    with link(pair, IPV4) as (sender, receiver):
        sender.send(b"still the old key")
        assert receiver.recv(100) == b"still the old key"
    info = await pair.right.get_sa(sa.destination, sa.spi)
    assert (info.lifetime.hard_packets, info.integrity_failures) == (100, 0)


async def test_a_reserved_spi_is_completed(pair: Pair) -> None:
    spi = await pair.right.alloc_spi(*IPV4, REQID, 0x1000, 0xFFFFFFFF)
    assert (await pair.right.get_sa(IPV4[1], spi)).larval
    sa = outbound(spi=spi)
    await pair.right.update_sa(inbound(sa))
    changed = await next_of(pair.events, SaChanged)
    assert isinstance(changed, SaChanged)
    assert (changed.pid, changed.sa.spi, changed.sa.larval) == (pair.right.pid, spi, False)
    await pair.right.add_policy(protect(sa, Direction.IN))
    await pair.left.add_sa(sa)
    await pair.left.add_policy(protect(sa, Direction.OUT))
    with link(pair, IPV4) as (sender, receiver):
        sender.send(b"x")
        assert receiver.recv(10) == b"x"
    with pytest.raises(MissingError):
        await pair.right.update_sa(replace(inbound(sa), spi=spi ^ 1))


async def test_packet_limits_are_soft_and_then_hard_events(pair: Pair) -> None:
    sa = outbound(lifetime=Lifetime(soft_packets=2, hard_packets=8))
    await connect(pair, replace(sa, lifetime=Lifetime()))
    await pair.right.delete_sa(sa.destination, sa.spi)
    await pair.right.add_sa(inbound(sa))
    with link(pair, IPV4) as (sender, receiver):
        for _ in range(4):  # the kernel looks at a packet's arrival whether those before it went beyond the limit
            sender.send(b"x")
            receiver.recv(10)
        soft = await next_of(pair.events, Expired)
        assert isinstance(soft, Expired)
        assert (soft.pid, soft.hard, soft.sa.spi) == (0, False, sa.spi)
        assert (await pair.right.get_sa(sa.destination, sa.spi)).packets == 4
        for _ in range(6):
            sender.send(b"x")
        hard = await next_of(pair.events, Expired)
        assert isinstance(hard, Expired)
        assert (hard.pid, hard.hard, hard.sa.spi) == (0, True, sa.spi)
    with pytest.raises(MissingError):
        await pair.right.get_sa(sa.destination, sa.spi)
    assert await pair.right.sas() == []


async def test_a_time_limit_ends_an_sa(pair: Pair) -> None:
    await pair.right.add_sa(inbound(outbound(lifetime=Lifetime(hard_seconds=1))))
    expired = await next_of(pair.events, Expired)
    assert isinstance(expired, Expired)
    assert expired.hard


async def test_the_identity_is_destination_spi_and_mark(pair: Pair) -> None:
    sa = inbound(outbound())
    await pair.right.add_sa(replace(sa, mark=Mark(7)))
    await pair.right.add_sa(sa)  # in this order: an SA without a mark matches every mark
    with pytest.raises(AlreadyExistsError, match=r"cannot add SA 10\.0\.0\.9 -> 10\.0\.0\.2 spi 0x10000001"):
        await pair.right.add_sa(replace(sa, source=ip_address("10.0.0.9")))
    assert {info.mark for info in await pair.right.sas()} == {None, Mark(7)}
    ip(pair.names[1], "xfrm", "state", "delete", "src", "10.0.0.1", "dst", "10.0.0.2", "proto", "esp", "spi", hex(SPI))
    deleted = await next_of(pair.events, SaDeleted)
    assert isinstance(deleted, SaDeleted)
    assert (deleted.pid, deleted.sa.mark, deleted.sa.spi) == (0, None, sa.spi)
    with pytest.raises(MissingError):
        await pair.right.delete_sa(sa.destination, sa.spi)
    await pair.right.delete_sa(sa.destination, sa.spi, Mark(7))
    deleted = await next_of(pair.events, SaDeleted)
    assert isinstance(deleted, SaDeleted)
    assert (deleted.pid, deleted.sa.mark) == (pair.right.pid, Mark(7))


async def test_an_update_of_the_policy_moves_traffic_to_another_sa(pair: Pair) -> None:
    sa = outbound()
    following = outbound(spi=SPI + 1)
    await connect(pair, sa)
    await pair.right.add_sa(inbound(following))
    await pair.left.add_sa(following)
    with link(pair, IPV4) as (sender, receiver):
        sender.send(b"old")
        assert receiver.recv(10) == b"old"
        await pair.left.update_policy(protect(following, Direction.OUT))
        sender.send(b"new")
        assert receiver.recv(10) == b"new"
    assert {info.spi: info.packets for info in await pair.right.sas()} == {SPI: 1, SPI + 1: 1}


async def test_replays_and_forgeries_are_counted(pair: Pair) -> None:
    sa = outbound()
    await connect(pair, sa)
    with inside(pair.names[0]):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
    with wire, link(pair, IPV4) as (sender, receiver):
        wire.bind(("wire", 0))
        wire.settimeout(5)
        sender.send(b"once")
        frame = wire.recv(2000)
        while frame[23] != 50:  # the protocol in the IPv4 header is ESP
            frame = wire.recv(2000)
        assert receiver.recv(10) == b"once"
        assert b"once" not in frame
        wire.send(frame)
        forged = bytearray(frame)
        forged[41] = 9  # the low byte of ESP's sequence number: not seen yet, so it is the check value that fails
        wire.send(forged)
        sender.send(b"again")  # behind the others: when this has arrived they have been judged
        assert receiver.recv(10) == b"again"
    info = await pair.right.get_sa(sa.destination, sa.spi)
    assert (info.packets, info.replay_drops, info.integrity_failures) == (2, 1, 1)
