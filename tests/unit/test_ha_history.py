"""Accounts of a change of primary: how two become one, and how they are kept and told."""

from __future__ import annotations

import json
from functools import reduce
from ipaddress import ip_address
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clusters import paths_of
from support.situations import at

from srd.annals import ASIDE_SUFFIX, FILE_NAME, Annals
from srd.changes import ChangeKind, RoleChange
from srd.ha.history import KEPT, account_of, decode, encode, entered, key_of, merge, word_of
from srd.model import Body, Endpoint, SrdError

WALL = 1_700_000_000.0
SEEN = RoleChange(WALL, 7, at(1), at(2))
BARE = RoleChange(WALL + 1, 7, None, at(2), kind=ChangeKind.FIRST, before=True)

addresses = st.one_of(st.ip_addresses(), st.just(ip_address("fe80::1")))
endpoints = st.builds(Endpoint, addresses, st.integers(1, 65535))
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n"), min_size=1, max_size=40)
seconds = st.floats(0, 1e6)
counts = st.integers(0, 2**63 - 1)


def accounts(epochs: st.SearchStrategy[int], to: st.SearchStrategy[Endpoint]) -> st.SearchStrategy[RoleChange]:
    return st.builds(
        RoleChange,
        at_timestamp=st.floats(0, 1e11),
        epoch=epochs,
        previous=st.none() | endpoints,
        current=to,
        kind=st.sampled_from(ChangeKind),
        before=st.booleans(),
        cause=st.none() | texts,
        by=st.sets(texts, max_size=3).map(lambda names: tuple(sorted(names))),
        duration_seconds=st.none() | seconds,
        gap_seconds=st.none() | seconds,
        settling_seconds=st.none() | seconds,
        known_offset=st.none() | counts,
        known_age_seconds=st.none() | seconds,
        taken_offset=st.none() | counts,
        complete=st.booleans(),
    )


def consistent(change: RoleChange) -> bool:
    return (change.known_offset is None) == (change.known_age_seconds is None)


of_one_change = accounts(st.just(7), st.just(at(2))).filter(consistent)
of_any_change = accounts(st.integers(0, 5), st.sampled_from([at(1), at(2), at(3)])).filter(consistent)


@given(of_one_change, of_one_change, of_one_change)
def test_accounts_of_one_change_may_come_in_any_order_and_twice(a: RoleChange, b: RoleChange, c: RoleChange) -> None:
    assert merge(a, a) == a
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(merge(a, b), b) == merge(a, b)


@given(st.lists(of_any_change, max_size=4))
def test_a_history_is_the_same_in_whichever_order_it_was_heard(changes: list[RoleChange]) -> None:
    histories = {reduce(entered, order, ()) for order in permutations(changes)}
    assert len(histories) == 1
    (history,) = histories
    assert [change.epoch for change in history] == sorted(change.epoch for change in history)
    assert {key_of(change) for change in history} == {key_of(change) for change in changes}


@given(st.lists(of_any_change, max_size=5))
def test_the_file_holds_what_was_written(changes: list[RoleChange]) -> None:
    history = reduce(entered, changes, ())
    assert decode("orders", encode("orders", history)) == history


@given(of_any_change)
def test_a_word_says_what_is_known(change: RoleChange) -> None:
    assert account_of(word_of(change)) == change


def test_whoever_knows_best_says_why_and_all_say_what_they_measured() -> None:
    found_down = RoleChange(
        WALL, 7, at(1), at(2), kind=ChangeKind.SENTINEL, cause="they have found it down", duration_seconds=3.0
    )
    crashed = RoleChange(
        WALL + 2,
        7,
        at(1),
        at(2),
        kind=ChangeKind.CRASH,
        cause="redis has ended",
        by=("n1",),
        duration_seconds=0.5,
        known_offset=900,
        known_age_seconds=0.2,
    )
    successor = RoleChange(WALL + 1, 7, at(1), at(2), settling_seconds=0.1, taken_offset=850)
    known = reduce(merge, (found_down, crashed, successor))
    assert (known.kind, known.cause, known.by) == (ChangeKind.CRASH, "redis has ended", ("n1",))
    assert (known.duration_seconds, known.write_gap_seconds) == (0.5, 0.6)
    assert (known.lost_bytes, known.known_age_seconds, known.at_timestamp) == (50, 0.2, WALL)


def test_two_that_had_a_silent_node_replaced_are_both_named() -> None:
    one, other = (RoleChange(WALL, 7, at(1), at(3), kind=ChangeKind.SILENT, by=(name,)) for name in ("n2", "n3"))
    assert merge(other, one).by == ("n2", "n3")


def test_a_moment_that_was_seen_counts_for_more_than_one_before_which_it_was() -> None:
    known = merge(RoleChange(WALL - 5, 7, None, at(2), kind=ChangeKind.UNSEEN, before=True), SEEN)
    assert (known.at_timestamp, known.before, known.previous, known.kind) == (WALL, False, at(1), ChangeKind.UNKNOWN)


@pytest.mark.parametrize(
    ("changes", "gap", "lost"),
    [
        ({}, None, None),
        ({"kind": ChangeKind.CRASH, "duration_seconds": 1.0}, None, None),
        ({"kind": ChangeKind.CRASH, "duration_seconds": 1.0, "settling_seconds": 0.5}, 1.5, None),
        # The old primary went on taking writes, or nobody knows whether it did.
        ({"kind": ChangeKind.OUTSIDE, "duration_seconds": 1.0, "settling_seconds": 0.5}, None, None),
        ({"duration_seconds": 1.0, "settling_seconds": 0.5}, None, None),
        ({"kind": ChangeKind.SWITCHOVER, "duration_seconds": 1.0, "gap_seconds": 0.01, "complete": True}, 0.01, 0),
        ({"known_offset": 100, "taken_offset": 60}, None, 40),
        ({"known_offset": 60, "taken_offset": 100}, None, 0),
        ({"known_offset": 60}, None, None),
        ({"taken_offset": 60}, None, None),
    ],
)
def test_what_follows_from_what_is_known(changes: dict[str, object], gap: float | None, lost: int | None) -> None:
    change = RoleChange(WALL, 7, at(1), at(2), **changes)  # type: ignore[arg-type]
    assert (change.write_gap_seconds, change.lost_bytes) == (gap, lost)


def test_accounts_of_different_changes_are_never_merged() -> None:
    with pytest.raises(ValueError, match="different changes"):
        merge(SEEN, RoleChange(WALL, 8, at(1), at(2)))


def test_the_last_thousand_are_kept() -> None:
    history = decode("orders", encode("orders", tuple(RoleChange(WALL, n, at(1), at(2)) for n in range(KEPT + 5))))
    history = entered(history, RoleChange(WALL, KEPT + 5, at(1), at(2)))
    assert [history[0].epoch, history[-1].epoch, len(history)] == [6, KEPT + 5, KEPT]


def test_what_a_newer_srd_has_added_to_its_word_is_left_out() -> None:
    assert account_of({**word_of(SEEN), "weather": "fine"}) == SEEN


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"epoch": "7"},
        {"kind": "magic"},
        {"current": "nowhere"},
        {"current": None},
        {"current": "192.168.205.11:port"},
        {"at_timestamp": float("nan")},
        {"duration_seconds": float("inf")},
        {"settling_seconds": -1.0},
        {"known_offset": 2**64},
        {"cause": "x" * 1000},
        {"by": "\n".join(str(n) for n in range(100))},
    ],
)
def test_a_word_that_is_no_account_is_refused(wrong: Body) -> None:
    with pytest.raises(SrdError, match="cannot understand an account of a change of primary"):
        account_of({**word_of(SEEN), **wrong})


def annals(directory: Path, cluster: str = "orders") -> Annals:
    paths = paths_of(directory, "redis-1")
    paths.state_dir.mkdir(parents=True, exist_ok=True)
    return Annals(paths, cluster)


def file_of(directory: Path) -> Path:
    return paths_of(directory, "redis-1").state_dir / FILE_NAME


def test_a_history_outlives_srd_in_a_private_file(tmp_path: Path) -> None:
    assert annals(tmp_path).load() == ()
    annals(tmp_path).save((SEEN,))
    assert annals(tmp_path).load() == (SEEN,)
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"\xff\xfe",
        encode("orders", (SEEN,))[:-20],
        encode("orders", (SEEN,)).replace(b'"schema":1', b'"schema":9'),
        encode("orders", (SEEN,)).replace(b"192.168.205.11", b"999.168.205.11"),
        encode("customers", (SEEN,)),
    ],
)
def test_a_file_that_is_none_is_moved_aside_and_a_new_one_begins(tmp_path: Path, content: bytes) -> None:
    kept = annals(tmp_path)
    file = file_of(tmp_path)
    file.write_bytes(content)
    assert kept.load() == ()
    assert not file.exists()
    assert file.with_name(FILE_NAME + ASIDE_SUFFIX).read_bytes() == content
    kept.save((SEEN,))
    assert kept.load() == (SEEN,)


@given(st.binary(max_size=200))
def test_no_content_whatsoever_is_more_than_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any reason
        decode("orders", content)


@given(st.data())
def test_no_damage_to_a_file_is_more_than_a_value_error(data: st.DataObject) -> None:
    content = bytearray(encode("orders", (SEEN, BARE)))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode("orders", bytes(content))
    except ValueError:
        return


def test_a_directory_in_its_place_is_moved_aside_too(tmp_path: Path) -> None:
    kept = annals(tmp_path)
    file_of(tmp_path).mkdir()
    assert kept.load() == ()
    kept.save((SEEN,))
    assert kept.load() == (SEEN,)


def test_what_cannot_be_written_leaves_the_former_file(tmp_path: Path) -> None:
    kept = annals(tmp_path)
    kept.save((SEEN,))
    full = file_of(tmp_path)
    aside = full.parent.rename(full.parent.with_name("elsewhere"))
    with pytest.raises(SrdError, match="cannot write"):
        kept.save((SEEN, BARE))
    aside.rename(full.parent)
    assert kept.load() == (SEEN,)


def test_the_file_says_in_plain_words_what_it_holds(tmp_path: Path) -> None:
    kept = annals(tmp_path)
    kept.save((SEEN,))
    assert json.loads(file_of(tmp_path).read_bytes()) == {
        "schema": 1,
        "cluster": "orders",
        "changes": [
            {
                "at_timestamp": WALL,
                "epoch": 7,
                "previous": "192.168.205.10:6379",
                "current": "192.168.205.11:6379",
                "kind": "unknown",
            }
        ],
    }
