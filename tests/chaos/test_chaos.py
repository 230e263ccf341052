"""Walks of faults: a short one, and those of walks/, which have failed before.

LAB_CHAOS_SEED and LAB_CHAOS_FAULTS, or LAB_CHAOS_WALK, a file, make it another walk (`make chaos`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chaos.faults import KINDS, MACHINE_KINDS
from chaos.plan import Plan, load, plan
from chaos.walk import keep, walk_through
from chaos.world import World

SEED = int(os.environ.get("LAB_CHAOS_SEED") or 1)
# The deck deals each kind once in so many (chaos/plan.py).
FAULTS = int(os.environ.get("LAB_CHAOS_FAULTS") or len(KINDS))
NODES = int(os.environ["LAB_NODES"])
MACHINES = bool(int(os.environ["LAB_KERNELS"]))
# A fault, and what follows it, where a cluster is slow to recover.
FAULT_SECONDS = 150


def walks() -> dict[str, Plan]:
    """Return what there is to do, by name."""
    if file := os.environ.get("LAB_CHAOS_WALK"):
        return {Path(file).stem: load(Path(file).read_text())}
    found = {f"seed-{SEED}": plan(SEED, FAULTS, NODES, MACHINE_KINDS if MACHINES else KINDS)}
    if "LAB_CHAOS_SEED" not in os.environ:
        found |= {
            path.stem: load(path.read_text()) for path in sorted(Path(__file__).with_name("walks").glob("*.json"))
        }
    return {name: walk for name, walk in found.items() if walk.nodes == NODES}


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("name", "walk"),
    [
        pytest.param(name, walk, id=name, marks=pytest.mark.timeout(600 + walk.faults * FAULT_SECONDS))
        for name, walk in walks().items()
    ],
)
def test_a_walk_of_faults_breaks_no_promise(world: World, name: str, walk: Plan) -> None:
    directory = Path("/var/lab/chaos") / name
    print(f"\n{name}, {walk.faults} faults, {walk.nodes} nodes")  # noqa: T201 - to do it again
    try:
        done = walk_through(world, walk, directory)
    finally:
        keep(world, directory, Path(f"/host/chaos-{name}"))
    print(json.dumps(done.document()))  # noqa: T201 - figures for people
    assert done.violations == []
