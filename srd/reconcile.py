"""The loop that keeps something true, the keyed difference it works from, and the one retry policy.

A loop observes its whole world, compares it with what is wanted and applies the difference. Events never carry a
change: they only wake the loop. A pass over a world that is as wanted changes nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import structlog
import tenacity

from srd.model import SrdError

log = structlog.get_logger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

BACKOFF_FIRST_SECONDS: Final = 0.1
BACKOFF_CAP_SECONDS: Final = 30.0
BACKOFF_JITTER: Final = 0.2
# 0.1 s doubled nine times is past the cap; a larger exponent would only overflow.
_BACKOFF_MAX_DOUBLINGS: Final = 9


def boottime() -> float:
    """Return seconds on CLOCK_BOOTTIME: never stepped, and it goes on counting while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def backoff_seconds(failures: int, jitter: float) -> float:
    """Return the pause after that many failures in a row: 0.1 s doubled each time, at most 30 s.

    `jitter` is in [-1, 1] and moves the pause by up to 20 %, so that nodes do not act in step.
    """
    if failures <= 0:
        return 0.0
    pause = BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, _BACKOFF_MAX_DOUBLINGS)
    return min(pause, BACKOFF_CAP_SECONDS) * (1 + BACKOFF_JITTER * jitter)


@dataclass(frozen=True, slots=True)
class Diff(Generic[K, V]):
    """What separates the world from what is wanted: apply `add` and `change` before `remove`."""

    add: Mapping[K, V]
    change: Mapping[K, V]
    remove: frozenset[K]

    def __bool__(self) -> bool:
        return bool(self.add or self.change or self.remove)


def diff(wanted: Mapping[K, V], observed: Mapping[K, V]) -> Diff[K, V]:
    """Compare by key, then by equality; `change` holds the wanted value."""
    return Diff(
        add={key: value for key, value in wanted.items() if key not in observed},
        change={key: value for key, value in wanted.items() if key in observed and observed[key] != value},
        remove=frozenset(key for key in observed if key not in wanted),
    )


def persistently(
    *exceptions: type[SrdError],
    note: Callable[[BaseException], None],
    cap: float = BACKOFF_CAP_SECONDS,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tenacity.AsyncRetrying:
    """Return the one retry policy: the named errors only, pauses as `backoff_seconds`, until it works or is cancelled.

    `note` is told of each failure, so that none goes uncounted. `cap` seconds bound the pause, and `sleep` may end it.
    """

    def wait(state: tenacity.RetryCallState) -> float:
        return min(cap, backoff_seconds(state.attempt_number, random.uniform(-1, 1)))  # noqa: S311 - jitter

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            note(error)

    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(exceptions), wait=wait, before_sleep=tell, sleep=sleep
    )


def _log_failure(sentence: str, detail: BaseException | None) -> None:
    log.warning("failed", error=sentence, exc_info=detail)


async def contained(
    what: str,
    body: Callable[[], Awaitable[object]],
    *,
    log_failure: Callable[[str, BaseException | None], None] = _log_failure,
) -> str | None:
    """Run `body`; return None, or how it failed in one sentence. A defect in one part must not end the others.

    `log_failure` gets the sentence, and the exception where a person needs to see its trace. Cancellation passes.
    """
    try:
        await body()
    except SrdError as error:
        log_failure(str(error), None)
        return str(error)
    except Exception as error:  # noqa: BLE001 - the one place where everything is caught
        sentence = f"{what} failed unexpectedly: {type(error).__name__}"
        log_failure(sentence, error)
        return sentence
    return None


class Loop:
    """Runs one reconciler: when woken, at least every `resync` seconds, each pass bounded by `timeout` seconds.

    `resync` may be asked for after each pass: how long can nothing be due that nobody wakes the loop for?
    """

    def __init__(
        self,
        name: str,
        reconcile: Callable[[], Awaitable[None]],
        *,
        resync: float | Callable[[], float],
        timeout: float,
    ) -> None:
        self.name = name
        self._reconcile = reconcile
        self._resync = resync if callable(resync) else lambda: resync
        self._timeout = timeout
        self._wake = asyncio.Event()
        self._first_pass = asyncio.Event()
        self.failures = 0
        self.last_tick = boottime()
        self.last_error: str | None = None

    def wake(self) -> None:
        """Ask for a pass soon; any number of calls before it starts are one."""
        self._wake.set()

    async def ready(self) -> None:
        """Return when one pass has succeeded."""
        await self._first_pass.wait()

    async def run(self) -> None:
        """Reconcile until cancelled. No failure of a pass ends the loop: it is shown, and tried again later."""
        while True:
            self._wake.clear()
            await self._pass()
            pause = self._resync()
            if self.failures:
                pause = min(pause, backoff_seconds(self.failures, random.uniform(-1, 1)))  # noqa: S311 - jitter
            # By the same event, and not by a time-out: one that expires costs twice as much, dozens of times a second.
            due = asyncio.get_running_loop().call_later(pause, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                due.cancel()

    async def _pass(self) -> None:
        failure = await contained(self.name, self._bounded, log_failure=self._failed)
        if failure is None:
            if self.failures:
                log.info("recovered", loop=self.name, failures=self.failures)
            self.failures = 0
            self.last_error = None
            self._first_pass.set()
        self.last_tick = boottime()

    async def _bounded(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._reconcile()
        except TimeoutError as error:
            raise SrdError("finish", self.name, f"it took longer than {self._timeout:g} s") from error

    def _failed(self, sentence: str, detail: BaseException | None) -> None:
        # The same error again and again is one line, at its first occurrence.
        if sentence != self.last_error:
            log.warning("pass failed", loop=self.name, error=sentence, exc_info=detail)
        self.failures += 1
        self.last_error = sentence


async def to_its_end(step: Coroutine[Any, Any, V]) -> V:
    """Await what must not be left half done, and has a bound of its own: a cancellation is passed on when it ends."""
    task = asyncio.create_task(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen: nobody else will ask for it
        raise cancelled
    return task.result()


async def until_first(*bodies: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the bodies side by side until the first one ends; cancel the others, await them, and raise its error if any.

    Not a TaskGroup: before Python 3.13 one whose child fails while it is being cancelled swallows the cancellation
    (python/cpython#116720), and a connection that breaks just as srd stops is exactly that.
    """
    tasks = [asyncio.create_task(body()) for body in bodies]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    failures = [task.exception() for task in tasks if not task.cancelled() and task.exception() is not None]
    if failures and failures[0] is not None:
        raise failures[0]
