"""A redis that keeps nothing on disk, under a whole srd on every node: its death costs no key."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.primacy.managed import IN_MEMORY, ManagedOnLoopback
from bench.primacy.measures import restart
from bench.primacy.places import OnLoopback, explained, own_network


@pytest.mark.timeout(180)
def test_a_primary_without_persistence_that_dies_loses_no_key(tmp_path: Path) -> None:
    """By itself it would be back, empty, before anybody noticed, and its replicas would copy that."""
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o711)  # the services' users pass through
    with own_network(), explained(tmp_path):
        place = OnLoopback(tmp_path, ("redis-1", "redis-2", "redis-3"))
        try:
            assert restart(place, ManagedOnLoopback(place, IN_MEMORY), 0.0) == 0
        finally:
            place.end()
