"""Making keys over a bad wire by ends that die: a packet that is sent can always be received, and nothing piles up.

Two nodes, each with a real `Mesh` on a table of the kernel's rules, take the steps of the real state machines in any
order that the world allows, down to single actions.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

import msgspec
import pytest
from support.clusters import dual_stack_toml
from support.kernel import FakeKernel

from srd.cluster import Node
from srd.config import parse_config
from srd.desired import leg_addresses
from srd.ipsec import protocol
from srd.ipsec.mesh import GRACE_SECONDS, Mesh
from srd.ipsec.peering import RENEWAL_FLOOR_SECONDS
from srd.ipsec.protocol import (
    PROTOCOL,
    Action,
    Agree,
    Beat,
    Commit,
    Committed,
    Discard,
    Done,
    End,
    Follower,
    Hello,
    Install,
    KeyingError,
    Leader,
    Message,
    Pin,
    Prepare,
    Prepared,
    Retire,
    Say,
    Terms,
    leads,
    understood,
)
from srd.ipsec.xfrm import Direction, XfrmError
from srd.model import NodeKind, SrdError, Suite
from srd.state import Store

TEXT = dual_stack_toml(2)
CONFIG = parse_config(TEXT, "cluster.toml")
ONE, TWO = CONFIG.nodes
GRADES = {Suite.AES_256_GCM: 1, Suite.CHACHA20_POLY1305: 2}
# How long a packet may be under way: less than the grace, or it could not be waited for.
UNDER_WAY_SECONDS = GRACE_SECONDS / 2
ENOSPC = 28


def exporter(secret: bytes) -> Callable[[bytes, bytes, int], bytes]:
    return lambda label, context, length: hashlib.shake_256(secret + label + context).digest(length)


def terms(me: Node, peer: Node, rng: random.Random, *, counted: int = 0, sends: tuple[int, ...] = ()) -> Terms:
    legs = leg_addresses(me, peer)
    spis = tuple(rng.randrange(protocol.SMALLEST_SPI, protocol.LARGEST_SPI) for _ in legs)
    return Terms("orders", me, peer, f"boot of {me.name}", legs, GRADES, counted, sends, spis)


@pytest.fixture
def ends() -> tuple[Leader, Follower]:
    rng, export = random.Random(1), exporter(b"secret")
    return Leader(terms(ONE, TWO, rng), export), Follower(terms(TWO, ONE, rng), export)


def said(actions: list[Action] | tuple[Action, ...]) -> Message:
    (message,) = [action.message for action in actions if isinstance(action, Say)]
    return message


def kinds(actions: object) -> list[type]:
    return [type(action) for action in actions]  # type: ignore[attr-defined]


def test_the_steps_and_their_order(ends: tuple[Leader, Follower]) -> None:
    leader, follower = ends
    hello, answer = said(list(leader.start())), said(list(follower.start()))
    assert kinds(greeted := leader.hear(answer)) == [Agree, Say]
    assert kinds(follower.hear(hello)) == [Agree]
    assert kinds(prepared := follower.hear(said(list(greeted)))) == [Install, Say]
    assert kinds(committed := leader.hear(said(list(prepared)))) == [Install, Pin, Say]
    assert kinds(answered := follower.hear(said(list(committed)))) == [Pin, Say]
    assert kinds(done := leader.hear(said(list(answered)))) == [Retire, Say]
    assert kinds(follower.hear(said(list(done)))) == [Retire]
    one, two = leader.result(), follower.result()
    assert (one.number, one.suite) == (two.number, two.suite) == (1, Suite.CHACHA20_POLY1305)
    for here, there in zip(one.legs, two.legs, strict=True):
        assert (here.spi_in, here.key_in, here.local) == (there.spi_out, there.key_out, there.remote)
        assert (here.spi_out, here.key_out) == (there.spi_in, there.key_in)
    keys = [key for leg in one.legs for key in (leg.key_in, leg.key_out)]
    assert len(set(keys)) == len(keys) == 4
    assert all(len(key) == 36 for key in keys)


@pytest.mark.parametrize("change", ["cluster", "boot_id", "grades"])
def test_ends_that_differ_in_anything_get_different_keys_or_none(change: str) -> None:
    rng, export = random.Random(2), exporter(b"secret")
    values = {"cluster": "other", "boot_id": "another boot", "grades": {Suite.AES_256_GCM: 1}}
    leader = Leader(terms(ONE, TWO, rng), export)
    follower = Follower(replace(terms(TWO, ONE, rng), **{change: values[change]}), export)
    hello = said(list(leader.start()))
    offered = leader.hear(replace_hello(said(list(follower.start())), boot_id="boot of redis-2", grades=dict(GRADES)))
    follower.hear(hello)
    try:
        prepared = follower.hear(said(list(offered)))
    except KeyingError:
        return
    committed = leader.hear(said(list(prepared)))
    mine, theirs = (next(a.generation for a in acts if isinstance(a, Install)) for acts in (committed, prepared))
    assert mine.legs[0].key_in != theirs.legs[0].key_out


@pytest.mark.parametrize(("leading", "following"), [(4500, None), (None, 4500), (4500, 4501)])
def test_ends_that_differ_about_udp_make_no_keys_and_say_so(leading: int | None, following: int | None) -> None:
    rng, export = random.Random(3), exporter(b"secret")
    ends = (
        Leader(replace(terms(ONE, TWO, rng), udp_port=leading), export),
        Follower(replace(terms(TWO, ONE, rng), udp_port=following), export),
    )
    greetings = [said(list(end.start())) for end in ends]
    for end, greeting in zip(ends, reversed(greetings), strict=True):
        with pytest.raises(KeyingError, match=r"ESP in .* this node in .*: ipsec\.encap is not the same on both"):
            end.hear(greeting)


def replace_hello(message: Message, **changes: object) -> Message:
    assert isinstance(message, Hello)
    fields = {name: getattr(message, name) for name in message.__struct_fields__} | changes
    return Hello(**fields)


ALL: list[Message] = [
    Hello(PROTOCOL, "x", 0, {str(s): 2 for s in Suite}, []),
    Prepare(1, Suite.CHACHA20_POLY1305, [0x1000, 0x1001]),
    Prepared(1, [0x1000, 0x1001]),
    Commit(1),
    Committed(1),
    Done(1),
    Beat("0", initialized=False, role="replica", healthy=True, offset=None, wants_keys=False),
    Beat(
        "0",
        True,
        "primary",
        True,
        7,
        True,
        drained=True,
        pause_number=1_700_000_000,
        pause_until=1_700_003_600.5,
        replid="a" * 40,
    ),
]


@pytest.mark.parametrize("end", ["leader", "follower"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_whatever_is_not_due_is_refused_at_every_step(ends: tuple[Leader, Follower], end: str, steps: int) -> None:
    leader, follower = ends
    heard: dict[str, deque[Message]] = {
        "leader": deque([said(list(follower.start()))]),
        "follower": deque([said(list(leader.start()))]),
    }
    while any(heard.values()):
        for name, other in (("leader", "follower"), ("follower", "leader")):
            machine = leader if name == "leader" else follower
            if heard[name]:
                if name == end and steps == 0:
                    expected = machine.expects
                    for message in ALL:
                        if type(message) is not expected:
                            with pytest.raises(KeyingError, match="is not what is due"):
                                machine.hear(message)
                    assert machine.expects is expected
                steps -= name == end
                actions = machine.hear(heard[name].popleft())
                heard[other].extend(action.message for action in actions if isinstance(action, Say))
    assert leader.result().number == follower.result().number
    with pytest.raises(KeyingError, match="is not what is due"):
        leader.hear(ALL[0])


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        (Prepare(7, Suite.CHACHA20_POLY1305, [0x1000, 0x1001]), "offers generation 7, and 8 is due"),
        (Prepare(9, Suite.CHACHA20_POLY1305, [0x1000, 0x1001]), "offers generation 9, and 8 is due"),
        (Prepare(8, Suite.AES_256_GCM, [0x1000, 0x1001]), "is what both run best"),
        (Prepare(8, "rfc4106(gcm(aes))\n", [0x1000, 0x1001]), "is what both run best"),
        (Prepare(8, Suite.CHACHA20_POLY1305, [0x1000]), "SPIs that cannot be"),
        (Prepare(8, Suite.CHACHA20_POLY1305, [0x1000, 255]), "SPIs that cannot be"),
    ],
)
def test_an_offer_that_is_old_weak_or_impossible_is_refused_and_changes_nothing(offer: Prepare, words: str) -> None:
    follower = Follower(terms(TWO, ONE, random.Random(3), counted=7), exporter(b""))
    follower.hear(ALL[0])
    with pytest.raises(KeyingError, match=words):
        follower.hear(offer)
    assert follower.counted == 7
    assert follower.lost() == []


def test_a_peer_that_has_counted_to_the_end_is_keyed_all_the_same(ends: tuple[Leader, Follower]) -> None:
    """By claim or in nine million years: the node that has heard of it must go on with whoever comes after."""
    heard = [protocol.LAST_GENERATION, protocol.LAST_GENERATION - 1, protocol.LAST_GENERATION]
    made = []
    for claimed in heard:
        rng, export = random.Random(claimed), exporter(b"secret")
        leader = Leader(terms(ONE, TWO, rng, counted=ends[0].counted), export)
        follower = Follower(terms(TWO, ONE, rng, counted=claimed), export)
        hello = said(list(leader.start()))
        prepare = said(list(leader.hear(said(list(follower.start())))))
        follower.hear(hello)
        assert understood(msgspec.msgpack.encode(prepare), Prepare, "its leader") == prepare
        follower.hear(prepare)
        made.append((leader.counted, follower.counted))
    assert made == [(1, 1), (protocol.LAST_GENERATION,) * 2, (1, 1)]


def test_a_client_leads_whatever_its_name_and_else_the_smaller_name() -> None:
    client = replace(TWO, kind=NodeKind.CLIENT)
    assert leads(client, ONE)
    assert not leads(ONE, client)
    assert leads(ONE, TWO)
    assert not leads(TWO, ONE)
    assert leads(replace(ONE, kind=NodeKind.CLIENT), client)


# --- the walk


class FullKernel(FakeKernel):
    """A kernel that may refuse the next SAs."""

    refuse = 0

    async def add_sa(self, sa) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - as its base
        if self.refuse:
            self.refuse -= 1
            raise XfrmError("add", str(sa), ENOSPC)
        await super().add_sa(sa)


@dataclass
class Side:
    """One node: its kernel, its srd (which may be killed and started), and what its end of the connection has to do."""

    node: Node
    peer: Node
    world: World
    kernel: FullKernel = field(init=False)
    mesh: Mesh = field(init=False)
    counted: int = 0
    end: End | None = None
    todo: deque[Action] = field(default_factory=deque)
    inbox: deque[Message] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.kernel = FullKernel(self.world.check)

    async def start(self) -> None:
        """Start srd: what it knew is gone, what the kernel has is there."""
        self.counted = 0
        self.end = None
        self.todo.clear()
        self.inbox.clear()
        self.mesh = Mesh(
            config=CONFIG,
            node=self.node,
            socket=self.kernel,
            store=Store(0.0),
            wake=lambda: None,
            clock=lambda: self.world.now,
        )
        await self.mesh.reconcile()

    async def connected(self, kind: type[End], secret: bytes) -> None:
        await self.broken()
        self.inbox.clear()  # what the last connection had under way died with it
        sends = await self.mesh.sends(self.peer.name)
        made = terms(self.node, self.peer, self.world.rng, counted=self.counted, sends=sends)
        self.end = kind(made, exporter(secret))
        self.todo.extend(self.end.start())

    async def broken(self) -> None:
        """Notice that the connection is gone."""
        if self.end is not None:
            end, self.end = self.end, None
            self.counted = end.counted
            self.todo.clear()
            for action in end.lost():
                await self.perform(action)

    async def perform(self, action: Action) -> None:
        if self.end is not None:
            self.end.begin(action)
        match action:
            case Say(message):
                self.world.other(self).inbox.append(message)
            case Agree(sends):
                await self.mesh.agree(self.peer.name, sends)
            case Install(generation):
                await self.mesh.install(generation)
            case Pin(generation):
                await self.mesh.pin(generation)
            case Discard(generation):
                await self.mesh.discard(generation)
            case Retire():
                await self.mesh.retire(self.peer.name)

    async def step(self) -> None:
        """Carry out one action, or hear one message."""
        if self.end is None:
            return
        try:
            if self.todo:
                await self.perform(self.todo.popleft())
            elif self.inbox and self.end.expects is not None:
                self.todo.extend(self.end.hear(self.inbox.popleft()))
            elif self.end.expects is None:
                self.end.result()
                self.counted, self.end = self.end.counted, None
        except SrdError:
            await self.broken()

    async def look(self) -> None:
        """Make a pass."""
        await self.mesh.reconcile()
        outbound = [key for key in self.kernel._sas if key[0] in self.peer.addresses]
        assert len(outbound) <= 4, "keys to send with pile up"

    def pinned(self) -> dict[object, tuple[int, bytes]]:
        """Return for each of the peer's addresses what packets to it leave under: SPI and key."""
        found: dict[object, tuple[int, bytes]] = {}
        for policy in self.kernel._policies.values():
            if policy.direction is Direction.OUT and policy.templates:
                remote = policy.selector.destination.network_address
                sa = self.kernel._sas.get((remote, policy.templates[0].spi))
                assert sa is not None, f"{self.node.name} has no keys to send to {remote} with"
                found[remote] = (sa.spi, sa.aead.key)
        return found


class World:
    """Both sides, and the rule: what was sent a moment ago can be received."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 1000.0
        self.sent: dict[tuple[str, object, int, bytes], float] = {}
        self.sides = (Side(ONE, TWO, self), Side(TWO, ONE, self))
        self.watched = False

    def other(self, side: Side) -> Side:
        return self.sides[1 - self.sides.index(side)]

    def check(self) -> None:
        if not self.watched:
            return
        for side in self.sides:
            for remote, (spi, key) in side.pinned().items():
                self.sent[side.node.name, remote, spi, key] = self.now
        for (sender, remote, spi, key), at in list(self.sent.items()):
            if self.now - at > UNDER_WAY_SECONDS:
                del self.sent[sender, remote, spi, key]
                continue
            receiver = self.sides[1] if sender == ONE.name else self.sides[0]
            sa = receiver.kernel._sas.get((ip_address(str(remote)), spi))
            assert sa is not None, f"{sender} sends to {remote} under {spi:#x}, which nobody can receive"
            assert sa.aead.key == key

    async def connect(self) -> None:
        secret = self.rng.randbytes(8)
        await self.sides[0].connected(Leader, secret)
        await self.sides[1].connected(Follower, secret)

    async def finish(self) -> None:
        """A connection on which nothing goes wrong."""
        for side in self.sides:
            side.kernel.refuse = 0
        await self.connect()
        for _ in range(100):
            for side in self.sides:
                await side.step()
        assert [side.end for side in self.sides] == [None, None]

    async def step(self) -> None:
        rng, side = self.rng, self.rng.choice(self.sides)
        what = rng.choices(
            ["step", "connect", "break", "repeat", "reorder", "lose", "kill", "refuse", "pass", "wait"],
            [140, 5, 2, 1, 1, 1, 2, 2, 12, 10],
        )[0]
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "step": side.step,
            "connect": self.connect,
            "break": side.broken,  # the other end finds out when it is connected to, or by a time-out
            "kill": side.start,
            "pass": side.look,
        }
        if what in acts:
            await acts[what]()
        elif what == "repeat" and side.inbox:
            side.inbox.append(side.inbox[0])
        elif what == "reorder":
            side.inbox.reverse()
        elif what == "lose" and side.inbox:
            side.inbox.popleft()
        elif what == "refuse":
            side.kernel.refuse = rng.randrange(1, 4)
        elif what == "wait":
            self.now += rng.uniform(0, 3)
        self.check()


async def walk(seed: int, steps: int = 250) -> None:
    world = World(random.Random(seed))
    for side in world.sides:
        await side.start()
    await world.finish()
    world.watched = True
    for _ in range(steps):
        await world.step()
    await world.finish()
    assert {link.protected for side in world.sides for link in side.mesh._links.values()} == {True}
    world.now += GRACE_SECONDS + 1
    for side in world.sides:
        await side.mesh.reconcile()
        assert len(side.kernel._sas) == 4, "keys pile up"
    one, two = ({(d, s): sa.aead.key for (d, s), sa in side.kernel._sas.items()} for side in world.sides)
    assert one == two


@pytest.mark.parametrize("seed", range(40))
def test_a_random_walk_loses_no_packet_and_ends_in_agreement(seed: int) -> None:
    asyncio.run(walk(seed))


async def test_keys_that_are_renewed_all_the_time_do_not_pile_up() -> None:
    world = World(random.Random(1))
    for side in world.sides:
        await side.start()
    counts = []
    for _ in range(50):
        await world.finish()
        world.now += RENEWAL_FLOOR_SECONDS
        for side in world.sides:
            await side.mesh.reconcile()
            counts.append(len(side.kernel._sas))
    legs = 2
    assert max(counts) <= 2 * legs + legs * (GRACE_SECONDS / RENEWAL_FLOOR_SECONDS + 1)
