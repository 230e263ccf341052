"""A cluster for the walks, in the lab: each node has a file system of its own for its state."""

from __future__ import annotations

import pytest
from chaos.world import World
from support.lab import Lab, bring_up


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: a walk of faults, which takes minutes")


@pytest.fixture(scope="session")
def world() -> World:
    lab = Lab()
    World.give_disks(lab.nodes)
    bring_up()
    return World(lab.nodes, lab.srd_pid, lab.start_srd)
