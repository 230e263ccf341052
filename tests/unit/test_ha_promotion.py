"""What is taken over in a switchover: the former primary's lease, by what its srd says or is asked for."""

from __future__ import annotations

import asyncio

import pytest
from support.sentinels import SECRETS
from support.situations import config

from srd.ha.custody import Custody
from srd.ha.fleet import Fleet
from srd.ha.promotion import LEASE_TOPIC, Promotion
from srd.model import Body
from srd.reconcile import boottime
from srd.state import Store

CONFIG = config()
FORMER, SUCCESSOR = CONFIG.redis_nodes[:2]


class Succession:
    """The second node's srd, which is about to succeed the first; the first gives for a second whenever it is asked."""

    def __init__(self) -> None:
        self.custody = Custody()
        self.asked: list[str] = []
        self.promotion = Promotion(
            Fleet(CONFIG, SECRETS),
            SUCCESSOR,
            store=Store(boottime()),
            custody=self.custody,
            ask_peer=self._ask,
            look=lambda: None,
            judge=lambda: None,
        )

    async def _ask(self, peer: str, topic: str, _body: Body, _seconds: float) -> Body:
        assert (peer, topic) == (FORMER.name, LEASE_TOPIC)
        self.asked.append(peer)
        return {"seconds": 1.0}


@pytest.fixture
def succession(monkeypatch: pytest.MonkeyPatch) -> Succession:
    monkeypatch.setattr("srd.ha.promotion.LEADING_SECONDS", 0.01)
    return Succession()


async def test_what_is_given_counts_from_when_it_was_expected(succession: Succession) -> None:
    await succession.promotion.expect(FORMER.name, {})
    expected = boottime()
    await asyncio.sleep(0.02)  # its lease was renewed: longer than a lease from then on, and no longer from now on
    await succession.promotion.succeed(FORMER.name, {"seconds": CONFIG.primary_lease + 0.01, "assured": 4.0})
    assert succession.asked == []
    assert 0 <= expected + CONFIG.primary_lease + 0.01 - succession.custody.granted_until < 0.01
    assert succession.custody.is_assured(expected + 3.9)


@pytest.mark.parametrize(
    "body",
    [{}, {"seconds": 60.0}, {"seconds": -1.0}, {"seconds": "2"}, {"seconds": 1.0, "assured": "for ever"}],
    ids=["nothing", "more than a lease", "ended", "text", "no number"],
)
async def test_what_is_of_no_use_is_asked_for(succession: Succession, body: Body) -> None:
    await succession.promotion.expect(FORMER.name, {})
    await succession.promotion.succeed(FORMER.name, body)
    assert succession.asked == [FORMER.name]
    assert succession.custody.held_until(0.0, boottime(), 0) > boottime()


async def test_who_was_not_expected_is_asked(succession: Succession) -> None:
    await succession.promotion.expect("redis-3", {})
    await succession.promotion.succeed(FORMER.name, {"seconds": 1.0})
    assert succession.asked == [FORMER.name]
    await succession.promotion.succeed(FORMER.name, {"seconds": 1.0})
    assert succession.asked == [FORMER.name] * 2, "an expectation is of one switchover"
