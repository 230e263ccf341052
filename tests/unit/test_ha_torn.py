"""srd/ha/torn.py: when redis is told to write its append-only file anew."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from support.situations import NOW, primary_redis

from srd.ha.redis import LOG_FILE
from srd.ha.torn import FOUND_AGAIN_SECONDS, LONGEST_RETRY_SECONDS, RETRY_SECONDS, Torn
from srd.state import Redis

SOUND = primary_redis()
FULL = replace(SOUND, unsaved=LOG_FILE)
REWRITING = replace(SOUND, rewriting=True)
FAILED = replace(SOUND, rewritten=False)


def looks(*seen: Redis, seconds: float = 0.5) -> list[bool]:
    """Return at which of these looks, so far apart, it is due."""
    torn = Torn()
    due: list[bool] = []
    for number, one in enumerate(seen):
        now = NOW + number * seconds
        due.append(torn.is_due(one, now))
        if due[-1]:
            torn.told(now)
    return due


def test_a_file_that_was_always_written_to_is_left_alone() -> None:
    assert looks(SOUND, SOUND, REWRITING, FAILED) == [False] * 4


def test_it_is_written_anew_once_as_soon_as_it_can_be_written_to() -> None:
    assert looks(FULL, FULL, SOUND, REWRITING, SOUND, SOUND) == [False, False, True, False, False, False]


def test_each_time_the_disk_was_full() -> None:
    assert looks(FULL, SOUND, SOUND, FULL, SOUND) == [False, True, False, False, True]
    assert looks(FULL, SOUND, REWRITING, FULL, SOUND) == [False, True, False, False, True]


def test_a_rewrite_that_is_under_way_already_began_before() -> None:
    assert looks(FULL, REWRITING, SOUND) == [False, False, True]


def test_what_failed_is_tried_again_but_not_at_once_and_less_and_less_often() -> None:
    assert looks(FULL, SOUND, FAILED, FAILED) == [False, True, False, False]
    again = looks(FULL, SOUND, *[FAILED] * 400, seconds=RETRY_SECONDS)
    at = [number for number, due in enumerate(again) if due]
    assert at[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert {later - sooner for sooner, later in pairwise(at[7:])} == {LONGEST_RETRY_SECONDS / RETRY_SECONDS}


def test_what_redis_did_not_take_is_told_again_but_not_at_once() -> None:
    torn = Torn()
    assert not torn.is_due(FULL, NOW)
    assert torn.is_due(SOUND, NOW + 1)
    assert torn.is_due(SOUND, NOW + 2), "that the last rewrite succeeded says nothing of one that was never begun"
    torn.refused(NOW + 2)
    assert not torn.is_due(SOUND, NOW + 3)
    assert torn.is_due(SOUND, NOW + 2 + RETRY_SECONDS)


def test_a_redis_that_was_started_since_has_read_its_file() -> None:
    assert looks(FULL, replace(SOUND, run_id="another")) == [False, False]


def test_files_that_are_longer_than_redis_takes_them_to_be_are_written_anew_once_in_a_while() -> None:
    torn = Torn()
    for later, due in ((0.0, True), (1.0, False), (FOUND_AGAIN_SECONDS, True)):
        assert torn.found(SOUND.run_id, NOW + later) is due
        assert torn.is_due(SOUND, NOW + later) is due
        torn.told(NOW + later)
        assert not torn.is_due(SOUND, NOW + later + 0.5), "redis says that it is done"
