"""Start one program so that it outlives srd and holds no right that it does not need. Blocks: call it from a thread.

The program gets its own session, its own user, an environment that srd writes, no standard input, and a log file
instead of a pipe. All this is taken on by a thread that exists for this one start: the account, no-new-privs, the
ambient and inheritable sets and the bounding set belong to a thread, and a child inherits those of the thread that
forks it. So no launcher program stands between srd and the child, and `argv[0]` is free to choose.

Listening sockets are handed on as systemd does it (sd_listen_fds(3)): descriptors from 3 on, LISTEN_FDS, and
LISTEN_PID, the program's own pid. Nobody can know that before the fork, so a shell sets it and becomes the program.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from srd.model import PLAIN_ENVIRONMENT, SrdError
from srd.supervise.become import become, in_own_thread
from srd.supervise.files import Owner, open_log

# linux/prctl.h, linux/capability.h
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_LAST_CAPABILITY_FILE: Final = Path("/proc/sys/kernel/cap_last_cap")

_FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START
_CLONE_FILES: Final = 0x00000400  # linux/sched.h
_OUT_OF_THE_WAY: Final = 100  # above every descriptor that is handed on
_WITH_OWN_PID: Final = ("/bin/sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh")

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run: the file, its argument vector (never a secret in it), whose it is, where it works and logs.

    `sockets` are descriptors of sockets that listen; with any, `argv[0]` is the file's path. `settings` go into its
    environment.
    """

    program: Path
    argv: tuple[str, ...]
    owner: Owner
    directory: Path
    log: Path
    sockets: tuple[int, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """A process that has just been started: its pid, and the descriptor that stays bound to it whatever happens."""

    pid: int
    pidfd: int


def spawn(command: Command) -> Started:
    """Start a program; `SrdError` when the system refuses."""
    log = open_log(command.log)

    def body() -> int:
        _give_up_capabilities()
        # Before the start and not by it: the directory can be entered by its owner alone.
        if command.owner.switch:
            become(command.owner.uid, command.owner.gid)
        return _start(command, log)

    try:
        pid = in_own_thread(body, f"spawn {command.argv[0]}")
        # Nobody but srd may reap it, so the number is still its own.
        try:
            return Started(pid, os.pidfd_open(pid))
        except OSError:  # no descriptor is left: nobody would know of it
            command.owner.do(lambda: os.kill(pid, signal.SIGKILL))
            os.waitpid(pid, 0)
            raise
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SrdError("start", str(command.program), reason) from error
    finally:
        os.close(log)


def _start(command: Command, log: int) -> int:
    environment, argv, program = {**PLAIN_ENVIRONMENT, **command.settings}, command.argv, command.program
    handed: tuple[int, ...] = ()
    if command.sockets:
        log, handed = _hand_on(command.sockets, log)
        environment |= {"LISTEN_FDS": str(len(handed))}
        argv = (*_WITH_OWN_PID, str(program), *argv[1:])
        program = Path(_WITH_OWN_PID[0])
    process = subprocess.Popen(
        argv,
        executable=program,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=command.directory,
        env=environment,
        start_new_session=True,
        umask=0o077,
        pass_fds=handed,
    )
    # Its status is collected through a descriptor; marked as ended, subprocess will not try to do so as well.
    process.returncode = 0
    return process.pid


def _hand_on(sockets: tuple[int, ...], log: int) -> tuple[int, tuple[int, ...]]:
    """Put sockets where sd_listen_fds(3) looks for them; return where the log is then, and where they are.

    What other threads have open under these numbers stays theirs: this thread gets a table of descriptors of its own.
    """
    _check(_libc.unshare(_CLONE_FILES))
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for descriptor in (log, *sockets)]
    handed = tuple(range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + len(sockets)))
    for descriptor, target in zip(high[1:], handed, strict=True):
        os.dup2(descriptor, target)
    return high[0], handed


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _give_up_capabilities() -> None:
    """Make this thread, for good, one whose children get no capability and no way to gain one."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapabilityData * 2)()
    _check(_libc.capget(ctypes.byref(header), data))
    if any(part.inheritable for part in data):
        for part in data:
            part.inheritable = 0
        _check(_libc.capset(ctypes.byref(header), data))
    # Without CAP_SETPCAP the bounding set stays; no-new-privs makes it harmless for every user but root.
    for capability in range(int(_LAST_CAPABILITY_FILE.read_text()) + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except PermissionError:
            return


def _prctl(option: int, argument: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
