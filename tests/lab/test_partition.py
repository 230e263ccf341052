"""Jepsen's partition in short: primary and writer in the minority, of three nodes. tests/bench/primacy has five."""

from __future__ import annotations

from pathlib import Path

from bench.primacy.managed_in_lab import ManagedInLab
from bench.primacy.measures import part
from bench.primacy.places import InLab
from support.lab import Lab

WRITES, SECONDS = 500, 6.0
FENCED_SECONDS = 3.0


def test_a_primary_in_a_minority_loses_what_it_took_before_its_fence_and_nothing_that_a_replica_confirmed(
    lab: Lab, tmp_path: Path
) -> None:
    plain, confirmed = part(InLab(tmp_path, lab.nodes), ManagedInLab(lab), (0, 1), writes=WRITES, seconds=SECONDS)
    print(f"\nin a minority: {plain}, {confirmed}")  # noqa: T201 - for people
    assert plain.last <= FENCED_SECONDS
    assert plain.lost <= plain.acknowledged < WRITES
    assert confirmed.lost == 0
