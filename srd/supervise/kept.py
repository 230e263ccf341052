"""A copy of what redis has on disk, from before it follows another primary. It may hold what no other node has.

A replica that cannot resume its primary's stream is sent the whole data set, and its own files are replaced: writes
that only a dead or cut-off primary had taken would be gone. The copy is made of hard links: it takes no time, and no
room until redis replaces the files. The file that redis still appends to grows in the copy, too, until then.

Everything here blocks, and is done with the rights of redis' account.
"""

from __future__ import annotations

import calendar
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from srd.supervise.inventory import files_in

DIRECTORY: Final = "kept"
# Each may come to be as large as the data set. The second is for one that is made soon after the one that mattered.
COPIES: Final = 2
_NAME: Final = "%Y%m%dT%H%M%SZ"


def keep(data: Path, wall_clock: float) -> Path | None:
    """Link the files of a redis' data directory into a directory of their own; return it, None if there are none.

    Raises `OSError`. Older copies than the last `COPIES` are removed, and so is what an interrupted attempt has left.
    As long as redis has the very files of the last copy, that is the copy: a redis that is started again and again
    pushes none out. A copy's name is a time, later than that of the one before, whatever the clock says.
    """
    files = files_in(data)
    if not files:
        return None
    last = latest(data)
    if last is not None and _inodes(files, data) == _inodes(last.rglob("*"), last):
        return last
    copies = data / DIRECTORY
    later = (_time_of(last) or 0) + 1 if last is not None else 0
    copy = copies / time.strftime(_NAME, time.gmtime(max(wall_clock, later)))
    unfinished = copies / ".unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    for path in files:
        target = unfinished / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    unfinished.rename(copy)
    for old in _copies(data)[:-COPIES]:
        shutil.rmtree(old)
    return copy


def latest(data: Path) -> Path | None:
    """Return the last copy, None if there is none. Raises `OSError`."""
    return next(reversed(_copies(data)), None)


def _inodes(paths: Iterable[Path], root: Path) -> dict[Path, int]:
    return {path.relative_to(root): path.stat().st_ino for path in paths if path.is_file()}


def _copies(data: Path) -> list[Path]:
    """Return the copies, the oldest first: their names are times. What has another name is somebody else's."""
    return sorted(path for path in data.glob(f"{DIRECTORY}/*") if _time_of(path) is not None)


def _time_of(copy: Path) -> int | None:
    """Return when a copy was made, in seconds of the wall clock, by its name; None if that is no copy's."""
    try:
        return calendar.timegm(time.strptime(copy.name, _NAME))
    except ValueError:
        return None
