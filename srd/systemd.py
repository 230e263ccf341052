"""The service manager: what srd tells it (sd_notify(3)), what it keeps for srd, and what it is about to do.

The protocol is a datagram to a UNIX socket; systemd's manual recommends speaking it directly. Under no manager every
call does nothing. The manager keeps descriptors over srd's death and over a restart (systemd.service(5),
FileDescriptorStoreMax=): a listening socket that it holds goes on taking connections, which wait for the next srd.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog

from srd.model import PLAIN_ENVIRONMENT

log = structlog.get_logger(__name__)

_FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START
_CGROUP: Final = Path("/proc/self/cgroup")
_JOBS_SECONDS: Final = 5.0


class Notifier:
    """Sends state lines such as `READY=1` to the socket that the service manager named.

    `watchdog_seconds` is how often the manager wants to hear `WATCHDOG=1` at least; None: it does not watch.
    """

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        # A leading @ stands for the NUL of Linux' abstract namespace.
        self._address = f"\0{address[1:]}" if address and address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take what the manager left there out of the environment, so that no child inherits it."""
        microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        watched = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        return cls(os.environ.pop("NOTIFY_SOCKET", None), int(microseconds) / 1e6 if watched else None)

    def send(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        """Send; a manager that is gone is nobody's error."""
        if not self._address:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as notify,
            contextlib.suppress(OSError),
        ):
            notify.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)


class FdStore:
    """Descriptors that the manager holds for the next srd, by name (at most 255 bytes, no colon).

    Without a manager nothing is kept, and nothing was. `handed` is what it has given to this process, which owns it.
    """

    def __init__(self, notifier: Notifier, handed: Iterable[tuple[str, int]] = ()) -> None:
        self._notifier = notifier
        self._handed: dict[str, int] = {}
        for name, descriptor in handed:
            if name in self._handed:
                os.close(descriptor)
            else:
                self._handed[name] = descriptor

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was handed over and not yet taken."""
        return tuple(self._handed)

    def take(self, name: str) -> int | None:
        """Return what an earlier srd kept under a name; it is the caller's now, and the manager holds it as well."""
        return self._handed.pop(name, None)

    def keep(self, name: str, descriptor: int) -> None:
        """Have the manager hold a descriptor too; what it has under that name it keeps as well."""
        # Without FDPOLL=0 the manager would drop a socket as soon as it is readable (systemd 252).
        self._notifier.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=(descriptor,))

    def forget(self, name: str) -> None:
        """Have the manager close what it holds under a name."""
        self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def drop_rest(self) -> None:
        """Close and forget what nobody has taken: it is of another configuration, or of another version of srd."""
        for name, descriptor in self._handed.items():
            os.close(descriptor)
            self.forget(name)
        self._handed.clear()


def handed_over() -> list[tuple[str, int]]:
    """Return (name, descriptor) of all that the manager kept, or opened, for this process (sd_listen_fds(3))."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    descriptors = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return list(zip(names, descriptors, strict=False))


async def starting_again() -> bool:
    """Whether the manager starts this unit again after the SIGTERM that has come: the next srd gets the children.

    The signal does not say, the manager's list of jobs does. Only a job that stops the unit is a stop, a power-off
    included. A restart has one of its own; a signal by hand, or a start that took too long, has none, and
    Restart=always follows. When nobody can be asked, it is a stop.
    """
    unit = own_unit()
    if unit is None:
        return False
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl",
            "list-jobs",
            "--plain",
            "--no-legend",
            "--no-pager",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=PLAIN_ENVIRONMENT,
        )
    except OSError:
        return False
    try:
        async with asyncio.timeout(_JOBS_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        log.warning("systemctl does not say what it is about to do: taken for a stop")
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return False
    return not any(words[1:3] == [unit, "stop"] for words in map(str.split, said.decode().splitlines()))


def own_unit() -> str | None:
    """Return the service unit whose main process this is, or was started as; None for any other process."""
    # Whatever is started below a service, by cron say, is in its control group too (systemd.exec(5), since 248).
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        return None
    try:
        text = _CGROUP.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:0:|\d+:name=systemd):.*/([^/\n]+\.service)$", text, re.MULTILINE)
    return found[1] if found else None
