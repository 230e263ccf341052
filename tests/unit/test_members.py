"""What a node knows of every node: the same in `srd list` and in `/cluster`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.situations import NOW, OFFSET, arbiter_situation, primary_situation, replica_situation, with_node

from srd.control import documents as control
from srd.members import REPORT_MAX_AGE_SECONDS, Member, members
from srd.model import Role
from srd.state import Situation
from srd.web import documents as web


def rows(situation: Situation) -> list[tuple[str, str, str, int | None]]:
    return [(m.node.name, m.state, m.role, m.lag_bytes) for m in members(situation, "0.1.0")]


def behind(situation: Situation, peer: str, count: int) -> Situation:
    peers = {**situation.view.peers, peer: replace(situation.view.peers[peer], offset=OFFSET - count)}
    return replace(situation, view=replace(situation.view, peers=peers))


def test_every_node_is_known_by_its_role_and_lag_on_the_primary_and_on_a_replica() -> None:
    assert rows(behind(primary_situation(), "redis-3", 100)) == [
        ("redis-1", "running", "primary", None),
        ("redis-2", "running", "replica", 0),
        ("redis-3", "running", "replica", 100),
    ]
    assert rows(behind(replica_situation(), "redis-3", 100)) == [
        ("redis-1", "running", "replica", 0),
        ("redis-2", "running", "primary", None),
        ("redis-3", "running", "replica", 100),
    ]


def test_a_node_without_redis_has_no_role_and_no_lag() -> None:
    assert rows(arbiter_situation())[2] == ("redis-3", "running", "unknown", None)


@pytest.mark.parametrize(("age", "heard"), [(REPORT_MAX_AGE_SECONDS, True), (REPORT_MAX_AGE_SECONDS + 0.01, False)])
def test_the_word_of_a_peer_that_fell_silent_is_not_shown(age: float, heard: bool) -> None:  # noqa: FBT001 - a table
    whole = primary_situation()
    peers = {**whole.view.peers, "redis-2": replace(whole.view.peers["redis-2"], received=NOW - age)}
    known = members(replace(whole, view=replace(whole.view, peers=peers)), "0.1.0")[1]
    assert (known.state == "running") == heard
    assert (known.role is Role.REPLICA) == (known.version is not None) == heard


def test_a_node_that_does_not_do_its_job_says_so_of_itself_and_of_a_peer() -> None:
    whole = primary_situation()
    peers = {**whole.view.peers, "redis-2": replace(whole.view.peers["redis-2"], healthy=False)}
    broken = replace(whole, view=replace(whole.view, children={}, peers=peers))
    assert [state for _, state, _, _ in rows(broken)] == ["degraded", "degraded", "running"]


def test_drained_nodes_are_known_by_their_own_word() -> None:
    whole = primary_situation(drained=True)
    peers = {**whole.view.peers, "redis-3": replace(whole.view.peers["redis-3"], drained=True)}
    known = replace(whole, view=replace(whole.view, peers=peers))
    assert [member.drained for member in members(known, "0.1.0")] == [True, False, True]
    for listed in (control.members(known, "0.1.0"), web.cluster_document(known, "0.1.0")):
        assert [member["drained"] for member in listed["members"]] == [True, False, True]


def test_both_faces_show_the_same() -> None:
    situation = with_node(behind(replica_situation(), "redis-3", 7), "redis-2", noloadbalance=True)
    known: tuple[Member, ...] = members(situation, "0.1.0")
    listed = control.members(situation, "0.1.0")["members"]
    clustered = web.cluster_document(situation, "0.1.0")["members"]
    wanted = [(m.node.name, m.state, m.role, m.lag_bytes, m.node.tags) for m in known]
    assert [(m["node"], m["state"], m["role"], m["lag_bytes"], m["tags"]) for m in listed] == wanted
    assert [(m["name"], m["state"], m["role"], m["lag"], m["tags"]) for m in clustered] == wanted
    assert [m["tags"] for m in listed] == [{}, {"noloadbalance": True}, {}]
