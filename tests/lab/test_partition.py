"""Jepsen's partition in short: primary and writer in the minority, of three nodes. tests/bench/primacy has five."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench.primacy.managed_in_lab import ManagedInLab
from bench.primacy.measures import part
from bench.primacy.places import InLab
from support.lab import Lab

from srd.web import health

WRITES, SECONDS = 500, 6.0
FENCED_SECONDS = 3.0
# At most 4 s by replication.c; until that is seen a write, and the start of whoever writes it.
OWN_FENCE_SECONDS = 5.0


def test_a_primary_in_a_minority_loses_what_it_took_before_its_fence_and_nothing_that_a_replica_confirmed(
    lab: Lab, tmp_path: Path
) -> None:
    plain, confirmed = part(InLab(tmp_path, lab.nodes), ManagedInLab(lab), (0, 1), writes=WRITES, seconds=SECONDS)
    print(f"\nin a minority: {plain}, {confirmed}")  # noqa: T201 - for people
    assert plain.last <= FENCED_SECONDS
    assert plain.lost <= plain.acknowledged < WRITES
    assert confirmed.lost == 0


def test_a_primary_whose_srd_is_stopped_refuses_writes_by_itself_when_it_is_cut_off(lab: Lab, tmp_path: Path) -> None:
    """redis' own fence, which needs no srd: it has fallen before another node leads, and stays."""
    lab.wait_whole()
    primary = lab.primary()
    others = [node for node in lab.nodes if node != primary]

    def write() -> str:
        command = ("redis-cli", "-h", lab.address(primary), "set", "cut-off", "1")
        return lab.on(primary, *command, check=False).stdout.strip()

    srd = lab.srd_pid(primary)
    os.kill(srd, signal.SIGSTOP)
    try:
        assert write() == "OK"
        with InLab(tmp_path, lab.nodes).silent(primary) as cut:
            lab.wait(lambda: "NOREPLICAS" in write(), "redis refuses writes")
            refused = time.monotonic() - cut
            lab.wait(lambda: any(lab.get(node, "/primary").status == health.OK for node in others), "another one leads")
            assert "NOREPLICAS" in write()
    finally:
        os.kill(srd, signal.SIGCONT)
    lab.wait_whole()
    print(f"\nwithout its srd the primary refused writes {refused:.1f} s after the cut")  # noqa: T201 - for people
    assert refused <= OWN_FENCE_SECONDS
