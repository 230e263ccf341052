"""Act as another account, in a thread that exists for this one act: what it does, it does with that account's rights.

So srd needs no right over others' files and processes (CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL), only to
become those others, as it must anyway to start programs as them; and nothing that a service puts into its directory can
lead srd to a file that the service itself could not reach. libc's setresuid() would change every thread of the process,
the system call of that name changes its caller. Everything here blocks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from srd.model import SrdError

T = TypeVar("T")

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Numbers(NamedTuple):
    setgroups: int
    setresgid: int
    setresuid: int


# include/uapi/asm-generic/unistd.h; architectures that came after it share it.
_GENERIC: Final = _Numbers(159, 149, 147)
_NUMBERS: Final = {
    "x86_64": _Numbers(116, 119, 117),
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
    "ppc64le": _Numbers(81, 169, 164),
    "s390x": _Numbers(206, 210, 208),
}


def in_own_thread(act: Callable[[], T], name: str) -> T:
    """Call `act` in a thread that ends with it, whatever it makes of that thread; what it raises is raised here."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(act())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)

    thread = threading.Thread(target=body, name=name)
    try:
        thread.start()
    except RuntimeError as error:  # CPython's for EAGAIN of clone(2)
        raise SrdError("start a thread", name, "the system allows no more", "raise TasksMax= of srd.service") from error
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def acting_as(uid: int, gid: int, act: Callable[[], T], *, groups: tuple[int, ...] = ()) -> T:
    """Call `act` as that account, which has no other groups than the given ones; what it raises is raised here."""

    def body() -> T:
        become(uid, gid, groups)
        return act()

    return in_own_thread(body, f"as user {uid}")


def become(uid: int, gid: int, groups: tuple[int, ...] = ()) -> None:
    """Make this thread, for good, one of that account: for a thread of `in_own_thread`."""
    machine = os.uname().machine
    numbers = _NUMBERS.get(machine)
    if numbers is None:
        raise SrdError("act as", f"user {uid}", f"srd does not know the system calls of {machine}")
    _system_call(numbers.setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups))
    _system_call(numbers.setresgid, gid, gid, gid)
    _system_call(numbers.setresuid, uid, uid, uid)  # the last: it takes the capabilities away


def _system_call(number: int, *arguments: int | ctypes.Array[ctypes.c_uint32]) -> None:
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if _libc.syscall(ctypes.c_long(number), *words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def send_signal(pid: int, pidfd: int, number: signal.Signals) -> None:
    """Signal the process that `pidfd` is bound to, as the account that it runs as where srd itself may not.

    `pid` only says whose it is: were it another process's by now, the kernel would refuse the signal.
    """
    try:
        signal.pidfd_send_signal(pidfd, number)
    except PermissionError:
        uid, gid = _account_of(pid)
        acting_as(uid, gid, lambda: signal.pidfd_send_signal(pidfd, number))


def _account_of(pid: int) -> tuple[int, int]:
    """Return the real uid and gid of a process; ProcessLookupError when there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError as error:
        raise ProcessLookupError(*error.args) from error
    found = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("Uid:", "Gid:"))}
    return found["Uid:"], found["Gid:"]
