"""Files that redis refuses to read, on a node whose data another one has: redis would never start again.

Whether it is that is asked of redis' own checkers, which are the same program by other names. Everything here blocks,
and is done with the rights of redis' account.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from srd.supervise.become import send_signal
from srd.supervise.files import Owner
from srd.supervise.inventory import APPEND_ONLY, MANIFEST, SNAPSHOT, files_in, look
from srd.supervise.programs import Program
from srd.supervise.spawn import Command, spawn

# Before redis 7.0 there was one file and no manifest, and it is left alone.
_MANIFEST: Final = Path(APPEND_ONLY, MANIFEST)
CHECK_SECONDS: Final = 20.0
_LOOK_MILLISECONDS: Final = 200


def is_unreadable(
    program: Program,
    owner: Owner,
    data: Path,
    log: Path,
    *,
    appends: bool,
    seconds: float = CHECK_SECONDS,
    given_up: Callable[[], bool] = lambda: False,
) -> bool:
    """Whether redis' checker finds what redis would load invalid; what it says is in the log. `SrdError`, `OSError`.

    `appends` is redis' `appendonly`. What takes longer than so many seconds, or is given up, is not judged.
    """
    file, checks = (_MANIFEST, "-check-aof") if appends else (Path(SNAPSHOT), "-check-rdb")
    if not owner.do((data / file).exists):
        return False
    if appends and not owner.do(lambda: look(data, appends=True).data):
        return True  # the checker takes an empty manifest for an empty log
    checker = program.argv0.replace("-server", checks)
    if checker == program.argv0:
        return False  # by an unknown name it would not check, but serve
    started = spawn(Command(program.path, (checker, str(file)), owner, data, log))
    try:
        poll = select.poll()
        poll.register(started.pidfd, select.POLLIN)
        deadline, late = time.monotonic() + seconds, False
        while not late and not poll.poll(_LOOK_MILLISECONDS):
            late = given_up() or time.monotonic() >= deadline
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
