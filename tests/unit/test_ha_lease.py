"""The lease: tables for what counts, properties for what must never be."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.cluster import LEASE_SECONDS, Config
from srd.config import parse_config
from srd.ha.lease import PROBATION_SECONDS, PROMOTED_FLAG, Tenure, assess, dated, endpoint_of, fresh, support_ends
from srd.model import Endpoint, IpAddress
from srd.state import Lease, SentinelAnswer

CLEAN = frozenset({"master"})


def cluster(redis: int = 3, arbiters: int = 0, clients: int = 0, down_after: float = 5.0) -> Config:
    kinds = ["redis"] * redis + ["sentinel"] * arbiters + ["client"] * clients
    nodes = "".join(
        f'[[node]]\nname = "n{number}"\naddresses = ["10.0.0.{number}"]\nkind = "{kind}"\n'
        for number, kind in enumerate(kinds, 1)
    )
    return parse_config(f'cluster = "c"\n{nodes}[sentinel]\ndown_after = {down_after}\n', "test")


CONFIG = cluster()
N1, N2, N3 = (endpoint_of(CONFIG, node) for node in CONFIG.nodes)


def answer(node: str, primary: Endpoint | None, asked: float, **more: object) -> SentinelAnswer:
    base = SentinelAnswer(node, asked, primary, 0, tilt=False, known_sentinels=2, known_replicas=2, flags=CLEAN)
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def answers(*given_answers: SentinelAnswer) -> dict[str, SentinelAnswer]:
    return {item.node: item for item in given_answers}


NODE1 = CONFIG.node("n1")


def test_three_sentinels_that_agree_give_a_lease_that_ends_with_the_second_latest() -> None:
    lease = assess(CONFIG, NODE1, answers(answer("n1", N1, 10.0), answer("n2", N1, 9.0), answer("n3", N1, 8.8)), 10.5)
    assert (lease.held, lease.expires, lease.agree, lease.reachable, lease.primary) == (True, 11.0, 3, 3, N1)


def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    two = answers(answer("n1", N1, 10.0), answer("n2", N1, 9.0))
    assert assess(CONFIG, NODE1, two, 10.999).held
    late = assess(CONFIG, NODE1, two, 11.0)
    assert (late.held, late.expires) == (False, 11.0)
    assert late.primary is None


def test_a_majority_is_of_all_configured_voters_not_of_those_that_answer() -> None:
    lease = assess(CONFIG, NODE1, answers(answer("n1", N1, 10.0)), 10.1)
    assert (lease.held, lease.expires, lease.agree, lease.reachable, lease.primary) == (False, 0.0, 1, 1, None)


@pytest.mark.parametrize(
    "second",
    [
        answer("n2", N1, 10.0, tilt=True),
        answer("n2", N1, 10.0, flags=CLEAN | {"s_down"}),
        answer("n2", N1, 10.0, flags=CLEAN | {"s_down", "o_down"}),
        answer("n2", N1, 10.0, flags=CLEAN | {"failover_in_progress"}),
        answer("n2", N2, 10.0),
        answer("n2", None, 10.0),
        answer("n2", Endpoint(N1.address, 6380), 10.0),
        answer("n2", N1, 5.0),
        answer("n2", N1, 11.0),
        answer("stranger", N1, 10.0),
    ],
    ids=["tilt", "s_down", "o_down", "replacing", "other", "nobody", "other port", "old", "future", "no voter"],
)
def test_what_does_not_count_for_the_lease(second: SentinelAnswer) -> None:
    assert not assess(CONFIG, NODE1, answers(answer("n1", N1, 10.0), second), 10.5).held


def test_a_primary_that_is_taken_for_down_is_still_named() -> None:
    down = CLEAN | {"s_down", "o_down"}
    lease = assess(CONFIG, NODE1, answers(answer("n1", N1, 10.0, flags=down), answer("n2", N1, 10.0, flags=down)), 10.1)
    assert (lease.held, lease.primary, lease.agree) == (False, N1, 2)


def test_tilt_answers_are_reachable_but_agree_with_nobody() -> None:
    heard = answers(answer("n1", N1, 10.0, tilt=True), answer("n2", N1, 10.0, tilt=True), answer("n3", N1, 10.0))
    lease = assess(CONFIG, NODE1, heard, 10.1)
    assert (lease.reachable, lease.agree, lease.primary) == (3, 1, None)


def test_every_node_sees_whom_the_majority_names() -> None:
    heard = answers(answer("n1", N1, 10.0), answer("n2", N2, 10.0), answer("n3", N2, 10.0))
    leases = {node.name: assess(CONFIG, node, heard, 10.1) for node in CONFIG.nodes}
    assert {name: lease.held for name, lease in leases.items()} == {"n1": False, "n2": True, "n3": False}
    assert {lease.primary for lease in leases.values()} == {N2}
    assert {lease.agree for lease in leases.values()} == {2}


def test_arbiters_vote_and_clients_do_not() -> None:
    config = cluster(redis=2, arbiters=1, clients=1)
    node = config.node("n1")
    with_arbiter = answers(answer("n1", N1, 10.0), answer("n3", N1, 10.0))
    with_client = answers(answer("n1", N1, 10.0), answer("n4", N1, 10.0))
    assert assess(config, node, with_arbiter, 10.1).held
    assert not assess(config, node, with_client, 10.1).held
    assert set(fresh(config, with_client, 10.1)) == {"n1"}


def test_one_node_is_its_own_majority() -> None:
    config = cluster(redis=1)
    lease = assess(config, config.node("n1"), answers(answer("n1", N1, 10.0)), 10.1)
    assert (lease.held, lease.primary) == (True, N1)


ENDPOINTS = st.sampled_from([N1, N2, N3, None])
TIMES = st.floats(min_value=0, max_value=20)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Config, dict[str, SentinelAnswer]]:
    config = cluster(redis=draw(st.integers(1, 5)))
    heard = [
        answer(node.name, draw(ENDPOINTS), draw(TIMES), tilt=draw(st.booleans()))
        for node in config.nodes
        if draw(st.booleans())
    ]
    return config, answers(*heard)


@given(worlds(), TIMES)
def test_from_the_same_answers_at_most_one_node_holds_the_lease(
    world: tuple[Config, dict[str, SentinelAnswer]], now: float
) -> None:
    config, heard = world
    leases = [assess(config, node, heard, now) for node in config.redis_nodes]
    assert sum(lease.held for lease in leases) <= 1
    assert len({lease.primary for lease in leases}) == 1


@given(worlds(), TIMES, st.data())
def test_a_lease_ends_by_itself_and_no_older_answer_prolongs_it(
    world: tuple[Config, dict[str, SentinelAnswer]], now: float, data: st.DataObject
) -> None:
    config, heard = world
    for node in config.redis_nodes:
        lease = assess(config, node, heard, now)
        assert lease.held == (now < lease.expires)
        if lease.held:
            assert lease.expires <= now + config.primary_lease
            assert lease.primary == endpoint_of(config, node)
            later = data.draw(st.floats(min_value=0, max_value=config.primary_lease * 2))
            then = assess(config, node, heard, now + later)
            assert then.held == (now + later < lease.expires)


@given(
    down_after=st.floats(min_value=4, max_value=60),
    voters=st.sampled_from([3, 5]),
    cut=st.floats(min_value=50, max_value=60),
    data=st.data(),
)
def test_two_sides_of_a_cut_never_hold_the_lease_together(
    down_after: float, voters: int, cut: float, data: st.DataObject
) -> None:
    """The old side asks until the cut; the new side is named after `down_after` of silence, and asks as it likes."""
    config = cluster(redis=voters, down_after=round(down_after, 3))
    ping = data.draw(
        st.floats(min_value=0, max_value=1), label="the last ping with a reply left so long before the cut"
    )
    promoted = cut - ping + config.sentinel.down_after
    old_side = answers(
        *(answer(n.name, N1, cut - data.draw(st.floats(min_value=0, max_value=5))) for n in config.nodes)
    )
    new_side = answers(
        *(answer(n.name, N2, promoted + data.draw(st.floats(min_value=0, max_value=5))) for n in config.nodes[1:])
    )
    moments = [promoted, *(item.asked for item in new_side.values()), promoted + data.draw(st.floats(0, 10))]
    for now in moments:
        held = [
            assess(config, config.node("n1"), old_side, now).held,
            assess(config, config.node("n2"), new_side, now).held,
        ]
        assert not all(held)


def test_endpoint_of_a_node_is_its_first_address_and_the_redis_port() -> None:
    address: IpAddress = CONFIG.node("n2").address
    assert endpoint_of(CONFIG, CONFIG.node("n2")) == Endpoint(address, CONFIG.redis.port)


def voted(node: str, leader: str, *, asked: float = 10.0, seen: float = 9.0, **more: object) -> SentinelAnswer:
    """An answer of one whose configuration is epoch 0 and that has voted in epoch 1."""
    return answer(node, N1, asked, run_id=f"id of {node}", vote=f"id of {leader}", vote_epoch=1, vote_seen=seen, **more)


LEADS = {"flags": frozenset({"master", "o_down", "failover_in_progress"})}


@pytest.mark.parametrize(
    ("others", "held"),
    [
        ((voted("n2", "n3"), voted("n3", "n3", **LEADS)), False),  # it is replacing n1, and n2 has voted for that
        ((voted("n2", "n3"),), False),  # whether n3 is, nobody knows
        ((voted("n2", "n3"), voted("n3", "n3")), True),  # asked since, it is not: the attempt was given up
        ((voted("n2", "n3"), answer("n3", N2, 10.0, run_id="id of n3", epoch=1)), False),  # it has replaced n1
        ((voted("n2", "n3", seen=10.0), answer("n3", N1, 9.9, unanswered=7.5)), False),  # it may have begun since
        ((answer("n2", N1, 10.0, down_after=0.2),), False),  # it is hurried: it may vote at any moment
        ((answer("n2", N1, 10.0, down_after=5.0),), True),
        ((voted("n2", "n3", seen=10.0 - 3 * 5.0),), True),  # every step of it has timed out
        ((voted("n2", "n3", epoch=1),), True),  # an old vote: its configuration is of that epoch
        ((answer("n2", N1, 10.0, vote=None, vote_epoch=1),), True),  # nobody that it voted for is left
    ],
)
def test_a_sentinel_that_has_voted_for_a_replacement_does_not_count(
    others: tuple[SentinelAnswer, ...],
    held: bool,  # noqa: FBT001
) -> None:
    own = answer("n1", N1, 10.0, run_id="id of n1")
    assert assess(CONFIG, NODE1, answers(own, *others), 10.1).held is held


def test_an_answer_counts_no_later_than_from_the_first_ping_without_a_reply() -> None:
    own, other = answer("n1", N1, 10.0), answer("n2", N1, 10.0, unanswered=8.5)
    assert assess(CONFIG, NODE1, answers(own, other), 10.1).expires == 10.5
    slow = answer("n2", N1, 10.0, unanswered=8.5, took=0.5)
    assert assess(CONFIG, NODE1, answers(own, slow), 10.0).expires == 10.0, "that ping left 0.5 s sooner, maybe"
    assert assess(CONFIG, NODE1, answers(own, answer("n2", N1, 10.0, unanswered=10.05)), 10.1).expires == 12.0


def test_a_leader_that_names_whom_it_has_promoted_is_still_without_a_reply_of_the_former_primary() -> None:
    leader = answer("n3", N2, 10.0, flags=frozenset({"promoted"}), unanswered=5.0, epoch=1)
    both = answers(leader, answer("n2", N2, 10.0, epoch=1))
    assert assess(CONFIG, CONFIG.node("n2"), both, 10.1).expires == 12.0


def lease(
    *, held: bool = True, unanimous: bool = False, epoch: int = 1, now: float = 0.0, settled: bool = True
) -> Lease:
    return Lease(held, now + 2.0 if held else 0.0, 2, 3, N1 if epoch else None, epoch, unanimous, settled)


def test_a_lease_that_all_sentinels_give_is_taken_up_at_once() -> None:
    assert Tenure().expires(lease(unanimous=True), 5.0) == 2.0


def test_a_lease_that_some_give_is_taken_up_after_a_while_and_kept_without_them_all() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(), 5.0) == 0.0
    assert tenure.expires(lease(), 5.0 + PROBATION_SECONDS - 0.1) == 0.0
    assert tenure.expires(lease(), 5.0 + PROBATION_SECONDS) == 2.0
    assert tenure.expires(lease(), 8.0) == 2.0


def test_a_lease_that_has_lapsed_begins_anew() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(unanimous=True), 5.0) == 2.0
    assert tenure.expires(lease(held=False), 6.0) == 0.0
    assert tenure.expires(lease(), 7.0) == 0.0
    assert tenure.expires(lease(held=False), 8.0) == 0.0
    assert tenure.expires(lease(), 8.5) == 0.0
    assert tenure.expires(lease(), 8.4 + PROBATION_SECONDS) == 0.0
    assert tenure.expires(lease(), 8.5 + PROBATION_SECONDS) == 2.0


def test_a_promotion_that_was_seen_to_happen_is_no_return() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(held=False, epoch=1), 5.0) == 0.0  # another's, in epoch 1
    assert tenure.expires(lease(held=False, epoch=2), 6.0) == 0.0  # named, and not yet by answers that count
    assert tenure.expires(lease(epoch=2), 6.1) == 2.0
    assert tenure.expires(lease(held=False, epoch=2), 9.0) == 0.0
    assert tenure.expires(lease(epoch=2), 9.1) == 0.0, "this is one"


def test_who_has_seen_no_promotion_takes_no_majority_for_one() -> None:
    assert Tenure().expires(lease(epoch=7), 5.0) == 0.0


def test_an_epoch_that_is_named_again_is_no_promotion() -> None:
    tenure = Tenure()
    for epoch in (3, 2, 3):
        assert tenure.expires(lease(held=False, epoch=epoch), 5.0) == 0.0
    assert tenure.expires(lease(epoch=3), 6.0) == 0.0


def test_who_is_named_without_a_vote_waits_until_the_former_lease_must_have_ended() -> None:
    """As after SENTINEL FAILOVER, which promotes beside a primary that is well."""
    tenure = Tenure()
    assert tenure.expires(lease(held=False, epoch=1), 5.0) == 0.0
    for moment in (6.0, 6.0 + PROBATION_SECONDS - 0.1):
        assert tenure.expires(lease(epoch=2, unanimous=True, settled=False), moment) == 0.0
    assert tenure.expires(lease(epoch=2, settled=False), 6.0 + PROBATION_SECONDS) == 2.0


def test_who_leads_and_is_named_anew_without_a_vote_waits_too() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(unanimous=True, epoch=1), 5.0) == 2.0
    assert tenure.expires(lease(unanimous=True, epoch=3, settled=False), 6.0) == 0.0
    assert tenure.expires(lease(unanimous=True, epoch=3, settled=False), 6.0 + PROBATION_SECONDS) == 2.0


def test_who_was_given_the_former_lease_has_its_own_after_it() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(held=False, epoch=1), 5.0, given=True) == 0.0
    assert tenure.expires(lease(epoch=2, settled=False), 6.0, given=True) == 2.0
    assert tenure.expires(lease(epoch=2, settled=False), 7.5) == 2.0


def test_what_was_given_helps_nobody_whose_lease_has_lapsed_since() -> None:
    tenure = Tenure()
    assert tenure.expires(lease(epoch=2, settled=False), 6.0, given=True) == 2.0
    assert tenure.expires(lease(held=False, epoch=2), 7.0, given=True) == 0.0
    assert tenure.expires(lease(epoch=2, settled=False), 7.5, given=True) == 0.0
    assert tenure.expires(lease(epoch=2, settled=False), 7.4 + PROBATION_SECONDS, given=True) == 0.0
    assert tenure.expires(lease(epoch=2, settled=False), 7.5 + PROBATION_SECONDS, given=True) == 2.0


def lost_at(moment: float, lost: bool) -> dict[str, float]:  # noqa: FBT001 - a table's column
    return {"former_until": moment} if lost else {}


@pytest.mark.parametrize(
    ("votes", "lost", "named_for", "settled"),
    [
        ((4, 4, 0), (True, True, False), (0.1, 0.0, 0.1), True),
        ((5, 4, 0), (True, True, False), (0.1, 0.0, 0.1), True),
        ((4, 4, 4), (True, False, False), (0.1, 0.0, 0.1), False),
        ((4, 3, 3), (True, True, True), (0.1, 1.9, 1.9), False),
        ((3, 3, 3), (False, False, False), (2.0, 1.9, 2.0), True),
        ((3, 3, 3), (False, False, False), (2.0, 1.9, 1.9), False),
    ],
    ids=["voted", "voted again", "voted by who saw no loss", "asked for", "long ago", "not long ago"],
)
def test_nobody_else_has_a_lease_after_a_vote_and_a_loss_or_a_lease_later(
    votes: tuple[int, ...],
    lost: tuple[bool, ...],
    named_for: tuple[float, ...],
    settled: bool,  # noqa: FBT001 - a table's column
) -> None:
    heard = answers(
        *(
            answer(node.name, N1, 10.0, epoch=4, vote_epoch=vote, named_since=10.0 - seconds, **lost_at(9.8, loss))
            for node, vote, loss, seconds in zip(CONFIG.nodes, votes, lost, named_for, strict=True)
        )
    )
    assert assess(CONFIG, NODE1, heard, 10.1).settled == settled


@pytest.mark.parametrize(
    ("last", "lost"),
    [
        ({}, False),
        ({"unanswered": 9.5}, False),
        ({"unanswered": 8.0}, True),
        ({"flags": CLEAN | {"s_down"}}, True),
        ({"down_after": 0.2}, True),
        ({"former_until": 5.0}, False),
    ],
    ids=["well", "a ping under way", "silent", "down", "hurried", "well, and had lost the one before"],
)
def test_a_sentinel_that_still_names_the_former_one_tells_by_itself_whether_that_is_lost(
    last: dict[str, object],
    lost: bool,  # noqa: FBT001 - a table's column
) -> None:
    new = {"epoch": 4, "vote_epoch": 4}
    leader = answer("n2", N2, 10.0, former_until=10.0, named_since=10.0, **new)
    other = answer("n3", N2, 10.0, named_since=10.0, epoch=4)
    voter = answer("n1", N1, 10.0, vote_epoch=4, **last)
    assert assess(CONFIG, CONFIG.node("n2"), answers(leader, voter, other), 10.1).settled == lost


@pytest.mark.parametrize(
    ("last", "until"),
    [
        ({}, math.inf),
        ({"unanswered": 9.2}, math.inf),
        ({"unanswered": 9.2, "vote": "c", "vote_epoch": 4}, 9.2 + LEASE_SECONDS),
        ({"unanswered": 9.2, "vote": "c", "vote_epoch": 3}, math.inf),
        ({"unanswered": 9.2, "vote": "c", "vote_epoch": 5}, math.inf),
        ({"unanswered": 9.2, "vote": None, "vote_epoch": 4}, math.inf),
        ({"unanswered": 9.2, "vote": "c", "vote_epoch": 4, "epoch": 4}, math.inf),
        ({"vote": "c", "vote_epoch": 4}, math.inf),
        ({"unanswered": 9.2, "vote": "c", "vote_epoch": 4, "flags": CLEAN | {"s_down"}}, 10.0),
        ({"unanswered": 8.0}, 10.0),
        ({"down_after": 0.2}, 10.0),
        ({"unanswered": 8.0, "tilt": True}, math.inf),
        ({"unanswered": 8.0, "flags": frozenset({PROMOTED_FLAG})}, math.inf),
    ],
    ids=[
        "well",
        "a ping under way",
        "voted",
        "an older vote",
        "a later vote",
        "nobody knows for whom",
        "for what it has taken in",
        "well and voted",
        "down",
        "silent",
        "hurried",
        "in TILT",
        "of the one before",
    ],
)
def test_what_a_sentinel_gave_ends_with_a_loss_or_a_lease_after_the_first_ping_without_a_reply_if_it_has_voted(
    last: dict[str, object], until: float
) -> None:
    assert support_ends(CONFIG, answer("n1", N1, 10.0, **last), 4) == until


VOTED = {"unanswered": 9.2, "vote": "c", "vote_epoch": 4}


@pytest.mark.parametrize(
    ("before", "now", "until"),
    [
        (answer("n2", N1, 10.0, named_since=1.0, **VOTED), answer("n2", N2, 10.3, epoch=4), 9.2 + LEASE_SECONDS),
        (answer("n2", N1, 10.0, named_since=9.5, **VOTED), answer("n2", N2, 10.3, epoch=4), 9.5 + LEASE_SECONDS),
        (
            answer("n2", N1, 10.0, named_since=9.9, former_until=9.0, **VOTED),
            answer("n2", N2, 10.3, epoch=4),
            9.2 + LEASE_SECONDS,
        ),
        (answer("n2", N1, 8.0, named_since=1.0, **VOTED), answer("n2", N2, 10.3, epoch=4), math.inf),
        (answer("n2", N2, 10.0, former_until=9.0), answer("n2", N2, 10.3, epoch=4), 9.0),
        (None, answer("n2", N2, 10.3, epoch=4), math.inf),
    ],
    ids=["changed", "changed twice", "changed twice after a loss", "long ago", "the same", "never heard"],
)
def test_an_answer_tells_until_when_what_was_given_to_the_former_one_may_hold(
    before: SentinelAnswer | None, now: SentinelAnswer, until: float
) -> None:
    assert dated(CONFIG, before, now, 10.4).former_until == until


@pytest.mark.parametrize(
    ("before", "now", "vote", "seen"),
    [
        ({}, {"vote": "c", "vote_epoch": 4}, "c", 10.4),
        ({"vote": "c", "vote_epoch": 4}, {"vote": "c", "vote_epoch": 4}, "c", 7.0),
        ({"vote": "c", "vote_epoch": 4}, {"vote": None, "vote_epoch": 4}, "c", 7.0),
        ({"vote": "c", "vote_epoch": 4}, {"vote": "d", "vote_epoch": 5}, "d", 10.4),
        ({"vote": "c", "vote_epoch": 4}, {"vote": None, "vote_epoch": 5}, None, 10.4),
    ],
    ids=["new", "known", "forgotten", "another", "of another epoch"],
)
def test_a_vote_that_a_sentinel_has_forgotten_stands(
    before: dict[str, object], now: dict[str, object], vote: str | None, seen: float
) -> None:
    earlier, later = answer("n2", N1, 10.0, vote_seen=7.0, **before), answer("n2", N1, 10.3, **now)
    told = dated(CONFIG, earlier, later, 10.4)
    assert (told.vote, told.vote_seen) == (vote, seen)


def test_nobody_else_has_a_lease_as_soon_as_what_a_majority_gave_the_former_one_has_ended() -> None:
    voted = {"epoch": 4, "vote_epoch": 4, "named_since": 10.0}
    heard = answers(
        answer("n1", N2, 10.0, former_until=10.4, **voted),
        answer("n2", N2, 10.0, former_until=10.9, **voted),
        answer("n3", N2, 10.0, **voted),
    )
    settled = [assess(CONFIG, CONFIG.node("n2"), heard, now).settled for now in (10.3, 10.8, 10.9, 11.5)]
    assert settled == [False, False, True, True]


def test_nobody_had_a_lease_before_the_first_epoch() -> None:
    heard = answers(answer("n1", N1, 10.0, named_since=10.0), answer("n2", N1, 10.0, named_since=10.0))
    assert assess(CONFIG, NODE1, heard, 10.1).settled


def test_a_greater_down_after_of_a_changed_file_hurries_nobody() -> None:
    longer = dataclasses.replace(CONFIG, sentinel=msgspec.structs.replace(CONFIG.sentinel, down_after=8.0))
    both = answers(answer("n1", N1, 10.0, down_after=5.0), answer("n2", N1, 10.0, down_after=5.0))
    assert assess(longer, NODE1, both, 10.1).held
