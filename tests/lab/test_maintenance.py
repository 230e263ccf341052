"""Nodes are worked on, under a client that writes all the time: drained and taken back, and the cluster paused."""

from __future__ import annotations

import csv
import os
import signal
import socket
from pathlib import Path

from support.lab import Lab, kept, outcome, writer

DRAINS = int(os.environ.get("LAB_DRAINS", "2"))
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


def pauses(lab: Lab) -> list[bool]:
    return [lab.get(node, "/srd").body["pause"] for node in lab.nodes]


def test_a_paused_cluster_starts_nothing_again_and_every_node_knows(lab: Lab) -> None:
    lab.wait_whole()
    first = lab.primary()
    second, away = (node for node in lab.nodes if node != first)
    os.kill(lab.srd_pid(away), signal.SIGKILL)
    said = lab.on(second, "srd", "pause", "--for", "1h").stdout
    try:
        assert f"{away} does not know yet" in said
        lab.start_srd(away)
        lab.wait(lambda: pauses(lab) == [True] * len(lab.nodes), "every node knows")
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
