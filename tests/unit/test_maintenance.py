"""What a person has asked for is kept on disk, and known again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import click
import pytest
from support.clusters import paths_of
from support.situations import WALL, primary_situation

from srd.cli.maintenance import pause_command
from srd.ha.promotion import AskPeer
from srd.maintenance import DRAINED_NAME, PAUSE_NAME, PAUSE_TOPIC, Maintenance
from srd.model import CLOCK_TOLERANCE_SECONDS, LONGEST_PAUSE_SECONDS, Body, Pause, RefusedError, SrdError
from srd.reconcile import boottime
from srd.state import Situation, Store


async def nobody(peer: str, topic: str, _body: Body, _seconds: float) -> Body:
    raise RefusedError("ask about", topic, f"{peer} is not there")


def started(root: Path, ask_peer: AskPeer = nobody) -> tuple[Maintenance, Store]:
    """Start one as each srd does, over the same directory."""
    store = Store(boottime())
    return Maintenance(paths_of(root, "n1"), store, ask_peer), store


async def test_a_node_stays_drained_over_restarts_until_that_is_ended(tmp_path: Path) -> None:
    first, store = started(tmp_path)
    assert not store.view().drained
    for _ in range(2):
        await first.drain()
        assert store.view().drained
    second, store = started(tmp_path)
    assert store.view().drained
    for _ in range(2):
        await second.undrain()
        assert not store.view().drained
    assert not started(tmp_path)[1].view().drained


async def test_what_cannot_be_written_down_is_not_done(tmp_path: Path) -> None:
    maintenance, store = started(tmp_path)
    (paths_of(tmp_path, "n1").state_dir / DRAINED_NAME / "in the way").mkdir(parents=True)
    with pytest.raises(SrdError, match="cannot write"):
        await maintenance.drain()
    assert not store.view().drained


def saying(situation: Situation, **said: Pause) -> Situation:
    """Return a situation in which these peers say this of a pause."""
    reports = situation.view.peers
    peers = {name: replace(reports[name], pause=said.get(name.replace("-", "_"), Pause())) for name in reports}
    return replace(situation, view=replace(situation.view, peers=peers))


async def test_a_pause_is_told_to_every_other_voter_and_kept_over_a_restart(tmp_path: Path) -> None:
    told: list[tuple[str, str, Body]] = []

    async def ask(peer: str, topic: str, body: Body, _seconds: float) -> Body:
        told.append((peer, topic, body))
        if peer == "redis-3":
            raise RefusedError("ask", peer, "it is not connected")
        return {}

    s = primary_situation()
    maintenance, store = started(tmp_path, ask)
    assert await maintenance.pause(3600, s) == {"redis-2": None, "redis-3": "it is not connected"}
    paused = store.view().pause
    assert paused == Pause(int(WALL), WALL + 3600)
    assert [(peer, topic) for peer, topic, _ in told] == [("redis-2", PAUSE_TOPIC), ("redis-3", PAUSE_TOPIC)]
    assert all(body == {"number": paused.number, "until": paused.until} for _, _, body in told)
    maintenance, store = started(tmp_path, ask)
    assert store.view().pause == paused
    await maintenance.pause(0, s)
    assert store.view().pause == Pause(paused.number + 1, 0.0), "in the same second, or with a clock that is behind"
    assert started(tmp_path)[1].view().pause == store.view().pause


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        (Pause(8, WALL + 60), True),
        (Pause(7, WALL + 61), True),  # said in the same second on two nodes: the longer one, everywhere
        (Pause(8, 0.0), True),
        (Pause(7, WALL + 60), False),
        (Pause(6, WALL + 90), False),
        (Pause(9, WALL + LONGEST_PAUSE_SECONDS + CLOCK_TOLERANCE_SECONDS + 1), False),
        (Pause(9, math.inf), False),
        (Pause(9, math.nan), False),
    ],
)
async def test_of_two_wishes_the_later_counts(tmp_path: Path, said: Pause, believed: bool) -> None:  # noqa: FBT001 - a table
    maintenance, store = started(tmp_path)
    known = Pause(7, WALL + 60)
    for _ in range(2):
        await maintenance.learn(saying(primary_situation(), redis_2=known))
    assert store.view().pause == known
    await maintenance.learn(saying(primary_situation(), redis_2=known, redis_3=said))
    assert store.view().pause == (said if believed else known)


async def test_a_pause_that_is_told_is_taken_over_and_what_is_none_is_refused(tmp_path: Path) -> None:
    maintenance, store = started(tmp_path)
    assert await maintenance.told({"number": 8, "until": WALL + 60}, primary_situation()) == {}
    assert store.view().pause == Pause(8, WALL + 60)
    with pytest.raises(RefusedError, match="cannot understand pause"):
        await maintenance.told({"until": "for ever"}, primary_situation())


async def test_a_damaged_file_is_no_pause(tmp_path: Path) -> None:
    file = paths_of(tmp_path, "n1").state_dir / PAUSE_NAME
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert started(tmp_path)[1].view().pause == Pause()


@pytest.mark.parametrize(
    ("until", "holds"),
    [
        (0.0, False),
        (WALL - 1, False),
        (WALL, False),
        (WALL + 1, True),
        (WALL + LONGEST_PAUSE_SECONDS, True),
        (2 * WALL, False),
    ],
)
def test_a_pause_ends_by_itself_and_is_never_longer_than_any(until: float, holds: bool) -> None:  # noqa: FBT001 - a table
    assert primary_situation(pause=Pause(1, until)).paused is holds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("4h", 14400), ("2d", 172800), ("7d", LONGEST_PAUSE_SECONDS)]
)
def test_how_long_a_pause_is_to_be_is_said_as_people_say_it(text: str, seconds: float) -> None:
    assert pause_command.make_context("pause", ["--for", text]).params["seconds"] == seconds


def test_a_pause_is_a_day_if_nobody_says_otherwise() -> None:
    assert pause_command.make_context("pause", []).params["seconds"] == 86400


@pytest.mark.parametrize("text", ["", "0h", "4", "h", "-1h", "1.5h", "8d", "604801s", "4 h", "999999999d"])
def test_what_is_no_time_or_too_long_is_a_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a time such as 30m"):
        pause_command.make_context("pause", ["--for", text])
