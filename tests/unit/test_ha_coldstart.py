"""Whose data a cluster goes on with: how far a node has come, who has come further, whose turn it is to find out."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
from support.situations import NOW, OFFSET, WALL, at, primary_situation, replica_redis, replica_situation, with_child

from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY, Node
from srd.ha.coldstart import STOCK_TOPIC, ColdStart, arranges, is_in_touch
from srd.ha.failover import Failover
from srd.ha.progress import UNKNOWN_EPOCH, Progress, Stock, is_ahead, may_exceed, seen, stock_of
from srd.ha.restart import Census, Death
from srd.model import Body, Pause, RefusedError, Role, Service, SrdError
from srd.state import ChildState, Lease, Situation

STREAM, OTHER = "b" * 40, "c" * 40


def test_a_primary_that_is_named_and_a_replica_in_step_of_it_have_come_that_far() -> None:
    assert seen(primary_situation(lease=Lease(True, NOW + 1, 3, 3, at(1), epoch=3)), None) == Progress(
        3, STREAM, OFFSET
    )
    lease = Lease(False, 0.0, 3, 3, at(2), epoch=4)
    assert seen(replica_situation(lease=lease), None) == Progress(4, STREAM, OFFSET)


@pytest.mark.parametrize(
    "situation",
    [
        primary_situation(redis=None),
        primary_situation(lease=Lease(False, 0.0, 1, 1, None)),
        primary_situation(lease=Lease(False, 0.0, 3, 3, at(2), epoch=4)),
        replica_situation(redis=replica_redis(link_up=False)),
        replica_situation(redis=replica_redis(sync_in_progress=True)),
        replica_situation(redis=replica_redis(loading=True)),
        replica_situation(redis=replica_redis(primary=at(3))),
    ],
    ids=["no redis", "nobody named", "another named", "no link", "syncing", "loading", "follows another"],
)
def test_otherwise_it_is_known_only_of_a_stream_that_was_known_before(situation: Situation) -> None:
    assert seen(situation, None) is None
    assert seen(situation, Progress(2, OTHER, 1)) is None
    redis = situation.view.redis
    known = redis is not None and not redis.loading
    assert seen(situation, Progress(2, STREAM, 1)) == (Progress(2, STREAM, OFFSET) if known else None)


@pytest.mark.parametrize(
    ("count", "inode", "size", "offset"),
    [(2, 7, 100, 1000), (2, 7, 130, 1030), (2, 7, 60, 960), (2, 7, 0, 900), (3, 8, 60, 1000)],
)
def test_what_the_files_have_grown_or_lost_since_a_note_counts(count: int, inode: int, size: int, offset: int) -> None:
    noted = Progress(1, STREAM, 1000, "appendonly.aof.2.incr.aof", 7, 100)
    assert noted.on_disk(f"appendonly.aof.{count}.incr.aof", inode, size).offset == offset


@pytest.mark.parametrize(
    ("log", "inode"), [("appendonly.aof.1.incr.aof", 7), ("appendonly.aof.2.incr.aof", 8), ("", 0)]
)
def test_a_note_says_nothing_of_files_that_have_begun_anew(log: str, inode: int) -> None:
    assert Progress(1, STREAM, 1000, "appendonly.aof.2.incr.aof", 7, 100).on_disk(log, inode, 100) == Progress()


@pytest.mark.parametrize(
    ("noted", "role", "offset", "may"),
    [
        (None, Role.PRIMARY, OFFSET, True),
        (Progress(3, STREAM, OFFSET), Role.PRIMARY, OFFSET, False),
        (Progress(3, STREAM, OFFSET), Role.PRIMARY, OFFSET - 1, True),
        (Progress(2, STREAM, 1), Role.PRIMARY, OFFSET, True),
        (Progress(3, STREAM, OFFSET), Role.REPLICA, OFFSET, True),
        (Progress(3, STREAM, OFFSET), Role.PRIMARY, None, True),
        (Progress(3, OTHER, OFFSET), Role.PRIMARY, OFFSET, True),  # begun anew since, as after a power cut
    ],
)
def test_who_follows_a_primary_that_goes_on_with_its_stream_has_nothing_else(
    noted: Progress | None,
    role: Role,
    offset: int | None,
    may: bool,  # noqa: FBT001 - a table's column
) -> None:
    s = replica_situation()
    peers = {**s.view.peers, "redis-2": replace(s.view.peers["redis-2"], role=role, offset=offset, replid=STREAM)}
    assert may_exceed(replace(s, view=replace(s.view, peers=peers)), noted, at(2)) is may


MINE = Stock("n1", data=True, able=True, epoch=3, replid=STREAM, offset=1000, end="00")


@pytest.mark.parametrize(
    ("theirs", "they_have_more", "i_have_more", "ahead"),
    [
        (MINE, None, None, False),
        (replace(MINE, data=False, epoch=9, offset=9999), 5, None, False),
        (replace(MINE, epoch=4, offset=1), None, 7, True),
        (replace(MINE, epoch=2, offset=9999), 7, None, False),
        (replace(MINE, offset=1), 7, None, True),
        (replace(MINE, offset=9999), 0, None, False),
        (replace(MINE, offset=9999), None, 7, False),
        (replace(MINE, offset=9999), None, 0, False),
        (replace(MINE, offset=1001), None, None, True),
        (replace(MINE, offset=999), None, None, False),
        (replace(MINE, offset=9999, replid=OTHER), None, None, False),
        (replace(MINE, epoch=UNKNOWN_EPOCH, offset=9999), None, None, False),
        (replace(MINE, epoch=UNKNOWN_EPOCH), 7, None, True),
    ],
)
def test_who_is_ahead(
    theirs: Stock,
    they_have_more: int | None,
    i_have_more: int | None,
    ahead: bool,  # noqa: FBT001 - a table's column
) -> None:
    assert is_ahead(theirs, MINE, they_have_more=they_have_more, i_have_more=i_have_more) is ahead


def test_whoever_has_anything_is_ahead_of_who_has_nothing() -> None:
    nothing = Stock("n1", able=True)
    assert is_ahead(replace(MINE, epoch=UNKNOWN_EPOCH), nothing, they_have_more=None, i_have_more=None)
    assert not is_ahead(nothing, nothing, they_have_more=None, i_have_more=None)


def test_no_two_are_each_ahead_of_the_other() -> None:
    offsets, epochs, streams = (1, 2), (UNKNOWN_EPOCH, 0, 1), (STREAM, OTHER)
    stocks = [
        replace(MINE, data=data, epoch=e, replid=r, offset=o)
        for data in (True, False)
        for e in epochs
        for r in streams
        for o in offsets
    ]
    for one in stocks:
        for two in stocks:
            for more, less in ((None, None), (0, 0), (5, None)):
                ahead = is_ahead(one, two, they_have_more=more, i_have_more=less)
                behind = is_ahead(two, one, they_have_more=less, i_have_more=more)
                assert not (ahead and behind), (one, two, more, less)


def test_what_a_node_has_survives_the_wire_and_nothing_else_does() -> None:
    assert stock_of("n1", MINE.body()) == MINE
    for broken in ({}, {**MINE.body(), "offset": "1000"}, {**MINE.body(), "data": None}):
        with pytest.raises(SrdError, match="its answer about what it has is none"):
            stock_of("n1", broken)


def down(situation: Situation) -> Situation:
    stopped = with_child(situation, Service.REDIS, state=ChildState.STOPPED, pid=None)
    return replace(stopped, view=replace(stopped.view, redis=None))


def test_whom_the_sentinels_name_compares_while_its_redis_is_down() -> None:
    assert not arranges(primary_situation(), None)
    assert arranges(down(primary_situation()), None)


@pytest.mark.parametrize(("ago", "turn"), [(1.0, False), (7.9, False), (8.0, True)])
def test_one_that_has_just_died_is_replaced_by_who_was_in_step(ago: float, turn: bool) -> None:  # noqa: FBT001 - a table's column
    assert arranges(down(primary_situation()), Death(NOW - ago, Role.PRIMARY)) is turn


def test_one_that_could_not_load_its_data_has_nobody_who_was_in_step() -> None:
    assert arranges(down(primary_situation()), Death(NOW, Role.UNKNOWN))


def alone(situation: Situation, *away: str, priority: int = NEVER_PRIORITY) -> Situation:
    """A replica without a link, whose sentinels have not heard of the primary, without these nodes."""
    view = situation.view
    sentinels = {name: replace(answer, unanswered=NOW - 5) for name, answer in view.sentinels.items()}
    channels = {
        name: replace(channel, connected=channel.connected and name not in away)
        for name, channel in view.channels.items()
    }
    redis = replica_redis(link_up=False, priority=priority)
    return replace(situation, view=replace(view, sentinels=sentinels, channels=channels, redis=redis))


@pytest.mark.parametrize(("priority", "turn"), [(NEVER_PRIORITY, True), (PREFERRED_PRIORITY, True), (100, False)])
def test_the_first_node_that_is_heard_compares_where_the_primarys_is_away(
    priority: int,
    turn: bool,  # noqa: FBT001 - a table's column
) -> None:
    """Unless the sentinels may promote its redis by themselves."""
    assert arranges(alone(replica_situation(), "redis-2", priority=priority), None) is turn


def test_who_is_heard_of_the_others_is_asked_by_one_alone() -> None:
    assert not arranges(alone(replica_situation()), None), "the primary's srd is there"
    third = replica_situation()
    third = replace(third, node=third.config.node("redis-3"))
    view = third.view
    peers = {"redis-1": replace(view.peers["redis-2"], node="redis-1"), "redis-2": view.peers["redis-2"]}
    channels = {"redis-1": replace(view.channels["redis-2"], peer="redis-1"), "redis-2": view.channels["redis-2"]}
    third = replace(third, view=replace(view, peers=peers, channels=channels))
    assert not arranges(alone(third, "redis-2"), None), "redis-1 does it"
    assert arranges(alone(third, "redis-2", "redis-1"), None)


def test_a_primary_that_answers_one_sentinel_of_a_majority_is_not_away() -> None:
    here = alone(replica_situation(), "redis-2")
    sentinels = {name: replace(answer, unanswered=None) for name, answer in here.view.sentinels.items()}
    assert not arranges(replace(here, view=replace(here.view, sentinels=sentinels)), None)


def test_who_has_been_silent_for_long_is_not_heard() -> None:
    s = replica_situation()
    assert is_in_touch(s, s.config.node("redis-3"))
    assert not is_in_touch(replace(s, now=NOW + 10), s.config.node("redis-3"))


class Elections:
    """Stands where ha/failover.py does: notes whom the sentinels are to elect."""

    def __init__(self) -> None:
        self.preferred: list[str | None] = []

    async def replace(self, _primary: Node, _why: str, *, since: float | None, prefer: str | None = None) -> None:
        assert since is None, "nobody can tell"
        self.preferred.append(prefer)


async def compared(s: Situation, *stocks: Stock) -> tuple[Census | None, list[str | None]]:
    """Return what comes of one comparison on redis-1, and whom the sentinels are to elect; ends are in no file."""
    found = {stock.node: stock for stock in stocks}
    elections = Elections()

    async def own() -> Stock:
        return found[s.node.name]

    async def ask(peer: str, topic: str, _body: Body, _seconds: float) -> Body:
        if peer not in found:
            raise RefusedError("ask", peer, "it is away")
        return found[peer].body() if topic == STOCK_TOPIC else {"after": None}

    async def nowhere(_end: str) -> int | None:
        return None

    cold = ColdStart(
        cast("Failover", elections),
        situation=lambda: s,
        ask_peer=ask,
        stock=own,
        after=nowhere,
        died=lambda: None,
        wake=lambda: None,
    )
    await cold.reconcile()
    return cold.census, elections.preferred


def stock(number: int, offset: int, *, epoch: int = 3, data: bool = True, chosen: bool = False) -> Stock:
    return Stock(
        f"redis-{number}", data, able=True, ready=True, chosen=chosen, epoch=epoch, replid=STREAM, offset=offset
    )


NAMED = down(primary_situation())


@pytest.mark.parametrize(
    ("stocks", "census", "elected"),
    [
        ((stock(1, 9), stock(2, 9), stock(3, 8)), Census(alone=True), []),
        ((stock(1, 9), stock(2, 9, chosen=True), stock(3, 8)), Census(), []),
        ((stock(1, 8), stock(2, 9), stock(3, 10)), Census(ahead="redis-3"), ["redis-3"]),
        (
            (stock(1, 0, data=False), stock(2, 9, epoch=UNKNOWN_EPOCH), stock(3, 8)),
            Census(ahead="redis-3"),
            ["redis-3"],
        ),
        ((stock(1, 9), stock(2, 8)), Census(awaited=("redis-3",)), []),
        (tuple(stock(n, 0, data=False) for n in (1, 2, 3)), Census(empty=True, alone=True), []),
    ],
)
async def test_what_comes_of_a_comparison(stocks: tuple[Stock, ...], census: Census, elected: list[str]) -> None:
    assert await compared(NAMED, *stocks) == (census, elected)


async def test_nobody_is_elected_during_a_pause() -> None:
    paused = replace(NAMED, view=replace(NAMED.view, pause=Pause(1, WALL + 60)))
    assert await compared(paused, stock(1, 8), stock(2, 9), stock(3, 10)) == (Census(ahead="redis-3"), [])
