"""Jepsen's partition of 2013: five nodes, the primary in the minority with a writer. Run by tests/bench/primacy/suite.

Two writers go on beside it, whose writes are confirmed by one replica and by two. A replica of the five is in the
minority with the primary, so one confirmation may be its own: it is two (WAIT 2) that with the primary are a majority.
"""

from __future__ import annotations

from bench.primacy.conftest import Plainly
from bench.primacy.figures import Figure, keep
from bench.primacy.managed import Arrangement
from bench.primacy.managed_in_lab import ManagedInLab
from bench.primacy.measures import DEPOSED_SECONDS, Parted, part
from bench.primacy.places import InLab

MAJORITY = 2  # replicas that are more than half of five nodes, with the primary
FENCED_SECONDS = 3.0


def note(row: str, cluster: Arrangement, parted: list[Parted]) -> None:
    for each in parted:
        how = f" with WAIT {each.confirmations}" if each.confirmations else ""
        last = f", the last one {each.last:.2f} s after the cut" if each.lost else ""
        text = f"{each.lost} of {each.acknowledged}{how}{last} ({each.tried} tried in {each.seconds:.0f} s)"
        keep(Figure(row if not each.confirmations else f"{row}-{each.confirmations}", "lab", cluster.name, text))


def test_plain_sentinel(plain: Plainly) -> None:
    place, cluster = plain()
    note("part", cluster, part(place, cluster, (0, 1, MAJORITY), lasting=DEPOSED_SECONDS))


def test_srd(srd: tuple[InLab, ManagedInLab]) -> None:
    place, cluster = srd
    parted = part(place, cluster, (0, 1, MAJORITY))
    note("part", cluster, parted)
    plain, _, confirmed = parted
    assert plain.last <= FENCED_SECONDS
    assert confirmed.lost == 0


def test_srd_with_the_primary_alone(srd: tuple[InLab, ManagedInLab]) -> None:
    """Then one confirmation is a majority's: no replica is with the primary."""
    place, cluster = srd
    parted = part(place, cluster, (0, 1), alone=True)
    note("alone", cluster, parted)
    plain, confirmed = parted
    assert plain.last <= FENCED_SECONDS
    assert confirmed.lost == 0
