"""What a primary's srd gives to its successor when its redis has ended, and when it gives nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.situations import NOW, at, primary_redis, primary_situation

from srd.ha.bequest import Bequest
from srd.ha.custody import ASSURANCE_SECONDS, Custody
from srd.ha.losses import Losses
from srd.model import RefusedError, Role, Service
from srd.state import Child, ChildState, Lease, Situation

EPOCH = 3
NAMED = Lease(True, NOW + 1.5, 3, 3, at(1), EPOCH, settled=True)
LAPSED = replace(NAMED, held=False, expires=NOW - 0.1)


def ended(lease: Lease | None) -> Situation:
    """A primary whose redis has just ended."""
    s = primary_situation(lease=lease)
    return replace(s, view=replace(s.view, children={**s.view.children, Service.REDIS: Child(ChildState.BACKOFF)}))


def bequest(s: Situation, custody: Custody) -> Bequest:
    losses = Losses(at(1), view=lambda: s.view, clock=lambda: s.now)
    return Bequest(custody=custody, losses=losses, situation=lambda: s, judge=lambda: None)


def holder(until: float) -> Custody:
    custody = Custody()
    custody.held_until(until, NOW - 1, EPOCH)
    return custody


async def test_the_rest_of_the_lease_is_given() -> None:
    custody = holder(NOW + 1.5)
    words = await bequest(ended(NAMED), custody).answer("redis-2", {})
    assert words == {"seconds": pytest.approx(1.5), "assured": ASSURANCE_SECONDS}
    assert custody.held_until(NOW + 2, NOW, EPOCH) == 0.0


async def test_who_has_none_any_more_assures_one_node_that_it_takes_none() -> None:
    custody = holder(NOW - 0.1)
    will = bequest(ended(LAPSED), custody)
    assert await will.answer("redis-2", {}) == {"seconds": 0.0, "assured": ASSURANCE_SECONDS}
    assert custody.held_until(NOW + 2, NOW + 1, EPOCH) == 0.0
    with pytest.raises(RefusedError):
        await will.answer("redis-3", {})


@pytest.mark.parametrize(
    "lease",
    [None, replace(LAPSED, primary=None), replace(LAPSED, primary=at(3)), replace(LAPSED, settled=False)],
    ids=["nobody was asked yet", "no majority names anybody", "another one is named", "its predecessor may have one"],
)
async def test_no_assurance_is_given_where_another_one_may_have_a_lease(lease: Lease | None) -> None:
    custody = holder(NOW - 0.1)
    with pytest.raises(RefusedError):
        await bequest(ended(lease), custody).answer("redis-2", {})
    assert custody.held_until(NOW + 2, NOW, EPOCH) == NOW + 2


@pytest.mark.parametrize("redis", [None, primary_redis()], ids=["it has not answered yet", "it is primary"])
async def test_nothing_is_given_while_this_nodes_redis_may_be_primary(redis: object) -> None:
    s = primary_situation(lease=NAMED, redis=redis)
    with pytest.raises(RefusedError, match="may be primary itself"):
        await bequest(s, holder(NOW + 1.5)).answer("redis-2", {})
    replica = primary_situation(lease=NAMED, redis=primary_redis(role=Role.REPLICA))
    assert (await bequest(replica, holder(NOW + 1.5)).answer("redis-2", {}))["seconds"] > 0
