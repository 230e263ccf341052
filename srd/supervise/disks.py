"""Whether what srd and its children write to can be written to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from srd.model import Paths
from srd.state import DiskTrouble

# An almost empty append-only file is rewritten at 64 MB, and what the logs grow in a week is about this much. What the
# file system keeps for root does not count: redis is not root.
LEAST_FREE_BYTES: Final = 16 * 1024 * 1024


class Disks:
    """Looks at the directories of a node; `write` gets each that is in trouble, with what it is.

    `mended` is called when one has left the list.
    """

    def __init__(
        self, paths: Paths, write: Callable[[dict[str, DiskTrouble]], None], mended: Callable[[], None]
    ) -> None:
        self._directories = (paths.state_dir, paths.log_dir, paths.run_dir)
        self._write = write
        self._mended = mended
        self._before: frozenset[str] = frozenset()

    async def reconcile(self) -> None:
        """Look once."""
        looked = await asyncio.to_thread(lambda: {str(path): trouble(path) for path in self._directories})
        found = {path: what for path, what in looked.items() if what is not None}
        self._write(found)
        if self._before - found.keys():
            self._mended()
        self._before = frozenset(found)


def trouble(directory: Path) -> DiskTrouble | None:
    """Say what is wrong with the file system of a directory; None when it takes what is written to it. Blocks."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return DiskTrouble.GONE
    if found.f_flag & os.ST_RDONLY:
        return DiskTrouble.READ_ONLY
    if found.f_bavail * found.f_frsize < LEAST_FREE_BYTES:
        return DiskTrouble.FULL
    if found.f_files and not found.f_favail:
        return DiskTrouble.NO_INODES
    return None
