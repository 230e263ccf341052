"""When a primary is fenced, what lifts the fence, and when a silent primary may be replaced. Pure."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.cluster import LEASE_MARGIN_SECONDS, LEASE_SECONDS, NEVER_PRIORITY, Config, Node
from srd.config import parse_config
from srd.ha.custody import ASSURANCE_SECONDS, Custody, Offer
from srd.ha.failover import OWN_FENCE_SECONDS, REPLACE_SECONDS, haste, replaceable_at
from srd.ha.fence import FENCE_SECONDS, awaited, cut_off, demanded
from srd.ha.lease import endpoint_of
from srd.ha.preference import most_advanced
from srd.ha.redis import FENCED
from srd.ha.strays import Stray
from srd.model import Endpoint, Role
from srd.state import Channel, Lease, PeerReport, Redis, ReplicaOf, SentinelAnswer, Situation, View

NOW = 1000.0


def cluster(nodes: int = 3) -> Config:
    entries = "".join(f'[[node]]\nname = "n{i}"\naddresses = ["10.0.0.{i}"]\n' for i in range(1, nodes + 1))
    return parse_config(f'cluster = "c"\n{entries}', "test")


THREE = cluster()
N1, N2, N3 = THREE.nodes
REPLICA = ReplicaOf(Endpoint(ip_address("10.0.0.2"), 6379), "online", 1, 0)
PRIMARY = Redis(
    answered=NOW,
    version="7.0.15",
    run_id="r",
    role=Role.PRIMARY,
    loading=False,
    replid="a" * 40,
    offset=100,
    uptime_seconds=1,
    dbsize=0,
    min_replicas_to_write=1,
    persistence=True,
    replicas=(REPLICA, dataclasses.replace(REPLICA, endpoint=Endpoint(ip_address("10.0.0.3"), 6379))),
)


def report(node: Node, ago: float) -> PeerReport:
    return PeerReport(node.name, NOW - ago, "0", initialized=True, role=Role.UNKNOWN, healthy=True)


def situation(view: View, node: Node = N1, config: Config = THREE) -> Situation:
    return Situation(config, node, view, NOW)


def silent(**since: float) -> View:
    return View(silent={name: NOW - ago for name, ago in since.items()})


HELD = Lease(held=True, expires=NOW + 1, agree=3, reachable=3, primary=endpoint_of(THREE, N1))
LOST = dataclasses.replace(HELD, held=False, expires=0.0)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(), False),
        (silent(n2=9, n3=FENCE_SECONDS - 0.01), False),
        (silent(n2=9), False),
        (silent(n2=9, n3=FENCE_SECONDS), True),
        (silent(n1=9), False),  # its own sentinel is down: the node itself is there
        (silent(n1=9, n2=9, n3=9), True),
        (dataclasses.replace(silent(n2=9, n3=9), peers={"n3": report(N3, FENCE_SECONDS - 0.01)}), False),
        (dataclasses.replace(silent(n2=9, n3=9), peers={"n3": report(N3, FENCE_SECONDS)}), True),
    ],
)
def test_a_node_is_cut_off_when_no_majority_was_heard_for_long_enough(view: View, expected: bool) -> None:  # noqa: FBT001
    assert cut_off(situation(view)) is expected


def may_replace(s: Situation, primary: Node) -> bool:
    moment = replaceable_at(s, primary)
    return moment is not None and s.now >= moment


def test_what_is_demanded_of_a_write() -> None:
    whole = View(lease=HELD)
    fenced = dataclasses.replace(PRIMARY, min_replicas_to_write=FENCED)
    assert demanded(situation(whole), PRIMARY) == THREE.min_replicas_to_write == 1
    assert demanded(situation(silent(n2=9, n3=9)), PRIMARY) == FENCED
    assert demanded(situation(whole), fenced) == 1, "a majority names it: lifted"
    assert demanded(situation(View(lease=LOST)), fenced) == FENCED, "nobody names it: it stays"
    assert demanded(situation(View()), fenced) == FENCED, "nobody was asked yet, as after a restart of srd: it stays"
    late = dataclasses.replace(situation(whole), now=NOW + 1)
    assert demanded(late, fenced) == FENCED, "the lease has ended: it stays"
    replica = dataclasses.replace(fenced, role=Role.REPLICA)
    assert demanded(situation(silent(n2=9, n3=9)), replica) == 1, "a replica takes no writes of clients"


def test_a_redis_that_has_stepped_down_follows_whom_a_majority_names_if_that_is_another_one() -> None:
    parted = dataclasses.replace(PRIMARY, role=Role.REPLICA, replicas=())
    other = dataclasses.replace(LOST, primary=endpoint_of(THREE, N2))
    assert awaited(situation(View(lease=other)), parted) == endpoint_of(THREE, N2)
    assert awaited(situation(View(lease=LOST)), parted) is None, "it is named itself: a switchover is under way"
    assert awaited(situation(View()), parted) is None
    following = dataclasses.replace(parted, primary=endpoint_of(THREE, N3))
    assert awaited(situation(View(lease=other)), following) is None, "sentinels see to one that follows another"
    assert awaited(situation(View(lease=other)), PRIMARY) is None


def test_a_primary_demands_more_replicas_only_once_it_has_them() -> None:
    seven = cluster(7)
    with_three = dataclasses.replace(PRIMARY, replicas=PRIMARY.replicas * 2)
    assert seven.min_replicas_to_write == 3
    assert demanded(situation(View(lease=HELD), config=seven), PRIMARY) == 1
    assert demanded(situation(View(lease=HELD), config=seven), with_three) == 3
    assert demanded(situation(View(lease=HELD)), dataclasses.replace(PRIMARY, min_replicas_to_write=3)) == 1


def answer(node: Node, unanswered: float | None, **more: object) -> SentinelAnswer:
    base = SentinelAnswer(
        node.name,
        NOW - 0.1,
        endpoint_of(THREE, N1),
        1,
        tilt=False,
        known_sentinels=2,
        known_replicas=2,
        unanswered=None if unanswered is None else NOW - unanswered,
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def seen_from_n2(n2: float | None, n3: float | None, last_word_of_n1: float | None) -> Situation:
    peers = {} if last_word_of_n1 is None else {"n1": report(N1, last_word_of_n1)}
    return situation(View(sentinels={"n2": answer(N2, n2), "n3": answer(N3, n3)}, peers=peers), N2)


@pytest.mark.parametrize(
    ("n2", "n3", "last_word", "expected"),
    [
        (None, None, None, False),
        (9, None, 9, False),  # one sentinel is answered
        (REPLACE_SECONDS, 1.6, REPLACE_SECONDS + 0.5, True),  # its srd lived until the cut, and has fenced
        (REPLACE_SECONDS - 0.01, 1.6, REPLACE_SECONDS + 0.5, False),
        (REPLACE_SECONDS, 1.6, REPLACE_SECONDS + 2.1, True),  # cut off just before its next word, and just after a ping
        (REPLACE_SECONDS, 1.6, REPLACE_SECONDS + 2.6, False),
        (REPLACE_SECONDS, 1.0, REPLACE_SECONDS, False),  # the other sentinel is not sure yet
        (REPLACE_SECONDS, 1.6, 20, False),  # its srd was gone before: redis' own fence is waited for
        (REPLACE_SECONDS, 1.6, None, False),
        (OWN_FENCE_SECONDS, OWN_FENCE_SECONDS - 1, 20, True),
        (OWN_FENCE_SECONDS, OWN_FENCE_SECONDS - 1, None, True),
        (OWN_FENCE_SECONDS, 1.6, None, False),  # not one cut: the other one was answered for long
        (20, REPLACE_SECONDS, REPLACE_SECONDS + 0.5, True),  # one was cut off before, and has not pinged again since
        (20, REPLACE_SECONDS - 0.01, REPLACE_SECONDS + 0.5, False),
        (20, REPLACE_SECONDS, 0.1, False),
        (9, 9, 0.1, False),  # its srd is heard: it knows better what its redis does
    ],
)
def test_a_silent_primary_is_replaced_once_its_fences_have_fallen(
    n2: float | None,
    n3: float | None,
    last_word: float | None,
    expected: bool,  # noqa: FBT001
) -> None:
    assert may_replace(seen_from_n2(n2, n3, last_word), N1) is expected


def test_a_srd_whose_connection_ended_before_its_node_fell_silent_has_not_fenced() -> None:
    s = seen_from_n2(REPLACE_SECONDS, 1.6, REPLACE_SECONDS + 0.5)
    for connected in (True, False):
        channel = Channel(peer="n1", connected=connected, since=0.0)
        assert (
            may_replace(dataclasses.replace(s, view=dataclasses.replace(s.view, channels={"n1": channel})), N1)
            is connected
        )


def test_a_sentinel_in_tilt_or_one_that_names_another_is_no_witness() -> None:
    for other in ({"tilt": True}, {"primary": endpoint_of(THREE, N3)}, {"asked": NOW - LEASE_SECONDS}):
        view = View(sentinels={"n2": answer(N2, 9), "n3": answer(N3, 9, **other)})
        assert not may_replace(situation(view, N2), N1)


def test_nobody_is_replaced_before_its_lease_has_ended() -> None:
    assert REPLACE_SECONDS >= LEASE_SECONDS
    assert OWN_FENCE_SECONDS > LEASE_SECONDS


def replica(offset: int, **more: object) -> Redis:
    return dataclasses.replace(PRIMARY, role=Role.REPLICA, offset=offset, **more)  # type: ignore[arg-type]


def test_the_replica_that_has_most_is_preferred_if_they_differ() -> None:
    assert most_advanced({"n2": replica(7), "n3": replica(9)}) == "n3"
    assert most_advanced({"n2": replica(9), "n3": replica(9)}) is None
    assert most_advanced({"n2": replica(9)}) is None
    assert most_advanced({}) is None
    assert most_advanced({"n2": replica(7), "n3": replica(9, replid="b" * 40)}) is None, "other histories"
    assert most_advanced({"n2": replica(7), "n3": replica(9), "n4": replica(11, loading=True)}) == "n3"
    assert most_advanced({"n1": PRIMARY, "n2": replica(7), "n3": replica(6)}) == "n2"
    drained = replica(11, priority=NEVER_PRIORITY)
    assert most_advanced({"n2": replica(7), "n3": replica(9), "n4": drained}) == "n3"
    assert most_advanced({"n2": replica(9), "n4": drained}) is None


def test_who_was_not_in_step_with_the_primary_that_is_gone_is_not_compared_with_who_was() -> None:
    stream = "a" * 40
    stranger = replica(99, replid="b" * 40)
    assert most_advanced({"n2": replica(7), "n3": replica(9), "n4": stranger}, stream) == "n3"
    assert most_advanced({"n2": replica(9), "n3": replica(9), "n4": stranger}, stream) == "n2", (
        "the sentinels could err"
    )
    assert most_advanced({"n2": replica(9), "n4": stranger}, stream) == "n2"
    assert most_advanced({"n2": replica(9), "n3": replica(9)}, stream) is None
    assert most_advanced({"n4": stranger}, stream) is None
    assert most_advanced({"n2": replica(7), "n3": replica(9), "n4": stranger}, "c" * 40) is None


@given(st.floats(0, 14))  # long before, the sentinels have taken it for down by themselves
def test_replicas_that_lost_the_primary_are_good_enough_for_sentinels_that_are_hurried(lost_for: float) -> None:
    link_down = lost_for + 1.0  # in whole seconds, rounded up; it went down a ping before the first without a reply
    assert 10 * haste(lost_for) >= link_down or lost_for < 1.0
    assert 0.2 <= haste(lost_for) < LEASE_SECONDS + LEASE_MARGIN_SECONDS, "a lease must be able to tell"
    assert haste(lost_for) <= max(0.2, lost_for), "the primary has been silent for as long"


def test_a_stray_setting_is_tolerated_for_as_long_as_it_may_be_needed() -> None:
    stray = Stray(3.0)
    assert not stray.is_due(differs=True, now=10.0)
    assert not stray.is_due(differs=True, now=12.9)
    assert stray.is_due(differs=True, now=13.0)
    assert not stray.is_due(differs=False, now=14.0)
    assert not stray.is_due(differs=True, now=15.0), "a new one is tolerated anew"
    stray.end_now()
    assert stray.is_due(differs=True, now=15.1)


Step = tuple[str, int, float]


def give(holder: Custody, heir: str, now: float, epoch: int) -> Offer | None:
    """Give as a node's srd does that is asked for what is left of its lease; None where it refuses."""
    seconds = holder.give(heir, now)
    if seconds <= 0 and not holder.assure(heir, now, epoch):
        return None
    return Offer("n0", now, seconds, ASSURANCE_SECONDS)


@given(st.lists(st.tuples(st.sampled_from(["ask", "take", "extend", "wait"]), st.integers(0, 2), st.floats(0, 3))))
def test_a_lease_that_changes_hands_is_never_in_two(steps: list[Step]) -> None:
    """Node 0 holds what the sentinels give it, and gives it to whoever asks, and takes it later; clocks run alike."""
    holder, heirs = Custody(), {1: Custody(), 2: Custody()}
    offers: dict[int, Offer | None] = {}
    now, expires = 0.0, LEASE_SECONDS
    for what, who, amount in steps:
        if what == "wait":
            now += amount
        elif what == "extend":
            expires = now + LEASE_SECONDS
        elif what == "ask" and who:
            offers[who] = give(holder, f"n{who}", now, 1)
        elif what == "take" and (offer := offers.pop(who, None)) is not None:
            heirs[who].take(offer, promoted=now)
        holding = [0] if holder.held_until(expires, now, 1) > now else []
        holding += [heir for heir, custody in heirs.items() if custody.held_until(0.0, now, 0) > now]
        assert len(holding) <= 1, (holding, now)
        counting = [heir for heir, custody in heirs.items() if custody.is_assured(now)]
        assert len(counting) <= 1, (counting, now)
        assert not (counting and 0 in holding), now


def test_what_was_given_is_lost_by_a_redis_that_is_no_primary_any_more_and_not_by_one_that_was_none_yet() -> None:
    heir = Custody()
    heir.take(Offer("n0", 10.0, 2.0, 4.0), promoted=10.3)
    heir.lose(10.2)  # asked just before it was promoted, and heard just after
    assert heir.held_until(0.0, 10.4, 1) == 12.0
    heir.lose(10.5)
    assert heir.held_until(0.0, 10.6, 1) == 0.0
    assert not heir.is_assured(10.6)


def test_who_has_given_its_lease_has_none_in_that_epoch_for_as_long_as_the_heir_counts_on_it() -> None:
    holder, heir = Custody(), Custody()
    assert holder.held_until(12.0, 10.0, 3) == 12.0
    heir.take(Offer("n0", 10.1, holder.give("n1", 10.2), ASSURANCE_SECONDS), promoted=10.3)
    for now in (11.0, 12.5, 14.0):
        assert heir.is_assured(now)
        assert holder.held_until(now + 2.0, now, 3) == 0.0
    assert not heir.is_assured(14.15)
    assert holder.held_until(16.0, 14.15, 3) == 0.0
    assert holder.held_until(16.3, 14.3, 3) == 16.3


def test_a_lease_is_taken_back_from_an_heir_that_was_not_told_or_has_declined_and_from_no_other() -> None:
    for told, declined in ((False, False), (True, False), (True, True)):
        holder = Custody()
        holder.held_until(12.0, 10.0, 3)
        assert holder.give("n1", 10.2) > 0
        if told:
            holder.tell(10.2)
        if declined:
            holder.declined()
        holder.take_back()
        assert (holder.held_until(12.0, 10.3, 3) == 12.0) is (declined or not told)
        assert holder.give("n2", 30.0) == 0.0
        assert not holder.told, "what an earlier heir was told is over"


def test_who_has_no_lease_any_more_gives_one_node_the_assurance_that_it_takes_none() -> None:
    holder, heir = Custody(), Custody()
    assert holder.held_until(12.0, 10.0, 3) == 12.0
    assert not holder.assure("n1", 11.0, 3), "there is a lease that is to be given"
    offer = give(holder, "n1", 12.5, 3)
    assert offer is not None
    heir.take(offer, promoted=12.6)
    assert heir.held_until(0.0, 12.6, 4) <= 12.6, "there was nothing left"
    assert heir.is_assured(12.6)
    assert holder.held_until(14.5, 12.6, 3) == 0.0
    assert give(holder, "n2", 13.0, 3) is None, "another one counts on it"
    assert give(holder, "n1", 13.0, 3) is not None
    assert holder.held_until(15.1, 13.1, 4) == 15.1, "it was elected anew"
    assert give(holder, "n2", 15.2, 4) is not None


def test_who_has_given_its_lease_has_another_one_when_it_is_elected_anew() -> None:
    holder = Custody()
    holder.held_until(12.0, 10.0, 3)
    holder.give("n1", 10.2)
    assert holder.held_until(13.0, 11.9, 4) == 0.0, "the given one has not ended"
    assert holder.held_until(14.5, 12.5, 4) == 14.5


def test_an_heir_counts_on_its_giver_until_a_third_one_is_named() -> None:
    heir = Custody()
    heir.take(Offer("n1", 10.0, 0.5, ASSURANCE_SECONDS), promoted=10.0)
    for named in (None, N1, N2):
        heir.named(named, N2)
        assert heir.is_assured(11.0)
    heir.named(N3, N2)
    assert not heir.is_assured(11.0)
