"""The second net on a real netfilter, in network namespaces: what passes, what does not, what is put back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from ipaddress import ip_address

import pytest
from support.clusters import dual_stack_toml
from support.namespace import in_namespace

from srd.config import parse_config
from srd.ipsec.backstop import (
    BackstopError,
    Iptables,
    Keeper,
    Nftables,
    Scope,
    SecondNet,
    scope_of,
    usable_keepers,
)
from srd.ipsec.policies import KEYING_MARK
from srd.state import Store

HERE, THERE, OUTSIDER = "192.0.2.1", "192.0.2.2", "192.0.2.99"
HERE6, THERE6 = "2001:db8::1", "2001:db8::2"
TEXT = dual_stack_toml(2)
CONFIG = parse_config(TEXT, "cluster.toml")
OFF = parse_config(TEXT + '[ipsec]\nmode = "off"\n', "cluster.toml")
SCOPE = scope_of(CONFIG, CONFIG.node("redis-1"))
FAMILIES = {4: "iptables", 6: "ip6tables"}
KEEPERS: dict[str, Callable[[], Nftables | Iptables]] = {
    "nftables": lambda: Nftables("nft"),
    "iptables-legacy": lambda: Iptables(FAMILIES, "-legacy"),
    "iptables": lambda: Iptables(FAMILIES, ""),
}
ETH_P_ALL, ESP = 3, 50
UNTOUCHED = "-A OUTPUT -d 203.0.113.7/32 -j DROP"


def does(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ip(*arguments: str) -> None:
    does("ip", *arguments)


def interface() -> None:
    """A wire at whose other end everybody is, and nobody answers."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
    ip("addr", "add", f"{HERE}/24", "dev", "d0")
    ip("addr", "add", f"{HERE6}/64", "dev", "d0", "nodad")
    for end in ("d0", "d1"):
        ip("link", "set", end, "up")
    for neighbour in (THERE, OUTSIDER, THERE6):
        ip("neigh", "add", neighbour, "lladdr", "02:00:00:00:00:02", "dev", "d0")


def leaves(destination: str, *, protocol: str = "tcp", source_port: int = 0, port: int = 40000, mark: int = 0) -> bool:
    """Whether the first packet of a flow comes out of the interface."""
    six = ":" in destination
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "esp": socket.SOCK_RAW}[protocol]
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sender = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind, ESP if protocol == "esp" else 0)
    with wire, sender:
        wire.bind(("d1", ETH_P_ALL))
        sender.setblocking(False)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sender.bind((HERE6 if six else HERE, 0 if protocol == "esp" else source_port))
        with contextlib.suppress(BlockingIOError, PermissionError):  # netfilter's drop is EPERM to a datagram's sender
            if protocol == "tcp":
                sender.connect((destination, port))
            else:
                sender.sendto(bytes(64), (destination, port if protocol == "udp" else 0))
        return seen(wire, ip_address(destination).packed)


def seen(wire: socket.socket, address: bytes) -> bool:
    """Whether a packet to an address passes within a moment."""
    wire.settimeout(0.15)
    with contextlib.suppress(TimeoutError):
        while True:
            frame = wire.recv(2048)
            at = {0x0800: 30, 0x86DD: 38}.get(int.from_bytes(frame[12:14]))
            if at is not None and frame[at : at + len(address)] == address:
                return True
    return False


@pytest.mark.parametrize("name", KEEPERS)
def test_what_may_pass_passes_and_nothing_else(name: str) -> None:
    @in_namespace
    async def body() -> None:
        interface()
        keeper = KEEPERS[name]()
        assert await keeper.usable()
        await keeper.replace(SCOPE)
        for peer in (THERE, THERE6):
            assert not leaves(peer, protocol="udp", port=53)
            assert not leaves(peer, protocol="udp", port=6379)
            for source_port, port in ((0, 8080), (22, 6379), (849, 6379), (840, 26379), (6379, 22), (840, 849)):
                assert not leaves(peer, source_port=source_port, port=port), (peer, source_port, port)
            for source_port, port, mark in ((0, 22, 0), (22, 40000, 0), (847, 849, KEYING_MARK)):
                assert leaves(peer, source_port=source_port, port=port, mark=mark), (peer, source_port, port)
        assert leaves(THERE, protocol="esp")
        assert leaves(OUTSIDER, protocol="udp", port=53)
        assert leaves(OUTSIDER, port=6380)
        for source_port, port in ((0, 6379), (26379, 40000)):
            assert not leaves(OUTSIDER, source_port=source_port, port=port)

    body()


@pytest.mark.parametrize("name", KEEPERS)
def test_it_is_replaced_whole_removed_whole_and_leaves_the_rules_of_others(name: str) -> None:
    @in_namespace
    async def body() -> None:
        interface()
        keeper = KEEPERS[name]()
        others = "iptables-legacy" if name == "iptables-legacy" else "iptables"
        does(others, *UNTOUCHED.split())
        assert await keeper.observe() == ""
        await keeper.replace(SCOPE)
        first = await keeper.observe()
        await keeper.replace(Scope((), SCOPE.protected, SCOPE.bypass))
        assert leaves(THERE, protocol="udp")
        await keeper.replace(SCOPE)
        assert await keeper.observe() == first
        assert not leaves(THERE, protocol="udp")
        assert first.count("192.0.2.2") == 2 - (name == "nftables")
        await keeper.remove()
        await keeper.remove()
        assert await keeper.observe() == ""
        assert leaves(THERE, protocol="udp")
        rules = does(others, "-S")
        assert UNTOUCHED in rules
        assert "SRD" not in rules

    body()


def only(name: str) -> Callable[[], Coroutine[object, object, list[Keeper]]]:
    async def usable() -> list[Keeper]:
        keeper = KEEPERS[name]()
        return [keeper] if await keeper.usable() else []

    return usable


@pytest.mark.parametrize("name", KEEPERS)
def test_what_somebody_takes_away_is_put_back_and_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = {
        "nftables": ["nft", "flush", "ruleset"],
        "iptables-legacy": ["iptables-legacy", "-F"],
        "iptables": ["iptables", "-F"],
    }

    monkeypatch.setattr("srd.ipsec.backstop.usable_keepers", only(name))

    @in_namespace
    async def body() -> None:
        interface()
        store = Store(0.0)
        net = SecondNet(config=CONFIG, node=CONFIG.node("redis-1"), store=store)
        for mended in (0, 0):
            await net.reconcile()
            assert (backstop := store.view().backstop) is not None
            assert (backstop.keeper, backstop.mended) == (name, mended)
        does(*flush[name])
        assert leaves(THERE, protocol="udp")
        for _ in range(2):
            await net.reconcile()
        assert (backstop := store.view().backstop) is not None
        assert backstop.mended == 1
        assert not leaves(THERE, protocol="udp")

    body()


@in_namespace
async def test_plaintext_that_comes_in_is_dropped_and_the_exemptions_are_not() -> None:
    async with peer() as send:
        keeper = (await usable_keepers())[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind((HERE, 9999))
            receiver.setblocking(False)
            assert await arrives(receiver, send)
            await keeper.replace(SCOPE)
            assert not await arrives(receiver, send)
        assert await send("bash", "-c", f"exec 3<>/dev/tcp/{HERE}/22") != 0  # refused, so it was let in
        assert await send("timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{HERE}/6379") == 124  # timeout(1)'s


Send = Callable[..., Coroutine[object, object, int]]


async def arrives(receiver: socket.socket, send: Send) -> bool:
    assert await send("bash", "-c", f"echo x >/dev/udp/{HERE}/9999") == 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            return bool(await asyncio.get_running_loop().sock_recv(receiver, 10))
    return False


@contextlib.asynccontextmanager
async def peer() -> AsyncIterator[Send]:
    """A neighbour in a namespace of its own; the value runs a command there and returns its exit status."""
    holder = await asyncio.create_subprocess_exec(
        "unshare", "--net", "sh", "-c", "echo; exec sleep 60", stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    await holder.stdout.readline()

    async def send(*command: str) -> int:
        process = await asyncio.create_subprocess_exec(
            "nsenter", f"--net=/proc/{holder.pid}/ns/net", *command, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait()

    try:
        ip("link", "set", "lo", "up")
        ip("link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(holder.pid))
        ip("addr", "add", f"{HERE}/24", "dev", "v0")
        ip("link", "set", "v0", "up")
        await send("ip", "addr", "add", f"{THERE}/24", "dev", "v1")
        await send("ip", "link", "set", "v1", "up")
        yield send
    finally:
        holder.kill()
        await holder.wait()


def test_the_pairs_are_those_that_have_policies() -> None:
    assert SCOPE.pairs == (
        (ip_address(HERE), ip_address(THERE)),
        (ip_address(HERE6), ip_address(THERE6)),
    )
    assert scope_of(OFF, OFF.node("redis-1")).pairs == ()


@pytest.mark.parametrize("name", ["iptables", "iptables-legacy"])
def test_a_rule_that_somebody_puts_before_srds_does_not_stay_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srd.ipsec.backstop.usable_keepers", only(name))

    @in_namespace
    async def body() -> None:
        interface()
        net = SecondNet(config=CONFIG, node=CONFIG.node("redis-1"), store=Store(0.0))
        await net.reconcile()
        does(name, "-I", "OUTPUT", "1", "-j", "ACCEPT")
        assert leaves(THERE, protocol="udp")
        await net.reconcile()
        assert not leaves(THERE, protocol="udp")
        assert does(name, "-S").count("-j SRD-OUT\n") == 1

    body()


@in_namespace
async def test_another_way_of_keeping_the_rules_takes_the_former_ones_away() -> None:
    interface()
    await KEEPERS["iptables-legacy"]().replace(SCOPE)
    await SecondNet(config=CONFIG, node=CONFIG.node("redis-1"), store=Store(0.0)).reconcile()
    keepers = await usable_keepers()
    assert [bool(await keeper.observe()) for keeper in keepers] == [True, False, False]
    assert not leaves(THERE, protocol="udp")
    for keeper in keepers:
        await keeper.remove()
    assert leaves(THERE, protocol="udp")


class Slow:
    """A keeper that takes its time, and whose rules somebody may want to change meanwhile."""

    name = "slow"

    def __init__(self) -> None:
        self.stands: Scope | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.broken = False

    async def observe(self) -> str:
        return repr(self.stands)

    async def replace(self, scope: Scope) -> None:
        if self.broken:
            raise BackstopError("keep", "it", "no")
        self.meanwhile()
        self.stands = scope

    async def remove(self) -> None:
        self.stands = None


async def test_a_change_that_comes_during_a_pass_is_made_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, store = Slow(), Store(0.0)

    async def usable() -> list[Keeper]:
        return [keeper]

    monkeypatch.setattr("srd.ipsec.backstop.usable_keepers", usable)
    net = SecondNet(config=CONFIG, node=CONFIG.node("redis-1"), store=store)
    keeper.meanwhile = lambda: net.adopt(OFF)
    await net.reconcile()
    assert keeper.stands == SCOPE
    await net.reconcile()
    assert keeper.stands == scope_of(OFF, OFF.node("redis-1"))
    net.adopt(CONFIG)
    keeper.broken = True
    with pytest.raises(BackstopError):
        await net.reconcile()
    assert (backstop := store.view().backstop) is not None
    assert (backstop.keeper, backstop.mended) == (None, 0)
