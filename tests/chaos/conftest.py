"""A cluster for the walks, in the lab: of machines, or of namespaces with a file system for each one's state."""

from __future__ import annotations

import os

import pytest
from chaos.machines import Machines
from chaos.world import Namespaces, World
from support.lab import Lab, bring_up


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chaos: a walk of faults, which takes minutes")


@pytest.fixture(scope="session")
def world() -> World:
    lab = Lab()
    if int(os.environ["LAB_KERNELS"]):
        bring_up()
        return Machines(lab.nodes)
    Namespaces.give_disks(lab.nodes)
    bring_up()
    return Namespaces(lab.nodes, lab.srd_pid, lab.start_srd)
