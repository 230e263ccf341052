"""A restart of the cluster, node by node: who comes when, what a whole cluster is, and what a node does of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles, paths_of
from support.situations import NOW, WALL, arbiter_situation, at, primary_redis, primary_situation, replica_situation

from srd.cli.rolling import DEFAULT, SRD, Turn, next_turn, turns
from srd.duties import Duties
from srd.model import Body, Pause, RefusedError, Service
from srd.reconcile import boottime
from srd.rolling import RESTART_TOPIC, STATE_TOPIC, Restarts, missing
from srd.state import Child, ChildState, ReplicaOf, Situation, Store
from srd.systemd import FdStore, Notifier

WHOLE = primary_situation()
MEMBERS = [
    {"node": "n1", "kind": "redis"},
    {"node": "n2", "kind": "redis"},
    {"node": "arbiter", "kind": "sentinel"},
    {"node": "app", "kind": "client"},
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (DEFAULT, {"n1": "sentinel stunnel redis", "n2": "sentinel stunnel redis", "arbiter": "sentinel"}),
        ({"redis"}, {"n1": "redis", "n2": "redis"}),
        ({"sentinel"}, {"n1": "sentinel", "n2": "sentinel", "arbiter": "sentinel"}),
        ({SRD, "redis"}, {"n1": "redis srd", "n2": "redis srd", "arbiter": "srd"}),
    ],
)
def test_each_node_is_restarted_what_it_runs_in_a_fixed_order(wanted: set[str], expected: dict[str, str]) -> None:
    assert {turn.node: " ".join(turn.programs) for turn in turns(MEMBERS, wanted)} == expected


def test_the_primary_comes_last_whoever_that_is_by_then() -> None:
    pending = [Turn(node, ("redis",)) for node in ("n1", "n2", "n3")]
    assert next_turn(pending, "n1").node == "n2"
    assert next_turn(pending, "n3").node == "n1"
    assert next_turn(pending, None).node == "n1"
    assert next_turn(pending[2:], "n3").node == "n3"


@pytest.mark.parametrize(
    ("programs", "leaves"), [(("redis",), True), (("stunnel",), True), (("sentinel",), False), (("srd",), False)]
)
def test_the_primary_moves_away_only_from_what_serves_writers(programs: tuple[str, ...], leaves: bool) -> None:  # noqa: FBT001 - a table
    assert Turn("n1", programs).leaves("n1") is leaves
    assert not Turn("n1", programs).leaves("n2")


def seen(situation: Situation, **changes: object) -> Situation:
    return replace(situation, view=replace(situation.view, **changes))


def test_a_whole_cluster_lacks_nothing_and_what_endures_does_not_count() -> None:
    for situation in (WHOLE, replica_situation(), arbiter_situation()):
        assert missing(situation) == []
        lasting = seen(situation, drained=True, pause=Pause(1, WALL + 60), certificates={"node": WALL + 60})
        assert missing(lasting) == []


def without_sentinel(**changes: object) -> Situation:
    whole = WHOLE
    answer = replace(whole.view.sentinels["redis-2"], **changes)
    return seen(whole, sentinels={**whole.view.sentinels, "redis-2": answer})


@pytest.mark.parametrize(
    ("situation", "lacks"),
    [
        (without_sentinel(asked=NOW - 60), "the sentinel of redis-2 does not answer"),
        (without_sentinel(tilt=True), "the sentinel of redis-2 does not answer"),
        (without_sentinel(known_sentinels=1), "the sentinel of redis-2 does not see the whole cluster"),
        (without_sentinel(known_replicas=1), "the sentinel of redis-2 does not see the whole cluster"),
        (without_sentinel(flags=frozenset({"master", "s_down"})), "redis-2 does not see the whole cluster"),
        (without_sentinel(primary=at(3)), "the sentinel of redis-2 does not see the whole cluster"),
        (
            seen(WHOLE, redis=primary_redis(replicas=(ReplicaOf(at(2), "online", 5000, 0),))),
            "redis-3 is no replica in step",
        ),
        (
            seen(
                WHOLE,
                redis=primary_redis(replicas=(ReplicaOf(at(2), "online", 1, 0), ReplicaOf(at(3), "wait_bgsave", 1, 0))),
            ),
            "redis-3 is no replica in step",
        ),
        (
            seen(
                WHOLE,
                peers={
                    **WHOLE.view.peers,
                    "redis-2": replace(WHOLE.view.peers["redis-2"], received=1.0),
                },
            ),
            "the srd of redis-2 is not heard",
        ),
        (
            seen(WHOLE, children={**WHOLE.view.children, Service.STUNNEL: Child(ChildState.STARTING)}),
            "child_down stunnel",
        ),
    ],
)
def test_what_is_missing_is_said(situation: Situation, lacks: str) -> None:
    assert any(lacks in said for said in missing(situation)), missing(situation)


class Begun:
    """What a node's restarts have had done."""

    def __init__(self, situation: Situation) -> None:
        self.ended: asyncio.Queue[Service] = asyncio.Queue()
        self.anew = 0
        self.asked: list[tuple[str, str]] = []
        self.restarts = Restarts(
            situation.node,
            situation=lambda: situation,
            restart=self.ended.put,
            begin_anew=self._begin_anew,
            ask_peer=self._ask,
        )

    def _begin_anew(self) -> None:
        self.anew += 1

    async def _ask(self, peer: str, topic: str, _body: Body, _seconds: float) -> Body:
        self.asked.append((peer, topic))
        return {}


@contextlib.asynccontextmanager
async def running(begun: Begun) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(begun.restarts.run())
        yield
        task.cancel()


async def test_a_restart_is_begun_at_once_and_one_at_a_time() -> None:
    begun = Begun(replica_situation())
    assert begun.restarts.answer(RESTART_TOPIC, {"child": "redis"}) == {}
    with pytest.raises(RefusedError, match="another restart is under way on redis-1"):
        begun.restarts.answer(RESTART_TOPIC, {"child": "sentinel"})
    async with running(begun):
        async with asyncio.timeout(5):
            assert await begun.ended.get() is Service.REDIS
        assert await begun.restarts.on("redis-1", RESTART_TOPIC, {"child": "srd"}) == {}
    assert begun.anew == 1
    await begun.restarts.on("redis-2", RESTART_TOPIC, {"child": "redis"})
    assert begun.asked == [("redis-2", RESTART_TOPIC)]


@pytest.mark.parametrize(
    ("situation", "child", "reason"),
    [
        (primary_situation(), "redis", "redis-1 is the primary"),
        (arbiter_situation(), "redis", "redis-3 runs no such child"),
        (replica_situation(), "haproxy", "redis-1 runs no such child"),
    ],
)
def test_a_restart_that_would_do_harm_is_refused(situation: Situation, child: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        Begun(situation).restarts.answer(RESTART_TOPIC, {"child": child})


def test_a_node_says_by_what_its_programs_are_known_again_once_they_are_ready() -> None:
    state = Begun(primary_situation()).restarts.answer(STATE_TOPIC, {})
    assert state == {"missing": "", "primary": True, "srd": NOW - 700, "redis": 100, "sentinel": 101, "stunnel": 102}
    children = {**replica_situation().view.children, Service.REDIS: Child(ChildState.STARTING, pid=7)}
    starting = Begun(seen(replica_situation(), children=children)).restarts.answer(STATE_TOPIC, {})
    assert (starting["redis"], starting["primary"]) == (None, False)
    assert "child_down redis" in str(starting["missing"])


async def test_a_client_of_the_mesh_has_no_say(tmp_path: Path) -> None:
    client = '[[node]]\nname = "app"\nkind = "client"\naddresses = ["127.0.1.9"]\n'
    bundle = make_bundles(tmp_path, cluster_toml(extra=client))["redis-1"]
    assert bundle.secrets is not None
    store = Store(boottime())
    begun = Begun(primary_situation())
    duties = Duties(
        config=bundle.config,
        node=bundle.node,
        paths=paths_of(tmp_path, "redis-1"),
        secrets=bundle.secrets,
        store=store,
        situation=lambda: Situation(bundle.config, bundle.node, store.view(), boottime()),
        fds=FdStore(Notifier(None)),
        ask_peer=begun._ask,
        begin_anew=begun._begin_anew,
    )
    for topic in ("switchover", "lease", "pause", RESTART_TOPIC):
        with pytest.raises(RefusedError, match="app is a client, which has no say here"):
            await duties.answer("app", topic, {})
    assert "missing" in await duties.answer("redis-2", STATE_TOPIC, {})
