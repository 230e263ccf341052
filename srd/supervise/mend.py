"""What is done to redis' files before it starts. No redis may run in that directory.

* Redis cuts off a command that is not complete (aof-load-truncated), but not zeros behind it, which a file system shows
  where it noted the new length of a file and had not written its last block before a power cut (measured with 7.0.15:
  `Bad file format reading the append only file`, for ever). They are cut off: nothing goes that redis would have
  loaded (inventory.py says why). But not where a later file has commands: redis would go on with those, and what is
  missing between would be missing for good. It refuses such files, and another node's are better (unreadable.py).
* A redis that is killed while it writes a file leaves that behind, under a name that no other redis takes: up to a data
  set each time, until the disk is full (measured with 7.0.15). Such files are removed.

Everything here blocks, and is done with the rights of redis' account. Raises `OSError`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from srd.supervise.inventory import APPEND_ONLY, logs_of, size_without_zeros

# rdb.c, rdbSaveBackground; replication.c, syncWithMaster; aof.c, rewriteAppendOnlyFile and TEMP_FILE_NAME_PREFIX.
_UNFINISHED: Final = ("temp-*.rdb", "temp-rewriteaof-*.aof", f"{APPEND_ONLY}/temp-*")


def cut_off_zeros(data: Path) -> int:
    """Cut the zeros off the end of the append-only files, taken together; return how many there were."""
    cut = 0
    for log in reversed(logs_of(data)):
        size, content = (log.stat().st_size, size_without_zeros(log)) if log.exists() else (0, 0)
        if content < size:
            os.truncate(log, content)
            cut += size - content
        if content > 0:
            break
    return cut


def remove_unfinished(data: Path) -> list[str]:
    """Remove the files that a killed redis was writing; return their names."""
    found = sorted(path for pattern in _UNFINISHED for path in data.glob(pattern) if path.is_file())
    for path in found:
        path.unlink()
    return [str(path.relative_to(data)) for path in found]
