"""The primary is moved on purpose, under a client that writes all the time: nothing is lost, hardly anything waits."""

from __future__ import annotations

import os
import re
import signal
import statistics
from pathlib import Path

from support.lab import Lab, kept, outcome, writer

SWITCHOVERS = int(os.environ.get("LAB_SWITCHOVERS", "2"))


def test_the_primary_is_moved_without_losing_a_write(lab: Lab) -> None:
    gaps, seen = [], []
    for number in range(SWITCHOVERS):
        lab.wait_whole()
        first = lab.primary()
        writing = writer("for", "8", "0")
        asked = lab.nodes[number % len(lab.nodes)]  # whichever node it is said on
        said = lab.on(asked, "srd", "switchover").stdout
        begun, ended = said.splitlines()
        assert begun.startswith(f"nothing speaks against it: the primary moves from {first} to "), said
        found = re.fullmatch(r"(\S+) is primary instead of (\S+): no write was taken for (\d+) ms .*", ended)
        assert found is not None, said
        assert found[2] == first
        done = outcome(writing)
        assert lab.primary() == found[1]
        assert kept(lab, done) == done["acknowledged"] > 0
        gaps.append(int(found[3]))
        seen.append(round(done["longest_gap_seconds"] * 1000))
    lab.wait_whole()
    figures = f"median {statistics.median(gaps):.0f} ms by srd, {statistics.median(seen):.0f} ms as the client saw it"
    print(f"\n{SWITCHOVERS} switchovers, no write lost: {figures}; {gaps}, {seen}")  # noqa: T201 - for people
    assert statistics.median(seen) < 1000


def test_a_switchover_to_a_node_that_is_not_fit_changes_nothing(lab: Lab) -> None:
    lab.wait_whole()
    first = lab.primary()
    refused = lab.on(first, "srd", "switchover", "--to", first, check=False)
    assert refused.returncode == 40, refused.stderr
    assert lab.on(first, "srd", "switchover", "--dry-run").stdout.startswith(f"the primary would move from {first} to ")
    assert lab.primary() == first


def test_a_primary_whose_node_is_stopped_is_moved_away_first(lab: Lab) -> None:
    lab.wait_whole()
    first = lab.primary()
    writing = writer("for", "20", "0")
    os.kill(lab.srd_pid(first), signal.SIGTERM)
    lab.wait(lambda: not Path(f"/proc/{lab.srd_pid(first)}").exists(), "srd has ended")
    done = outcome(writing)
    lab.start_srd(first)
    lab.wait_whole()
    print(f"\na primary's node was stopped: {done}")  # noqa: T201 - for people
    assert lab.primary() != first
    assert kept(lab, done) == done["acknowledged"] > 0
    assert done["longest_gap_seconds"] < 4.0, "it was no failover"
