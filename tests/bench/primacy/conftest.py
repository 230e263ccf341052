"""Clusters for what is measured in the lab: each has its CPU to itself, being gone before the next one is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.primacy.managed import Arrangement
from bench.primacy.places import InLab, explained
from bench.primacy.plain import Plain

NODES = tuple(f"redis-{number}" for number in range(1, int(os.environ.get("LAB_NODES", "3")) + 1))
Plainly = Callable[[str], tuple[InLab, Plain]]


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Callable[..., tuple[InLab, Plain]]]:
    """Make the manual's cluster, with further directives for redis."""
    place = InLab(tmp_path, NODES)

    def make(extra: str = "") -> tuple[InLab, Plain]:
        with explained(tmp_path):
            return place, Plain(place, extra)

    try:
        yield make
    finally:
        place.end()


@pytest.fixture(scope="module")
def srd(tmp_path_factory: pytest.TempPathFactory) -> tuple[InLab, Arrangement]:
    """The lab's own cluster; it runs until the lab ends."""
    from support.lab import bring_up  # noqa: PLC0415
    from support.machines import cluster  # noqa: PLC0415

    from bench.primacy.managed_in_lab import ManagedInLab  # noqa: PLC0415 - these can be imported in the lab only

    bring_up()
    return InLab(tmp_path_factory.mktemp("srd"), NODES), ManagedInLab(cluster())
