"""Waiting in tests: for a condition that real programs bring about, never for longer than was said."""

from __future__ import annotations

import tenacity

from srd.model import SrdError


def retrying(*exceptions: type[SrdError], seconds: float) -> tenacity.AsyncRetrying:
    """Try again while the named errors come, with growing pauses, for at most `seconds`; then the error."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(exceptions),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )
