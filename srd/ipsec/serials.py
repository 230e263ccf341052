"""By which certificates the keys in the kernel were made: a file that lives as long as they do, until the next boot.

A revoked certificate must put its holder out even if srd was away meanwhile, on either side: the SAs go on without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import structlog

log = structlog.get_logger(__name__)

FILE_NAME: Final = "keyed-by.json"


class SerialsFile:
    """A JSON object, peer -> serial number in hexadecimal, on the file system of /run: a write takes no disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        try:
            self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # not UTF-8 is a ValueError, too
            log.warning("nobody knows by which certificates the keys were made", reason=str(error))

    def of(self, peer: str) -> int | None:
        """Return the serial number of the certificate by which the peer's keys were made, None if nobody knows."""
        text = self._known.get(peer)
        return int(text, 16) if text is not None else None

    def note(self, peer: str, serial: int) -> None:
        """Remember it, if it is another than before."""
        if self._known.get(peer) == f"{serial:x}":
            return
        self._known[peer] = f"{serial:x}"
        beside = self._path.with_suffix(".new")
        try:
            beside.write_bytes(msgspec.json.encode(self._known))
            beside.replace(self._path)
        except OSError as error:
            log.warning("cannot remember by which certificate keys were made", peer=peer, reason=error.strerror)
