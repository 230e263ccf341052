"""srd/supervise/unreadable.py, by redis' own checker: what redis would not load is found out, and goes only if kept."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

from srd.supervise import kept
from srd.supervise.files import Owner
from srd.supervise.programs import Program
from srd.supervise.unreadable import clear, cut_off_zeros, is_unreadable

COMMAND = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n"
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


def data(directory: Path, content: bytes) -> Path:
    (log := directory / "data" / "appendonlydir").mkdir(parents=True)
    (log / "appendonly.aof.1.incr.aof").write_bytes(content)
    (log / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    return log.parent


@pytest.mark.parametrize(
    ("content", "unreadable"),
    [
        (COMMAND * 3, False),
        # What redis 7 leaves after a full disk: zeros where part of a command was cut off again.
        (COMMAND * 2 + bytes(20) + COMMAND * 3, True),
    ],
)
def test_a_file_with_a_hole_is_found_out(
    tmp_path: Path, program: Program, owner: Owner, content: bytes, *, unreadable: bool
) -> None:
    assert is_unreadable(program, owner, data(tmp_path, content), tmp_path / "log") is unreadable


@pytest.mark.parametrize("zeros", [0, 1, 5000])
def test_a_file_that_ends_in_zeros_is_read_once_they_are_cut_off(
    tmp_path: Path, program: Program, owner: Owner, zeros: int
) -> None:
    directory = data(tmp_path, COMMAND * 3 + bytes(zeros))
    assert is_unreadable(program, owner, directory, tmp_path / "log") is (zeros > 0)
    assert cut_off_zeros(directory) == zeros
    assert not is_unreadable(program, owner, directory, tmp_path / "log")
    assert cut_off_zeros(directory) == 0


def test_where_there_is_no_manifest_nothing_is_judged(tmp_path: Path, program: Program, owner: Owner) -> None:
    assert not is_unreadable(program, owner, tmp_path, tmp_path / "log")
    assert cut_off_zeros(tmp_path) == 0


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
