"""A node is taken out of service, under a client that writes all the time: it notices nothing but a pause."""

from __future__ import annotations

import csv
import os
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
