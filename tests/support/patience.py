"""Waiting in tests: for a condition that real programs bring about, never for longer than was said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import tenacity

from srd.model import SrdError

PATIENCE_SECONDS: Final = 120.0


def retrying(*exceptions: type[SrdError], seconds: float) -> tenacity.AsyncRetrying:
    """Try again while the named errors come, with growing pauses, for at most `seconds`; then the error."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(exceptions),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )


def wait(what: Callable[[], str], seconds: float = PATIENCE_SECONDS, between: float = 0.2) -> None:
    """Wait until there is nothing to say that is not as it should be; fail with it otherwise."""
    deadline = time.monotonic() + seconds
    while reason := what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {reason}"
        time.sleep(between)
