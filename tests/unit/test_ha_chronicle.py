"""What a node writes down of a change of primary, from what it saw and heard, and whom it tells."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace

import pytest
from support.sentinels import SECRETS
from support.situations import NOW, WALL, at, config, primary_redis, replica_redis

from srd.changes import ChangeKind, RoleChange
from srd.ha.chronicle import BLIND_SECONDS, HISTORY_TOPIC, Chronicle
from srd.ha.fleet import Fleet
from srd.ha.history import History, account_of, word_of
from srd.ha.losses import LOSS_SECONDS, Loss, Losses
from srd.ha.sentinel import Event
from srd.model import Body, Endpoint, Role, SrdError
from srd.state import Lease, PeerReport, Redis, SentinelAnswer, Store

CONFIG = config()
SUBJECT = "orders 192.168.205.10 6379"


class Node:
    """redis-1's chronicle; the test says what is seen, and moves the clock."""

    def __init__(self, saved: History = ()) -> None:
        self.now = NOW
        self.store = Store(NOW)
        self._lease, self._sentinels = self.store.writer("lease"), self.store.writer("sentinels")
        self._redis, self._peers = self.store.writer("redis"), self.store.writer("peers")
        self.away: set[str] = set()
        self.told: list[tuple[str, RoleChange]] = []
        self.kept: list[History] = []
        self.disk_is_full = False
        self.disk_works = threading.Event()
        self.disk_works.set()
        self.losses = Losses(at(1), view=self.store.view, clock=lambda: self.now)
        self.chronicle = Chronicle(
            Fleet(CONFIG, SECRETS),
            CONFIG.node("redis-1"),
            self.store,
            losses=self.losses,
            ask_peer=self._ask,
            saved=saved,
            save=self._save,
            clock=lambda: self.now,
            wall_clock=lambda: WALL + self.now - NOW,
        )

    async def _ask(self, peer: str, topic: str, body: Body, _seconds: float) -> Body:
        if peer in self.away:
            raise SrdError("ask", peer, "it is away")
        assert topic == HISTORY_TOPIC
        self.told.append((peer, account_of(body)))
        return {}

    def _save(self, history: History) -> None:
        self.disk_works.wait(10)
        if self.disk_is_full:
            raise SrdError("write", "history.json", "no space left on device")
        self.kept.append(history)

    def see(
        self,
        primary: Endpoint | None,
        epoch: int = 1,
        *,
        redis: Redis | None = None,
        reports: Mapping[str, int] | None = None,
        unanswered: float | None = None,
    ) -> None:
        """Have a majority name this primary now; `reports` are offsets of peers that say to be primary."""
        answer = SentinelAnswer("", self.now, primary, epoch, False, 2, 2, unanswered=unanswered)
        self._sentinels({node.name: replace(answer, node=node.name) for node in CONFIG.voters})
        self._redis(redis)
        self._peers(
            {
                name: PeerReport(name, self.now, "0", True, Role.PRIMARY, True, offset)
                for name, offset in (reports or {}).items()
            }
        )
        held = primary == at(1)
        self._lease(Lease(held, self.now + 2 if held else 0.0, 3, 3, primary))
        self.chronicle.judged()

    def hear(self, node: str, name: str, payload: str = f"master {SUBJECT}") -> None:
        self.losses.heard(Event(node, name, payload))

    @property
    def history(self) -> History:
        return self.store.view().history

    @property
    def last(self) -> RoleChange:
        return self.history[-1]


def primary_at(now: float, offset: int = 500) -> Redis:
    return primary_redis(answered=now, offset=offset)


@pytest.fixture
def node() -> Node:
    """One that has seen redis-1 as the primary."""
    it = Node()
    it.see(at(1), redis=primary_at(it.now))
    it.now += 1
    return it


def test_the_first_that_is_seen_took_nobodys_place(node: Node) -> None:
    assert [(each.kind, each.previous, each.current) for each in node.history] == [(ChangeKind.FIRST, None, at(1))]


def test_nothing_is_entered_while_nothing_changes(node: Node) -> None:
    for primary in (at(1), None, at(1)):
        node.see(primary)
    assert len(node.history) == 1


def test_a_death_is_a_crash_with_what_redis_had_written(node: Node) -> None:
    node.see(at(1), redis=primary_at(node.now))
    node.now += 0.25
    node.losses.note(Loss(ChangeKind.CRASH, at(1), node.now, by="redis-1"))
    node.now += 0.5
    node.losses.given()
    node.now += 1
    node.see(at(2), 2)
    change = node.last
    assert (change.kind, change.by, change.duration_seconds) == (ChangeKind.CRASH, ("redis-1",), 0.5)
    assert (change.known_offset, change.known_age_seconds) == (500, 0.25)
    assert change.at_timestamp == WALL + node.now - NOW - 1


def test_a_redis_that_is_primary_again_was_not_replaced_because_it_had_ended(node: Node) -> None:
    node.losses.note(Loss(ChangeKind.CRASH, at(1), node.now, by="redis-1"))
    node.now += 5
    node.see(at(1), redis=primary_at(node.now))
    node.see(at(2), 2)
    assert node.last.kind is ChangeKind.UNKNOWN


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([], ChangeKind.UNKNOWN),
        ([("redis-2", "+try-failover")], ChangeKind.OUTSIDE),
        ([("redis-2", "+odown"), ("redis-2", "+try-failover")], ChangeKind.SENTINEL),
        ([("redis-2", "+odown"), ("redis-2", "-odown"), ("redis-2", "+try-failover")], ChangeKind.OUTSIDE),
        # Whoever tries has found it down by itself, or was asked to.
        ([("redis-3", "+odown"), ("redis-2", "+try-failover")], ChangeKind.OUTSIDE),
        ([("redis-2", "+odown")], ChangeKind.UNKNOWN),
    ],
)
def test_what_the_sentinels_announce_tells_why(node: Node, events: list[tuple[str, str]], kind: ChangeKind) -> None:
    for name, event in events:
        node.hear(name, event)
    node.see(at(2), 2)
    assert node.last.kind is kind


@pytest.mark.parametrize("payload", ["", "slave 192.168.205.11:6379 192.168.205.11 6379 @ " + SUBJECT, "master x y z"])
def test_what_is_no_announcement_of_a_primary_says_nothing(node: Node, payload: str) -> None:
    node.hear("redis-2", "+try-failover", payload)
    node.see(at(2), 2)
    assert node.last.kind is ChangeKind.UNKNOWN


def test_sentinels_own_failover_lasts_since_the_first_ping_without_a_reply(node: Node) -> None:
    lost = node.now
    for _ in range(5):
        node.now += 1
        node.see(at(1), unanswered=lost)
    node.hear("redis-2", "+odown")
    node.hear("redis-2", "+try-failover")
    node.now += 1
    node.see(at(2), 2)
    assert (node.last.kind, node.last.duration_seconds) == (ChangeKind.SENTINEL, 6.0)


def test_what_happened_long_ago_is_no_reason(node: Node) -> None:
    node.hear("redis-2", "+try-failover")
    while node.now < NOW + LOSS_SECONDS + 2:
        node.now += 1
        node.see(at(1))
    node.see(at(2), 2)
    assert node.last.kind is ChangeKind.UNKNOWN


def test_that_another_node_was_stopped_is_no_reason_for_ever(node: Node) -> None:
    node.see(at(2), 2)
    node.losses.note(Loss(ChangeKind.OPERATOR, at(2), node.now))
    while node.now < NOW + LOSS_SECONDS + 2:
        node.now += 1
        node.see(at(2), 2)
    node.see(at(3), 3)
    assert node.last.kind is ChangeKind.UNKNOWN


def test_a_reason_is_that_of_one_primary_and_of_one_change(node: Node) -> None:
    node.losses.note(Loss(ChangeKind.SILENT, at(3), node.now))
    node.see(at(2), 2)
    assert node.last.kind is ChangeKind.UNKNOWN
    node.hear("redis-2", "+try-failover", "master orders 192.168.205.11 6379")
    node.see(at(3), 3)
    node.see(at(2), 4)
    assert [each.kind for each in node.history[-2:]] == [ChangeKind.OUTSIDE, ChangeKind.UNKNOWN]


def test_of_a_silent_primary_its_srds_last_word_says_how_far_it_had_come(node: Node) -> None:
    node.see(at(2), 2, reports={"redis-2": 700})
    node.now += 2
    node.losses.note(Loss(ChangeKind.SILENT, at(2), node.now, "it is silent", "redis-1"))
    node.see(at(1), 3)
    assert (node.last.known_offset, node.last.known_age_seconds) == (700, 2.0)


def test_a_primary_that_is_back_says_itself_how_far_it_had_come(node: Node) -> None:
    again = Node(saved=node.history)
    again.see(at(2), 2, redis=primary_at(again.now, offset=900))
    assert (again.last.kind, again.last.known_offset, again.last.known_age_seconds) == (ChangeKind.UNSEEN, 900, 0.0)
    follows = Node(saved=node.history)
    follows.see(at(2), 2, redis=replica_redis(offset=900))
    assert (follows.last.kind, follows.last.known_offset) == (ChangeKind.UNSEEN, None)


def test_a_switchover_that_came_to_nothing_is_no_reason(node: Node) -> None:
    node.losses.note(Loss(ChangeKind.SWITCHOVER, at(1), node.now, "srd switchover", "redis-3"))
    node.losses.stayed()
    node.see(at(2), 2)
    assert node.last.kind is ChangeKind.UNKNOWN


def test_a_change_while_no_majority_was_heard_is_one_before(node: Node) -> None:
    node.now += BLIND_SECONDS + 1
    node.see(at(2), 2)
    assert (node.last.kind, node.last.before, node.last.duration_seconds) == (ChangeKind.UNSEEN, True, None)


def test_after_a_restart_only_what_has_changed_is_entered(node: Node) -> None:
    again = Node(saved=node.history)
    again.see(at(1))
    assert again.history == node.history
    later = Node(saved=node.history)
    later.see(at(2), 2)
    later.see(at(2), 2)
    assert [each.kind for each in later.history] == [ChangeKind.FIRST, ChangeKind.UNSEEN]


async def test_a_word_that_comes_before_the_sentinels_is_the_same_change(node: Node) -> None:
    word = RoleChange(WALL, 2, at(1), at(2), kind=ChangeKind.CRASH, cause="redis has ended", by=("redis-1",))
    node.chronicle.answer("redis-2", word_of(word))
    node.see(at(1))
    node.see(at(2), 2)
    assert len(node.history) == 2
    assert (node.last.kind, node.last.cause) == (ChangeKind.CRASH, "redis has ended")


async def test_everyone_is_told_once_and_who_was_away_when_it_is_back(node: Node) -> None:
    node.away = {"redis-3"}
    node.see(at(2), 2)
    for _ in range(2):
        await node.chronicle._tell()
    assert [(peer, change.epoch) for peer, change in node.told] == [("redis-2", 1), ("redis-2", 2)]
    node.away = set()
    for _ in range(2):
        await node.chronicle._tell()
    assert [(peer, change.epoch) for peer, change in node.told[2:]] == [("redis-3", 1), ("redis-3", 2)]


async def test_nobody_is_told_what_it_has_said_itself(node: Node) -> None:
    await node.chronicle._tell()
    node.told.clear()
    word = RoleChange(WALL, 2, at(1), at(2), kind=ChangeKind.CRASH)
    node.chronicle.answer("redis-2", word_of(word))
    await node.chronicle._tell()
    assert node.told == [("redis-3", word)]


async def test_a_disk_that_hangs_is_waited_for_by_one_thread_only(node: Node) -> None:
    node.disk_works.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await node.chronicle._keep()
    with pytest.raises(SrdError, match="has not answered the last attempt"):
        await node.chronicle._keep()
    assert node.kept == []
    node.disk_works.set()
    async with asyncio.timeout(10):
        while node.kept != [node.history]:  # noqa: ASYNC110 - it is another thread that comes to its end
            await asyncio.sleep(0.01)


async def test_a_full_disk_is_tried_again(node: Node) -> None:
    node.disk_is_full = True
    with pytest.raises(SrdError, match="no space left"):
        await node.chronicle._keep()
    node.disk_is_full = False
    for _ in range(2):
        await node.chronicle._keep()
    assert node.kept == [node.history]
