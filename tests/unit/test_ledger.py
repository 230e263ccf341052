"""What a node notes of how far its data has come, and what it says that it has."""

from __future__ import annotations

import json
import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.situations import NOW, OFFSET, at, primary_situation, with_child

from srd.ha.progress import NOTE_SECONDS, UNKNOWN_EPOCH
from srd.ledger import Ledger
from srd.model import Paths, RefusedError, Service
from srd.state import ChildState, Lease, Situation

STREAM = "b" * 40
LEASE = Lease(True, NOW + 1, 3, 3, at(1), epoch=3)


class Node:
    """redis-1, the primary, with a redis' files of its own."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root, root, root, root)
        self.log = self.paths.service_dir(Service.REDIS) / "appendonlydir" / "appendonly.aof.2.incr.aof"
        self.log.parent.mkdir(parents=True)
        self.manifest = self.log.with_name("appendonly.aof.manifest")
        self.manifest.write_text("file appendonly.aof.2.incr.aof seq 2 type i\n")
        self.log.write_bytes(b"12345")
        s = primary_situation(lease=LEASE)
        me = pwd.getpwuid(os.geteuid()).pw_name
        self.situation = replace(s, config=replace(s.config, redis=msgspec.structs.replace(s.config.redis, user=me)))
        self.torn: list[str] = []
        self.ledger = self.next_ledger()

    def next_ledger(self) -> Ledger:
        """Return that of a srd that is started now."""
        return Ledger(self.paths, lambda: self.situation, torn=self.find_torn)

    def find_torn(self, run_id: str, _: float) -> bool:
        self.torn.append(run_id)
        return True

    def noted(self) -> dict[str, object]:
        return dict(json.loads((self.paths.state_dir / "progress.json").read_text()))

    def see(self, *, offset: int, later: float = 0.0, epoch: int = 3, rewrites: int = 0, **files: bool) -> None:
        self.say(**({"rewriting": False, "rewrite_scheduled": False} | files), offset=offset, rewrites=rewrites)
        s = self.situation
        self.situation = replace(s, view=replace(s.view, lease=replace(LEASE, epoch=epoch)), now=s.now + later)

    def say(self, **said: Any) -> None:
        """Have redis say something else."""
        s = self.situation
        assert s.view.redis is not None
        self.situation = replace(s, view=replace(s.view, redis=replace(s.view.redis, **said)))

    def stop_redis(self) -> None:
        stopped: Situation = with_child(self.situation, Service.REDIS, state=ChildState.STOPPED, pid=None)
        self.situation = replace(stopped, view=replace(stopped.view, redis=None))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_an_epoch_is_noted_at_once_and_an_offset_now_and_then(node: Node) -> None:
    await node.ledger.note()
    assert node.noted()["offset"] == OFFSET
    node.see(offset=OFFSET + 10, later=NOTE_SECONDS - 0.1)
    await node.ledger.note()
    assert node.noted()["offset"] == OFFSET
    node.see(offset=OFFSET + 10, later=0.2)
    await node.ledger.note()
    assert node.noted()["offset"] == OFFSET + 10
    node.see(offset=OFFSET + 20, epoch=4)
    await node.ledger.note()
    assert (node.noted()["epoch"], node.noted()["offset"]) == (4, OFFSET + 20)


async def test_files_that_were_written_anew_are_noted_at_once(node: Node) -> None:
    await node.ledger.note()
    node.log.write_bytes(b"12345678")
    node.see(offset=OFFSET + 10, later=0.5, rewrites=1)
    await node.ledger.note()
    assert (node.noted()["offset"], node.noted()["size"]) == (OFFSET + 10, 8)


async def test_the_next_srd_knows_it_by_the_note_and_the_files(node: Node) -> None:
    await node.ledger.note()
    node.stop_redis()
    node.log.write_bytes(b"123")
    stock = await node.next_ledger().stock()
    assert (stock.data, stock.ready, stock.epoch, stock.replid) == (True, False, 3, STREAM)
    assert (stock.offset, bytes.fromhex(stock.end)) == (OFFSET - 2, b"123")


async def test_what_is_lost_is_forgotten(node: Node) -> None:
    await node.ledger.note()
    node.stop_redis()
    node.log.with_name("appendonly.aof.manifest").unlink()
    assert not await node.ledger.holds_data()
    stock = await node.ledger.stock()
    assert (stock.data, stock.epoch) == (False, UNKNOWN_EPOCH)
    assert not (node.paths.state_dir / "progress.json").exists()


@pytest.mark.parametrize("content", [b"", b"{}garbage", b'{"epoch": "3"}', b'{"replid": "\xe2"}'])
async def test_a_note_that_cannot_be_read_is_none(node: Node, content: bytes) -> None:
    (node.paths.state_dir / "progress.json").write_bytes(content)
    node.stop_redis()
    stock = await node.next_ledger().stock()
    assert (stock.data, stock.epoch) == (True, UNKNOWN_EPOCH)


async def test_a_redis_that_ended_before_it_had_its_data_is_not_counted_on_until_one_has_it(node: Node) -> None:
    node.situation = with_child(node.situation, Service.REDIS, lately=(NOW - 30, NOW - 20, NOW - 10))
    assert not (await node.ledger.stock()).able
    await node.ledger.note()
    assert (await node.ledger.stock()).able


async def test_after_a_full_resync_the_note_stays_that_of_the_files_until_those_are_written(node: Node) -> None:
    await node.ledger.note()
    noted = node.noted()
    unlisted = node.log.with_name("temp-appendonly.aof.incr")
    unlisted.write_bytes(b"what came since")
    for epoch in (3, 4):
        node.see(offset=OFFSET + 1000, epoch=epoch, later=NOTE_SECONDS, rewriting=True)
        await node.ledger.note()
        assert node.noted() == noted
    unlisted.unlink()  # that attempt has failed, and the next one is about to begin
    for epoch in (3, 4):
        node.see(offset=OFFSET + 1000, epoch=epoch, later=NOTE_SECONDS, rewriting=True, rewrite_scheduled=True)
        await node.ledger.note()
        assert node.noted() == noted
    node.see(offset=OFFSET + 1000, epoch=4, rewrites=1)
    await node.ledger.note()
    assert (node.noted()["epoch"], node.noted()["offset"]) == (4, OFFSET + 1000)


@pytest.mark.parametrize("epoch", [3, 4])
async def test_another_rewrite_is_no_reason_not_to_note(node: Node, epoch: int) -> None:
    await node.ledger.note()
    node.see(offset=OFFSET + 10, epoch=epoch, later=NOTE_SECONDS, rewriting=True)
    await node.ledger.note()
    assert (node.noted()["epoch"], node.noted()["offset"]) == (epoch, OFFSET + 10)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"log_bytes": 5}, False),
        ({"log_bytes": 9}, False),  # it has appended since
        ({"log_bytes": None}, False),
        ({"log_bytes": 4}, True),
        ({"log_bytes": 4, "rewriting": True}, False),
        ({"log_bytes": 4, "rewritten": False}, False),
        ({"log_bytes": 4, "rewrites": 2}, False),
        ({"log_bytes": 4, "run_id": "another"}, False),
    ],
)
async def test_files_that_are_longer_than_redis_takes_them_to_be_have_a_hole(
    node: Node, said: dict[str, object], *, found: bool
) -> None:
    node.say(log_bytes=4)
    await node.ledger.note()
    await node.ledger.note()
    assert node.torn == [], "that was said before they were measured"
    node.say(**said, answered=NOW + 1)
    await node.ledger.note()
    assert (node.torn != []) is found


async def test_files_are_measured_again_when_something_was_appended_be_there_replicas_or_not(node: Node) -> None:
    node.say(log_bytes=5)
    await node.ledger.note()
    node.log.write_bytes(b"123456789")
    node.see(offset=OFFSET, later=NOTE_SECONDS)
    node.say(log_bytes=7, answered=NOW + NOTE_SECONDS)
    await node.ledger.note()
    node.say(answered=NOW + NOTE_SECONDS + 1)
    await node.ledger.note()
    assert node.torn != []


async def test_a_base_that_redis_has_made_at_its_start_is_no_hole(node: Node) -> None:
    node.log.rename(log := node.log.with_name("appendonly.aof.1.incr.aof"))
    node.manifest.write_text(f"file {log.name} seq 1 type i\n")
    for later in (0.0, 1.0):
        node.say(log_bytes=0, answered=NOW + later)
        await node.ledger.note()
    assert node.torn == []


async def test_how_much_follows_an_end_is_said_and_nothing_else_is_understood(node: Node) -> None:
    assert await node.ledger.after(b"123".hex()) == 2
    assert await node.ledger.after(b"9".hex()) is None
    with pytest.raises(RefusedError, match="it is not hexadecimal"):
        await node.ledger.after("what?")
