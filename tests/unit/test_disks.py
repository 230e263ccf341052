"""Which directories cannot be written to, by what the kernel says of their file systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from srd.model import Paths
from srd.state import DiskTrouble
from srd.supervise.disks import LEAST_FREE_BYTES, Disks, trouble

BLOCK = 4096


def file_system(
    *, free: int = LEAST_FREE_BYTES, inodes: int = 1000, left: int = 10, flags: int = 0
) -> os.statvfs_result:
    return os.statvfs_result((BLOCK, BLOCK, 10**9, 10**9, free // BLOCK, inodes, left, left, flags, 255))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (file_system(), None),
        (file_system(free=LEAST_FREE_BYTES - BLOCK), DiskTrouble.FULL),
        (file_system(left=0), DiskTrouble.NO_INODES),
        (file_system(inodes=0, left=0), None),  # btrfs makes them as they are needed
        (file_system(flags=os.ST_RDONLY), DiskTrouble.READ_ONLY),
        (file_system(flags=os.ST_RDONLY, free=0), DiskTrouble.READ_ONLY),
    ],
)
def test_what_is_wrong_with_a_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: os.statvfs_result, expected: DiskTrouble | None
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    assert trouble(tmp_path) is expected


async def test_a_directory_that_comes_back_is_off_the_list_and_somebody_hears_of_it(tmp_path: Path) -> None:
    paths = Paths(config_dir=tmp_path, state_dir=tmp_path / "state", run_dir=tmp_path, log_dir=tmp_path)
    written: list[dict[str, DiskTrouble]] = []
    mended: list[int] = []
    disks = Disks(paths, written.append, lambda: mended.append(len(written)))
    await disks.reconcile()
    await disks.reconcile()
    assert written[-1] == {str(paths.state_dir): DiskTrouble.GONE}
    assert mended == []
    paths.state_dir.mkdir()
    await disks.reconcile()
    await disks.reconcile()
    assert written[-2:] == [{}, {}]
    assert mended == [3]
