"""srd/supervise/mend.py: what a killed redis was writing goes, and nothing else (zeros: real/test_unreadable.py)."""

from __future__ import annotations

from pathlib import Path

from srd.supervise.mend import remove_unfinished

# As redis 7.0.15 leaves them when it is killed in a resync and in a rewrite.
UNFINISHED = ("appendonlydir/temp-appendonly.aof.incr", "temp-1764532800.4711.rdb", "temp-rewriteaof-4712.aof")
OTHERS = (
    "appendonlydir/appendonly.aof.1.base.rdb",
    "appendonlydir/appendonly.aof.1.incr.aof",
    "appendonlydir/appendonly.aof.manifest",
    "dump.rdb",
    "kept/20261130T195338Z/dump.rdb",
    "redis.conf",
)


def test_what_was_left_unfinished_is_removed_and_named(tmp_path: Path) -> None:
    for name in (*UNFINISHED, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("data")
    assert sorted(remove_unfinished(tmp_path)) == sorted(UNFINISHED)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(OTHERS)
    assert remove_unfinished(tmp_path) == []
