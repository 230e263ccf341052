"""What srd remembers of its children, so that the next srd finds them again: the same processes, beyond doubt.

A pid is only a number. A process is the recorded one when this is the boot it was started in, the kernel gives the same
start time for it, and it lives; the pidfd is opened first, so that the number cannot change hands between the check and
the use. Where that cannot be decided, the process is neither adopted nor ended. Everything here blocks.
"""

from __future__ import annotations

import enum
import hashlib
import os
import select
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from srd.model import Service, SrdError
from srd.supervise.files import TRAVERSABLE_DIRECTORY, make_own_directory, write_private

_DEAD_STATES: Final = frozenset({"Z", "X", "x"})
_PROC: Final = Path("/proc")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_START_TIME_INDEX: Final = 19  # field 22 of proc_pid_stat(5), counted from the state, which is field 3


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One child as it was started. `start_time` is in clock ticks since boot, `started` CLOCK_BOOTTIME seconds."""

    service: Service
    pid: int
    start_time: int
    boot_id: str
    argv_hash: str
    started: float
    restarts: int = 0
    settings: str = ""  # a digest of what cluster.toml said for it; empty if that is not known


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema: int
    children: tuple[Record, ...]


REGISTER_NAME: Final = "children.json"
MARKER_NAME: Final = "initialized"  # there once this node has been part of its cluster
FOLLOWS_NAME: Final = "follows"  # there while redis was last in step with a primary: it has no writes of its own
_SCHEMA: Final = 1


class Verdict(enum.StrEnum):
    """What became of a recorded process."""

    ALIVE = "alive"
    GONE = "gone"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True)
class Found:
    """A recorded process looked up: its descriptor when it is alive, the reason when nobody can tell."""

    verdict: Verdict
    pidfd: int | None = None
    reason: str = ""


def boot_id() -> str:
    """Return the identity of this boot of the machine."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def argv_hash(argv: tuple[str, ...]) -> str:
    """Return a digest of an argument vector, to notice that a child was started in another way."""
    return hashlib.sha256("\0".join(argv).encode()).hexdigest()


def start_time_of(pid: int, proc: Path = _PROC) -> tuple[str, int]:
    """Return the state letter and the start time of a process; OSError or ValueError when they cannot be read."""
    # The name in parentheses may hold anything, parentheses and blanks too: what counts is after the last one.
    fields = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if len(fields) <= _START_TIME_INDEX:
        msg = "it has too few fields"
        raise ValueError(msg)
    return fields[0], int(fields[_START_TIME_INDEX])


def look_up(record: Record, proc: Path = _PROC) -> Found:
    """Decide whether the recorded process still lives; on ALIVE the caller owns `pidfd`."""
    if record.boot_id != boot_id():
        return Found(Verdict.GONE)
    if record.pid <= 1:  # 0 is this process' own group to kill(2), 1 is init
        return Found(Verdict.UNVERIFIABLE, reason=f"{record.pid} is not the pid of a child")
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return Found(Verdict.GONE)
    except OSError as error:
        return Found(Verdict.UNVERIFIABLE, reason=error.strerror or str(error))
    found = _compare(record, pidfd, proc)
    if found.verdict is not Verdict.ALIVE:
        os.close(pidfd)
    return found


def _compare(record: Record, pidfd: int, proc: Path) -> Found:
    try:
        state, start_time = start_time_of(record.pid, proc)
    except (OSError, ValueError) as error:
        if _ended(pidfd):
            return Found(Verdict.GONE)
        return Found(Verdict.UNVERIFIABLE, reason=f"/proc/{record.pid}/stat cannot be read: {error}")
    # A zombie takes signals and has a stat file, but it serves nobody.
    if start_time != record.start_time or state in _DEAD_STATES or _ended(pidfd):
        return Found(Verdict.GONE)
    return Found(Verdict.ALIVE, pidfd=pidfd)


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def pid_of(pidfd: int) -> int | None:
    """Return the pid that a descriptor is bound to; None when that process has ended (pidfd_open(2))."""
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    pid = int(fields.get("Pid", "-1"))
    return None if pid <= 0 or _ended(pidfd) else pid


def record_found(service: Service, pid: int) -> Record:
    """Describe a child of which only its descriptor was kept: how it was started, and how often, is not known."""
    record = record_of(service, pid, (), started=0.0, restarts=0)
    # Clock ticks since boot, suspended time included: CLOCK_BOOTTIME (proc_pid_stat(5)).
    return msgspec.structs.replace(record, started=record.start_time / os.sysconf("SC_CLK_TCK"))


class Register:
    """children.json: who was started. Written whole, and on disk, before anyone relies on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._records: dict[Service, Record] = {}

    def load(self) -> dict[Service, Record]:
        """Read what an earlier srd wrote; `SrdError` when it is there but unreadable (then nothing is known)."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise SrdError("read", str(self._path), error.strerror or str(error)) from error
        try:
            file = msgspec.json.decode(content, type=_File)
        except ValueError as error:  # not UTF-8 is one, too
            remedy = "running services cannot be adopted; end them, or restore the file"
            raise SrdError("read", str(self._path), f"it is damaged ({error})", remedy) from error
        if file.schema != _SCHEMA:
            raise SrdError("read", str(self._path), f"it has schema {file.schema}, this srd knows {_SCHEMA}")
        self._records = {record.service: record for record in file.children}
        return dict(self._records)

    def put(self, record: Record) -> None:
        """Remember a child."""
        with self._lock:
            self._records[record.service] = record
            self._write()

    def remove(self, service: Service) -> None:
        """Forget a child that has ended."""
        with self._lock:
            if self._records.pop(service, None) is not None:
                self._write()

    def _write(self) -> None:
        make_own_directory(self._path.parent, TRAVERSABLE_DIRECTORY)
        file = _File(schema=_SCHEMA, children=tuple(self._records.values()))
        write_private(self._path, msgspec.json.encode(file))


def record_of(
    service: Service,
    pid: int,
    argv: tuple[str, ...],
    *,
    started: float,
    restarts: int,
    settings: str = "",
    proc: Path = _PROC,
) -> Record:
    """Describe a child that runs now, as it will be looked up later."""
    try:
        start_time = start_time_of(pid, proc)[1]
    except (OSError, ValueError) as error:
        raise SrdError("identify", f"{service} (pid {pid})", f"/proc/{pid}/stat cannot be read: {error}") from error
    return Record(
        service=service,
        pid=pid,
        start_time=start_time,
        boot_id=boot_id(),
        argv_hash=argv_hash(argv),
        started=started,
        restarts=restarts,
        settings=settings,
    )
