"""The mesh against a table of the kernel's rules: whatever happens in whatever order, no plaintext between peers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from support.clusters import dual_stack_toml
from support.kernel import FakeKernel, Fate, Packet

from srd.cluster import Config
from srd.config import parse_config
from srd.ipsec.mesh import GRACE_SECONDS, Mesh
from srd.ipsec.policies import KEYING_MARK, owns_index
from srd.ipsec.sas import LIFETIME, Generation, KeyedLeg
from srd.ipsec.teardown import protected_ports, teardown
from srd.ipsec.xfrm import Action, Aead, Direction, Policy, Sa, SaInfo, Selector
from srd.model import IpAddress, Suite
from srd.state import Store

TEXT = dual_stack_toml(3)
CONFIG = parse_config(TEXT, "cluster.toml")
PEERS = ("redis-2", "redis-3")
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
OUTSIDER = ip_address("192.0.2.99")
STRANGER = Policy(
    Selector(ip_network("198.51.100.1"), ip_network("198.51.100.2")), Direction.OUT, Action.BLOCK, 10, index=9
)
STRANGERS_SA = Sa(
    source=ip_address("198.51.100.1"),
    destination=ip_address("198.51.100.2"),
    spi=0x4242,
    reqid=1,
    aead=Aead(Suite.AES_256_GCM, bytes(36)),
    direction=Direction.OUT,
    selector=STRANGER.selector,
)


def protected_packets(config: Config) -> Iterator[Packet]:
    """Yield packets with peers that must never pass in plaintext, each way."""
    ports = (6379, 26379, 8080, 50000)
    me = config.node("redis-1")
    for peer in config.peers_of("redis-1"):
        for mine, theirs in zip(me.addresses, peer.addresses, strict=True):
            for port in ports:
                # From an ephemeral port, and from those that exemptions name.
                for other in (40000, 22, 849, 840):
                    if (port, other) == (50000, 22) or (port in (8080, 50000) and other == 22):
                        continue  # ssh itself, which ipsec.bypass names
                    yield Packet(Direction.OUT, mine, theirs, TCP, other, port)
                    yield Packet(Direction.OUT, mine, theirs, TCP, port, other)
                    yield Packet(Direction.IN, theirs, mine, TCP, other, port)
                    yield Packet(Direction.IN, theirs, mine, TCP, port, other)
            yield Packet(Direction.OUT, mine, theirs, UDP, 53, 53)
            yield Packet(Direction.OUT, mine, theirs, ICMP if mine.version == 4 else ICMPV6, 128, 0)
            # The keying channel's ports, but not srd's own socket.
            yield Packet(Direction.OUT, mine, theirs, TCP, 840, 849)


def exempt_packets(config: Config) -> Iterator[Packet]:
    me = config.node("redis-1")
    for peer in config.peers_of("redis-1"):
        for mine, theirs in zip(me.addresses, peer.addresses, strict=True):
            yield Packet(Direction.OUT, mine, theirs, TCP, 847, 849, mark=KEYING_MARK)
            yield Packet(Direction.OUT, mine, theirs, TCP, 849, 840, mark=KEYING_MARK)
            yield Packet(Direction.IN, theirs, mine, TCP, 843, 849)
            yield Packet(Direction.OUT, mine, theirs, TCP, 40000, 22)
            yield Packet(Direction.IN, theirs, mine, TCP, 22, 40000)
            if mine.version == 6:
                for kind in (135, 136):
                    yield Packet(Direction.OUT, mine, theirs, ICMPV6, kind, 0)
                    yield Packet(Direction.IN, theirs, mine, ICMPV6, kind, 0)


PROTECTED = tuple(protected_packets(CONFIG))
EXEMPT = tuple(exempt_packets(CONFIG))
# After each single change a few of them are tried, after each step all.
SAMPLE = PROTECTED[::13]


def generation(rng: random.Random, peer: str, number: int) -> Generation:
    me, other = CONFIG.node("redis-1"), CONFIG.node(peer)
    legs = tuple(
        KeyedLeg(mine, theirs, rng.randrange(0x1000, 2**32), rng.randrange(0x1000, 2**32), bytes(36), bytes(36))
        for mine, theirs in zip(me.addresses, other.addresses, strict=True)
    )
    return Generation(peer, number, Suite.AES_256_GCM, "for the test", legs)


class World:
    """A kernel that is watched at every change, and the mesh of redis-1 on it."""

    def __init__(self) -> None:
        self.kernel = FakeKernel(self.look)
        self.closed = False  # whether every policy has been there, and nobody else has taken one away since
        self.leaks: list[Packet] = []
        self.now = 1000.0
        self.start()

    def start(self) -> None:
        self.store = Store(0.0)
        self.mesh = Mesh(
            config=CONFIG,
            node=CONFIG.node("redis-1"),
            socket=self.kernel,
            store=self.store,
            wake=lambda: None,
            clock=lambda: self.now,
        )

    def look(self) -> None:
        if self.closed:
            self.leaks += self.leaking(SAMPLE)

    def leaking(self, packets: tuple[Packet, ...]) -> list[Packet]:
        return [packet for packet in packets if self.kernel.fate(packet) is Fate.PLAINTEXT]

    async def settle(self) -> None:
        await self.mesh.reconcile()
        self.closed = True
        self.leaks += self.leaking(PROTECTED)
        before = list(self.kernel.changes)
        await self.mesh.reconcile()
        assert self.kernel.changes == before, "a second pass changed something"

    async def settle_as(self, config: Config) -> None:
        """Make another pass, by which nothing may change."""
        before = list(self.kernel.changes)
        await self.mesh.adopt(config)
        assert self.kernel.changes == before

    async def key(self, made: Generation) -> None:
        await self.mesh.install(made)
        await self.mesh.pin(made)
        await self.mesh.retire(made.peer)

    async def key_all(self) -> None:
        rng = random.Random(0)
        for peer in PEERS:
            await self.key(generation(rng, peer, 1))

    def fates(self) -> set[Fate]:
        return {self.kernel.fate(packet) for packet in PROTECTED if packet.direction is Direction.OUT}


@pytest.fixture
def world() -> World:
    return World()


async def test_without_keys_everything_is_dropped_and_the_exemptions_pass(world: World) -> None:
    await world.settle()
    assert {world.kernel.fate(packet) for packet in PROTECTED} == {Fate.DROPPED}
    assert {world.kernel.fate(packet) for packet in EXEMPT} == {Fate.PLAINTEXT}


async def test_with_keys_everything_leaves_in_esp(world: World) -> None:
    await world.settle()
    await world.key_all()
    assert world.fates() == {Fate.ESP}
    assert all(link.protected for link in world.store.view().links.values())


async def test_at_every_moment_of_the_first_pass_a_packet_meets_its_final_fate_or_no_policy() -> None:
    closed: set[Packet] = set()
    trouble: list[tuple[str, Packet]] = []

    def look() -> None:
        for packet in PROTECTED:
            if kernel.fate(packet) is Fate.DROPPED:
                closed.add(packet)
            elif packet in closed:
                trouble.append(("opened again", packet))
        trouble.extend(("refused", packet) for packet in EXEMPT if kernel.fate(packet) is not Fate.PLAINTEXT)

    kernel = FakeKernel(look)
    node = CONFIG.node("redis-1")
    await Mesh(config=CONFIG, node=node, socket=kernel, store=Store(0.0), wake=lambda: None).reconcile()
    assert closed == set(PROTECTED)
    assert not trouble, trouble[0]


async def test_esp_in_udp_may_come_in_and_nothing_may_leave_in_its_place() -> None:
    text = dual_stack_toml(2) + '[ipsec]\nencap = "udp"\nencap_port = 4501\n'
    config, kernel = parse_config(text, "cluster.toml"), FakeKernel(lambda: None)
    node = config.node("redis-1")
    await Mesh(config=config, node=node, socket=kernel, store=Store(0.0), wake=lambda: None).reconcile()
    for here, there in zip(node.addresses, config.node("redis-2").addresses, strict=True):
        assert kernel.fate(Packet(Direction.IN, there, here, UDP, 4501, 4501)) is Fate.PLAINTEXT
        for ports in ((4501, 53), (53, 4501)):
            assert kernel.fate(Packet(Direction.IN, there, here, UDP, *ports)) is Fate.DROPPED
        assert kernel.fate(Packet(Direction.OUT, here, there, UDP, 4501, 4501)) is Fate.DROPPED


async def test_an_outsider_reaches_neither_redis_nor_sentinel(world: World) -> None:
    await world.settle()
    me = ip_address("192.0.2.1")
    for port in (6379, 26379):
        for source_port in (40000, 22, 849, 840):
            assert world.kernel.fate(Packet(Direction.IN, OUTSIDER, me, TCP, source_port, port)) is Fate.DROPPED
            assert world.kernel.fate(Packet(Direction.OUT, me, OUTSIDER, TCP, port, source_port)) is Fate.DROPPED
            # Nor do this node's programs reach another cluster's, or a node's that is no member any more.
            assert world.kernel.fate(Packet(Direction.OUT, me, OUTSIDER, TCP, source_port, port)) is Fate.DROPPED
            assert world.kernel.fate(Packet(Direction.IN, OUTSIDER, me, TCP, port, source_port)) is Fate.DROPPED
    assert world.kernel.fate(Packet(Direction.IN, OUTSIDER, me, TCP, 40000, 6380)) is Fate.PLAINTEXT
    assert world.kernel.fate(Packet(Direction.IN, me, me, TCP, 40000, 6379)) is Fate.PLAINTEXT


async def test_a_restarted_mesh_goes_on_under_the_keys_that_are_in_use(world: World) -> None:
    await world.settle()
    await world.key_all()
    before = list(world.kernel.changes)
    world.start()
    await world.settle()
    assert world.kernel.changes == before
    assert world.fates() == {Fate.ESP}
    assert all(link.protected for link in world.store.view().links.values())


async def test_keys_to_receive_with_go_only_after_both_ends_have_switched_and_the_grace(world: World) -> None:
    await world.settle()
    rng = random.Random(3)
    first, second = generation(rng, "redis-2", 1), generation(rng, "redis-2", 2)
    await world.key(first)
    world.now += 60
    await world.settle()
    await world.mesh.install(second)
    await world.settle()
    assert {sa.spi for sa in await world.kernel.sas()} == first.spis | second.spis
    await world.mesh.pin(second)
    await world.settle()
    inbound = {leg.spi_in for leg in first.legs}
    assert {sa.spi for sa in await world.kernel.sas()} == inbound | second.spis
    await world.mesh.retire("redis-2")
    await world.settle()
    assert {sa.spi for sa in await world.kernel.sas()} == inbound | second.spis
    world.now += GRACE_SECONDS + 1
    await world.settle()
    assert {sa.spi for sa in await world.kernel.sas()} == second.spis


async def test_a_generation_that_is_given_up_leaves_nothing(world: World) -> None:
    await world.settle()
    made = generation(random.Random(4), "redis-2", 1)
    await world.mesh.install(made)
    await world.mesh.discard(made)
    assert await world.kernel.sas() == []


async def test_what_is_not_srds_is_never_touched(world: World) -> None:
    await world.kernel.add_policy(STRANGER)
    await world.kernel.add_sa(STRANGERS_SA)
    await world.settle()
    await world.key(generation(random.Random(5), "redis-2", 1))
    others = [info.policy for info in await world.kernel.policies() if not owns_index(info.policy.index)]
    assert others == [STRANGER]
    assert STRANGERS_SA.spi in {sa.spi for sa in await world.kernel.sas()}


async def test_a_foreign_policy_that_comes_first_is_named_and_left(world: World) -> None:
    open_door = Policy(Selector(ip_network("0.0.0.0/0"), ip_network("0.0.0.0/0")), Direction.OUT, Action.ALLOW, 1)
    await world.kernel.add_policy(open_door)
    await world.mesh.reconcile()
    kernel = world.store.view().kernel
    assert kernel is not None
    assert not kernel.policies_installed
    assert "0.0.0.0/0 -> 0.0.0.0/0" in kernel.foreign_overrides[0]


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
async def test_a_foreign_policy_in_the_place_of_srds_is_a_conflict_whatever_its_priority(
    world: World, direction: Direction
) -> None:
    here, there = ip_network("192.0.2.1"), ip_network("192.0.2.2")
    selector = Selector(here, there) if direction is Direction.OUT else Selector(there, here)
    theirs = Policy(selector, direction, Action.ALLOW, 5000)
    await world.kernel.add_policy(theirs)
    await world.mesh.reconcile()
    await world.key_all()
    view = world.store.view()
    assert view.kernel is not None
    assert not view.kernel.policies_installed
    assert str(selector) in view.kernel.foreign_overrides[0]
    assert not view.links["redis-2"].protected
    assert view.links["redis-3"].protected


async def test_teardown_removes_what_is_srds_and_nothing_else_and_outsiders_reach_redis_only_at_its_end(
    world: World,
) -> None:
    await world.kernel.add_policy(STRANGER)
    await world.kernel.add_sa(STRANGERS_SA)
    await world.settle()
    await world.key_all()
    world.closed = False
    open_after: list[int] = []
    knocking = Packet(Direction.IN, OUTSIDER, ip_address("192.0.2.1"), TCP, 40000, 6379)

    def look() -> None:
        if world.kernel.fate(knocking) is Fate.PLAINTEXT:
            open_after.append(len(world.kernel._policies))

    world.kernel._changed = look
    expiring = list(world.kernel._sas)[-1]
    removed = await teardown(Expiring(world.kernel, expiring))
    assert (len(removed.sas), len(removed.policies)) == (8, len(world.mesh._unkeyed))
    assert protected_ports(removed) == {6379, 26379}
    assert [info.policy for info in await world.kernel.policies()] == [STRANGER]
    assert [sa.spi for sa in await world.kernel.sas()] == [STRANGERS_SA.spi]
    assert max(open_after) <= 16, "only policies that block are left by then"


class Expiring:
    """A kernel in which an SA ends between being seen and being deleted."""

    def __init__(self, kernel: FakeKernel, gone: tuple[IpAddress, int]) -> None:
        self.policies, self.delete_policy = kernel.policies, kernel.delete_policy
        self._kernel, self._gone = kernel, gone

    async def sas(self) -> list[SaInfo]:
        seen = await self._kernel.sas()
        await self._kernel.delete_sa(*self._gone)
        return seen

    async def delete_sa(self, destination: IpAddress, spi: int) -> None:
        await self._kernel.delete_sa(destination, spi)


async def test_a_pass_for_another_peer_leaves_half_a_first_generation_alone(world: World) -> None:
    await world.settle()
    rng = random.Random(6)
    half, other = generation(rng, "redis-2", 1), generation(rng, "redis-3", 1)
    await world.mesh.install(half)
    await world.key(other)
    await world.settle()
    assert half.spis <= {sa.spi for sa in await world.kernel.sas()}
    await world.mesh.pin(half)
    assert world.store.view().links["redis-2"].protected


async def test_giving_a_generation_up_touches_no_other_links_sa_of_the_same_spi(world: World) -> None:
    await world.settle()
    rng = random.Random(7)
    kept, given_up = generation(rng, "redis-3", 1), generation(rng, "redis-2", 1)
    await world.key(kept)
    named = tuple(replace(leg, spi_out=kept.legs[0].spi_out) for leg in given_up.legs)
    hostile = replace(given_up, legs=named)
    await world.mesh.install(hostile)
    await world.mesh.discard(hostile)
    assert {sa.spi for sa in await world.kernel.sas()} == kept.spis


async def test_keys_that_have_carried_enough_are_worn_until_they_are_replaced(world: World) -> None:
    await world.settle()
    rng = random.Random(8)
    first, second = generation(rng, "redis-2", 1), generation(rng, "redis-2", 2)
    await world.key(first)
    soft = LIFETIME.soft_bytes
    assert soft is not None
    leg = first.legs[1]
    packets = LIFETIME.soft_packets
    assert packets is not None
    cases = {(soft - 1, packets - 1): False, (soft, 0): True, (0, packets): True}
    for sa in ((leg.local, leg.spi_in), (leg.remote, leg.spi_out)):
        for carried, worn in cases.items():
            world.kernel.carried = {sa: carried}
            await world.settle()
            assert world.store.view().links["redis-2"].worn is worn
    await world.key(second)
    assert not world.store.view().links["redis-2"].worn


FOUR = parse_config(dual_stack_toml(4), "cluster.toml")
TWO_ONLY = parse_config(dual_stack_toml(2), "cluster.toml")


async def test_a_new_peer_is_closed_from_the_start_and_no_other_link_changes(world: World) -> None:
    await world.settle()
    await world.key_all()
    before = {sa.spi for sa in await world.kernel.sas()}
    await world.mesh.adopt(FOUR)
    new = tuple(packet for packet in protected_packets(FOUR) if packet not in PROTECTED)
    assert new
    assert {world.kernel.fate(packet) for packet in new} == {Fate.DROPPED}
    assert not world.leaks
    assert {sa.spi for sa in await world.kernel.sas()} == before
    assert world.fates() == {Fate.ESP}
    kernel = world.store.view().kernel
    assert kernel is not None
    assert kernel.drift_mended == 0


async def test_a_peer_that_leaves_is_blocked_before_its_keys_go_and_open_only_when_all_is_gone(world: World) -> None:
    await world.settle()
    await world.key_all()
    leaving = [packet for packet in PROTECTED if ip_address("192.0.2.3") in (packet.source, packet.destination)]
    staying = [packet for packet in PROTECTED if ip_address("192.0.2.2") in (packet.source, packet.destination)]
    fates: list[set[Fate]] = []

    def look() -> None:
        fates.append({world.kernel.fate(packet) for packet in leaving})
        assert Fate.PLAINTEXT not in {world.kernel.fate(packet) for packet in staying}
        if Fate.PLAINTEXT in fates[-1]:
            assert not [sa for sa in world.kernel._sas.values() if str(sa.destination) == "192.0.2.3"]

    world.kernel._changed = look
    await world.mesh.adopt(TWO_ONLY)
    assert {Fate.DROPPED} in fates, "between ESP and nothing there is BLOCK"
    assert "redis-3" not in world.store.view().links
    assert {info.policy.index >> 3 for info in await world.kernel.policies()} == {
        index >> 3 for index in world.mesh._indices.values()
    }
    world.kernel._changed = lambda: None
    await world.settle_as(TWO_ONLY)


async def test_a_peer_that_is_trusted_no_more_is_cut_off_at_once_and_can_be_keyed_again(world: World) -> None:
    await world.settle()
    await world.key_all()
    await world.mesh.forget("redis-3")
    assert not world.store.view().links["redis-3"].keyed
    assert world.store.view().links["redis-2"].protected
    assert {str(sa.source) for sa in await world.kernel.sas()} & {"192.0.2.3", "2001:db8::3"} == set()
    assert not world.leaking(PROTECTED)
    await world.key(generation(random.Random(9), "redis-3", 2))
    assert world.store.view().links["redis-3"].protected


async def test_a_peer_with_another_address_is_another_peer(world: World) -> None:
    await world.settle()
    await world.key_all()
    moved = parse_config(TEXT.replace("192.0.2.3", "192.0.2.33"), "cluster.toml")
    await world.mesh.adopt(moved)
    link = world.store.view().links["redis-3"]
    assert (str(link.legs[0].remote), link.keyed) == ("192.0.2.33", False)
    assert "192.0.2.3" not in {str(sa.destination) for sa in await world.kernel.sas()}


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk_never_lets_plaintext_out(seed: int) -> None:
    asyncio.run(walk(random.Random(seed)))


async def walk(rng: random.Random, steps: int = 30) -> None:
    """Key, half-key, restart, lose SAs and policies to somebody else, in any order."""
    world = World()
    await world.settle()
    for number in range(1, steps + 1):
        made = generation(rng, rng.choice(PEERS), number)
        step = rng.choice(["key", "key", "half", "give up", "restart", "flush SAs", "flush policies"])
        if step == "key":
            await world.key(made)
        elif step == "half":
            await world.mesh.install(made)
        elif step == "give up":
            await world.mesh.install(made)
            await world.mesh.discard(made)
        elif step == "restart":
            world.start()
        elif step == "flush SAs":
            world.kernel.flush_sas()
        else:
            world.closed = False
            world.kernel.flush_policies()
        await world.settle()
        assert not world.leaks, (step, world.leaks[0])
        assert all(world.kernel.fate(packet) is Fate.PLAINTEXT for packet in EXEMPT)
