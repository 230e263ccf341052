"""How soon writes are back, and how many were lost, with srd and with Sentinel alone, in one run on loopback.

BENCH_FAILOVERS (20) kills of the primary and BENCH_SWITCHOVERS (20) each, seen by a client that is writing through
TLS and haproxy. Without IPsec, as this machine's kernel may have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from statistics import median

import pytest
from support.directories import passable

from bench.primacy.figures import Figure, keep, seconds
from bench.primacy.managed import Arrangement, ManagedOnLoopback
from bench.primacy.measures import DEPOSED_SECONDS, kill, move, reconnect
from bench.primacy.places import OnLoopback, Place, explained, own_network
from bench.primacy.plain import Plain

FAILOVERS = int(os.environ.get("BENCH_FAILOVERS", "3"))
SWITCHOVERS = int(os.environ.get("BENCH_SWITCHOVERS", "3"))
NODES = ("redis-1", "redis-2", "redis-3")
MADE: dict[str, Callable[[Place], Arrangement]] = {"plain": Plain, "srd": ManagedOnLoopback}


@pytest.fixture(scope="module", params=MADE)
def there(request: pytest.FixtureRequest) -> Iterator[tuple[Place, Arrangement]]:
    """A cluster on the loopback of a network of its own, the one after the other is gone."""
    with passable() as root, own_network():
        place = OnLoopback(root, NODES)
        try:
            with explained(root):
                made = MADE[request.param](place)
            yield place, made
        finally:
            place.end()


@pytest.mark.timeout(3600)
def test_writes_are_back_after_a_kill_of_the_primary(there: tuple[Place, Arrangement]) -> None:
    place, cluster = there
    gaps = [kill(place, cluster, number) for number in range(FAILOVERS)]
    keep(Figure("kill", "loopback", cluster.name, seconds(gaps)))
    assert cluster.name != "srd" or median(gaps) <= 0.7


@pytest.mark.timeout(3600)
def test_the_primary_is_moved(there: tuple[Place, Arrangement]) -> None:
    place, cluster = there
    lasting = DEPOSED_SECONDS if cluster.name != "srd" else 0.5
    keep(Figure("reconnect", "loopback", cluster.name, seconds(reconnect(place, cluster, SWITCHOVERS))))
    moved = [move(place, cluster, number, lasting) for number in range(SWITCHOVERS)]
    lost, all_of = sum(each.lost for each in moved), sum(each.acknowledged for each in moved)
    keep(Figure("move", "loopback", cluster.name, f"{seconds([m.gap for m in moved])}; {lost} of {all_of} lost"))
    assert cluster.name != "srd" or lost == 0
    assert cluster.name != "srd" or median(m.gap for m in moved) <= 0.05
