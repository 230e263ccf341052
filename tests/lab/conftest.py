"""A cluster for the tests that run inside the lab: brought up under a capture that ends with the last test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lab import Lab, bring_up, capturing
from support.machines import cluster

# Tests that need the lab before the cluster, and those that judge all the others.
FIRST, LAST = "before_the_cluster", "after_everything"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{FIRST}: runs while no srd has run yet")
    config.addinivalue_line("markers", f"{LAST}: judges what all other tests left behind")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.get_closest_marker(LAST) is not None, item.get_closest_marker(FIRST) is None))


@pytest.fixture(scope="session")
def wire() -> Path:
    return capturing()


@pytest.fixture(scope="session")
def lab(wire: Path) -> Lab:  # noqa: ARG001 - the capture begins before the cluster
    """The cluster, up and whole."""
    bring_up()
    return cluster()
