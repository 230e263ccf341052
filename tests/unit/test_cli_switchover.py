"""`srd switchover`, as a user runs it: what it asks of the daemon, when, and what it says."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.commandline import PATIENCE_SECONDS, srd, start
from support.situations import primary_situation

from srd.control.server import ControlServer

IN_EIGHT_DAYS = f"{dt.datetime.now().astimezone() + dt.timedelta(days=8):%Y-%m-%dT%H:%M}"
MOVED = {"from": "redis-1", "to": "redis-2", "gap_seconds": 0.0123, "seconds": 1.5, "named": True}


class Daemon:
    """Takes every wish to move the primary, and knows when each came."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[tuple[bool, float]] = []  # whether it was a dry run, and when, in Unix seconds

    async def move(self, words: Mapping[str, str]) -> dict[str, Any]:
        self.asked.append((words.get("dry_run") == "1", time.time()))
        return MOVED


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    found = Daemon(tmp_path)
    actions = {"/v1/switchover": found.move}
    server = ControlServer(tmp_path / "control.sock", primary_situation, version="0.1.0", actions=actions)
    await server.start()
    try:
        yield found
    finally:
        await server.stop()


async def test_the_gap_is_told_after_it_was_asked_whether_anything_speaks_against_it(daemon: Daemon) -> None:
    code, said, _ = await srd(daemon.directory, "switchover")
    assert (code, [dry for dry, _ in daemon.asked]) == (0, [True, False])
    assert said == (
        "nothing speaks against it: the primary moves from redis-1 to redis-2\n"
        "redis-2 is primary instead of redis-1: no write was taken for 12 ms (1.5 s in all)\n"
    )


async def test_a_moment_is_waited_for_and_what_speaks_against_it_is_asked_before_and_then(daemon: Daemon) -> None:
    moment = dt.datetime.now().astimezone().replace(microsecond=0) + dt.timedelta(seconds=4)
    code, said, _ = await srd(daemon.directory, "switchover", "--at", f"{moment:%Y-%m-%dT%H:%M:%S}")
    assert code == 0
    assert f"waiting until {moment:%Y-%m-%d %H:%M:%S}" in said
    assert [(dry, when >= moment.timestamp()) for dry, when in daemon.asked] == [
        (True, False), (True, True), (False, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        ("25:00", "is neither 23:30 nor 2026-01-31T23:30"),
        ("soon", "is neither 23:30 nor 2026-01-31T23:30"),
        ("2020-01-31T23:30", "is past, or more than a week from now"),
        (IN_EIGHT_DAYS, "is past, or more than a week from now"),
    ],
    ids=["no hour", "no time", "past", "in eight days"],
)
async def test_a_moment_that_cannot_be_waited_for_is_refused_and_nothing_is_asked(
    daemon: Daemon, moment: str, why: str
) -> None:
    code, _, said = await srd(daemon.directory, "switchover", "--at", moment)
    assert (code, daemon.asked) == (2, [])
    assert why in " ".join(said.split())


async def test_a_time_of_day_that_has_passed_is_tomorrows(daemon: Daemon) -> None:
    passed = dt.datetime.now().astimezone() - dt.timedelta(minutes=2)
    process = await start(daemon.directory, "switchover", "--at", f"{passed:%H:%M}")
    assert process.stdout is not None
    try:
        said = await asyncio.wait_for(process.stdout.readline(), PATIENCE_SECONDS)
    finally:
        process.kill()
        await process.communicate()
    assert said.decode() == f"waiting until {passed + dt.timedelta(days=1):%Y-%m-%d %H:%M}:00\n"
