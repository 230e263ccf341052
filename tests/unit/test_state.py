"""The store's rules, and every condition of the catalogue: what raises it, and that nothing else does."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.situations import WALL, arbiter_situation, primary_situation, replica_situation, with_child

from srd.conditions import CHANNEL_HOLD_SECONDS, Code, Severity, conditions
from srd.findings import Cure, Finding, Trouble
from srd.model import IpsecMode, Pause, Service
from srd.state import Channel, Child, ChildState, DiskTrouble, Kernel, Situation, Store, Symptom


def seen(situation: Situation, **changes: object) -> Situation:
    return replace(situation, view=replace(situation.view, **changes))


def codes(situation: Situation) -> dict[Code, tuple[Severity, str]]:
    return {found.code: (found.severity, found.subject) for found in conditions(situation)}


def test_a_healthy_node_has_no_condition() -> None:
    assert conditions(primary_situation()) == ()
    assert conditions(replica_situation()) == ()
    assert conditions(arbiter_situation()) == ()


def test_ipsec_that_is_off_is_said_and_nothing_else_of_ipsec() -> None:
    whole = primary_situation()
    config = replace(whole.config, ipsec=type(whole.config.ipsec)(mode=IpsecMode.OFF))
    off = seen(replace(whole, config=config), kernel=None, links={})
    assert codes(off) == {Code.IPSEC_OFF: (Severity.WARNING, whole.config.cluster)}


def test_missing_policies_are_critical() -> None:
    found = codes(seen(primary_situation(), kernel=Kernel(policies_installed=False)))
    assert found == {Code.POLICIES_MISSING: (Severity.CRITICAL, "redis-1")}


def test_a_foreign_policy_that_comes_first_is_critical() -> None:
    found = codes(seen(primary_situation(), kernel=Kernel(policies_installed=True, foreign_overrides=("theirs",))))
    assert found == {Code.FOREIGN_POLICY: (Severity.CRITICAL, "theirs")}


def test_a_peer_without_keys_is_named() -> None:
    whole = primary_situation()
    links = {name: link for name, link in whole.view.links.items() if name != "redis-2"}
    assert codes(seen(whole, links=links)) == {Code.LINK_UNPROTECTED: (Severity.WARNING, "redis-2")}


@pytest.mark.parametrize(("age", "shown"), [(CHANNEL_HOLD_SECONDS - 1, False), (CHANNEL_HOLD_SECONDS + 1, True)])
def test_a_lost_keying_channel_shows_after_a_while(age: float, shown: bool) -> None:  # noqa: FBT001 - a table
    whole = primary_situation()
    down = Channel(peer="redis-2", connected=False, since=whole.now - age, last_error="refused")
    found = codes(seen(whole, channels={**whole.view.channels, "redis-2": down}))
    assert (Code.CHANNEL_DOWN in found) is shown


def test_keys_that_cannot_be_renewed_show_while_the_old_ones_still_do_their_work() -> None:
    whole = primary_situation()
    failing = replace(whole.view.channels["redis-2"], last_error="no such suite")
    found = codes(seen(whole, channels={**whole.view.channels, "redis-2": failing}))
    assert found == {Code.REKEY_FAILING: (Severity.WARNING, "redis-2")}


@pytest.mark.parametrize("state", [state for state in ChildState if state is not ChildState.READY])
def test_a_child_that_is_not_ready_is_critical(state: ChildState) -> None:
    whole = primary_situation()
    service = next(iter(whole.view.children))
    found = codes(seen(whole, children={**whole.view.children, service: Child(state)}))
    assert found == {Code.CHILD_DOWN: (Severity.CRITICAL, service)}


def test_a_child_that_waits_says_for_what() -> None:
    whole = primary_situation()
    service = next(iter(whole.view.children))
    waits = Child(ChildState.STOPPED, waiting_for="a majority")
    (found,) = conditions(seen(whole, children={**whole.view.children, service: waits}))
    assert (found.code, found.text) == (Code.CHILD_WAITING, "waits: a majority")


@pytest.mark.parametrize("symptom", list(Symptom))
def test_a_child_that_is_silent_says_why_and_what_is_done(symptom: Symptom) -> None:
    whole = primary_situation()
    service = next(iter(whole.view.children))
    silent = Child(ChildState.DEGRADED, waiting_for="an answer", symptom=symptom)
    (found,) = conditions(seen(whole, children={**whole.view.children, service: silent}))
    assert (found.code, found.severity) == (Code.CHILD_SILENT, Severity.CRITICAL)
    assert found.text.startswith("no answer: ")


@pytest.mark.parametrize("trouble", list(DiskTrouble))
def test_a_directory_that_cannot_be_written_to_is_critical(trouble: DiskTrouble) -> None:
    assert codes(seen(primary_situation(), disks={"/var/lib/srd": trouble})) == {
        Code.DISK_TROUBLE: (Severity.CRITICAL, "/var/lib/srd")
    }


def test_a_redis_that_cannot_save_says_which_file() -> None:
    whole = primary_situation()
    assert whole.view.redis is not None
    (found,) = conditions(seen(whole, redis=replace(whole.view.redis, unsaved="append-only file")))
    assert found.code is Code.SAVING_FAILS
    assert found.text.startswith("redis could not write its append-only file")


def test_what_the_doctor_finds_is_one_condition_for_each_sentinel() -> None:
    whole = primary_situation()
    one = Finding(Trouble.SETTING, "redis-2", "quorum", "quorum is 1, not 2", Cure.SET)
    more = replace(one, subject="parallel-syncs", text="parallel-syncs is 1, not 2")
    found = conditions(seen(whole, findings=(one, more, replace(one, node="redis-3"))))
    assert {(each.code, each.severity, each.subject) for each in found} == {
        (Code.SENTINEL_TROUBLE, Severity.WARNING, "redis-2"),
        (Code.SENTINEL_TROUBLE, Severity.WARNING, "redis-3"),
    }
    assert {each.text for each in found} == {
        "its sentinel: quorum is 1, not 2; and 1 more; see srd doctor",
        "its sentinel: quorum is 1, not 2; see srd doctor",
    }


FLAPPING = {Code.CHILD_FLAPPING: (Severity.WARNING, Service.REDIS)}


@pytest.mark.parametrize(
    ("ages", "expected"),
    [((1, 2, 3, 4), {}), ((1, 2, 3, 4, 119), FLAPPING), ((1, 2, 3, 4, 121), {})],
)
def test_a_child_that_ends_again_and_again_is_flapping_even_while_it_is_up(
    ages: tuple[float, ...], expected: dict[Code, tuple[Severity, str]]
) -> None:
    whole = primary_situation()
    child = whole.view.children[Service.REDIS]
    ended = replace(child, lately=tuple(whole.now - age for age in ages), last_exit="killed by SIGSEGV")
    assert codes(seen(whole, children={**whole.view.children, Service.REDIS: ended})) == expected


def test_no_majority_of_sentinels_is_counted() -> None:
    whole = primary_situation()
    assert whole.view.lease is not None
    (found,) = conditions(seen(whole, lease=replace(whole.view.lease, reachable=1)))
    assert found.code is Code.NO_MAJORITY
    assert found.text == "1 of 3 sentinels answer; 2 are a majority"


def test_sentinels_that_know_of_no_replica_have_no_successor() -> None:
    whole = primary_situation()
    blind = {name: replace(answer, known_replicas=0) for name, answer in whole.view.sentinels.items()}
    assert codes(seen(whole, sentinels=blind)) == {Code.NO_SUCCESSOR: (Severity.WARNING, "master")}


def test_a_primary_whose_replicas_lag_takes_no_writes() -> None:
    whole = primary_situation()
    redis = whole.view.redis
    assert redis is not None
    late = replace(redis, min_replicas_to_write=1, replicas=tuple(replace(r, lag_seconds=9) for r in redis.replicas))
    assert codes(seen(whole, redis=late)) == {Code.WRITES_REFUSED: (Severity.CRITICAL, "redis-1")}


def test_a_replica_without_its_primary_is_named() -> None:
    whole = replica_situation()
    assert whole.view.redis is not None
    found = codes(seen(whole, redis=replace(whole.view.redis, link_up=False)))
    assert set(found) == {Code.REPLICA_LINK_DOWN}


@pytest.mark.parametrize(
    ("days", "severity"), [(30, None), (13, Severity.WARNING), (0.5, Severity.WARNING), (-1, Severity.CRITICAL)]
)
def test_a_certificate_is_announced_two_weeks_before_its_end(days: float, severity: Severity | None) -> None:
    whole = replace(primary_situation(), wall_clock=1_700_000_000.0)
    found = codes(seen(whole, certificates={"node": 1_700_000_000.0 + days * 86400}))
    assert found.get(Code.CERTIFICATE_EXPIRING) == ((severity, "node") if severity is not None else None)


def test_the_worst_comes_first() -> None:
    whole = seen(primary_situation(), links={}, kernel=Kernel(policies_installed=False))
    assert [found.severity for found in conditions(whole)] == [Severity.CRITICAL, Severity.WARNING, Severity.WARNING]


def test_a_key_has_one_writer() -> None:
    store = Store(0.0)
    store.writer("redis")
    with pytest.raises(ValueError, match="'redis' has a writer"):
        store.writer("redis")
    with pytest.raises(ValueError, match="no such key"):
        store.writer("rediss")


def test_a_snapshot_never_changes() -> None:
    store = Store(0.0)
    write = store.writer("certificates")
    mine = {"node": 1.0}
    write(mine)
    before = store.view()
    mine["node"] = 2.0
    write({"node": 3.0})
    assert before.certificates == {"node": 1.0}
    with pytest.raises(TypeError):
        before.certificates["node"] = 4.0  # type: ignore[index]


def test_writing_what_is_there_wakes_nobody() -> None:
    store = Store(0.0)
    woken: list[None] = []
    store.on_change(lambda: woken.append(None))
    write = store.writer("initialized")
    write(True)
    write(True)
    assert len(woken) == 1


async def test_waiting_ends_with_the_change_that_was_waited_for() -> None:
    store = Store(0.0)
    write = store.writer("initialized")
    asyncio.get_running_loop().call_soon(write, True)
    assert (await store.wait_for(lambda view: view.initialized, 5)).initialized


async def test_waiting_has_an_end() -> None:
    with pytest.raises(TimeoutError):
        await Store(0.0).wait_for(lambda view: view.initialized, 0.01)


def test_a_drained_node_is_shown_and_one_that_is_primary_all_the_same_more_urgently() -> None:
    (found,) = conditions(seen(replica_situation(), drained=True))
    assert (found.code, found.severity, found.subject) == (Code.DRAINED, Severity.WARNING, "redis-1")
    (still,) = conditions(seen(primary_situation(), drained=True))
    assert "primary all the same" in still.text


def test_a_pause_is_shown_with_its_end_while_it_holds() -> None:
    paused = primary_situation(pause=Pause(1, WALL + 60))
    (found,) = conditions(paused)
    assert (found.code, found.severity, found.subject) == (Code.PAUSED, Severity.WARNING, "orders")
    assert found.text.startswith("until 2023-11-14 22:14 UTC ")
    assert conditions(replace(paused, wall_clock=WALL + 60)) == ()


@pytest.mark.parametrize("symptom", list(Symptom))
def test_during_a_pause_a_silent_child_is_waited_for(symptom: Symptom) -> None:
    silent = with_child(
        primary_situation(pause=Pause(1, WALL + 60)), Service.REDIS, state=ChildState.DEGRADED, symptom=symptom
    )
    (text,) = (found.text for found in conditions(silent) if found.code is Code.CHILD_SILENT)
    assert text.endswith("; srd is paused, and waits")
