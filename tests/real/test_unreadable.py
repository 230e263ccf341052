"""srd/supervise/unreadable.py and mend.py, by redis' own checkers: what redis would not load is mended or found out."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srd.supervise import kept
from srd.supervise.files import Owner
from srd.supervise.mend import cut_off_zeros
from srd.supervise.programs import Program
from srd.supervise.unreadable import clear, is_unreadable

COMMAND = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n"
SNAPSHOT = b"REDIS0010\xff" + bytes(8)  # without keys and without a checksum
NOON = 1_700_000_000.0


@pytest.fixture
def program() -> Program:
    found = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert found is not None
    return Program(Path(found), "redis-server")


@pytest.fixture
def owner() -> Owner:
    entry = pwd.getpwuid(os.geteuid())
    return Owner(entry.pw_name, entry.pw_uid, entry.pw_gid, switch=False)


def data(directory: Path, *contents: bytes) -> Path:
    """Return a data directory whose append-only files have these contents."""
    (logs := directory / "data" / "appendonlydir").mkdir(parents=True)
    manifest = ""
    for number, content in enumerate(contents, 1):
        (log := logs / f"appendonly.aof.{number}.incr.aof").write_bytes(content)
        manifest += f"file {log.name} seq {number} type i\n"
    (logs / "appendonly.aof.manifest").write_text(manifest)
    return logs.parent


@pytest.fixture
def unreadable(tmp_path: Path, program: Program, owner: Owner) -> Callable[..., bool]:
    """Whether redis' checker cannot read what redis would load from a data directory."""
    return lambda directory, appends=True: is_unreadable(program, owner, directory, tmp_path / "log", appends=appends)


@pytest.mark.parametrize(
    ("content", "is_so"),
    [
        (COMMAND * 3, False),
        # What redis 7 leaves after a full disk: zeros where part of a command was cut off again.
        (COMMAND * 2 + bytes(20) + COMMAND * 3, True),
    ],
)
def test_a_file_with_a_hole_is_found_out(
    tmp_path: Path, unreadable: Callable[..., bool], content: bytes, *, is_so: bool
) -> None:
    assert unreadable(data(tmp_path, content)) is is_so


def test_a_manifest_that_names_nothing_is_found_out(tmp_path: Path, unreadable: Callable[..., bool]) -> None:
    assert unreadable(data(tmp_path))


@pytest.mark.parametrize(("snapshot", "is_so"), [(SNAPSHOT, False), (SNAPSHOT[:9] + b"\x00" + SNAPSHOT[9:], True)])
def test_a_snapshot_is_looked_into_where_redis_would_load_that(
    tmp_path: Path, unreadable: Callable[..., bool], snapshot: bytes, *, is_so: bool
) -> None:
    (tmp_path / "dump.rdb").write_bytes(snapshot)
    assert unreadable(tmp_path, appends=False) is is_so
    assert not unreadable(tmp_path)


@pytest.mark.parametrize(
    ("contents", "zeros"),
    [
        ((COMMAND * 3,), 0),
        ((COMMAND * 3 + bytes(1),), 1),
        ((COMMAND * 3 + bytes(5000),), 5000),
        ((COMMAND * 3 + bytes(9), b""), 9),
        ((COMMAND, bytes(9)), 9),
        ((COMMAND * 3 + bytes(9), bytes(5)), 14),
    ],
)
def test_files_that_end_in_zeros_are_read_once_those_are_cut_off(
    tmp_path: Path, unreadable: Callable[..., bool], contents: tuple[bytes, ...], zeros: int
) -> None:
    directory = data(tmp_path, *contents)
    assert unreadable(directory) is (zeros > 0)
    assert cut_off_zeros(directory) == zeros
    assert not unreadable(directory)
    assert cut_off_zeros(directory) == 0


def test_zeros_behind_which_redis_would_go_on_with_a_gap_stay(tmp_path: Path, unreadable: Callable[..., bool]) -> None:
    directory = data(tmp_path, COMMAND * 3 + bytes(9), COMMAND + bytes(5))
    assert cut_off_zeros(directory) == 5
    assert unreadable(directory)


def test_where_there_is_nothing_nothing_is_judged(tmp_path: Path, unreadable: Callable[..., bool]) -> None:
    assert not unreadable(tmp_path)
    assert not unreadable(tmp_path, appends=False)
    assert cut_off_zeros(tmp_path) == 0


@pytest.mark.parametrize(("seconds", "given_up"), [(3.0, False), (60.0, True)])
def test_a_check_that_takes_too_long_or_is_given_up_is_ended_and_judges_nothing(
    tmp_path: Path, owner: Owner, seconds: float, *, given_up: bool
) -> None:
    slow = tmp_path / "redis-server"
    slow.write_text("#!/bin/sh\necho $$ > pid\nexec sleep 60\n")
    slow.chmod(0o700)
    directory, program = data(tmp_path, COMMAND), Program(slow, "redis-server")
    file, began = directory / "pid", time.monotonic()
    assert not is_unreadable(
        program,
        owner,
        directory,
        tmp_path / "log",
        appends=True,
        seconds=seconds,
        given_up=lambda: given_up and file.exists(),
    )
    assert time.monotonic() - began < 30
    pid = int(file.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_only_what_is_kept_is_removed(tmp_path: Path) -> None:
    directory = data(tmp_path, COMMAND)
    (directory / "dump.rdb").write_bytes(b"older")
    assert not clear(directory)
    assert len(list(directory.glob("appendonlydir/*"))) == 2
    copy = kept.keep(directory, NOON)
    assert copy is not None
    assert clear(directory)
    assert list(directory.glob("appendonlydir/*")) == []
    assert not (directory / "dump.rdb").exists()
    assert (copy / "appendonlydir" / "appendonly.aof.1.incr.aof").read_bytes() == COMMAND
