"""What a person has asked for while a node, or the cluster, is worked on. Kept in the state directory.

A drained node takes nobody new: :8080 and :8081 say so, and its redis tells the sentinels that it is never to be
primary. That holds until a person ends it, over restarts of srd and of the machine.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

import structlog

from srd.model import Paths
from srd.state import Store
from srd.supervise.files import TRAVERSABLE_DIRECTORY, make_own_directory, remove_own, write_private

log = structlog.get_logger(__name__)

DRAINED_NAME: Final = "drained"  # there while this node is


class Maintenance:
    """Keeps `drained` of the view true to what was asked for."""

    def __init__(self, paths: Paths, store: Store) -> None:
        self._directory = paths.state_dir
        self._marker = paths.state_dir / DRAINED_NAME
        self._write_drained = store.writer("drained")
        self._write_drained(os.path.exists(self._marker))  # noqa: PTH110 - Path.exists raises where it may not look

    async def drain(self) -> None:
        """Have this node drained, on disk before anybody is told; `SrdError` when it cannot be written down."""
        await asyncio.to_thread(make_own_directory, self._directory, TRAVERSABLE_DIRECTORY)
        await asyncio.to_thread(write_private, self._marker, b"")
        self._write_drained(True)
        log.warning("drained")

    async def undrain(self) -> None:
        """End that."""
        await asyncio.to_thread(remove_own, self._marker)
        self._write_drained(False)
        log.info("not drained any more")
