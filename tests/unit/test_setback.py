"""srd/setback.py: a sentinel whose clock has gone back is started anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.situations import NOW, WALL, primary_situation

from srd.model import Service
from srd.setback import SETBACK_SECONDS, Setback
from srd.state import Pause, Situation


def seen(set_back: float, asked: float = NOW - 0.2) -> Situation:
    s = primary_situation()
    answers = dict(s.view.sentinels)
    answers[s.node.name] = replace(answers[s.node.name], set_back=set_back, asked=asked)
    return primary_situation(sentinels=answers)


async def looks(*situations: Situation) -> list[Service]:
    """Return what was restarted."""
    restarted: list[Service] = []
    present = list(situations[:1])

    async def restart(service: Service) -> None:
        restarted.append(service)

    setback = Setback(lambda: present[-1], restart)
    for s in situations:
        present.append(s)
        await setback.look()
    return restarted


@pytest.mark.parametrize(
    ("seconds", "times"), [(0.0, 0), (SETBACK_SECONDS - 0.1, 0), (SETBACK_SECONDS, 1), (3600.0, 1)]
)
async def test_it_is_started_anew_where_it_would_wait_for_long(seconds: float, times: int) -> None:
    assert await looks(seen(seconds)) == [Service.SENTINEL] * times


async def test_what_the_former_one_has_said_does_not_count_against_the_next() -> None:
    assert await looks(seen(3600.0), seen(3600.0), seen(0.0, NOW + 1)) == [Service.SENTINEL]
    assert await looks(seen(3600.0), seen(3600.0, NOW + 1)) == [Service.SENTINEL] * 2


async def test_nothing_is_done_during_a_pause() -> None:
    s = seen(3600.0)
    assert await looks(replace(s, view=replace(s.view, pause=Pause(1, WALL + 60)))) == []


async def test_nothing_is_done_about_one_that_does_not_answer() -> None:
    assert await looks(primary_situation(sentinels={})) == []
