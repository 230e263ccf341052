"""What is done to the primary of three nodes: run in the lab by tests/bench/primacy/suite; with KERNELS=3 on machines.

LAB_BENCH_FAILOVERS, LAB_BENCH_SILENCES and LAB_BENCH_SWITCHOVERS are how often; `make bench` has 20, 10 and 20.
"""

from __future__ import annotations

import os
from statistics import median

from bench.primacy.conftest import Plainly
from bench.primacy.figures import Figure, keep, seconds
from bench.primacy.managed import Arrangement
from bench.primacy.managed_in_lab import ManagedInLab
from bench.primacy.measures import DEPOSED_SECONDS, KEYS, Moved, kill, move, reconnect, restart, silence
from bench.primacy.places import InLab

FAILOVERS = int(os.environ.get("LAB_BENCH_FAILOVERS", "3"))
SILENCES = int(os.environ.get("LAB_BENCH_SILENCES", "2"))
SWITCHOVERS = int(os.environ.get("LAB_BENCH_SWITCHOVERS", "3"))
SETTLED_SECONDS = 2.0
WHERE = "lab, a kernel for each node" if int(os.environ.get("LAB_KERNELS", "0")) else "lab"
IN_MEMORY = 'save ""\nappendonly no\n'


def note(row: str, cluster: Arrangement, text: str) -> None:
    keep(Figure(row, WHERE, cluster.name, text))


def note_moves(cluster: Arrangement, moved: list[Moved]) -> None:
    lost, every = sum(each.lost for each in moved), sum(each.acknowledged for each in moved)
    note("move", cluster, f"{seconds([each.gap for each in moved])}; {lost} of {every} lost")


def test_plain_sentinel(plain: Plainly) -> None:
    place, cluster = plain()
    note("kill", cluster, seconds([kill(place, cluster, number) for number in range(FAILOVERS)]))
    note("silence", cluster, seconds([silence(place, cluster, number) for number in range(SILENCES)]))
    note_moves(cluster, [move(place, cluster, number, DEPOSED_SECONDS) for number in range(SWITCHOVERS)])


def test_plain_sentinel_without_persistence(plain: Plainly) -> None:
    place, cluster = plain(IN_MEMORY)
    note("restart", cluster, f"{restart(place, cluster, DEPOSED_SECONDS)} of {KEYS} keys lost")


def test_srd_after_a_kill_of_the_primary(srd: tuple[InLab, ManagedInLab]) -> None:
    place, cluster = srd
    gaps = [kill(place, cluster, number) for number in range(FAILOVERS)]
    note("kill", cluster, seconds(gaps))
    assert median(gaps) <= 1.0
    assert max(gaps) <= 2.0


def test_srd_after_a_silent_loss_of_the_primarys_node(srd: tuple[InLab, ManagedInLab]) -> None:
    place, cluster = srd
    gaps = [silence(place, cluster, number) for number in range(SILENCES)]
    note("silence", cluster, seconds(gaps))
    assert median(gaps) <= 4.0


def test_srd_at_a_switchover(srd: tuple[InLab, ManagedInLab]) -> None:
    place, cluster = srd
    note("reconnect", cluster, seconds(reconnect(place, cluster, SWITCHOVERS)))
    moved = [move(place, cluster, number, SETTLED_SECONDS) for number in range(SWITCHOVERS)]
    note_moves(cluster, moved)
    assert sum(each.lost for each in moved) == 0
    assert median(each.gap for each in moved) <= 0.05


def test_srd_without_persistence(srd: tuple[InLab, ManagedInLab]) -> None:
    place, cluster = srd
    cluster.without_persistence()
    lost = restart(place, cluster, SETTLED_SECONDS)
    note("restart", cluster, f"{lost} of {KEYS} keys lost")
    assert lost == 0
