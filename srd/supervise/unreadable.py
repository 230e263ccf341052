"""An append-only file that redis refuses to read: it would never start again.

What a power cut leaves is mended. Redis cuts off a command that is not complete (aof-load-truncated), but not zeros
behind the last one, which a file system shows where it noted the new length of a file and had not written its last
block yet (measured with 7.0.15: `Bad file format reading the append only file`, for ever). They are cut off before
redis starts: nothing goes that redis would have loaded (inventory.py says why).

What is damaged in another way goes, all but a copy, on a node whose data another one has. Whether it is that file is
asked of redis' own checker, which is the same program by another name.

Everything here blocks, and is done with the rights of redis' account.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import Final

from srd.supervise.become import send_signal
from srd.supervise.files import Owner
from srd.supervise.inventory import APPEND_ONLY, MANIFEST, files_in, last_log, size_without_zeros
from srd.supervise.programs import Program
from srd.supervise.spawn import Command, spawn

# Before redis 7.0 there was one file and no manifest, and it is left alone.
_MANIFEST: Final = Path(APPEND_ONLY, MANIFEST)
# It reads as fast as redis itself does. What takes longer is not judged.
CHECK_SECONDS: Final = 20.0


def cut_off_zeros(data: Path) -> int:
    """Cut the zeros off the end of the last append-only file; return how many there were. Raises `OSError`.

    No redis may run in that directory.
    """
    log = last_log(data)
    if log is None or not log.exists():
        return 0
    size, content = log.stat().st_size, size_without_zeros(log)
    if content < size:
        os.truncate(log, content)
    return size - content


def is_unreadable(program: Program, owner: Owner, data: Path, log: Path) -> bool:
    """Whether redis' checker finds the append-only file invalid; what it says is in the log. `SrdError`, `OSError`."""
    if not owner.do((data / _MANIFEST).exists):
        return False
    checker = program.argv0.replace("-server", "-check-aof")
    if checker == program.argv0:
        return False  # by an unknown name it would not check, but serve
    started = spawn(Command(program.path, (checker, str(_MANIFEST)), owner, data, log))
    try:
        poll = select.poll()
        poll.register(started.pidfd, select.POLLIN)
        late = not poll.poll(CHECK_SECONDS * 1000)
        if late:
            send_signal(started.pid, started.pidfd, signal.SIGKILL)
        end = os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED)
    finally:
        os.close(started.pidfd)
    return not late and end is not None and (end.si_code, end.si_status) == (os.CLD_EXITED, 1)


def clear(data: Path) -> bool:
    """Remove what redis would load, if each file of it has another name, in a copy; return whether that was done.

    All of it: a redis that starts with an old RDB file, and one that is believed to have data, would both be wrong.
    """
    files = files_in(data)
    if any(path.stat().st_nlink == 1 for path in files):
        return False
    for path in files:
        path.unlink()
    return True
