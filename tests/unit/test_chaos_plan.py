"""tests/chaos/plan.py: a walk comes again from its seed, and never asks more of a cluster than it can bear."""

from __future__ import annotations

import pytest
from chaos.faults import KINDS, MACHINE_KINDS, Kind
from chaos.plan import load, minority, plan
from hypothesis import given
from hypothesis import strategies as st

CLUSTERS = st.integers(3, 10)
SEEDS = st.integers(0, 2**32)
BOTH = st.sampled_from([KINDS, MACHINE_KINDS])


@given(SEEDS, CLUSTERS)
def test_a_seed_gives_the_same_walk_again(seed: int, nodes: int) -> None:
    assert plan(seed, 50, nodes) == plan(seed, 50, nodes)
    assert plan(seed, 50, nodes) != plan(seed + 1, 50, nodes)


@given(SEEDS, st.integers(0, 60), CLUSTERS)
def test_a_walk_has_as_many_faults_as_were_asked_for(seed: int, faults: int, nodes: int) -> None:
    assert plan(seed, faults, nodes).faults == faults


@given(SEEDS, CLUSTERS, BOTH)
def test_no_step_impairs_more_nodes_than_a_minority(seed: int, nodes: int, kinds: dict[str, Kind]) -> None:
    for step in plan(seed, 100, nodes, kinds).steps:
        impaired = {victim for draw in step.draws if kinds[draw.kind].impairs for victim in draw.victims}
        assert len(impaired) <= minority(nodes)
        assert all(0 <= victim < nodes for draw in step.draws for victim in draw.victims)


@given(SEEDS, CLUSTERS, BOTH)
def test_a_fault_is_one_of_its_kind(seed: int, nodes: int, kinds: dict[str, Kind]) -> None:
    for step in plan(seed, 100, nodes, kinds).steps:
        for draw in step.draws:
            kind = kinds[draw.kind]
            assert draw.choice in kind.choices
            assert kind.lasting[0] <= draw.seconds <= kind.lasting[1]
        assert len({draw.kind for draw in step.draws}) == len(step.draws)


@pytest.mark.parametrize("kinds", [KINDS, MACHINE_KINDS], ids=["namespaces", "machines"])
def test_a_walk_comes_to_every_kind_of_fault(kinds: dict[str, Kind]) -> None:
    assert {draw.kind for step in plan(1, len(kinds), 3, kinds).steps for draw in step.draws} == set(kinds)


@given(SEEDS, CLUSTERS)
def test_a_walk_is_read_as_it_was_written(seed: int, nodes: int) -> None:
    walk = plan(seed, 20, nodes)
    assert load(walk.dump()) == walk


@pytest.mark.parametrize("text", ["", "{}", '{"nodes": 3, "steps": [{}]}'])
def test_what_is_no_walk_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        load(text)


@pytest.mark.parametrize(("nodes", "impaired"), [(3, 1), (4, 1), (5, 2), (10, 4)])
def test_a_minority(nodes: int, impaired: int) -> None:
    assert minority(nodes) == impaired
