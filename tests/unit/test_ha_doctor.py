"""The doctor's judgement: what a whole cluster looks like, and every way in which it is not whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.accounts import CONFIG, IDS, NAMES, OLD, SENTINEL_PORT, account, listed, look
from support.situations import at, primary_redis

from srd.cluster import Config
from srd.findings import Cure, Finding, Trouble
from srd.ha import doctor
from srd.ha.doctor import Look
from srd.ha.patient import Account, ListedSentinel, wanted_settings
from srd.model import Role, Secret, Secrets
from srd.supervise.render import sentinel_conf


def with_entry(number: int, entry: ListedSentinel) -> Account:
    return account(number, sentinels=(*account(number).sentinels, entry))


def kinds(seen: Look, cluster: Config = CONFIG) -> list[tuple[str, Trouble, Cure]]:
    return [(finding.node, finding.trouble, finding.cure) for finding in doctor.diagnose(cluster, seen)]


def test_a_whole_cluster_is_well_and_lists_are_whole() -> None:
    seen = look()
    assert doctor.diagnose(CONFIG, seen) == ()
    assert doctor.unsettled(CONFIG, seen) is None
    assert all(doctor.not_listed(CONFIG, seen, each) == [] for each in seen.accounts.values())


@pytest.mark.parametrize(
    ("changed", "trouble", "cure"),
    [
        (with_entry(1, listed(4, hello_age=OLD)), Trouble.STALE_SENTINEL, Cure.RESET),
        (with_entry(1, listed(4)), Trouble.STRANGE_SENTINEL, Cure.BY_HAND),
        (with_entry(1, listed(2, run_id="f" * 40)), Trouble.GHOST_SENTINEL, Cure.RESET),
        (with_entry(1, listed(1, run_id="f" * 40)), Trouble.GHOST_SENTINEL, Cure.RESET),
        (with_entry(1, listed(2, run_id="f" * 40, port=0, at="192.168.205.11:0")), Trouble.GHOST_SENTINEL, Cure.RESET),
        (account(1, sentinels=(listed(2), listed(3, at=str(at(7, 5))))), Trouble.STALE_SENTINEL, Cure.RESET),
        (account(1, sentinels=(listed(2),)), Trouble.UNKNOWN_SENTINEL, Cure.BY_HAND),
        (account(1, replicas=(str(at(2)), str(at(3)), str(at(4)))), Trouble.STALE_REPLICA, Cure.RESET),
        (account(1, replicas=(str(at(2)), str(at(3)), str(at(3, 0)))), Trouble.STALE_REPLICA, Cure.RESET),
        (account(1, replicas=(str(at(2)), str(at(3)), str(at(1)))), Trouble.STALE_REPLICA, Cure.RESET),
        (account(1, further_masters=("theirs",)), Trouble.FURTHER_MASTER, Cure.BY_HAND),
        (account(1, epoch=2), Trouble.OLD_EPOCH, Cure.BY_HAND),
        (account(1, primary=str(at(2)), epoch=2), Trouble.OTHER_PRIMARY, Cure.REBUILD),
        (account(1, primary=str(at(2))), Trouble.EPOCH_TIE, Cure.REBUILD),
        (account(1, primary=None, settings={}, sentinels=(), replicas=()), Trouble.OTHER_PRIMARY, Cure.REBUILD),
        (account(1, flags=frozenset({"master", "s_down"})), Trouble.SEES_DOWN, Cure.BY_HAND),
        (account(1, flags=frozenset({"master", "disconnected"})), Trouble.SEES_DOWN, Cure.BY_HAND),
    ],
)
def test_one_thing_wrong_is_one_finding(changed: Account, trouble: Trouble, cure: Cure) -> None:
    (found,) = doctor.diagnose(CONFIG, look(changed))
    assert (found.node, found.trouble, found.cure) == ("redis-1", trouble, cure)
    assert bool(found.remedy) is (cure is Cure.BY_HAND), "a person is told what to do where srd does nothing"


@pytest.mark.parametrize("name", sorted(wanted_settings(CONFIG, CONFIG.nodes[0])))
def test_each_setting_is_compared(name: str) -> None:
    wrong = account(2, settings={**account(2).settings, name: "7"})
    (found,) = doctor.diagnose(CONFIG, look(wrong))
    assert (found.node, found.trouble, found.subject, found.cure) == ("redis-2", Trouble.SETTING, name, Cure.SET)


def test_what_srd_renders_is_what_the_doctor_wants() -> None:
    secrets = Secrets(*(Secret("password" * 2) for _ in range(4)))
    node = CONFIG.nodes[1]
    lines = sentinel_conf(CONFIG, node, secrets, Path("/x"), at(1)).splitlines()
    for name, value in wanted_settings(CONFIG, node).items():
        if name == "quorum":
            assert f"sentinel monitor master 192.168.205.10 6379 {value}" in lines
        else:
            master = "" if name.startswith("announce") else "master "
            assert f"sentinel {name} {master}{value}" in lines


def test_a_replica_that_follows_the_primary_and_is_no_node_would_only_be_found_again() -> None:
    stranger = replace(primary_redis().replicas[0], endpoint=at(4))
    redis = primary_redis(replicas=(*primary_redis().replicas, stranger))
    changed = account(3, replicas=(*account(3).replicas, str(at(4))))
    assert kinds(look(changed, redis=redis)) == [("redis-3", Trouble.STRANGE_REPLICA, Cure.BY_HAND)]


def test_one_id_for_two_is_said_of_both_and_what_follows_from_it_is_not() -> None:
    twin = account(3, run_id=IDS["redis-2"], sentinels=(listed(1),))
    other = account(2, sentinels=(listed(1),))
    third = account(1, sentinels=(listed(3, run_id=IDS["redis-2"]),))
    found = doctor.diagnose(CONFIG, look(twin, other, third))
    assert [(each.node, each.trouble) for each in found] == [
        ("redis-2", Trouble.DUPLICATE_ID),
        ("redis-3", Trouble.DUPLICATE_ID),
    ]
    assert {each.cure for each in found} == {Cure.REBUILD}


def test_who_is_silent_is_named_and_nothing_is_guessed_of_it() -> None:
    assert kinds(look(silent=("redis-2",))) == [("redis-2", Trouble.SILENT, Cure.BY_HAND)]


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (look(account(2, flags=frozenset({"master", "failover_in_progress"}))), "redis-2 is carrying out a failover"),
        (look(account(2, flags=frozenset({"master", "s_down", "o_down"}))), "redis-2 and others take the primary"),
        (look(account(2, tilt=True)), "redis-2 is in TILT"),
        (look(redis=None), "redis at 192.168.205.10:6379 does not answer as primary"),
        (look(redis=primary_redis(role=Role.REPLICA)), "does not answer as primary"),
        (look(silent=("redis-1", "redis-2")), "1 of 3 sentinels answer, and 2 are a majority"),
    ],
)
def test_while_something_is_under_way_nothing_is_said_of_lists_and_epochs(seen: Look, why: str) -> None:
    wrong = replace(seen.accounts["redis-3"], epoch=1, sentinels=(listed(4, hello_age=OLD),), replicas=(str(at(9)),))
    seen = replace(seen, accounts={**seen.accounts, "redis-3": wrong})
    moving = doctor.unsettled(CONFIG, seen)
    assert moving is not None
    assert why in moving
    assert {trouble for _, trouble, _ in kinds(seen)} <= {Trouble.SILENT}


def test_without_a_majority_for_one_primary_each_is_told_whom_it_monitors() -> None:
    split = look(account(1), account(2, primary=str(at(2))), account(3, primary=str(at(3))), redis=None)
    assert doctor.agreed_primary(CONFIG, split.accounts) is None
    assert {(trouble, cure) for _, trouble, cure in kinds(split)} == {(Trouble.OTHER_PRIMARY, Cure.BY_HAND)}


def test_a_stranger_that_a_majority_monitors_is_no_primary() -> None:
    astray = [account(number, primary=str(at(8))) for number in (1, 2, 3)]
    assert doctor.agreed_primary(CONFIG, look(*astray).accounts) is None


def test_only_what_two_looks_show_lasts_in_the_words_of_the_second() -> None:
    one = Finding(Trouble.SETTING, "redis-1", "quorum", "quorum is 1, not 2", Cure.SET)
    reworded = replace(one, text="quorum is 3, not 2")
    other = replace(one, node="redis-2")
    assert doctor.lasting((one,), (reworded, other)) == (reworded,)
    assert doctor.lasting((), (one,)) == ()


def test_what_a_list_lacks_is_named() -> None:
    lone = account(1, sentinels=(), replicas=(str(at(3)),))
    assert doctor.not_listed(CONFIG, look(lone), lone) == [
        "the sentinel of redis-2",
        "the sentinel of redis-3",
        "the replica redis-2",
    ]
    assert doctor.not_listed(CONFIG, look(lone, silent=("redis-3",)), lone) == [
        "the sentinel of redis-2",
        "the replica redis-2",
    ]


ENTRIES = st.builds(
    ListedSentinel,
    run_id=st.sampled_from([*IDS.values(), "e" * 40, "f" * 40]),
    at=st.sampled_from([str(at(number, SENTINEL_PORT)) for number in range(1, 6)] + ["sentinel.example:0"]),
    port=st.sampled_from([0, SENTINEL_PORT]),
    hello_age=st.floats(0, 1e6),
)
PLACES = st.sampled_from([str(at(number, port)) for number in range(1, 6) for port in (0, 6379)])
FLAGS = st.frozensets(st.sampled_from(["master", "s_down", "o_down", "disconnected", "failover_in_progress"]))


def accounts_of(name: str) -> st.SearchStrategy[Account]:
    return st.builds(
        Account,
        node=st.just(name),
        run_id=st.sampled_from(list(IDS.values())),
        primary=st.one_of(st.none(), PLACES),
        epoch=st.integers(0, 4),
        tilt=st.booleans(),
        flags=FLAGS,
        settings=st.just(wanted_settings(CONFIG, CONFIG.node(name))),
        sentinels=st.lists(ENTRIES, max_size=5).map(tuple),
        replicas=st.lists(PLACES, max_size=5).map(tuple),
    )


ACCOUNTS = st.sets(st.sampled_from(NAMES)).flatmap(
    lambda names: st.fixed_dictionaries({name: accounts_of(name) for name in names})
)


@given(ACCOUNTS, st.booleans())
def test_whatever_they_say_a_voter_that_is_as_it_should_be_is_never_to_be_forgotten(
    accounts: dict[str, Account],
    answers: bool,  # noqa: FBT001 - drawn
) -> None:
    silent = {name: "no answer" for name in NAMES if name not in accounts}
    seen = Look(accounts, silent, primary_redis() if answers else None)
    right = {f"{each.run_id}@{at(NAMES.index(each.node) + 1, SENTINEL_PORT)}" for each in accounts.values()}
    nodes = {str(at(number)) for number in (1, 2, 3)}
    found = doctor.diagnose(CONFIG, seen)
    assert [each.node for each in found] == sorted(each.node for each in found)
    for each in found:
        if each.cure is Cure.RESET:
            assert each.subject not in right
            assert each.subject not in nodes - {accounts[each.node].primary}
        if each.trouble is not Trouble.SILENT:
            assert each.node in accounts
    assert len({doctor.key(each) for each in found if each.cure is not Cure.RESET}) == sum(
        each.cure is not Cure.RESET for each in found
    )
