"""What a node notes of how far its data has come, and what it says that it has."""

from __future__ import annotations

import json
import os
import pwd
from dataclasses import replace
from pathlib import Path

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
        self.log = self.paths.service_dir(Service.REDIS) / "appendonlydir" / "appendonly.aof.1.incr.aof"
        self.log.parent.mkdir(parents=True)
        manifest = self.log.with_name("appendonly.aof.manifest")
        manifest.write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
        self.log.write_bytes(b"12345")
        s = primary_situation(lease=LEASE)
        me = pwd.getpwuid(os.geteuid()).pw_name
        self.situation = replace(s, config=replace(s.config, redis=msgspec.structs.replace(s.config.redis, user=me)))
        self.ledger = Ledger(self.paths, lambda: self.situation)

    def noted(self) -> dict[str, object]:
        return dict(json.loads((self.paths.state_dir / "progress.json").read_text()))

    def see(self, *, offset: int, later: float = 0.0, epoch: int = 3, rewrites: int = 0) -> None:
        s = self.situation
        assert s.view.redis is not None
        redis = replace(s.view.redis, offset=offset, rewrites=rewrites)
        view = replace(s.view, redis=redis, lease=replace(LEASE, epoch=epoch))
        self.situation = replace(s, view=view, now=s.now + later)

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
    stock = await Ledger(node.paths, lambda: node.situation).stock()
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


@pytest.mark.parametrize("content", ["", "{}garbage", '{"epoch": "3"}'])
async def test_a_note_that_cannot_be_read_is_none(node: Node, content: str) -> None:
    (node.paths.state_dir / "progress.json").write_text(content)
    node.stop_redis()
    stock = await Ledger(node.paths, lambda: node.situation).stock()
    assert (stock.data, stock.epoch) == (True, UNKNOWN_EPOCH)


@pytest.mark.parametrize(
    ("before", "since", "able"),
    [((), (), True), ((50, 40, 30, 20), (), True), ((50, 40, 30), (1, 1), True), ((), (1, 1, 1), False)],
)
async def test_a_redis_that_has_loaded_is_counted_on_until_it_ends_again_and_again(
    node: Node, before: tuple[float, ...], since: tuple[float, ...], *, able: bool
) -> None:
    await node.ledger.note()
    node.see(offset=OFFSET, later=10)
    ends = (*(NOW - ago for ago in before), *(NOW + after for after in since))
    node.situation = with_child(node.situation, Service.REDIS, lately=ends)
    assert (await node.ledger.stock()).able is able


async def test_a_redis_that_ended_before_it_had_loaded_is_not_counted_on(node: Node) -> None:
    node.situation = with_child(node.situation, Service.REDIS, lately=(NOW - 30,))
    assert not (await node.ledger.stock()).able


async def test_how_much_follows_an_end_is_said_and_nothing_else_is_understood(node: Node) -> None:
    assert await node.ledger.after(b"123".hex()) == 2
    assert await node.ledger.after(b"9".hex()) is None
    with pytest.raises(RefusedError, match="it is not hexadecimal"):
        await node.ledger.after("what?")
