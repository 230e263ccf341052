from __future__ import annotations

from pathlib import Path

import pytest
from support.containers import Containers
from support.lab import bring_up, capturing


@pytest.fixture(scope="session")
def wire() -> Path:
    return capturing()


@pytest.fixture(scope="session")
def lab(wire: Path) -> Containers:  # noqa: ARG001 - the capture begins before the cluster
    bring_up()
    return Containers()
