"""srd as a unit on every machine of a cluster: its deaths and restarts are noticed by no client, a stop is a stop.

How often it is killed is said by LAB_SRD_KILLS.
"""

from __future__ import annotations

import os
import statistics

import pytest
from support.lab import FAMILIES, spis, xfrm_errors
from support.machines import SERVICES, Machines, writing

KILLS = int(os.environ.get("LAB_SRD_KILLS", "3"))
KILL_SECONDS = 60  # a death, and what follows it, where a start of srd takes 8 s


def back(lab: Machines, node: str, former: str) -> bool:
    state, pid = lab.show(node, "ActiveState", "MainPID")
    return state == "active" and pid not in ("0", former)


@pytest.mark.timeout(300 + KILLS * KILL_SECONDS)
def test_srd_is_killed_and_no_client_and_no_child_notices(lab: Machines) -> None:
    lab.wait_whole()
    primary = lab.primary()
    children = {node: lab.pids(node) for node in lab.nodes}
    errors = {node: xfrm_errors(lab, node) for node in lab.nodes}
    seconds = []
    with writing() as (client, written):
        for number in range(KILLS):
            # The primary's first, and each node's in turn.
            node = (primary, *(other for other in lab.nodes if other != primary))[number % len(lab.nodes)]
            # Those of a death before may be in their grace still.
            each_once = 2 * len(FAMILIES) * (len(lab.nodes) - 1)
            lab.wait(lambda node=node, each_once=each_once: len(spis(lab, node)) == each_once, "one SA a direction")
            keys = spis(lab, node)
            (former,) = lab.show(node, "MainPID")
            lab.on(node, "kill", "-KILL", former)
            assert spis(lab, node) == keys, "the keys of the dead one stay"
            lab.wait(lambda node=node, former=former: back(lab, node, former), f"number {number}: another srd is ready")
            seconds.append(lab.moment(node, "srd", "ActiveEnter") - lab.moment(node, "srd", "ActiveExit"))
            assert lab.pids(node) == children[node]
            assert all(child["adopted"] for child in lab.children(node).values())
            before = client.ask("count")
            lab.wait(lambda: not lab.conditions(), f"number {number}: all is well again")
            lab.wait(lambda before=before: client.ask("count") > before, "writes go on")
        missing = client.ask("missing")
    print(  # noqa: T201 - figures for people
        f"\nsrd killed {KILLS} times, from its end to READY with its children adopted: median "
        f"{statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} s; {written.figures}"
    )
    assert written.failed == 0, written.figures
    assert missing == []
    assert lab.primary() == primary
    assert {node: xfrm_errors(lab, node) for node in lab.nodes} == errors


def test_a_restart_keeps_the_children_and_a_stop_ends_them(lab: Machines) -> None:
    lab.wait_whole()
    primary = lab.primary()
    children = lab.pids(primary)
    with writing() as (_client, written):
        lab.on(primary, "systemctl", "restart", "srd")
        assert lab.pids(primary) == children
        lab.wait_whole()
    assert written.failed == 0, written.figures
    assert lab.primary() == primary

    node = next(node for node in lab.nodes if node != primary)
    children, keys = lab.pids(node), spis(lab, node)
    with writing() as (_client, written):
        lab.on(node, "systemctl", "stop", "srd")
        assert lab.show(node, "Result") == ("success",)
        alive = lab.on(node, "ps", "-o", "comm=", "-p", ",".join(map(str, children.values())), check=False).stdout
        assert alive == ""
        assert spis(lab, node) <= keys, "no new keys"
        assert not lab.reaches("client", node, 8080)
        assert not lab.reaches("client", node, 6380)
        lab.on(node, "systemctl", "start", "--no-block", "srd")
        lab.wait_whole()
    assert set(lab.pids(node)) == set(SERVICES)
    assert not set(lab.pids(node).values()) & set(children.values())
    assert written.failed == 0, written.figures
