from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from srd.model import Service, SrdError
from srd.supervise.adopt import Record, Register, Verdict, argv_hash, boot_id, look_up, record_of, start_time_of

ARGV = ("redis-server", "/var/lib/srd/redis/redis.conf")


def own_record() -> Record:
    return record_of(Service.REDIS, os.getpid(), ARGV, started=12.5, restarts=3)


def test_a_process_that_still_runs_is_found_and_its_descriptor_is_bound_to_it() -> None:
    found = look_up(own_record())
    assert found.verdict is Verdict.ALIVE
    assert found.pidfd is not None
    info = Path(f"/proc/self/fdinfo/{found.pidfd}").read_text()
    os.close(found.pidfd)
    assert f"Pid:\t{os.getpid()}\n" in info


def test_a_pid_that_another_process_has_by_now_is_not_the_child() -> None:
    record = own_record()
    recycled = msgspec.structs.replace(record, start_time=record.start_time - 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert look_up(recycled).verdict is Verdict.GONE
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_record_of_another_boot_means_nothing() -> None:
    other_boot = msgspec.structs.replace(own_record(), boot_id="0" * 36)
    assert look_up(other_boot).verdict is Verdict.GONE


def test_a_process_that_ended_and_was_reaped_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        record = record_of(Service.REDIS, process.pid, ARGV, started=0, restarts=0)
    assert look_up(record).verdict is Verdict.GONE


def test_a_zombie_is_gone_though_it_has_a_pid_and_the_right_start_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        record = record_of(Service.REDIS, process.pid, ARGV, started=0, restarts=0)
        assert start_time_of(process.pid) == ("Z", record.start_time)
        assert look_up(record).verdict is Verdict.GONE


def test_where_proc_does_not_show_it_nobody_can_tell(tmp_path: Path) -> None:
    found = look_up(own_record(), proc=tmp_path)
    assert found.verdict is Verdict.UNVERIFIABLE
    assert str(os.getpid()) in found.reason


@pytest.mark.parametrize("pid", [0, 1, -5])
def test_no_record_makes_srd_touch_init_or_its_own_process_group(pid: int) -> None:
    assert look_up(msgspec.structs.replace(own_record(), pid=pid)).verdict is Verdict.UNVERIFIABLE


def test_a_program_may_call_itself_anything(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = " ".join(["S", *(["0"] * 18), "4711", *(["0"] * 10)])
    (tmp_path / "7" / "stat").write_text(f"7 (a) Z 1 (b) {fields}\n")
    assert start_time_of(7, tmp_path) == ("S", 4711)


@pytest.mark.parametrize("content", ["", "7 (sh) S 1 2", "7"])
def test_a_stat_file_that_is_cut_short_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(content)
    with pytest.raises(ValueError, match="fields"):
        start_time_of(7, tmp_path)


def test_the_register_gives_back_what_was_put(tmp_path: Path) -> None:
    path = tmp_path / "run" / "children.json"
    register = Register(path)
    sentinel = msgspec.structs.replace(own_record(), service=Service.SENTINEL)
    register.put(own_record())
    register.put(sentinel)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Register(path).load() == {Service.REDIS: own_record(), Service.SENTINEL: sentinel}
    register.remove(Service.REDIS)
    assert Register(path).load() == {Service.SENTINEL: sentinel}
    assert [entry.name for entry in path.parent.iterdir()] == ["children.json"]


def test_a_missing_register_is_an_empty_one(tmp_path: Path) -> None:
    assert Register(tmp_path / "children.json").load() == {}


def test_every_cut_of_the_register_is_an_error_and_none_adopts(tmp_path: Path) -> None:
    path = tmp_path / "children.json"
    Register(path).put(own_record())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SrdError, match="damaged"):
            Register(path).load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"schema":2,"children":[]}', "schema 2"),
        (b'{"schema":1,"children":[{"service":"redis"}]}', "damaged"),
        (b'{"schema":1,"children":[],"more":1}', "damaged"),
        (b'{"schema":1,"children":[{"service":"\xe2"}]}', "damaged"),
    ],
)
def test_a_register_of_another_shape_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "children.json"
    path.write_bytes(content)
    with pytest.raises(SrdError, match=reason):
        Register(path).load()


def test_the_hash_tells_argument_vectors_apart() -> None:
    assert argv_hash(("a", "b c")) != argv_hash(("a b", "c"))


def test_the_boot_has_one_identity() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36
