"""What redis would load from its data directory, and how far that has come, by its files alone. Blocks.

Redis 7.0 with an append-only file forgets at a restart where in its primary's stream it was: replica or primary, it
comes back with another replication id and offset 0 (measured; the id is restored from an RDB file alone). The files do
say it. A primary and its replicas append the same bytes, command by command (measured: identical), so the last bytes of
one node's file are found in another's, and what follows them there is what the first one lacks. A file that lost its
end in a power cut is a prefix of what it was, be it in the middle of a command, and zeros may follow: a file system
notes the new length of a file whose last block it has not written yet. Every command ends with CR and LF, so zeros at
the end of a file are at best part of one that is not complete, and are not counted. Nor is what stands in a later file:
redis begins that one before it has made sure of the former's end (aof.c, rewriteAppendOnlyFileBackground).

Which files: with `appendonly yes` those of the manifest, and nothing without one: redis then starts empty, beside an
RDB file, too (measured). Otherwise the RDB file.

To be called with the rights of redis' account.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

APPEND_ONLY: Final = "appendonlydir"
MANIFEST: Final = "appendonly.aof.manifest"
# aof.c, getTempIncrAofName.
UNLISTED: Final = "temp-appendonly.aof.incr"
SNAPSHOT: Final = "dump.rdb"
# Enough to be found once; what many a client writes again and again is told apart by the numbers in it.
END_BYTES: Final = 4096
# Two nodes that were in touch differ by what was not on disk yet: two seconds of a stream, at 100 MB/s.
WINDOW_BYTES: Final = 256 << 20
_CHUNK_BYTES: Final = 1 << 20
_LAST_BYTES: Final = 1 << 16
_LINE_END: Final = b"\r\n"
_HEAD_BYTES: Final = 1024  # of an RDB file; what it says of itself comes first
_MAGIC_BYTES: Final = 9  # REDIS0010, VALKEY080
_AUX: Final = 0xFA
# rdb.h: the first two bits of a length, then what follows it.
_SIX_BITS, _FOURTEEN_BITS, _INTEGER = 0, 1, 3
_INTEGER_BYTES: Final = {0: 1, 1: 2, 2: 4}
_LONG_LENGTHS: Final = {0x80: 4, 0x81: 8}


@dataclass(frozen=True, slots=True)
class Files:
    """What lies in a data directory. `data`: redis would load something, be it an empty data set.

    `log` is the append-only file that redis would go on with, and `inode` tells it from another one of that name.
    `size` is the bytes of all files up to the first log that has lost its end, and `end` are the last of them. `replid`
    and `offset` are of an RDB file that a primary or a replica in touch has written. `unlisted`: there is a log that
    the manifest does not have yet. After a full resync redis appends to that, until it has written what it was sent to
    a file of its own.
    """

    data: bool = False
    log: str = ""
    inode: int = 0
    size: int = 0
    end: bytes = b""
    replid: str = ""
    offset: int = 0
    unlisted: bool = False


@dataclass(frozen=True, slots=True)
class _Log:
    """An append-only file, and its size but for zeros at its end."""

    path: Path
    size: int


def files_in(directory: Path) -> list[Path]:
    """Return all that redis may load from its data directory, whatever it is set to."""
    found = (directory / SNAPSHOT, *(directory / APPEND_ONLY).glob("*"))
    return [path for path in found if path.is_file()]


def look(directory: Path, *, appends: bool) -> Files:
    """Return what redis would load; `appends` is its `appendonly`. Raises `OSError`."""
    if appends:
        return _look_at_log(directory / APPEND_ONLY)
    try:
        with (directory / SNAPSHOT).open("rb") as file:
            told = _told_by(file.read(_HEAD_BYTES))
    except FileNotFoundError:
        return Files()
    return Files(data=True, replid=told.get("repl-id", ""), offset=int(told.get("repl-offset", "0")))


def bytes_after(directory: Path, end: bytes) -> int | None:
    """Return how much the append-only file has after these bytes; None if they are not in it, or more than once."""
    if not end:
        return None
    logs = _counted(logs_of(directory))
    found: list[int] = []
    carried, passed = b"", 0
    for chunk in _backwards(logs):
        text = chunk + carried
        index = text.rfind(end)
        while index >= 0:
            found.append(passed + len(text) - len(carried) - index - len(end))
            if len(found) > 1:
                return None
            index = text.rfind(end, 0, index + len(end) - 1)
        passed += len(chunk)
        carried = text[: len(end) - 1]
        if passed >= WINDOW_BYTES:
            break
    return found[0] if found else None


def logs_of(directory: Path) -> list[Path]:
    """Return the append-only files that the manifest names, in the order in which redis reads them; `OSError`."""
    return _listed(directory / APPEND_ONLY)[1]


def size_without_zeros(log: Path) -> int:
    """Return how many bytes an append-only file has but for the zeros at its end. Raises `OSError`."""
    with log.open("rb") as file:
        left = file.seek(0, os.SEEK_END)
        for chunk in _file_backwards(file, left, _LAST_BYTES):
            if content := chunk.rstrip(b"\0"):
                return left - len(chunk) + len(content)
            left -= len(chunk)
    return 0


def _look_at_log(directory: Path) -> Files:
    base, logs = _listed(directory)
    try:
        counted, last = _counted(logs), logs[-1].stat().st_ino if logs else 0
        bases = {path: path.stat().st_size for path in base}
        for path in logs:
            path.stat()
    except FileNotFoundError:
        return Files()  # a listed one is missing: redis would not start
    if not (base or logs) or any(path.suffix == ".rdb" and size == 0 for path, size in bases.items()):
        return Files()  # redis would take an empty base for an empty data set
    size, unlisted = sum(bases.values()) + sum(log.size for log in counted), (directory / UNLISTED).exists()
    if not logs:
        return Files(data=True, size=size, unlisted=unlisted)
    end = b""
    for chunk in _backwards(counted):
        end = chunk + end
        if len(end) >= END_BYTES:
            break
    return Files(True, logs[-1].name, last, size, end[-END_BYTES:], unlisted=unlisted)


def _counted(logs: Sequence[Path]) -> list[_Log]:
    """Return the logs up to the first one that has lost its end, that one included."""
    found = []
    for path in logs:
        found.append(_Log(path, size_without_zeros(path)))
        if found[-1].size < path.stat().st_size or not _ends_a_command(found[-1]):
            break
    return found


def _ends_a_command(log: _Log) -> bool:
    with log.path.open("rb") as file:
        file.seek(max(0, log.size - len(_LINE_END)))
        return log.size == 0 or file.read(len(_LINE_END)) == _LINE_END


def _listed(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the base files (one or none) and the logs of the manifest, in the order in which redis loads them."""
    try:
        lines = (directory / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], []
    base: list[Path] = []
    logs: list[Path] = []
    for line in lines:
        match line.split():
            case ["file", name, "seq", _, "type", "b"]:
                base.append(directory / Path(name).name)
            case ["file", name, "seq", _, "type", "i"]:
                logs.append(directory / Path(name).name)
    return base, logs


def _backwards(logs: Sequence[_Log]) -> Iterator[bytes]:
    """Yield the bytes of these files as if they were one, the last ones first, in pieces."""
    for log in reversed(logs):
        with log.path.open("rb") as file:
            yield from _file_backwards(file, log.size, _CHUNK_BYTES)


def _file_backwards(file: BinaryIO, left: int, most: int) -> Iterator[bytes]:
    """Yield the first `left` bytes of a file, the last ones first, in pieces of so many bytes at `most`."""
    while left > 0:
        start = max(0, left - most)
        file.seek(start)
        yield file.read(left - start)
        left = start


def _told_by(head: bytes) -> dict[str, str]:
    """Return what an RDB file says of itself at its head, by name; less where it says it in a way not known here."""
    told: dict[str, str] = {}
    place = _MAGIC_BYTES
    while place < len(head) and head[place] == _AUX:
        name, place = _string(head, place + 1)
        value, place = _string(head, place)
        if value is None or name is None:
            break
        told[name] = value
    return told


def _string(head: bytes, place: int) -> tuple[str | None, int]:
    """Read a string of an RDB file (rdb.c, rdbLoadStringObject): its text and where the next thing begins."""
    if place >= len(head):
        return None, place
    first = head[place]
    kind, rest = first >> 6, first & 0x3F
    place += 1
    if kind == _INTEGER:
        size = _INTEGER_BYTES.get(rest)
        if size is None or place + size > len(head):
            return None, place
        return str(int.from_bytes(head[place : place + size], "little", signed=True)), place + size
    if kind == _SIX_BITS:
        length = rest
    elif kind == _FOURTEEN_BITS and place < len(head):
        length, place = rest << 8 | head[place], place + 1
    else:
        width = _LONG_LENGTHS.get(first, 0)
        if not width:
            return None, place
        length, place = int.from_bytes(head[place : place + width], "big"), place + width
    if place + length > len(head):
        return None, place
    return head[place : place + length].decode("latin-1"), place + length
