"""Nodes are worked on, under a client that writes all the time: drained and taken back, and the cluster paused."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from support.lab import Lab, kept, outcome, writer

ROLLS = int(os.environ.get("LAB_ROLLS", "1"))
DRAINS = int(os.environ.get("LAB_DRAINS", "1"))
ROLL_SECONDS = 240.0
BALANCER = Path("/var/lab/lb/run/haproxy/admin.sock")


def balancer_says(backend: str, node: str) -> str:
    """Return the balancer's word for a node: UP, DRAIN, DOWN, MAINT, each with more in some cases."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(10)
        asked.connect(str(BALANCER))
        asked.sendall(b"show stat\n")
        with asked.makefile() as answer:
            rows = csv.DictReader(answer.read().removeprefix("# ").splitlines())
    return next(row["status"] for row in rows if (row["pxname"], row["svname"]) == (backend, node))


def test_a_node_is_drained_without_losing_a_write_and_comes_back(lab: Lab) -> None:
    seen = []
    for _ in range(DRAINS):
        lab.wait_whole()
        first = lab.primary()
        writing = writer("for", "10", "0")
        said = lab.on(first, "srd", "drain").stdout.splitlines()
        try:
            successor = lab.primary()
            assert said[0].startswith(f"{successor} is primary instead of {first}: "), said
            assert said[1:] == ["drained"]
            assert lab.on(first, "srd", "drain").stdout == "drained\n"
            lab.wait(lambda first=first: balancer_says("redis_replicas", first).startswith("DRAIN"), "drained")
            assert balancer_says("redis_primary", successor).startswith("UP")
            assert lab.get(first, "/replica").body["error_code"] == "drained"
            assert lab.get(first, "/health").status == 200
            listed = {member["node"]: member["drained"] for member in lab.srd(successor, "list")["members"]}
            assert listed == {node: node == first for node in lab.nodes}
            refused = lab.on(successor, "srd", "switchover", "--to", first, check=False)
            assert (refused.returncode, f"{first} is drained" in refused.stderr) == (40, True), refused.stderr
        finally:
            assert lab.on(first, "srd", "undrain").stdout == "in service\n"
        lab.wait(lambda first=first: balancer_says("redis_replicas", first).startswith("UP"), "in service again")
        done = outcome(writing)
        assert kept(lab, done) == done["acknowledged"] > 0
        seen.append(done["longest_gap_seconds"])
    lab.wait_whole()
    print(f"\n{DRAINS} primaries drained, no write lost; the longest gaps: {seen} s")  # noqa: T201 - for people


def all_paused(lab: Lab) -> bool:
    answers = [lab.get(node, "/srd") for node in lab.nodes]
    return all(answer.status == 200 and answer.body["pause"] for answer in answers)


def test_a_paused_cluster_starts_nothing_again_and_every_node_knows(lab: Lab) -> None:
    lab.wait_whole()
    first = lab.primary()
    second, away = (node for node in lab.nodes if node != first)
    os.kill(lab.srd_pid(away), signal.SIGKILL)
    said = lab.on(second, "srd", "pause", "--for", "1h").stdout
    try:
        assert f"{away} does not know yet" in said
        lab.start_srd(away)
        lab.wait(lambda: all_paused(lab), "every node knows")
        os.kill(lab.children(away)["redis"]["pid"], signal.SIGKILL)
        lab.wait(lambda: "pause" in (lab.children(away)["redis"]["waiting_for"] or ""), "it stays down")
        assert {f"{node}: paused lab" for node in lab.nodes} <= set(lab.conditions())
        assert lab.on(away, "srd", "restart", "redis").returncode == 0, "a person may start it"
        os.kill(lab.children(away)["stunnel"]["pid"], signal.SIGKILL)
        lab.wait(lambda: lab.children(away)["stunnel"]["waiting_for"] is not None, "it stays down, too")
        assert lab.primary() == first
    finally:
        assert lab.on(first, "srd", "resume").stdout == "not paused\n"
    lab.wait_whole()


def pids(lab: Lab, service: str) -> dict[str, int]:
    return {node: lab.children(node)[service]["pid"] for node in lab.nodes}


@pytest.mark.timeout(200 + 200 * ROLLS)
def test_redis_is_restarted_on_every_node_without_losing_a_write(lab: Lab) -> None:
    seen = []
    for number in range(ROLLS):
        lab.wait_whole()
        first, before, sentinels = lab.primary(), pids(lab, "redis"), pids(lab, "sentinel")
        asked = lab.nodes[number % len(lab.nodes)]
        planned = lab.on(asked, "srd", "rolling", "restart", "--only", "redis", "--dry-run").stdout.splitlines()
        others = [node for node in lab.nodes if node != first]
        assert planned == [*(f"{node}: redis" for node in others), f"{first}: the primary moves away, redis"]
        assert pids(lab, "redis") == before
        writing = writer("for", "60", "0")
        began = time.monotonic()
        restart = ("srd", "rolling", "restart", "--only", "redis")
        ended = lab.on(asked, *restart, check=False, seconds=ROLL_SECONDS)
        said = ended.stdout
        took = time.monotonic() - began
        assert ended.returncode == 0, f"{said}{ended.stderr}"
        moved = re.search(rf"^(\S+) is primary instead of {first}: ", said, re.MULTILINE)
        assert moved is not None, said
        assert re.findall(r"^(\S+): redis is back after ", said, re.MULTILINE) == [*others, first]
        assert said.splitlines()[-1].startswith(f"{first}: it is whole, and so is the cluster, after ")
        assert lab.primary() == moved[1]
        after = pids(lab, "redis")
        assert all(after[node] != before[node] for node in lab.nodes)
        assert pids(lab, "sentinel") == sentinels
        done = outcome(writing)
        assert kept(lab, done) == done["acknowledged"] > 0
        seen.append((round(took, 1), done["longest_gap_seconds"], done["failed"]))
    lab.wait_whole()
    print(f"\nredis restarted on {len(lab.nodes)} nodes, no write lost: (seconds, longest gap, failed writes) {seen}")  # noqa: T201 - for people


def test_a_node_that_does_not_come_back_whole_ends_it_and_nothing_else_is_touched(lab: Lab) -> None:
    """A redis ends, starts and reads its data: no machine is so fast that it would be back in 0.01 s."""
    lab.wait_whole()
    first, before = lab.primary(), pids(lab, "redis")
    impatient = ("srd", "rolling", "restart", "--only", "redis", "--timeout", "0.01")
    ended = lab.on(first, *impatient, check=False)
    victim = next(node for node in lab.nodes if node != first)
    assert ended.returncode == 1, ended
    assert f"cannot go on after {victim}: not within 0.01 s" in ended.stderr
    lab.wait_whole()
    after = pids(lab, "redis")
    assert {node for node in lab.nodes if after[node] != before[node]} == {victim}
    assert lab.primary() == first


def test_a_rolling_restart_does_not_begin_while_a_node_is_away(lab: Lab) -> None:
    lab.wait_whole()
    away, before = lab.nodes[-1], pids(lab, "redis")
    os.kill(lab.srd_pid(away), signal.SIGKILL)
    refused = lab.on(lab.nodes[0], "srd", "rolling", "restart", check=False)
    lab.start_srd(away)
    assert (refused.returncode, "not whole" in refused.stderr) == (40, True), refused.stderr
    lab.wait_whole()
    assert pids(lab, "redis") == before


def test_without_a_service_manager_srd_itself_is_not_restarted(lab: Lab) -> None:
    refused = lab.on(lab.nodes[0], "srd", "rolling", "restart", "--only", "srd", check=False)
    assert refused.returncode in (1, 40)
    assert "no service manager would start it again" in refused.stderr
