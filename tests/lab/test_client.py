"""A client that joins the mesh by its certificate alone, and is put out by its serial number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lab import FAMILIES, Lab, edited, pinging, spis

BUNDLES = Path("/var/lab/bundles")
STATION, NAME = "client", "app-1"


@pytest.fixture
def app(lab: Lab) -> Iterator[str]:
    """The lab's client with the bundle of a mesh member; in the end it is a host outside again."""
    lab.wait_whole()
    addresses = ",".join(lab.address(STATION, family) for family in FAMILIES)
    subprocess.run(
        ["srd", "node", "add", str(BUNDLES), f"{NAME}={addresses}", "--kind", "client"], check=True, capture_output=True
    )
    shutil.copytree(BUNDLES / NAME, f"/var/lab/{STATION}/etc/srd", dirs_exist_ok=True)
    lab.start_srd(STATION)
    yield NAME
    os.kill(lab.srd_pid(STATION), signal.SIGTERM)
    lab.wait(lambda: not Path(f"/proc/{lab.srd_pid(STATION)}").exists(), "the client's srd has ended")
    lab.on(STATION, "srd", "teardown", "--yes")
    lab.wait_whole()  # asked from there


def links(lab: Lab, node: str) -> dict[str, bool]:
    return {link["peer"]: link["protected"] for link in lab.srd(node, "links").get("links", ())}


def test_a_client_joins_live_reads_redis_inside_esp_survives_a_restart_and_is_put_out(lab: Lab, app: str) -> None:
    node, peer, *_ = lab.nodes
    with pinging(node, peer, "0.02") as flow:
        lab.wait(lambda: links(lab, STATION) == dict.fromkeys(lab.nodes, True), "the client is keyed with every node")
        assert all(links(lab, other)[app] for other in lab.nodes)
        assert lab.srd(STATION, "status")["health"] == "ok"
        # Straight to redis, which no host outside the mesh reaches.
        assert lab.on(STATION, "redis-cli", "-h", node, "ping").stdout == "PONG\n"

        before = spis(lab, node)
        os.kill(lab.srd_pid(node), signal.SIGKILL)
        assert spis(lab, node) == before
        assert lab.on(STATION, "redis-cli", "-h", node, "ping").stdout == "PONG\n"
        lab.start_srd(node)
        lab.wait(lambda: links(lab, node).get(app, False), "a restarted srd knows the client")
        assert lab.on(STATION, "redis-cli", "-h", node, "ping").stdout == "PONG\n"
        lab.wait_whole()

        subprocess.run(["srd", "node", "revoke", str(BUNDLES), app], check=True, capture_output=True)
        edited(lab, lab.nodes, (BUNDLES / "cluster.toml").read_text())
        for other in lab.nodes:
            assert app not in links(lab, other)
        assert not lab.reaches(STATION, node, 6379)
        lab.wait(lambda: lab.srd(STATION, "status")["health"] == "degraded", "the client notices")
    assert flow.lost == 0
    assert flow.sent > 100
