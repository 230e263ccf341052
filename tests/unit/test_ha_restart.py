"""May redis start, and as what: each rule by its table. The interleavings are in test_ha_first_boot.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from srd.cluster import Config
from srd.config import parse_config
from srd.desired import Start
from srd.ha.lease import endpoint_of
from srd.ha.restart import Census, Death, has_joined, patience_seconds, start
from srd.model import Endpoint, Role
from srd.state import Channel, PeerReport, Redis, SentinelAnswer, Situation, View

NOW = 1000.0


def cluster(redis: int = 3, arbiters: int = 0) -> Config:
    kinds = ["redis"] * redis + ["sentinel"] * arbiters
    nodes = (
        f'[[node]]\nname = "n{number}"\naddresses = ["10.0.0.{number}"]\nkind = "{kind}"\n'
        for number, kind in enumerate(kinds, 1)
    )
    return parse_config('cluster = "c"\n' + "".join(nodes), "test")


THREE = cluster()
TWO_AND_ARBITER = cluster(redis=2, arbiters=1)
N1, N2, N3 = (endpoint_of(THREE, node) for node in THREE.nodes)


COMPARED = Census()  # and nobody has more


def says(
    primary: Endpoint | None, epoch: int = 0, *, tilt: bool = False, met: int = 2, flags: str = ""
) -> SentinelAnswer:
    shown = frozenset({"master", *flags.split()})
    return SentinelAnswer("", NOW - 1, primary, epoch, tilt, known_sentinels=met, known_replicas=met, flags=shown)


def decide(
    node: str,
    answers: Mapping[str, SentinelAnswer],
    peers: Mapping[str, bool] | None = None,
    *,
    joined: bool = True,
    data: bool = True,
    death: Death | None = None,
    config: Config = THREE,
    lost: tuple[str, ...] = (),
    census: Census | None = COMPARED,
) -> Start:
    """`peers`: who is connected and whether it has joined; `lost` of them were connected once."""
    reports = peers or {}
    view = View(
        channels={name: Channel(name, connected=name not in lost, since=0.0) for name in reports},
        peers={
            name: PeerReport(name, NOW - 1, "1", initialized, Role.UNKNOWN, healthy=False)
            for name, initialized in reports.items()
        },
        sentinels={name: dataclasses.replace(answer, node=name) for name, answer in answers.items()},
        initialized=joined,
    )
    return start(Situation(config, config.node(node), view, NOW), death, holds_data=data, census=census)


def holds(decision: Start) -> bool:
    return decision.hold is not None and decision.primary is None


def test_a_majority_that_names_another_makes_a_replica_of_it() -> None:
    assert decide("n1", {"n2": says(N2, 1), "n3": says(N2, 1)}) == Start(primary=N2)


def test_even_a_newcomer_and_one_that_just_died_follow_whom_the_majority_names() -> None:
    answers = {"n2": says(N2, 1), "n3": says(N2, 1)}
    assert decide("n1", answers, joined=False, data=False) == Start(primary=N2)
    assert decide("n1", answers, death=Death(NOW - 1, Role.PRIMARY)) == Start(primary=N2)


def test_after_power_on_the_named_one_starts_with_its_data() -> None:
    assert decide("n1", {"n1": says(N1), "n2": says(N1)}) == Start()


def test_the_greatest_epoch_decides_while_the_name_of_a_new_primary_spreads() -> None:
    answers = {"n1": says(N1), "n2": says(N1), "n3": says(N2, 1)}
    assert decide("n1", answers) == Start(primary=N2)
    assert decide("n2", answers) == Start()


def test_two_names_in_one_epoch_are_decided_by_a_majority_or_waited_for() -> None:
    assert decide("n1", {"n1": says(N1, 3), "n2": says(N2, 3), "n3": says(N2, 3)}) == Start(primary=N2)
    undecided = decide("n1", {"n1": says(N1, 3), "n2": says(N2, 3)})
    assert undecided.hold == "the sentinels to agree: they name different primaries in one epoch"


@pytest.mark.parametrize("role", list(Role))
def test_a_redis_that_died_waits_to_be_replaced_and_no_longer_than_that_takes(role: Role) -> None:
    answers = {"n1": says(N1), "n2": says(N1)}
    patience = patience_seconds(THREE)
    assert patience == 25.0
    waiting = decide("n1", answers, death=Death(NOW - patience + 0.1, role))
    assert waiting.hold == f"the sentinels to replace it (its redis ended as {role})"
    assert decide("n1", answers, death=Death(NOW - patience, role)) == Start()
    assert holds(decide("n1", answers, {"n2": True}, death=Death(NOW - patience, role), data=False))


def test_a_redis_that_died_waits_for_nobody_if_nobody_can_be_elected() -> None:
    answers, death = {"n1": says(N1), "n2": says(N1)}, Death(NOW - 1, Role.PRIMARY)
    assert decide("n1", answers, death=death, census=Census(alone=True)) == Start()
    assert holds(decide("n1", answers, death=death))
    under_way = {"n1": says(N1), "n2": says(N1, flags="s_down o_down failover_in_progress")}
    assert holds(decide("n1", under_way, death=death, census=Census(alone=True)))


def test_a_failover_under_way_is_waited_for() -> None:
    answers = {"n1": says(N1), "n2": says(N1, flags="s_down o_down failover_in_progress")}
    assert decide("n1", answers).hold == "the end of the failover that is under way"


def test_being_taken_for_down_is_no_reason_to_stay_down() -> None:
    down = says(N1, flags="s_down o_down")
    assert decide("n1", {"n1": down, "n2": down}) == Start()


@pytest.mark.parametrize("flags", ["", "s_down", "s_down o_down failover_in_progress"])
def test_whom_a_sentinel_without_a_file_is_to_watch_is_known_while_redis_waits(flags: str) -> None:
    answers = {"n1": says(N1), "n2": says(N1, flags=flags)}
    waiting = decide("n1", answers, death=Death(NOW, Role.PRIMARY))
    assert waiting.hold is not None
    for decision in (waiting, decide("n1", answers, census=None), decide("n1", answers), decide("n3", answers)):
        assert (decision.named, decision.doubted) == (N1, flags != "")
    assert decide("n1", {"n2": says(N1)}).named is None


def test_an_empty_directory_is_refused_while_somebody_may_have_the_data() -> None:
    answers = {"n1": says(N1), "n2": says(N1), "n3": says(N1)}
    refused = "the sentinels to name a node that has the data: this data directory is empty"
    assert decide("n1", answers, {"n2": True, "n3": True}, data=False).hold == refused
    assert decide("n1", answers, {"n2": True, "n3": False}, data=False).hold == refused
    assert decide("n1", answers, {}, data=False).hold == refused
    assert decide("n1", answers, {"n2": False}, data=False).hold == refused
    assert decide("n1", answers, {"n2": False, "n3": False}, data=False) == Start()


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(
    ("census", "hold"),
    [
        (None, "what the other nodes have, to be compared with what this one has"),
        (Census(awaited=("n2", "n3")), "n2 and n3, which may have more data than this node"),
        (Census(ahead="n3"), "the sentinels to name n3, which has more data than this node"),
        (Census(empty=True), None),
    ],
)
def test_a_primary_is_compared_with_the_others_before_it_starts(
    data: bool,  # noqa: FBT001 - a table's column
    census: Census | None,
    hold: str | None,
) -> None:
    answers = {"n1": says(N1), "n2": says(N1)}
    assert decide("n1", answers, {"n2": True, "n3": True}, data=data, census=census).hold == hold
    assert decide("n2", answers, {"n1": True, "n3": True}, data=data, census=census) == Start(primary=N1)


def test_in_a_first_boot_there_is_nothing_to_compare() -> None:
    newcomers = {"n2": False, "n3": False}
    assert decide("n1", {}, newcomers, joined=False, data=False, census=None) == Start()


def test_a_lost_peers_last_word_that_it_has_data_still_counts() -> None:
    answers = {"n2": says(N1), "n3": says(N1)}
    peers = {"n2": True, "n3": False}
    assert holds(decide("n1", answers, peers, joined=False, data=False, lost=("n2",)))


@pytest.mark.parametrize(
    "answers",
    [{}, {"n1": says(N1)}, {"n1": says(N1), "n2": says(N1, tilt=True)}, {"n1": says(N1), "n2": says(None)}],
    ids=["none", "own only", "tilt", "knows nobody"],
)
def test_who_has_joined_waits_for_a_majority_of_sentinels(answers: dict[str, SentinelAnswer]) -> None:
    hold = decide("n1", answers, {"n2": True, "n3": True}).hold
    assert hold is not None
    assert hold.startswith("a majority of sentinels")


def test_stale_answers_are_no_answers() -> None:
    old = dataclasses.replace(says(N2, 1), asked=NOW - THREE.primary_lease)
    assert holds(decide("n1", {"n2": old, "n3": old}))


@pytest.mark.parametrize(("node", "expected"), [("n1", Start()), ("n2", Start(primary=N1)), ("n3", Start(primary=N1))])
def test_a_majority_of_newcomers_begins_with_the_first_node_as_primary(node: str, expected: Start) -> None:
    others = [name for name in ("n1", "n2", "n3") if name != node]
    assert decide(node, {}, dict.fromkeys(others, False), joined=False, data=False) == expected
    assert decide(node, {}, {others[0]: False}, joined=False, data=False) == expected
    alone = decide(node, {}, {}, joined=False, data=False)
    assert alone.hold == "a majority of the nodes (1 of 2, this one included)"
    assert holds(decide(node, {}, {others[0]: False}, joined=False, data=False, lost=(others[0],)))


def test_the_first_node_does_not_begin_anew_beside_one_that_has_data() -> None:
    assert holds(decide("n1", {}, {"n2": True, "n3": False}, joined=False, data=False))


def test_a_late_node_joins_on_the_word_of_one_sentinel() -> None:
    assert decide("n3", {"n1": says(N1)}, {"n1": True}, joined=False, data=False) == Start(primary=N1)
    assert decide("n3", {"n2": says(N2, 4)}, {"n2": True}, joined=False, data=False) == Start(primary=N2)
    assert holds(decide("n3", {}, {"n1": True, "n2": True}, joined=False, data=False))


def test_one_who_has_joined_counts_newcomers_too() -> None:
    assert decide("n1", {"n1": says(N1)}, {"n2": False}) == Start()
    assert holds(decide("n1", {"n1": says(N1)}, {"n2": True}))


def test_a_single_node_starts_whether_new_dead_or_empty() -> None:
    one = cluster(redis=1)
    assert decide("n1", {}, joined=False, data=False, config=one) == Start()
    assert decide("n1", {"n1": says(N1)}, config=one) == Start()
    assert decide("n1", {"n1": says(N1)}, config=one, death=Death(NOW, Role.PRIMARY)) == Start()
    assert decide("n1", {"n1": says(N1)}, config=one, data=False) == Start()


def test_an_arbiters_sentinel_answers_before_there_is_any_redis() -> None:
    arbiter = {"n3": says(N1, met=0)}
    first = decide("n1", arbiter, {"n3": False}, joined=False, data=False, config=TWO_AND_ARBITER)
    assert first == Start()
    second = decide("n2", arbiter, {"n3": False}, joined=False, data=False, config=TWO_AND_ARBITER)
    assert second == Start(primary=N1)


def test_an_arbiter_that_has_met_others_is_the_witness_that_data_exists() -> None:
    witness = {"n3": says(N1, met=1)}
    assert holds(decide("n1", witness, {"n3": False}, joined=False, data=False, config=TWO_AND_ARBITER))


REDIS = Redis(
    answered=NOW, version="7", run_id="r", role=Role.REPLICA, loading=False, replid="x", offset=1, uptime_seconds=1,
    dbsize=0, min_replicas_to_write=1, persistence=True, primary=N1, link_up=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("view", "joined"),
    [
        (View(), False),
        (View(redis=REDIS), True),
        (View(redis=dataclasses.replace(REDIS, link_up=False)), False),
        (View(redis=dataclasses.replace(REDIS, sync_in_progress=True)), False),
        (View(redis=dataclasses.replace(REDIS, role=Role.PRIMARY, link_up=False)), True),
        (View(redis=dataclasses.replace(REDIS, role=Role.PRIMARY, link_up=False, loading=True)), False),
        (View(sentinels={"n1": says(N1, 0)}), False),
        (View(sentinels={"n1": says(N1, 1)}), True),
        (View(sentinels={"n2": says(N1, 1)}), False),
    ],
)
def test_who_has_joined(view: View, joined: bool) -> None:  # noqa: FBT001 - a table's column
    assert has_joined(THREE.node("n1"), view) is joined
