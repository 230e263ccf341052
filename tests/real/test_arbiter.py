"""Two redis nodes and an arbiter: a primary that dies is replaced, one that is cut off takes no writes, and reloads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from redis.exceptions import RedisError
from support.whole import Whole, whole

from srd.config import node_entry
from srd.model import Service


@pytest.fixture
def cluster() -> Iterator[Whole]:
    """n1, the primary, n2 and the arbiter n3."""
    with whole("redis", "redis", "sentinel") as made:
        made.power_on(*made.names)
        made.wait_whole()
        assert made.wait_primary() == "n1"
        made.ask("n1", "SET", "key", "before")
        made.ask("n1", "WAIT", 1, 5000)
        yield made


def takes_writes(cluster: Whole, name: str) -> bool:
    try:
        return bool(cluster.ask(name, "SET", "key", "after"))
    except RedisError:
        return False


def test_a_primary_that_dies_is_replaced_and_writes_go_on_when_it_is_back(cluster: Whole) -> None:
    cluster.kill("n1", Service.REDIS)
    assert cluster.wait_primary("n2") == "n2"
    assert cluster.ask("n2", "GET", "key") == "before"
    cluster.wait_whole()
    assert takes_writes(cluster, "n2")


def test_a_primarys_node_that_is_lost_is_replaced_and_without_a_copy_nothing_is_written(cluster: Whole) -> None:
    cluster.power_off("n1")
    assert cluster.wait_primary("n2") == "n2"
    assert cluster.ask("n2", "GET", "key") == "before"
    assert not takes_writes(cluster, "n2"), "min-replicas-to-write is 1"
    cluster.power_on("n1")
    cluster.wait_whole()
    assert takes_writes(cluster, "n2")


def test_the_arbiter_may_be_lost(cluster: Whole) -> None:
    cluster.power_off("n3")
    cluster.wait(lambda: "channel_down" in cluster.codes("n1"), "n1 misses it")
    assert cluster.primaries() == ["n1"]
    assert takes_writes(cluster, "n1")


def test_a_primary_alone_is_fenced_and_says_no(cluster: Whole) -> None:
    """n2 and n3 hang, as if the primary's cable were pulled: nobody of them answers it."""
    stopped = [pid for name in ("n2", "n3") for pid in (cluster.running[name].pid, *cluster.children(name))]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        cluster.wait(lambda: not takes_writes(cluster, "n1") and not cluster.primaries(), "n1 is fenced", 10)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    cluster.wait_whole()
    (leader,) = cluster.primaries()
    assert takes_writes(cluster, leader)


def reload(cluster: Whole, name: str, more: str) -> subprocess.CompletedProcess[str]:
    paths = cluster.paths(name)
    text = paths.cluster_file.read_text()
    paths.cluster_file.write_text(text + more)
    try:
        return subprocess.run(
            [sys.executable, "-m", "srd", "reload"],
            env={"PATH": os.environ["PATH"], "SRD_RUN_DIR": str(paths.run_dir)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        paths.cluster_file.write_text(text)


def test_a_reload_takes_one_more_voter_and_no_two(cluster: Whole) -> None:
    fourth, fifth = (node_entry(f"n{number}", [f"127.0.1.{number}"]) for number in (4, 5))
    refused = reload(cluster, "n1", fourth + fifth)
    assert refused.returncode != 0
    assert "n4 and n5 come or go at once" in refused.stderr
    assert "change one node at a time" in refused.stderr
    assert reload(cluster, "n1", fourth).returncode == 0
    again = reload(cluster, "n1", fifth)
    assert "n4 and n5 come or go at once" in again.stderr, "one in another's place is two"
    assert reload(cluster, "n1", "").returncode == 0


def test_five_nodes_lose_two_and_go_on() -> None:
    with whole(*("redis",) * 5) as five:
        five.power_on(*five.names)
        five.wait_whole()
        assert five.wait_primary() == "n1"
        five.ask("n1", "SET", "key", "before")
        five.ask("n1", "WAIT", 4, 5000)
        five.power_off("n1", "n2")
        leader = five.wait_primary("n3", "n4", "n5")
        five.wait(lambda: takes_writes(five, leader), "writes with two replicas")
        five.power_on("n1", "n2")
        five.wait_whole()
        assert {five.ask(name, "GET", "key") for name in five.names} == {"after"}
