"""The loop, the difference, the pauses."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import structlog.testing
from hypothesis import given
from hypothesis import strategies as st

from srd.model import SrdError
from srd.reconcile import (
    BACKOFF_CAP_SECONDS,
    BACKOFF_JITTER,
    Loop,
    backoff_seconds,
    contained,
    diff,
    persistently,
    until_first,
)

TABLES = st.dictionaries(st.integers(0, 5), st.integers(0, 3))


@given(TABLES, TABLES)
def test_applying_the_difference_gives_what_is_wanted(wanted: dict[int, int], observed: dict[int, int]) -> None:
    found = diff(wanted, observed)
    after = {**observed, **found.add, **found.change}
    for key in found.remove:
        del after[key]
    assert after == wanted
    assert bool(found) is (wanted != observed)
    assert not found.add.keys() & observed.keys()


@given(st.integers(0, 10_000), st.floats(-1, 1))
def test_a_pause_never_passes_the_cap(failures: int, jitter: float) -> None:
    assert 0 <= backoff_seconds(failures, jitter) <= BACKOFF_CAP_SECONDS * (1 + BACKOFF_JITTER)


def test_pauses_double() -> None:
    assert [round(backoff_seconds(n, 0), 3) for n in range(5)] == [0, 0.1, 0.2, 0.4, 0.8]


def broken(error: Exception, times: int | None = None):  # noqa: ANN201 - a coroutine function
    """Return a pass that fails so many times, or always, and the list of its runs."""
    runs: list[None] = []

    async def body() -> None:
        runs.append(None)
        if times is None or len(runs) <= times:
            raise error

    return body, runs


@pytest.mark.parametrize("error", [SrdError("do", "it", "no"), ValueError("a defect")])
async def test_a_failing_pass_is_tried_again_and_said_once(error: Exception) -> None:
    body, runs = broken(error, times=3)
    loop = Loop("test", body, resync=30, timeout=5)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(loop.run())
        await asyncio.wait_for(loop.ready(), 10)
        task.cancel()
        await asyncio.wait([task])
    assert len(runs) == 4
    assert [entry["event"] for entry in logs] == ["pass failed", "recovered"]
    assert loop.failures == 0


async def test_a_pass_that_hangs_is_ended() -> None:
    runs = itertools.count()

    async def hangs_once() -> None:
        if next(runs) == 0:
            await asyncio.Event().wait()

    loop = Loop("test", hangs_once, resync=30, timeout=0.01)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(loop.run())
        await asyncio.wait_for(loop.ready(), 10)
        task.cancel()
        await asyncio.wait([task])
    assert logs[0]["error"] == "cannot finish test: it took longer than 0.01 s"


async def test_many_wakes_are_one_pass() -> None:
    passes = itertools.count()
    seen = asyncio.Queue[int]()

    async def body() -> None:
        seen.put_nowait(next(passes))

    loop = Loop("test", body, resync=30, timeout=5)
    task = asyncio.create_task(loop.run())
    await asyncio.wait_for(seen.get(), 5)
    for _ in range(10):
        loop.wake()
    assert await asyncio.wait_for(seen.get(), 5) == 1
    await asyncio.sleep(0)
    assert seen.empty()
    task.cancel()
    await asyncio.wait([task])


async def test_the_first_to_end_ends_the_others() -> None:
    cancelled = asyncio.Event()

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await until_first(lasting, lambda: asyncio.sleep(0))
    assert cancelled.is_set()


async def test_the_first_error_is_raised() -> None:
    body, _ = broken(SrdError("do", "it", "no"))
    with pytest.raises(SrdError, match="cannot do it: no"):
        await until_first(body, lambda: asyncio.sleep(60))


async def test_cancellation_passes_even_while_a_body_fails() -> None:
    """On Python 3.11 a TaskGroup would swallow it here."""

    async def fails_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise SrdError("stop", "", "broken") from None

    task = asyncio.create_task(until_first(fails_when_cancelled, lambda: asyncio.sleep(60)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_what_is_contained_says_how_it_failed() -> None:
    body, _ = broken(ZeroDivisionError())
    assert await contained("the test", body) == "the test failed unexpectedly: ZeroDivisionError"
    assert await contained("the test", lambda: asyncio.sleep(0)) is None


async def test_a_retry_names_what_it_catches_and_counts_each_failure() -> None:
    failures: list[BaseException] = []
    body, runs = broken(SrdError("do", "it", "no"), times=2)
    await persistently(SrdError, note=failures.append)(body)
    assert (len(runs), len(failures)) == (3, 2)


async def test_a_retry_lets_any_other_error_through() -> None:
    body, runs = broken(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await persistently(SrdError, note=lambda _: None)(body)
    assert len(runs) == 1
