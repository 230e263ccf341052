"""These tests run real programs as the users that production runs them as, on ports that only root may bind."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems() -> None:
    if os.geteuid() != 0:
        msg = "tests/real need root, as `make test` has it; tests/unit run as anyone"
        raise pytest.UsageError(msg)
