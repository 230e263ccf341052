"""srd dies at every moment of a rekey, and nobody but srd notices: packets pass, no keys stay behind.

The number of deaths is that of LAB_KILLS.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from support.lab import FAMILIES, PATIENCE_SECONDS, Lab, pinging, xfrm, xfrm_errors

from srd.control import client
from srd.ipsec.mesh import GRACE_SECONDS
from srd.ipsec.policies import UNKEYED_SPI
from srd.model import SrdError

KILLS = int(os.environ.get("LAB_KILLS", "2"))
# A death and what follows it, on the lab's slow CPU.
KILL_SECONDS = 60
INTERVAL_SECONDS = 0.05


def rekey(leader: str) -> None:
    """Have the node renew its keys with all peers; return when they are in use, or its srd is gone."""
    control = Path(f"/var/lab/{leader}/run/srd/control.sock")
    with contextlib.suppress(SrdError):
        client.post(control, f"/v1/rekey?wait={PATIENCE_SECONDS:g}", timeout=PATIENCE_SECONDS)


def sas(lab: Lab, node: str) -> list[tuple[str, ...]]:
    """Return source, destination and SPI of each SA that a node has."""
    return re.findall(r"^src (\S+) dst (\S+)\s+proto esp spi (\S+)", xfrm(lab, node, "state"), re.MULTILINE)


def pins(lab: Lab, node: str) -> set[int]:
    """Return the SPIs that a node sends under."""
    found = re.findall(r" spi (0x[0-9a-f]+) ", xfrm(lab, node, "policy"))
    return {int(spi, 16) for spi in found} - {UNKEYED_SPI}


def each_twice(lab: Lab) -> bool:
    """Whether each direction of each pair has one SA, which both ends have."""
    found = collections.Counter(sa for node in lab.nodes for sa in sas(lab, node))
    directions = {(source, destination) for source, destination, _ in found}
    pairs = len(lab.nodes) * (len(lab.nodes) - 1) * len(FAMILIES)
    return set(found.values()) == {2} and len(found) == len(directions) == pairs


@pytest.mark.timeout(300 + KILLS * KILL_SECONDS)
def test_srd_is_killed_at_any_moment_of_a_rekey_and_no_packet_is_lost(lab: Lab) -> None:
    lab.wait_whole()
    leader, middle, led = lab.nodes  # the smaller name leads
    rng = random.Random(50)
    started = time.monotonic()
    rekey(leader)
    longest = time.monotonic() - started
    caught: collections.Counter[str] = collections.Counter()
    errors = {node: xfrm_errors(lab, node) for node in lab.nodes}
    pinned = (len(lab.nodes) - 1) * len(FAMILIES)
    flows = ((leader, middle), (middle, led), (led, leader))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        counted = [stack.enter_context(pinging(node, peer, str(INTERVAL_SECONDS))) for node, peer in flows]
        for number in range(KILLS):
            victim = (leader, led)[number % 2]
            before = pins(lab, victim)
            asking = threading.Thread(target=rekey, args=(leader,))
            asking.start()
            time.sleep(rng.uniform(0, longest))  # the moment of death
            os.kill(lab.srd_pid(victim), signal.SIGKILL)
            left, have = pins(lab, victim), len(sas(lab, victim))
            caught[f"{len(left - before)} of {pinned} pins new, {have} SAs"] += 1
            lab.start_srd(victim)
            lab.wait(
                lambda victim=victim, left=left: len(now := pins(lab, victim)) == pinned and not now & left,
                f"number {number}: {victim} has new keys with both peers",
            )
            asking.join()
            lab.wait(lambda: not lab.conditions(), f"number {number}: all is well again")
        waited = lab.wait(lambda: each_twice(lab), "one SA for each direction of each pair")
    seconds = time.monotonic() - began
    lost = {flow: result.missing for flow, result in zip(flows, counted, strict=True)}
    sent = sum(result.sent for result in counted)
    print(  # noqa: T201 - figures for people
        f"\nsrd killed {KILLS} times within {longest:.2f} s of a rekey: {dict(caught)}; "
        f"{sent} packets in {seconds:.0f} s, lost {lost}; "
        f"one SA a direction within {waited:.1f} s (grace {GRACE_SECONDS:g} s)"
    )
    assert not any(lost.values()), lost
    assert all(result.sent > seconds / INTERVAL_SECONDS / 4 for result in counted), "a flow has paused"
    assert {node: xfrm_errors(lab, node) for node in lab.nodes} == errors
    lab.wait_whole()
