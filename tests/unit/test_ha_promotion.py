"""What the srd of a successor takes over, and what not; and whom it tells of that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from support.sentinels import SECRETS, until
from support.situations import config, primary_redis, replica_redis

from srd.ha.custody import Custody
from srd.ha.fleet import Fleet
from srd.ha.lease import endpoint_of
from srd.ha.promotion import AGAIN_SECONDS, LEASE_TOPIC, WORTHWHILE_SECONDS, Promotion
from srd.ha.resp import NobodyThereError
from srd.ha.sentinel import SELECTED, Event
from srd.model import Body, Endpoint, Role
from srd.reconcile import boottime
from srd.state import Redis, Store

CONFIG = config()
FORMER, SUCCESSOR, THIRD = CONFIG.redis_nodes
LEASE: Body = {"seconds": 1.0, "assured": 4.0}
CHOSEN = Event(THIRD.name, SELECTED, "slave 192.168.205.11:6379 192.168.205.11 6379 @ orders 192.168.205.10 6379")


def nothing(*_: object) -> None:
    raise AssertionError("nothing has changed")


async def no_peer(peer: str, topic: str, _body: Body, _seconds: float) -> Body:
    raise AssertionError(f"{peer} was asked about the {topic}")


async def a_replica(_seconds: float) -> Redis:
    return replica_redis()


async def its_role(_seconds: float) -> Role:
    return Role.REPLICA


@pytest.fixture
def promotion(monkeypatch: pytest.MonkeyPatch) -> Promotion:
    """The second node's, which can reach no redis but its own, and nobody has told that one anything."""
    fleet = Fleet(CONFIG, SECRETS)
    own = fleet.redises[SUCCESSOR.name]
    for name, answer in {"observe": a_replica, "role": its_role, "lead": nothing}.items():
        monkeypatch.setattr(own, name, answer)
    fleet.redises = {SUCCESSOR.name: own}
    return Promotion(
        fleet,
        SUCCESSOR,
        store=Store(boottime()),
        custody=Custody(),
        ask_peer=no_peer,
        look=nothing,
        observed=nothing,
        judge=nothing,
    )


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"seconds": 60.0},
        {"seconds": 0.0},
        {"seconds": -1.0},
        {"seconds": "2"},
        {"seconds": 1.0, "assured": "for ever"},
    ],
    ids=["nothing", "more than a lease", "ended", "negative", "text", "no number"],
)
async def test_words_that_give_no_lease_are_declined(promotion: Promotion, body: Body) -> None:
    await promotion.expect(FORMER.name, {})
    assert (await promotion.succeed(FORMER.name, body))["led"] is False
    assert promotion._custody == Custody()


async def test_a_switchover_that_was_not_announced_is_declined(promotion: Promotion) -> None:
    assert (await promotion.succeed(FORMER.name, LEASE))["led"] is False
    await promotion.expect(THIRD.name, {})
    assert (await promotion.succeed(FORMER.name, LEASE))["led"] is False


class Elsewhere:
    """Another node's redis, which does not hear the first word; `missed` is called then."""

    def __init__(self, missed: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self.missed = missed
        self.follows: Endpoint | None = None

    async def role(self, _seconds: float) -> Role:
        self.asked += 1
        if self.asked <= 2:  # to be in touch, and then whether it is a replica
            if self.asked == 2:
                self.missed()
            raise NobodyThereError("ask", "redis", "it is busy")
        return Role.REPLICA

    async def follow(self, primary: Endpoint, _seconds: float) -> None:
        self.follows = primary


@contextlib.asynccontextmanager
async def promoted(given: Body, third: Elsewhere) -> AsyncIterator[tuple[Custody, Callable[[Redis], None]]]:
    """The second node's, whose redis has just been promoted; its predecessor's srd gives that, no sentinel is there.

    With it comes what its redis says from now on.
    """
    fleet, store, custody = Fleet(CONFIG, SECRETS), Store(boottime()), Custody()
    own = fleet.redises[SUCCESSOR.name]

    async def role(_seconds: float) -> Role:
        return Role.PRIMARY

    async def give(peer: str, topic: str, _body: Body, _seconds: float) -> Body:
        assert (peer, topic) == (FORMER.name, LEASE_TOPIC)
        return given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "role", role)
        fleet.redises = {SUCCESSOR.name: own, THIRD.name: third}  # type: ignore[dict-item]
        fleet.sentinels = {}
        says = store.writer("redis")
        says(primary_redis())
        made = Promotion(
            fleet,
            SUCCESSOR,
            store=store,
            custody=custody,
            ask_peer=give,
            look=lambda: None,
            observed=lambda _: None,
            judge=lambda: None,
        )
        task = asyncio.create_task(made.run())
        made.heard(CHOSEN)
        yield custody, says
        task.cancel()
        await asyncio.wait({task})


async def soon(question: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return question()

    await until(holds)


@pytest.mark.parametrize(
    ("seconds", "leads"), [(1.5, True), (WORTHWHILE_SECONDS - 0.1, False), (0.0, False)], ids=["long", "short", "none"]
)
async def test_a_lease_that_is_about_to_end_counts_as_none_but_its_giver_has_none_either(
    seconds: float, *, leads: bool
) -> None:
    async with promoted({"seconds": seconds, "assured": 4.0}, Elsewhere()) as (custody, _):
        await soon(lambda: custody.granted_by == FORMER.name)
        now = boottime()
        assert (custody.held_until(0.0, now, 1) > now) is leads
        assert custody.is_assured(now)


async def test_a_replica_that_does_not_hear_whom_to_follow_is_told_again() -> None:
    third = Elsewhere()
    async with promoted(LEASE, third):
        await soon(lambda: third.follows is not None)
    assert third.follows == endpoint_of(CONFIG, SUCCESSOR)


async def test_a_redis_that_is_no_primary_any_more_has_nobody_follow_it() -> None:
    third = Elsewhere()
    async with promoted(LEASE, third) as (_, says):
        third.missed = lambda: says(replica_redis())
        await soon(lambda: third.asked >= 2)
        await asyncio.sleep(2 * AGAIN_SECONDS)
    assert third.follows is None
