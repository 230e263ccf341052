"""A redis that keeps nothing on disk, under a whole srd on every node: its death costs no key."""

from __future__ import annotations

import pytest
from bench.primacy.managed import IN_MEMORY, ManagedOnLoopback
from bench.primacy.measures import restart
from bench.primacy.places import OnLoopback, explained, own_network
from support.directories import passable


@pytest.mark.timeout(180)
def test_a_primary_without_persistence_that_dies_loses_no_key() -> None:
    """By itself it would be back, empty, before anybody noticed, and its replicas would copy that."""
    with passable() as root, own_network(), explained(root):
        place = OnLoopback(root, ("redis-1", "redis-2", "redis-3"))
        try:
            assert restart(place, ManagedOnLoopback(place, IN_MEMORY), 0.0) == 0
        finally:
            place.end()
