"""What redis has on disk before it follows another primary is kept, and not for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from srd.supervise import kept

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "dump.rdb").write_text("all until noon")
    (tmp_path / "appendonlydir" / "appendonly.aof.1.incr.aof").write_text("a write")
    (tmp_path / "redis.conf").write_text("no data")
    return tmp_path


def files(copy: Path) -> dict[str, str]:
    return {str(path.relative_to(copy)): path.read_text() for path in sorted(copy.rglob("*")) if path.is_file()}


def replace_files(data: Path) -> None:
    """Do what redis does when it takes another node's data."""
    new = data / "temp.rdb"
    new.write_text("another node's")
    new.rename(data / "dump.rdb")


def test_a_copy_keeps_what_redis_replaces_and_is_named_by_its_time(data: Path) -> None:
    copy = kept.keep(data, NOON)
    assert copy == data / "kept" / "20231114T221320Z" == kept.latest(data)
    replace_files(data)
    (data / "appendonlydir" / "appendonly.aof.1.incr.aof").unlink()
    assert files(copy) == {"appendonlydir/appendonly.aof.1.incr.aof": "a write", "dump.rdb": "all until noon"}


def test_it_takes_no_room_as_long_as_redis_has_the_files_itself(data: Path) -> None:
    copy = kept.keep(data, NOON)
    assert copy is not None
    assert (copy / "dump.rdb").stat().st_ino == (data / "dump.rdb").stat().st_ino


def test_where_there_is_no_data_there_is_no_copy(tmp_path: Path) -> None:
    assert kept.keep(tmp_path, NOON) is None
    assert kept.latest(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_copies_stay(data: Path) -> None:
    copies = []
    for minutes in range(4):
        copies.append(kept.keep(data, NOON + minutes * 60))
        replace_files(data)
    assert sorted((data / "kept").iterdir()) == copies[-2:]
    assert kept.latest(data) == copies[-1]


def test_a_redis_that_is_started_again_and_again_pushes_no_copy_out(data: Path) -> None:
    mattered = kept.keep(data, NOON)
    replace_files(data)
    second = kept.keep(data, NOON + 60)
    assert {kept.keep(data, NOON + 60 * minutes) for minutes in range(2, 9)} == {second}
    assert sorted((data / "kept").iterdir()) == [mattered, second]
    (data / "appendonlydir" / "appendonly.aof.2.incr.aof").write_text("more of its own")
    assert kept.keep(data, NOON + 600) != second


def test_two_starts_in_one_second_are_one_copy(data: Path) -> None:
    assert kept.keep(data, NOON) == kept.keep(data, NOON + 0.5)


def test_two_copies_of_one_second_are_two(data: Path) -> None:
    first = kept.keep(data, NOON)
    replace_files(data)
    second = kept.keep(data, NOON)
    assert first != second == kept.latest(data)
    assert sorted((data / "kept").iterdir()) == [first, second]


def test_a_clock_that_went_back_costs_no_copy(data: Path) -> None:
    kept.keep(data, NOON + 3600)
    replace_files(data)
    kept.keep(data, NOON + 7200)
    replace_files(data)
    copy = kept.keep(data, NOON)
    assert copy is not None
    assert copy.is_dir()
    assert copy == kept.latest(data)


def test_what_somebody_else_has_put_there_is_left_alone(data: Path) -> None:
    (other := data / "kept" / "20261130-before-the-upgradeZ").mkdir(parents=True)
    (impossible := data / "kept" / "20261399T000000Z").mkdir()
    for minutes in range(4):
        kept.keep(data, NOON + minutes * 60)
        replace_files(data)
    assert other.exists()
    assert impossible.exists()


def test_what_an_interrupted_attempt_left_is_no_copy_and_goes(data: Path) -> None:
    unfinished = data / "kept" / ".unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "dump.rdb").write_text("half")
    assert kept.latest(data) is None
    copy = kept.keep(data, NOON)
    assert copy is not None
    assert files(copy)["dump.rdb"] == "all until noon"
    assert not unfinished.exists()
