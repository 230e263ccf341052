"""What a person has asked for is kept on disk, and known again."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clusters import paths_of

from srd.maintenance import DRAINED_NAME, Maintenance
from srd.model import SrdError
from srd.reconcile import boottime
from srd.state import Store


def started(root: Path) -> tuple[Maintenance, Store]:
    """Start one as each srd does, over the same directory."""
    store = Store(boottime())
    return Maintenance(paths_of(root, "n1"), store), store


async def test_a_node_stays_drained_over_restarts_until_that_is_ended(tmp_path: Path) -> None:
    first, store = started(tmp_path)
    assert not store.view().drained
    for _ in range(2):
        await first.drain()
        assert store.view().drained
    second, store = started(tmp_path)
    assert store.view().drained
    for _ in range(2):
        await second.undrain()
        assert not store.view().drained
    assert not started(tmp_path)[1].view().drained


async def test_what_cannot_be_written_down_is_not_done(tmp_path: Path) -> None:
    maintenance, store = started(tmp_path)
    (paths_of(tmp_path, "n1").state_dir / DRAINED_NAME / "in the way").mkdir(parents=True)
    with pytest.raises(SrdError, match="cannot write"):
        await maintenance.drain()
    assert not store.view().drained
