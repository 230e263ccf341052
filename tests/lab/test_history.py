"""What the nodes of a cluster say of its changes of primary: all the same, and a srd that is killed forgets nothing."""

from __future__ import annotations

import os
import signal
from typing import Any

from support.lab import Lab


def last(lab: Lab, node: str) -> dict[str, Any]:
    (event,) = lab.srd(node, "events")["events"][-1:]
    return dict(event)


def agreed(lab: Lab, kind: str, since: int) -> dict[str, Any] | None:
    """Return the last change if it is of this kind, after this epoch, complete, and the same on every node."""
    told = [last(lab, node) for node in lab.nodes]
    complete = told[0]["epoch"] > since and told[0]["kind"] == kind and told[0]["write_gap_seconds"] is not None
    return told[0] if complete and all(event == told[0] for event in told) else None


def test_every_node_tells_the_same_of_a_crash_and_of_a_switchover(lab: Lab) -> None:
    lab.wait_whole()
    first, before = lab.primary(), last(lab, lab.nodes[0])["epoch"]
    os.kill(lab.children(first)["redis"]["pid"], signal.SIGKILL)
    lab.wait(lambda: agreed(lab, "crash", before) is not None, "all nodes tell of the crash")
    crash = last(lab, first)
    assert (crash["from"]["node"], crash["to"]["node"], crash["by"]) == (first, lab.primary(), [first])
    assert crash["cause"] == "redis has ended: killed by SIGKILL"
    assert crash["lost_bytes"] is not None

    lab.wait_whole()
    move = ("srd", "switchover", "--to", first)
    # The sentinels may not have ended the failover yet.
    lab.wait(lambda: lab.on(first, *move, "--dry-run", check=False).returncode == 0, "nothing speaks against it")
    lab.on(first, *move)
    lab.wait(lambda: agreed(lab, "switchover", crash["epoch"]) is not None, "all nodes tell of the switchover")
    moved = last(lab, first)
    assert (moved["to"]["node"], moved["cause"]) == (first, f"srd switchover --to {first}")
    assert moved["by"][0].startswith(f"{first} (pid ")
    assert (moved["lost_bytes"], moved["lost_exactly"]) == (0, True)

    lab.wait_whole()
    told = lab.srd(first, "events")["events"]
    os.kill(lab.srd_pid(first), signal.SIGKILL)
    lab.start_srd(first)
    lab.wait_whole()
    assert lab.srd(first, "events")["events"] == told
    print("\n" + lab.on(first, "srd", "events").stdout)  # noqa: T201 - for people
