"""Who listens on a TCP port: the process, its program, and the service unit that would start it again. Blocks."""

from __future__ import annotations

import contextlib
import pwd
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final

from srd.model import IpAddress
from srd.supervise.become import acting_as

_PROC: Final = Path("/proc")
_TCP_LISTEN: Final = "0A"  # net/tcp_states.h, as /proc/net/tcp prints it
# Of the system's service manager: a user's own one has /user.slice/.../user@1000.service/... before its units.
_UNIT: Final = re.compile(r"^(?:0:|\d+:name=systemd):(?!.*/user@).*/([^/\n]+)\.service$", re.MULTILINE)
# What srd's own children are in, be srd there or gone: not to be disabled.
_OWN_UNIT: Final = "srd"


@dataclass(frozen=True, slots=True)
class Listener:
    """A program that listens; `pid` None when that is hidden, `unit` None when no service of the system started it."""

    pid: int | None = None
    name: str = ""
    unit: str | None = None

    def __str__(self) -> str:
        if self.pid is None:
            return "another program"
        return f"pid {self.pid} ({self.name}" + (f" of {self.unit}.service)" if self.unit is not None else ")")

    @property
    def remedy(self) -> str:
        """How to be rid of it, for good where that is known."""
        if self.pid is None:
            return "srd check, from a root shell, names it; stop it"
        return "stop it" if self.unit in (None, _OWN_UNIT) else f"systemctl disable --now {self.unit}"


HIDDEN: Final = Listener()


@dataclass(frozen=True, slots=True)
class _Socket:
    address: IpAddress
    uid: int
    inode: str


def listener_of(port: int, *, for_others: bool = False) -> Listener | None:
    """Return who listens on a TCP port, `HIDDEN` if that cannot be seen, None if nobody does.

    `for_others` leaves out who can be reached from this machine only, on a loopback address.
    """
    rows = [row for table in ("tcp", "tcp6") for row in _listening(table, port)]
    sockets = [row for row in rows if not (for_others and row.address.is_loopback)]
    if not sockets:
        return None
    links = {f"socket:[{socket.inode}]" for socket in sockets}
    return _holder(links) or _holder_as_its_user(links, {socket.uid for socket in sockets} - {0}) or HIDDEN


def _holder(links: Collection[str]) -> Listener | None:
    for process in sorted(_PROC.glob("[0-9]*")):
        # Processes end while they are looked at, and other users' descriptors are theirs.
        with contextlib.suppress(OSError):
            if any(str(descriptor.readlink()) in links for descriptor in (process / "fd").iterdir()):
                return Listener(int(process.name), (process / "comm").read_text().strip(), _unit(process))
    return None


def _holder_as_its_user(links: Collection[str], uids: Collection[int]) -> Listener | None:
    """Look as the user whose socket it is: root without CAP_SYS_PTRACE does not see others' descriptors."""
    for uid in uids:
        with contextlib.suppress(KeyError, OSError):
            found = acting_as(uid, pwd.getpwuid(uid).pw_gid, partial(_holder, links))
            if found is not None:
                return found
    return None


def _unit(process: Path) -> str | None:
    found = _UNIT.search((process / "cgroup").read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def _listening(table: str, port: int) -> list[_Socket]:
    """Return each socket that listens on the port."""
    try:
        lines = (_PROC / "net" / table).read_text(encoding="ascii").splitlines()[1:]
    except FileNotFoundError:  # a kernel without IPv6
        return []
    rows = [line.split() for line in lines]
    ends = ((*row[1].split(":"), row[7], row[9]) for row in rows if row[3] == _TCP_LISTEN)
    return [
        _Socket(_proc_address(address), int(uid), inode)
        for address, number, uid, inode in ends
        if int(number, 16) == port
    ]


def _proc_address(text: str) -> IpAddress:
    """Read an address as /proc/net/tcp has it: words of 32 bits, each in the order of bytes of this machine."""
    words = [int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8)]
    address = ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
