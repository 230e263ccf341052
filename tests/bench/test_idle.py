"""What srd costs while nothing happens: memory and CPU of the three daemons of a cluster, on this machine's kernel.

For BENCH_IDLE_SECONDS (60; the figures in docs are of 600). Without IPsec, which this kernel may not have:
its loops read the kernel's policies every 10 s in between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles
from support.machine import CHECKOUT, Machine, machine

SECONDS = float(os.environ.get("BENCH_IDLE_SECONDS", "60"))
SETTLING_SECONDS = 15.0  # after the cluster is whole: the last first passes
NODES = ("redis-1", "redis-2", "redis-3")
DIRECTORIES = {"CONFIG": "etc", "STATE": "state", "RUN": "run", "LOG": "log"}
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machine]:
    """One machine with the daemons of three nodes, each a unit as srd.service is."""
    make_bundles(tmp_path, cluster_toml(nodes=len(NODES)))
    with machine() as made:
        there = Path(f"/proc/{made.init}/root")
        for node in NODES:
            shutil.copytree(tmp_path / "bundles" / node, there / "srv" / node / "etc")
            (there / "srv" / node).chmod(0o711)
            settings = [f"--setenv=SRD_{name}_DIR=/srv/{node}/{path}" for name, path in DIRECTORIES.items()]
            unit = ("--property=Type=notify", "--property=KillMode=process", "--property=WatchdogSec=20")
            made.run("systemd-run", f"--unit={node}", *unit, *settings, str(CHECKOUT / ".venv/bin/srd"), "run")
        made.wait(lambda: whole(made), "the cluster is whole")
        yield made


def whole(there: Machine) -> bool:
    """Whether no node has a condition but that of having no IPsec."""
    for number in range(1, len(NODES) + 1):
        said = there.run("curl", "-s", "-m", "5", f"http://127.0.1.{number}:8080/srd", check=False)
        if not said or {condition["code"] for condition in json.loads(said)["conditions"]} - {"ipsec_off"}:
            return False
    return True


def ticks(there: Machine, pid: str) -> int:
    """Return the CPU time of a process, in user and in system mode, in ticks."""
    fields = there.run("cat", f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def memory(there: Machine, pid: str) -> dict[str, float]:
    """Return MiB of a process: all that is resident, and what is its own and not a file's."""
    status = there.run("cat", f"/proc/{pid}/status")
    return {name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "RssAnon")}  # type: ignore[index]


@pytest.mark.timeout(300 + SECONDS)
def test_idle(cluster: Machine) -> None:
    pids = {node: cluster.show(node, "MainPID") for node in NODES}
    time.sleep(SETTLING_SECONDS)
    before = {node: ticks(cluster, pid) for node, pid in pids.items()}
    began = time.monotonic()
    time.sleep(SECONDS)
    elapsed = time.monotonic() - began
    for node, pid in pids.items():
        share = (ticks(cluster, pid) - before[node]) / TICKS / elapsed
        size = memory(cluster, pid)
        print(  # noqa: T201 - figures for people
            f"\n{node} over {elapsed:.0f} s: {share:.2%} of a core, "
            f"{size['VmRSS']:.1f} MiB resident, {size['RssAnon']:.1f} MiB of it its own"
        )
        assert share < 0.05
        assert size["VmRSS"] < 120
    assert whole(cluster)
    assert {node: cluster.show(node, "MainPID") for node in NODES} == pids
