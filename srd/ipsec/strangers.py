"""Whoever connects to the keying port from an address that is no peer's: a client that joins, or anybody.

They get a handshake, but never the places of peers: each IPv4 address, and each /64 of IPv6 (one host may have all of
it), has one place, and keeps it for a second at least, so that outsiders cost this node less than a tenth of a CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address, ip_network
from typing import Final

import structlog

log = structlog.get_logger(__name__)

MAX_STRANGERS: Final = 64
# For the handshake: a client on a slow machine needs half a second.
STRANGER_SECONDS: Final = 5.0
STRANGER_PAUSE_SECONDS: Final = 1.0
MAX_GRIEVANCES: Final = 1024


class Strangers:
    """Who has a place, and who was not let in; `count` is told how many that are so far."""

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count
        self._refusals = 0
        self._places: set[str] = set()
        self._grievances: dict[str, str] = {}  # by address, why the last connection was refused

    def enter(self, address: str) -> bool:
        """Take a place, if there is one; who takes it must use `placed`."""
        place = _place_of(address)
        if place in self._places or len(self._places) >= MAX_STRANGERS:
            self._refuse()
            return False
        self._places.add(place)
        return True

    @contextlib.asynccontextmanager
    async def placed(self, address: str) -> AsyncIterator[None]:
        """Give the place free a while after the block."""
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(STRANGER_PAUSE_SECONDS, self._places.discard, _place_of(address))

    def turn_away(self, address: str, reason: str) -> None:
        """Count who was not let in, and say it once: a client that is revoked, say, goes on trying."""
        self._refuse()
        if self._grievances.get(address) != reason:
            log.warning("keying connection refused", address=address, error=reason)
            if len(self._grievances) >= MAX_GRIEVANCES:
                self._grievances.clear()
            self._grievances[address] = reason

    def _refuse(self) -> None:
        self._refusals += 1
        self._count(self._refusals)


def _place_of(address: str) -> str:
    """Return what stands for all addresses that one host may have."""
    found = ip_address(address)
    return address if found.version == 4 else str(ip_network((found, 64), strict=False))  # noqa: PLR2004 - IP version
