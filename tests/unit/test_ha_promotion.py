"""What the srd of a successor refuses to take over in a switchover; its redis is not told anything then."""

from __future__ import annotations

import pytest
from support.sentinels import SECRETS
from support.situations import config, replica_redis

from srd.ha.custody import Custody
from srd.ha.fleet import Fleet
from srd.ha.promotion import Promotion
from srd.model import Body, Role
from srd.reconcile import boottime
from srd.state import Redis, Store

CONFIG = config()
FORMER, SUCCESSOR, THIRD = CONFIG.redis_nodes
LEASE: Body = {"seconds": 1.0, "assured": 4.0}


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
