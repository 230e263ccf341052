"""Who may be primary after this node, on purpose: what speaks against whom, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.situations import NOW, primary_situation

from srd.cluster import NEVER_PRIORITY
from srd.ha.lease import FAILOVER_FLAG, PROMOTED_FLAG, endpoint_of
from srd.ha.successor import LAG_BYTES, LAG_SECONDS, REPORT_SECONDS, choose, obstacles
from srd.model import RefusedError, Role
from srd.state import Situation, View

WHOLE = primary_situation()
ME, SECOND, THIRD = WHOLE.config.redis_nodes
Change = Callable[[View], dict[str, object]]


def seen(change: Change) -> Situation:
    return replace(WHOLE, view=replace(WHOLE.view, **change(WHOLE.view)))


def redis(**changes: object) -> Change:
    return lambda view: {"redis": replace(view.redis, **changes)}


def lease(**changes: object) -> Change:
    return lambda view: {"lease": replace(view.lease, **changes)}


def replica(**changes: object) -> Change:
    """Change how the second node's redis is seen by its primary."""

    def change(view: View) -> dict[str, object]:
        assert view.redis is not None
        second = endpoint_of(WHOLE.config, SECOND)
        lines = tuple(replace(line, **changes) if line.endpoint == second else line for line in view.redis.replicas)
        return {"redis": replace(view.redis, replicas=lines)}

    return change


def report(**changes: object) -> Change:
    return lambda view: {"peers": {**view.peers, SECOND.name: replace(view.peers[SECOND.name], **changes)}}


def sentinels(count: int, **changes: object) -> Change:
    """Change what the last so many sentinels say."""

    def change(view: View) -> dict[str, object]:
        names = list(view.sentinels)[-count:]
        return {"sentinels": {**view.sentinels, **{n: replace(view.sentinels[n], **changes) for n in names}}}

    return change


def test_where_all_is_well_nothing_speaks_against_a_replica_and_the_one_with_most_is_chosen() -> None:
    assert obstacles(WHOLE, SECOND) == obstacles(WHOLE, THIRD) == []
    assert choose(WHOLE, None) == SECOND
    assert choose(WHOLE, THIRD.name) == THIRD
    assert choose(seen(replica(offset=0)), None) == THIRD


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (redis(role=Role.REPLICA), f"{ME.name} is not the primary that a majority of the sentinels names"),
        (lease(held=False), f"{ME.name} is not the primary that a majority of the sentinels names"),
        (lease(expires=NOW), f"{ME.name} is not the primary that a majority of the sentinels names"),
        (sentinels(1, flags=frozenset({"master", FAILOVER_FLAG})), "a failover of the sentinels has not ended yet"),
        (sentinels(1, flags=frozenset({PROMOTED_FLAG})), "a failover of the sentinels has not ended yet"),
        (sentinels(2, tilt=True), "1 of 3 sentinels name it; 2 are a majority"),
        (lambda _: {"fenced": True}, "it takes no writes now, being fenced"),
        (lambda _: {"peers": {}}, f"the srd of {SECOND.name} is not heard"),
        (report(received=NOW - REPORT_SECONDS - 0.1), f"the srd of {SECOND.name} is not heard"),
        (report(healthy=False), f"{SECOND.name} says that it does not do its job"),
        (report(drained=True), f"{SECOND.name} is drained"),
        (redis(replicas=()), f"the redis of {SECOND.name} is no replica that is in step"),
        (replica(state="wait_bgsave"), f"the redis of {SECOND.name} is no replica that is in step"),
        (replica(lag_seconds=LAG_SECONDS + 1), "bytes and 2 s behind"),
        (replica(offset=-LAG_BYTES), "bytes and"),
    ],
)
def test_what_speaks_against_it_is_said(change: Change, reason: str) -> None:
    (found,) = obstacles(seen(change), SECOND)
    assert reason in found
    with pytest.raises(RefusedError, match=SECOND.name):
        choose(seen(change), SECOND.name)


def test_a_node_that_is_never_to_be_primary_is_chosen_only_by_name() -> None:
    nodes = tuple(replace(node, priority=NEVER_PRIORITY) if node == SECOND else node for node in WHOLE.config.nodes)
    never = replace(WHOLE, config=replace(WHOLE.config, nodes=nodes))
    assert choose(never, None) == THIRD
    assert choose(never, SECOND.name).name == SECOND.name


@pytest.mark.parametrize("wanted", [ME.name, "nobody"])
def test_neither_this_node_nor_a_stranger_is_a_successor(wanted: str) -> None:
    with pytest.raises(RefusedError, match="no other node that runs redis"):
        choose(WHOLE, wanted)
