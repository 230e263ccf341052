"""What redis would load, and what one node's append-only file has beyond another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srd.supervise import inventory
from srd.supervise.inventory import Files, bytes_after, look

BASE = "appendonly.aof.2.base.rdb"
LOGS = ("appendonly.aof.2.incr.aof", "appendonly.aof.3.incr.aof")


def lay(directory: Path, *logs: bytes, base: bytes | None = b"REDIS0010\xff", manifest: bool = True) -> Path:
    files = directory / "appendonlydir"
    files.mkdir()
    lines = []
    if base is not None:
        (files / BASE).write_bytes(base)
        lines.append(f"file {BASE} seq 2 type b")
    lines.append("file appendonly.aof.1.incr.aof seq 1 type h")
    for number, (name, content) in enumerate(zip(LOGS, logs, strict=False), 2):
        (files / name).write_bytes(content)
        lines.append(f"file {name} seq {number} type i")
    if manifest:
        (files / "appendonly.aof.manifest").write_text("\n".join(lines) + "\n")
    return directory


def test_nothing_is_there_where_no_redis_has_run(tmp_path: Path) -> None:
    assert look(tmp_path, appends=True) == look(tmp_path, appends=False) == Files()
    assert bytes_after(tmp_path, b"something") is None


def test_an_empty_data_set_is_one_that_redis_has_written(tmp_path: Path) -> None:
    inode = (lay(tmp_path, b"") / "appendonlydir" / LOGS[0]).stat().st_ino
    assert look(tmp_path, appends=True) == Files(data=True, log=LOGS[0], inode=inode, size=10)


@pytest.mark.parametrize("lost", ["manifest", "base", "the base's content", "log"])
def test_what_redis_would_start_empty_from_or_not_at_all_is_no_data(tmp_path: Path, lost: str) -> None:
    lay(tmp_path, b"a log", base=b"" if lost == "the base's content" else b"REDIS0010\xff", manifest=lost != "manifest")
    if lost in ("base", "log"):
        (tmp_path / "appendonlydir" / (BASE if lost == "base" else LOGS[0])).unlink()
    assert not look(tmp_path, appends=True).data


def test_a_snapshot_beside_it_is_not_what_redis_loads(tmp_path: Path) -> None:
    (tmp_path / "dump.rdb").write_bytes(b"REDIS0010\xff")
    assert not look(tmp_path, appends=True).data
    assert look(tmp_path, appends=False).data


# Written by redis-server 7.0.15 for a replica, but for the checksum; the offset of a long life is a string.
@pytest.mark.parametrize(("offset", "value"), [(b"\xc1\x39\x30", 12345), (b"\x0b12345678901", 12345678901)])
def test_a_snapshot_says_whose_stream_it_is_of_and_up_to_where(tmp_path: Path, offset: bytes, value: int) -> None:
    head = b"REDIS0010\xfa\tredis-ver\x067.0.15\xfa\nredis-bits\xc0@\xfa\x05ctime\xc2\x81\x22\x06k"
    head += b"\xfa\x08used-mem\xc2\x98\xa4\r\x00\xfa\x0erepl-stream-db\xc0\x00"
    head += b"\xfa\x07repl-id(" + b"a" * 40 + b"\xfa\x0brepl-offset" + offset + b"\xfa\x08aof-base\xc0\x00\xfe\x00"
    (tmp_path / "dump.rdb").write_bytes(head)
    assert look(tmp_path, appends=False) == Files(data=True, replid="a" * 40, offset=value)
    for length in range(len(head)):
        (tmp_path / "dump.rdb").write_bytes(head[:length])
        assert look(tmp_path, appends=False).data


def test_the_end_is_of_all_logs(tmp_path: Path) -> None:
    lay(tmp_path, b"a" * inventory.END_BYTES + b"\r\n", b"bcd")
    found = look(tmp_path, appends=True)
    assert (found.log, len(found.end), found.end[-6:]) == (LOGS[1], inventory.END_BYTES, b"a\r\nbcd")


@pytest.mark.parametrize(
    ("end", "after"),
    [
        (b"56789", 0), (b"4567", 2), (b"01\r\n456789", 0), (b"\r\n", 6), (b"x", None), (b"", None), (b"9a", None),
        (b"01\r\n4567890", None),
    ],
)  # fmt: skip
def test_what_follows_another_nodes_end(tmp_path: Path, end: bytes, after: int | None) -> None:
    assert bytes_after(lay(tmp_path, b"01\r\n", b"456789"), end) == after


@pytest.mark.parametrize(
    ("logs", "content"),
    [
        ((b"01\r\n", b"4567\0\0"), b"01\r\n4567"),
        ((b"01\r\n", b"\0\0"), b"01\r\n"),
        ((b"01\r\n", b"45\0\0" + b"67"), b"01\r\n45\0\x0067"),
        ((b"", b"01\0"), b"01"),
        ((b"01\0",), b"01"),
        ((b"\0",), b""),
        # A log that lost its end, and a later one: that is not counted.
        ((b"01\r\n\0\0", b"4567"), b"01\r\n"),
        ((b"01\r\n4\0", b"67\0"), b"01\r\n4"),
        ((b"01\r\n4", b"67"), b"01\r\n4"),
        ((b"\0", b"67"), b""),
    ],
)
def test_zeros_at_an_end_and_what_follows_in_another_log_are_not_counted(
    tmp_path: Path, logs: tuple[bytes, ...], content: bytes
) -> None:
    lay(tmp_path, *logs, base=b"REDIS0010")
    found = look(tmp_path, appends=True)
    assert (found.log, found.size, found.end) == (LOGS[len(logs) - 1], len(b"REDIS0010") + len(content), content)
    assert bytes_after(tmp_path, b"1") == (len(content) - 2 if content else None)


def test_a_log_that_the_manifest_does_not_have_yet_is_said(tmp_path: Path) -> None:
    lay(tmp_path, b"01\r\n")
    assert not look(tmp_path, appends=True).unlisted
    (tmp_path / "appendonlydir" / inventory.UNLISTED).write_bytes(b"more")
    assert look(tmp_path, appends=True).unlisted


def test_an_end_that_is_there_twice_says_nothing(tmp_path: Path) -> None:
    assert bytes_after(lay(tmp_path, b"incr x incr x "), b"incr x ") is None
    assert bytes_after(tmp_path, b"x incr") == 3


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_it_is_found_across_pieces_and_files(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    inventory_chunk = inventory._CHUNK_BYTES
    cut = data.draw(st.integers(0, len(content)))
    content = content[:cut] + b"\r\n" + content[cut:].rstrip(b"\0") + b"\r"
    start = data.draw(st.integers(0, len(content) - 1))
    end = content[start : data.draw(st.integers(start + 1, len(content)))]
    directory = lay(tmp_path_factory.mktemp("data"), content[: cut + 2], content[cut + 2 :])
    places = [i for i in range(len(content)) if content.startswith(end, i)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "_CHUNK_BYTES", data.draw(st.integers(1, 7)))
        found = bytes_after(directory, end)
    assert found == (len(content) - places[0] - len(end) if len(places) == 1 else None)
    assert inventory_chunk == inventory._CHUNK_BYTES
