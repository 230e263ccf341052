"""When a sentinel may be rebuilt or reset, by what all of them say, and what is said where it may not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.accounts import CONFIG, IDS, account, listed, look
from support.situations import at, primary_redis

from srd.ha.doctor import Look
from srd.ha.repairable import monitors_beside, require_sound, require_spare, require_whole
from srd.model import RefusedError, Role

FIRST, SECOND, THIRD = (CONFIG.node(name) for name in IDS)
ELSEWHERE = account(3, primary=str(at(9)), epoch=2)
NOWHERE = account(3, primary=None)
TWIN = account(3, run_id=IDS["redis-2"])


def test_in_a_whole_cluster_each_may_be_touched() -> None:
    require_sound(CONFIG, look())
    for node in (FIRST, SECOND, THIRD):
        require_spare(CONFIG, look(), node)
        require_whole(CONFIG, look(), node)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (look(silent=("redis-2", "redis-3")), "1 of 3"),
        (look(account(1, flags=frozenset({"master", "o_down"}))), "redis-1 and others take the primary for down"),
        (look(account(1, primary=str(at(2))), ELSEWHERE), "no majority of them monitors the same"),
        (look(redis=None), "does not answer as primary"),
        (look(redis=primary_redis(role=Role.REPLICA)), "does not answer as primary"),
    ],
    ids=["no majority answers", "it is taken for down", "each another one", "it does not answer", "it is no primary"],
)
def test_nothing_is_touched_unless_a_majority_monitors_one_primary_that_is_well(seen: Look, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        require_sound(CONFIG, seen)


@pytest.mark.parametrize("seen", [look(ELSEWHERE), look(NOWHERE), look(TWIN)], ids=["elsewhere", "nowhere", "twin"])
def test_who_is_in_disorder_may_be_rebuilt_where_the_others_are_a_majority_without_it(seen: Look) -> None:
    require_spare(CONFIG, seen, THIRD)
    with pytest.raises(RefusedError, match="no majority would answer and monitor"):
        require_spare(CONFIG, replace(seen, accounts={**seen.accounts, "redis-2": account(2, primary=None)}), THIRD)


def test_none_is_rebuilt_while_another_of_those_that_stay_is_in_disorder() -> None:
    doubtful = account(2, flags=frozenset({"master", "s_down"}))
    with pytest.raises(RefusedError, match="first mend that of redis-2"):
        require_spare(CONFIG, look(ELSEWHERE, doubtful), THIRD)
    require_spare(CONFIG, look(account(3, flags=doubtful.flags)), THIRD)


def test_of_two_with_one_id_only_one_counts() -> None:
    assert [each.node for each in monitors_beside(CONFIG, look(TWIN), FIRST)] == ["redis-2"]
    assert [each.node for each in monitors_beside(CONFIG, look(TWIN), THIRD)] == ["redis-1", "redis-2"]


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (look(silent=("redis-3",)), "redis-3 does not answer"),
        (look(ELSEWHERE), "first mend that of redis-3"),
        (look(account(3, settings={**account(3).settings, "quorum": "1"})), "redis-3: quorum is 1"),
        (look(account(3, sentinels=(listed(1),))), "redis-3: it does not know the sentinel of redis-2"),
        (look(account(3, replicas=(str(at(2)),))), "the sentinel of redis-3 does not list the replica redis-3"),
        (look(redis=primary_redis(replicas=())), "redis-2 does not follow the primary"),
    ],
    ids=[
        "one is silent",
        "disorder",
        "a quorum",
        "a sentinel that is not listed",
        "a replica that is not",
        "nobody follows",
    ],
)
def test_none_is_reset_that_could_not_find_everybody_again(seen: Look, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        require_whole(CONFIG, seen, SECOND)
