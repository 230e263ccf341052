"""First boot and power cuts of three nodes, every interleaving: never two primaries, never a wait for ever.

Two layouts: three redis nodes, and two with an arbiter.

The real `restart.start` and `desired.services` decide; redis and Sentinel are a small model of what they do. A pass of
srd may see any part of the others: nothing, the keying channel only, or their sentinel as well.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srd import desired
from srd.cluster import Config
from srd.config import parse_config
from srd.ha import restart
from srd.ha.lease import endpoint_of
from srd.model import Role, Service
from srd.state import Channel, Child, ChildState, PeerReport, SentinelAnswer, Situation, View


def layout(*kinds: str) -> Config:
    nodes = (
        f'[[node]]\nname = "n{number}"\naddresses = ["10.0.0.{number}"]\nkind = "{kind}"\n'
        for number, kind in enumerate(kinds)
    )
    return parse_config('cluster = "c"\n' + "".join(nodes) + '[ipsec]\nmode = "off"\n', "test")


THREE: Final = layout("redis", "redis", "redis")
ARBITER: Final = layout("redis", "redis", "sentinel")
NODES: Final = range(3)
ENDPOINTS: Final = [endpoint_of(THREE, node) for node in THREE.nodes]
PRIMARY: Final = -1
NOW: Final = 1000.0


class Memory(NamedTuple):
    """What a sentinel keeps on disk: whom it names, by which epoch, and the replicas and sentinels that it has met."""

    primary: int
    epoch: int
    replicas: frozenset[int] = frozenset()
    sentinels: frozenset[int] = frozenset()

    def naming(self, primary: int, epoch: int) -> Memory:
        others = (self.replicas | {self.primary}) - {primary}
        return self._replace(primary=primary, epoch=epoch, replicas=others) if primary != self.primary else self


class N(NamedTuple):
    """A node. `redis` is None when it does not run, PRIMARY, or the number of the node that it follows."""

    arbiter: bool = False
    up: bool = False
    redis: int | None = None
    sentinel: bool = False
    died: bool = False
    joined: bool = False
    data: bool = False
    memory: Memory | None = None


World = tuple[N, ...]
STARTS: Final[dict[str, World]] = {"three": (N(), N(), N()), "arbiter": (N(), N(), N(arbiter=True))}


def put(world: World, number: int, **changes: object) -> World:
    return tuple(n._replace(**changes) if i == number else n for i, n in enumerate(world))  # type: ignore[arg-type]


def leads(world: World, number: int) -> bool:
    """Whether others can see this node as a running primary; its own srd saw it first."""
    return world[number].up and world[number].redis == PRIMARY and world[number].joined


class Sight(NamedTuple):
    """What one pass of srd goes by."""

    config: str
    me: int
    joined: bool
    data: bool
    died: bool
    redis: bool
    sentinel: bool
    channels: frozenset[tuple[int, bool]]
    answers: frozenset[tuple[int, Memory]]


@functools.cache
def decide(sight: Sight) -> tuple[int | None, bool]:
    """Return what redis starts as now (None: it does not) and whether the sentinel starts, by the real rules."""
    config = ARBITER if sight.config == "arbiter" else THREE
    node = config.nodes[sight.me]
    view = View(
        children={Service.REDIS: Child(ChildState.READY if sight.redis else ChildState.STOPPED)},
        channels={f"n{peer}": Channel(f"n{peer}", connected=True, since=0.0) for peer, _ in sight.channels},
        peers={
            f"n{peer}": PeerReport(f"n{peer}", NOW, "", joined, Role.UNKNOWN, healthy=True)
            for peer, joined in sight.channels
        },
        sentinels={
            f"n{peer}": SentinelAnswer(
                f"n{peer}", NOW, ENDPOINTS[memory.primary], memory.epoch, False,
                len(memory.sentinels), len(memory.replicas),
            )
            for peer, memory in sight.answers
        },
        initialized=sight.joined,
    )  # fmt: skip
    situation = Situation(config, node, view, NOW)
    death = restart.Death(NOW - 1, Role.PRIMARY) if sight.died else None
    # Compared already, and nobody has more: to wait for that (ha/coldstart.py) only puts a start off.
    start = restart.start(situation, death, holds_data=sight.data, census=restart.Census())
    wanted = desired.services(situation, start)
    role = None
    if Service.REDIS in wanted and wanted[Service.REDIS].run and not sight.redis:
        role = PRIMARY if start.primary is None else ENDPOINTS.index(start.primary)
    return role, wanted[Service.SENTINEL].run and not sight.sentinel


def pass_of(world: World, me: int, channels: Iterable[int], answering: Iterable[int]) -> World:
    """One pass of this node's srd, which sees these peers' channels and these peers' sentinels."""
    n = world[me]
    answers = [(i, world[i].memory) for i in (*answering, me) if world[i].up and world[i].sentinel]
    sight = Sight(
        "arbiter" if world[-1].arbiter else "three", me, n.joined, n.data, n.died, n.redis is not None, n.sentinel,
        frozenset((i, world[i].joined) for i in channels if world[i].up), frozenset(answers),  # type: ignore[arg-type]
    )  # fmt: skip
    role, sentinel = decide(sight)
    if sentinel:
        follows = 0 if n.redis is None else me if n.redis == PRIMARY else n.redis
        world = put(world, me, sentinel=True, memory=n.memory or Memory(follows, 0))
    if role is not None:
        if role == PRIMARY:
            check_primary(world, me)
        world = put(world, me, redis=role, data=True)
    return world


def check_primary(world: World, me: int) -> None:
    """Nobody else is primary, nobody was elected since, and no data is replaced by nothing."""
    assert not any(n.up and n.redis == PRIMARY for n in world), world
    elected = max((n.memory for n in world if n.memory), key=lambda memory: memory.epoch, default=Memory(0, 0))
    assert elected.primary == me, world
    assert world[me].data or not any(n.joined for n in world), world


def srd_and_power(world: World) -> Iterator[World]:
    for me, n in enumerate(world):
        if not n.up:
            yield put(world, me, up=True)
            continue
        others = [i for i in NODES if i != me]
        for sights in itertools.product(("nothing", "channel", "both"), repeat=2):
            seen = dict(zip(others, sights, strict=True))
            yield pass_of(
                world, me, [i for i in others if seen[i] != "nothing"], [i for i in others if seen[i] == "both"]
            )
        if n.redis == PRIMARY:
            yield put(world, me, joined=True)


def harm(world: World) -> Iterator[World]:
    for me, n in enumerate(world):
        if n.up:
            yield put(world, me, up=False, redis=None, sentinel=False, died=False)
            if n.redis is not None:
                yield put(world, me, redis=None, died=True)


def redis_and_sentinel(world: World) -> Iterator[World]:
    """What they do by themselves, an election apart."""
    for i, n in enumerate(world):
        if n.up and n.redis is not None and n.redis != PRIMARY and leads(world, n.redis):
            yield put(world, i, joined=True)
        if not n.up or not n.sentinel or n.memory is None:
            continue
        if leads(world, n.memory.primary):
            found = {k for k in NODES if world[k].up and world[k].redis == n.memory.primary}
            yield put(world, i, memory=n.memory._replace(replicas=n.memory.replicas | found))
            for k in n.memory.replicas:
                if world[k].up and world[k].redis not in (None, n.memory.primary):
                    yield put(world, k, redis=n.memory.primary)
        for j in NODES:
            if j != i and meet(world, i, j):
                yield hello(world, i, j)


def watched(memory: Memory) -> frozenset[int]:
    return memory.replicas | {memory.primary}


def meet(world: World, i: int, j: int) -> bool:
    """Hellos go to sentinels that are known, and through every running redis that both watch."""
    one, two = world[i], world[j]
    if not (one.up and one.sentinel and two.up and two.sentinel and one.memory and two.memory):
        return False
    through = any(world[r].up and world[r].redis is not None for r in watched(one.memory) & watched(two.memory))
    return through or j in one.memory.sentinels or i in two.memory.sentinels


def hello(world: World, i: int, j: int) -> World:
    """They know each other now, and the one with the smaller epoch takes over the other's configuration."""
    for me, peer in ((i, j), (j, i)):
        mine, theirs = world[me].memory, world[peer].memory
        assert mine is not None
        assert theirs is not None
        mine = mine._replace(sentinels=mine.sentinels | {peer})
        if theirs.epoch > mine.epoch:
            mine = mine.naming(theirs.primary, theirs.epoch)._replace(epoch=theirs.epoch)
        world = put(world, me, memory=mine, joined=world[me].joined or mine.epoch > 0)
    return world


def elections(world: World) -> Iterator[World]:
    for leader, n in enumerate(world):
        if not n.up or not n.sentinel or n.memory is None or leads(world, n.memory.primary):
            continue
        if world[n.memory.primary].up and world[n.memory.primary].redis == PRIMARY:
            continue
        old = n.memory
        voters = [
            i
            for i in (leader, *old.sentinels)
            if world[i].up and world[i].sentinel and (m := world[i].memory) and (m.primary, m.epoch) == old[:2]
        ]
        if len(voters) < THREE.quorum:
            continue
        for winner in old.replicas:
            if world[winner].up and world[winner].redis is not None:
                after = put(world, winner, redis=PRIMARY, joined=True)
                for i in voters:
                    memory = after[i].memory
                    assert memory is not None
                    after = put(after, i, joined=True, memory=memory.naming(winner, old.epoch + 1))
                yield after


def settle(world: World, majority: tuple[int, ...]) -> World:
    """Let these nodes run together, undisturbed, until nothing changes; the others are without power."""
    for i in NODES:
        world = put(world, i, up=True) if i in majority else put(world, i, up=False, redis=None, sentinel=False)
    for _ in range(60):
        before = world
        for i in majority:
            others = [j for j in majority if j != i]
            world = pass_of(world, i, others, others)
            if world[i].redis == PRIMARY:
                world = put(world, i, joined=True)
        for _ in range(20):
            changed = next((after for after in redis_and_sentinel(world) if after != world), None)
            if changed is None:
                break
            world = changed
        elected = next(elections(world), None)
        if elected is not None:
            world = elected
        elif world == before:
            # Nobody can be elected, so the patience of those that died ends.
            world = tuple(n._replace(died=False) for n in world)
            if world == before:
                return world
    msg = f"does not come to rest: {world}"
    raise AssertionError(msg)


def explore(start: World, harms: int, most_elections: int) -> list[World]:
    """Return every world that can come about with so many power cuts or crashes, and elections."""
    seen: dict[tuple[World, int, int], None] = {(start, harms, most_elections): None}
    queue = list(seen)
    while queue:
        world, harm_left, elections_left = queue.pop()
        reached = [(after, harm_left, elections_left) for after in srd_and_power(world)]
        reached += [(after, harm_left, elections_left) for after in redis_and_sentinel(world)]
        if harm_left:
            reached += [(after, harm_left - 1, elections_left) for after in harm(world)]
        if elections_left:
            reached += [(after, harm_left, elections_left - 1) for after in elections(world)]
        for state in reached:
            if state not in seen:
                seen[state] = None
                queue.append(state)
    return list(dict.fromkeys(world for world, _, _ in seen))


MAJORITIES: Final = ((0, 1), (0, 2), (1, 2), (0, 1, 2))


def check_comes_up(world: World, majority: tuple[int, ...]) -> None:
    """All that can run does, under one primary: but if it is away, those left must have met to elect another."""
    after = settle(world, majority)
    for i in majority:
        assert after[i].sentinel, (world, after)
        assert after[i].arbiter or after[i].redis is not None, (world, after)
    primaries = [i for i in majority if after[i].redis == PRIMARY]
    if primaries or len(majority) == len(NODES):
        assert len(primaries) == 1, (world, after)
        return
    known = [after[i].memory for i in majority]
    assert all(memory is not None and memory.primary not in majority for memory in known), (world, after)
    met = any(memory is not None and memory.sentinels & set(majority) for memory in known)
    candidate = any(memory is not None and memory.replicas & set(majority) for memory in known)
    assert not (met and candidate), (world, after)


@pytest.fixture(scope="module", params=STARTS)
def reachable(request: pytest.FixtureRequest) -> list[World]:
    """Every world of a first boot with one power cut or crash and one election; two primaries fail here already."""
    return explore(STARTS[request.param], harms=1, most_elections=1)


def test_never_two_primaries_in_any_interleaving(reachable: list[World]) -> None:
    assert len(reachable) > 1000
    assert all(sum(n.up and n.redis == PRIMARY for n in world) <= 1 for world in reachable)


def test_any_majority_comes_up_after_power_was_cut_at_any_moment(reachable: list[World]) -> None:
    dark = {tuple(n._replace(up=False, redis=None, sentinel=False, died=False) for n in world) for world in reachable}
    for world, majority in itertools.product(dark, MAJORITIES):
        check_comes_up(world, majority)


def test_any_majority_comes_up_from_where_it_is(reachable: list[World]) -> None:
    for world, majority in zip(reachable[::10], itertools.cycle(MAJORITIES), strict=False):
        check_comes_up(world, majority)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(STARTS.values())), st.data())
def test_long_walks_with_much_harm(world: World, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 60))):
        steps = [*srd_and_power(world), *redis_and_sentinel(world), *elections(world), *harm(world)]
        world = data.draw(st.sampled_from(list(dict.fromkeys(steps))))
        assert sum(n.up and n.redis == PRIMARY for n in world) <= 1
    check_comes_up(world, data.draw(st.sampled_from(MAJORITIES)))
