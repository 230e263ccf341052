"""These tests run real programs as the users that production runs them as, on ports that only root may bind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.primacies import Srd, three
from support.sentinels import Cluster


def pytest_collection_modifyitems() -> None:
    if os.geteuid() != 0:
        msg = "tests/real need root, as `make test` has it; tests/unit run as anyone"
        raise pytest.UsageError(msg)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three redises and three sentinels that do not run yet; what runs at the end is ended."""
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.kill_all()


@pytest.fixture
async def srds(cluster: Cluster) -> dict[str, Srd]:
    """Three nodes' srds that do not run yet, over a cluster that does and whose primary is n1's."""
    return await three(cluster)
