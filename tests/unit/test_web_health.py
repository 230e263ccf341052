import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.situations import (
    NOW,
    OFFSET,
    arbiter_situation,
    at,
    config,
    primary_redis,
    primary_situation,
    replica_redis,
    replica_situation,
    with_child,
)

from srd.model import IpsecMode, Role, Service
from srd.reconcile import Loop
from srd.state import Child, ChildState, Kernel, Lease, Link, PeerReport, Situation, View
from srd.web import health
from srd.web.health import ErrorCode
from srd.web.query import BadQueryError, parse_size


def answer(path: str, situation: Situation, **parameters: str) -> tuple[int, str | None]:
    verdict = health.judge(path, parameters, situation)
    return verdict.status, verdict.error_code


OK = (200, None)


@pytest.mark.parametrize(
    ("path", "primary", "replica", "arbiter"),
    [
        ("/", OK, (503, "wrong_role"), (503, "wrong_role")),
        ("/primary", OK, (503, "wrong_role"), (503, "wrong_role")),
        ("/master", OK, (503, "wrong_role"), (503, "wrong_role")),
        ("/read-write", OK, (503, "wrong_role"), (503, "wrong_role")),
        ("/leader", OK, (503, "sentinel_disagrees"), (503, "sentinel_disagrees")),
        ("/standby-leader", (503, "wrong_role"), (503, "wrong_role"), (503, "wrong_role")),
        ("/replica", (503, "wrong_role"), OK, (503, "wrong_role")),
        ("/read-only", OK, OK, (503, "wrong_role")),
        ("/health", OK, OK, OK),
        ("/readiness", OK, OK, OK),
    ],
)
def test_every_path_in_a_whole_cluster(path: str, primary: object, replica: object, arbiter: object) -> None:
    assert answer(path, primary_situation()) == primary
    assert answer(path, replica_situation()) == replica
    assert answer(path, arbiter_situation()) == arbiter


NO_LINKS: dict[str, Link] = {}
ONE_LINK = {"redis-2": primary_situation().view.links["redis-2"]}

PRIMARY_REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("redis_down", {"redis": None, "children": {Service.REDIS: Child(ChildState.BACKOFF, restarts=1)}}),
    ("starting", {"children": {}}),
    ("redis_down", {"redis": None}),
    ("starting", {"redis": None, "children": {Service.REDIS: Child(ChildState.STARTING)}}),
    ("starting", {"redis": None, "started": NOW - 1}),
    ("stale_status", {"redis": primary_redis(answered=NOW - 2.01)}),
    ("redis_loading", {"redis": primary_redis(loading=True)}),
    ("wrong_role", {"redis": primary_redis(role=Role.UNKNOWN)}),
    ("starting", {"lease": None}),
    ("lease_expired", {"lease": Lease(True, NOW, 3, 3, at(1))}),
    ("handed_over", {"lease": Lease(False, 0.0, 3, 3, at(1), heir="redis-2")}),
    ("sentinel_no_quorum", {"lease": Lease(False, 0.0, 1, 1, at(1))}),
    ("sentinel_disagrees", {"lease": Lease(False, 0.0, 2, 3, at(2))}),
    ("sentinel_disagrees", {"lease": Lease(False, 0.0, 1, 3, None)}),
    ("starting", {"kernel": None}),
    ("ipsec_unprotected", {"kernel": Kernel(policies_installed=False)}),
    ("ipsec_unprotected", {"links": NO_LINKS}),
]


@pytest.mark.parametrize(("code", "changes"), PRIMARY_REFUSALS)
def test_a_primary_that_cannot_prove_itself_says_no(code: str, changes: dict[str, Any]) -> None:
    assert answer("/primary", primary_situation(**changes)) == (503, code)


@pytest.mark.parametrize(
    ("flags", "why"), [({"master", "s_down"}, "see it down"), ({"master"}, "until that has lasted")]
)
def test_a_primary_that_is_named_and_does_not_lead_says_why(flags: set[str], why: str) -> None:
    lapsed = primary_situation(lease=Lease(False, 0.0, 3, 3, at(1)))
    sentinels = {name: replace(said, flags=frozenset(flags)) for name, said in lapsed.view.sentinels.items()}
    verdict = health.primary(replace(lapsed, view=replace(lapsed.view, sentinels=sentinels)))
    assert verdict.error_code is ErrorCode.SENTINEL_DISAGREES
    assert why in verdict.description


def test_one_link_of_three_nodes_is_a_majority() -> None:
    assert answer("/primary", primary_situation(links=ONE_LINK)) == OK


@pytest.mark.parametrize(
    ("state", "restarts", "code"),
    [
        (ChildState.STARTING, 0, "starting"),
        (ChildState.STARTING, 1, "stunnel_down"),
        (ChildState.STOPPED, 0, "starting"),
        (ChildState.BACKOFF, 0, "stunnel_down"),
        (ChildState.DEGRADED, 0, "stunnel_down"),
        (ChildState.STOPPING, 0, "stunnel_down"),
    ],
)
def test_clients_come_in_by_stunnel(state: ChildState, restarts: int, code: str) -> None:
    for path, situation in (("/primary", primary_situation()), ("/replica", replica_situation())):
        changed = with_child(situation, Service.STUNNEL, state=state, restarts=restarts)
        assert answer(path, changed) == (503, code)


def test_the_death_of_redis_is_seen_before_its_last_answer_is_old() -> None:
    dead = with_child(primary_situation(), Service.REDIS, state=ChildState.BACKOFF, last_exit="SIGKILL")
    assert answer("/primary", dead) == (503, "redis_down")
    # Its successor has not answered: what the dead one said counts for nothing.
    again = with_child(primary_situation(), Service.REDIS, started=NOW - 0.05, restarts=1)
    assert answer("/primary", again) == (503, "redis_down")


def test_a_redis_that_hangs_is_down_not_merely_stale() -> None:
    hung = with_child(
        primary_situation(redis=primary_redis(answered=NOW - 3)), Service.REDIS, state=ChildState.DEGRADED
    )
    assert answer("/primary", hung) == (503, "redis_down")


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("replica_link_down", {"redis": replica_redis(link_up=False)}),
        ("replica_syncing", {"redis": replica_redis(link_up=False, sync_in_progress=True)}),
        ("sentinel_disagrees", {"redis": replica_redis(primary=at(3))}),
        ("sentinel_disagrees", {"lease": Lease(False, 0.0, 2, 3, None)}),
        ("sentinel_no_quorum", {"lease": Lease(False, 0.0, 1, 1, at(2))}),
        ("sentinel_no_quorum", {"sentinels": {}}),
        ("starting", {"lease": None}),
        ("ipsec_unprotected", {"links": NO_LINKS}),
        ("stale_status", {"redis": replica_redis(answered=NOW - 9)}),
    ],
)
def test_a_replica_that_is_not_in_step_says_no(code: str, changes: dict[str, Any]) -> None:
    situation = replica_situation(**changes)
    assert answer("/replica", situation) == (503, code)
    assert answer("/read-only", situation) == (503, code)


def behind(count: int, age: float = 0.1) -> Situation:
    report = PeerReport("redis-2", NOW - age, "0.1.0", True, Role.PRIMARY, True, OFFSET + count)
    return replica_situation(peers={"redis-2": report})


@pytest.mark.parametrize(
    ("situation", "parameters", "expected"),
    [
        (behind(1024), {"lag": "1kB"}, OK),
        (behind(1025), {"lag": "1kB"}, (503, "replica_lagging")),
        (behind(0, age=3), {"lag": "1kB"}, (503, "replica_lagging")),
        (behind(0, age=3), {}, OK),
        (behind(0), {"max_lag_seconds": "0.2"}, OK),
        (behind(0), {"max_lag_seconds": "0.05"}, (503, "replica_lagging")),
        (behind(1), {"max_lag_seconds": "10"}, (503, "replica_lagging")),
        (behind(0), {"replication_state": "connected"}, OK),
        (behind(0), {"replication_state": "sync"}, (503, "replica_link_down")),
        (behind(0), {"lag": "much"}, (400, "bad_request")),
        (behind(0), {"lag": "-1"}, (400, "bad_request")),
        (behind(0), {"lag": ""}, (400, "bad_request")),
        (behind(0), {"max_lag_seconds": "nan"}, (400, "bad_request")),
        (behind(0), {"replication_state": "streaming"}, (400, "bad_request")),
        (behind(0), {"max_lag_second": "1"}, (400, "bad_request")),
    ],
)
def test_how_far_behind_a_replica_may_be(situation: Situation, parameters: dict[str, str], expected: object) -> None:
    assert answer("/replica", situation, **parameters) == expected
    assert answer("/read-only", situation, **parameters) == expected


def test_readiness_allows_a_default_lag_and_what_is_asked() -> None:
    allowed = health.READINESS_LAG_BYTES
    assert answer("/readiness", behind(allowed)) == OK
    assert answer("/readiness", behind(allowed + 1)) == (503, "replica_lagging")
    assert answer("/readiness", behind(allowed + 1), lag="1GB") == OK
    assert answer("/readiness", replica_situation(peers={})) == OK
    assert answer("/readiness", replica_situation(peers={}), lag="1GB") == (503, "replica_lagging")


@pytest.mark.parametrize(
    ("situation", "parameters", "expected"),
    [
        (primary_situation(), {"role": "primary"}, OK),
        (primary_situation(), {"role": "replica"}, (503, "wrong_role")),
        (replica_situation(), {"role": "replica"}, OK),
        (replica_situation(), {"role": "primary"}, (503, "wrong_role")),
        (primary_situation(), {"role": "master"}, (400, "bad_request")),
        (primary_situation(), {"checks": "redis,ipsec"}, OK),
        (primary_situation(), {"checks": "redis,cows"}, (400, "bad_request")),
        (primary_situation(links=NO_LINKS), {"checks": "redis"}, OK),
        (primary_situation(links=NO_LINKS), {"checks": "ipsec"}, (503, "ipsec_unprotected")),
        (arbiter_situation(), {"checks": "sentinel"}, OK),
        (arbiter_situation(), {"checks": "redis"}, (503, "wrong_role")),
        (with_child(arbiter_situation(), Service.SENTINEL, state=ChildState.BACKOFF), {}, (503, "sentinel_down")),
        (primary_situation(lease=Lease(True, NOW - 1, 3, 3, at(1))), {}, (503, "lease_expired")),
        (replica_situation(redis=replica_redis(link_up=False)), {}, OK),
    ],
)
def test_health_is_about_this_nodes_own_job(situation: Situation, parameters: dict[str, str], expected: object) -> None:
    assert answer("/health", situation, **parameters) == expected


def test_without_ipsec_a_node_may_serve() -> None:
    for situation in (primary_situation(links={}, kernel=None), arbiter_situation(links={}, kernel=None)):
        off = replace(situation, config=config('ipsec = { mode = "off" }'))
        assert off.config.ipsec.mode is IpsecMode.OFF
        assert answer("/health", off) == OK
        assert not health.protected(off)


def test_a_path_that_is_no_check_is_refused() -> None:
    with pytest.raises(KeyError):
        health.judge("/healthz", {}, primary_situation())


def test_liveness_is_about_the_loops_and_nothing_else() -> None:
    async def nothing() -> None:
        return

    loop = Loop("links", nothing, resync=1, timeout=1)
    loop.last_tick = NOW
    assert health.alive((), NOW, 60).ok
    assert health.alive((loop,), NOW + 60, 60).ok
    assert health.alive((loop,), NOW + 61, 60).error_code is ErrorCode.STALE_STATUS


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("16kB", 16384), ("64MB", 64 << 20), ("1GB", 1 << 30), ("2 tb", 2 << 40), ("7b", 7)]
)
def test_sizes_are_those_of_patroni(text: str, count: int) -> None:
    assert parse_size(text) == count


@given(st.text(max_size=12))
def test_a_size_is_a_number_or_an_error(text: str) -> None:
    with contextlib.suppress(BadQueryError):
        assert parse_size(text) >= 0


@st.composite
def leases(draw: st.DrawFn) -> Lease | None:
    if draw(st.booleans()):
        return None
    primary = draw(st.sampled_from([None, at(1), at(2)]))
    return Lease(draw(st.booleans()), NOW + draw(st.floats(-5, 5)), 2, draw(st.integers(0, 3)), primary)


@given(
    lease=leases(),
    role=st.sampled_from(Role),
    age=st.floats(0, 5),
    loading=st.booleans(),
    keyed=st.sets(st.sampled_from(["redis-2", "redis-3"])),
    states=st.tuples(*(st.sampled_from(ChildState) for _ in Service)),
)
def test_primary_is_200_only_with_every_proof(
    *, lease: Lease | None, role: Role, age: float, loading: bool, keyed: set[str], states: tuple[ChildState, ...]
) -> None:
    whole = primary_situation()
    situation = primary_situation(
        lease=lease,
        redis=primary_redis(role=role, answered=NOW - age, loading=loading),
        links={name: link for name, link in whole.view.links.items() if name in keyed},
        children={service: Child(state, started=NOW - 600) for service, state in zip(Service, states, strict=True)},
    )
    verdict = health.judge("/primary", {}, situation)
    proven = (
        lease is not None
        and lease.held
        and lease.expires > NOW
        and role is Role.PRIMARY
        and age <= 2
        and not loading
        and bool(keyed)
        and states[2] is ChildState.READY
        and states[0] in (ChildState.STARTING, ChildState.READY, ChildState.DEGRADED)
    )
    if abs(age - 2) > 1e-6:
        assert verdict.ok == proven
    assert verdict.status in (200, 503)
    assert (verdict.error_code is None) == verdict.ok


@pytest.mark.parametrize("path", sorted(health.CHECK_PATHS))
def test_a_node_that_has_just_started_says_so_on_every_path(path: str) -> None:
    bare = replace(primary_situation(), view=View(started=NOW))
    assert answer(path, bare) == (503, "wrong_role" if path == "/standby-leader" else "starting")


@pytest.mark.parametrize(
    ("path", "primary", "replica"),
    [
        ("/primary", (503, "drained"), (503, "wrong_role")),
        ("/replica", (503, "wrong_role"), (503, "drained")),
        ("/read-only", (503, "drained"), (503, "drained")),
        ("/readiness", (503, "drained"), (503, "drained")),
        ("/leader", OK, (503, "sentinel_disagrees")),
        ("/health", OK, OK),
    ],
)
def test_a_drained_node_does_its_job_and_is_led_nobody_to(path: str, primary: object, replica: object) -> None:
    assert answer(path, primary_situation(drained=True)) == primary
    assert answer(path, replica_situation(drained=True)) == replica


@pytest.mark.parametrize(
    ("path", "parameters", "expected"),
    [
        ("/replica", {}, (503, "not_balanced")),
        ("/read-only", {}, (503, "not_balanced")),
        ("/health", {"role": "replica"}, (503, "not_balanced")),
        ("/health", {}, OK),
        ("/readiness", {}, OK),
    ],
)
def test_no_readers_are_led_to_a_replica_that_is_not_to_have_any(
    path: str, parameters: dict[str, str], expected: object
) -> None:
    assert answer(path, replica_situation(), **parameters) == OK
    assert answer(path, tagged(replica_situation()), **parameters) == expected


def test_a_primary_serves_whatever_it_would_not_as_a_replica() -> None:
    for path in ("/primary", "/read-only", "/health", "/readiness"):
        assert answer(path, tagged(primary_situation())) == OK


def tagged(situation: Situation) -> Situation:
    """Put `noloadbalance` to the node's entry."""
    nodes = tuple(replace(node, noloadbalance=node.name == situation.node.name) for node in situation.config.nodes)
    return replace(situation, config=replace(situation.config, nodes=nodes))


def test_what_else_is_wrong_with_a_drained_node_is_said_first() -> None:
    down = with_child(replica_situation(drained=True), Service.STUNNEL, state=ChildState.BACKOFF)
    assert answer("/replica", down) == (503, "stunnel_down")
