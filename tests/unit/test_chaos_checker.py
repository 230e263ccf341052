"""tests/chaos/checker.py against histories made by hand: what a walk proves rests on what it finds."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random

import msgspec
import pytest
from chaos.checker import Verdict, judge
from chaos.history import SILENT, Answers, Append, Fault, History, Outcome, Question, Read, Record, load, write
from hypothesis import given
from hypothesis import strategies as st

OK, FAIL, UNKNOWN = Outcome.OK, Outcome.FAIL, Outcome.UNKNOWN


def append(value: int, at: float, outcome: Outcome = OK, *, confirmed: bool = False, seconds: float = 0.1) -> Append:
    return Append("a", "k", str(value), at, at + seconds, outcome, confirmed)


def read(values: str, at: float, seconds: float = 0.1) -> Read:
    return Read("r", "k", at, at + seconds, OK, tuple(values.split()))


def says(
    node: str,
    begin: float,
    end: float,
    status: int = 200,
    *,
    width: float = 0.01,
    question: Question = Question.PRIMARY,
) -> Answers:
    """A run of answers, the first of which was asked for at `begin` and the last of which came at `end`."""
    return Answers(node, status, begin, begin + width, end - width, end, count=10, spacing=0.03, question=question)


def fault(number: int, at: float, name: str = "kill redis") -> Fault:
    return Fault(number, name, ("redis-1",), at, at + 1)


def judged(*records: Record) -> Verdict:
    history = History()
    for record in records:
        history.add(record)
    return judge(history)


def test_a_history_in_which_all_is_there_is_sound() -> None:
    verdict = judged(append(1, 0), append(2, 1, confirmed=True), read("1", 0.5), read("1 2", 2))
    assert verdict.violations() == []
    assert (verdict.acknowledged, verdict.acknowledged_confirmed, verdict.reads) == (2, 1, 2)
    assert verdict.lost == verdict.vanished == verdict.came_back == ()


def test_a_plain_write_that_is_lost_is_a_figure_and_a_confirmed_one_a_violation() -> None:
    verdict = judged(append(1, 0), append(2, 1, confirmed=True), append(3, 2), read("3", 5))
    assert verdict.lost == ("k 1", "k 2")
    assert verdict.lost_confirmed == ("k 2",)
    assert verdict.violations() == ["1 confirmed writes were lost: k 2"]
    assert judged(append(1, 0), read("", 5)).violations() == []


def test_what_is_lost_is_put_down_to_the_fault_that_it_came_with() -> None:
    """A write that was acknowledged just before a fault, too."""
    verdict = judged(
        fault(1, 0.5), append(1, 1), fault(2, 10), append(2, 9.5), append(3, 11, confirmed=True), read("", 20)
    )
    before, after = verdict.windows
    assert (before.fault, before.lost, before.lost_confirmed, before.first, before.last) == (
        "1 kill redis redis-1", 1, 0, 0.6, 0.6,
    )  # fmt: skip
    assert (after.fault, after.lost, after.lost_confirmed, after.first, after.last) == (
        "2 kill redis redis-1", 2, 1, -0.4, 1.1,
    )  # fmt: skip
    (before_any,) = judged(append(1, 1), read("", 20)).windows
    assert before_any.fault == "the start"


def test_a_fault_that_was_skipped_is_blamed_for_nothing() -> None:
    skipped = msgspec.structs.replace(fault(2, 2), skipped="no primary")
    verdict = judged(fault(1, 1), skipped, append(1, 3), read("", 9))
    (window,) = verdict.windows
    assert window.fault == "1 kill redis redis-1"
    assert verdict.skipped == ("2 kill redis redis-1: no primary",)


@pytest.mark.parametrize("values", ["1", "1 2"])
def test_nothing_follows_from_a_write_without_an_answer(values: str) -> None:
    verdict = judged(append(1, 0), append(2, 1, UNKNOWN), read(values, 5))
    assert verdict.violations() == []
    assert (verdict.lost, verdict.unknown) == ((), 1)


def test_a_write_that_was_refused_and_is_there_is_a_phantom() -> None:
    assert judged(append(1, 0, FAIL), read("1", 5)).phantoms == ("k 1",)
    assert judged(append(1, 0, FAIL), read("", 5)).violations() == []


def test_a_value_that_nobody_wrote_and_one_that_is_there_twice() -> None:
    verdict = judged(append(1, 0), read("1 7 1", 5))
    assert (verdict.foreign, verdict.duplicates) == (("k 7",), ("k 1",))
    assert len(verdict.violations()) == 2


def test_the_order_of_writes_that_were_under_way_together_is_free() -> None:
    one, other = append(1, 0, seconds=1), append(2, 0.5, seconds=1)
    assert judged(one, other, read("1 2", 5)).out_of_order == ()
    assert judged(one, other, read("2 1", 5)).out_of_order == ()
    assert judged(append(1, 0), append(2, 1), read("2 1", 5)).out_of_order == ("k 1",)
    assert judged(append(1, 0, UNKNOWN), append(2, 1), read("2 1", 5)).out_of_order == (), "it came late"


def test_a_value_that_was_seen_and_is_gone() -> None:
    verdict = judged(append(1, 0), append(2, 1), read("1 2", 2), read("1", 3), read("1 2", 4))
    assert verdict.vanished == ("k 2",)
    assert verdict.came_back == ("k 2",)
    assert verdict.lost == ()


def test_reads_that_were_under_way_together_contradict_nothing() -> None:
    verdict = judged(append(1, 0), read("1", 1, seconds=2), read("", 1.5, seconds=1), read("1", 1.6, seconds=3))
    assert verdict.vanished == verdict.came_back == ()


def test_a_read_that_began_before_the_write_was_acknowledged_may_miss_it() -> None:
    assert judged(append(1, 0, seconds=2), read("", 1), read("1", 5)).came_back == ()


def test_a_list_that_was_not_read_after_its_last_write_is_not_judged() -> None:
    verdict = judged(append(1, 0), append(2, 1), read("1", 0.5), Read("r", "k", 5, 6, UNKNOWN))
    assert verdict.unjudged == ("k",)
    assert verdict.lost == ()
    assert verdict.violations() == ["1 lists were never read at the end: k"]


def test_times_without_a_write() -> None:
    (span,) = judged(append(1, 0), fault(1, 0.5), append(2, 5), append(3, 5.5), read("1 2 3", 9)).without_writes
    assert (span.begin, span.seconds, span.after) == (0.1, 5.0, "1 kill redis redis-1")


def test_times_without_a_write_are_told_apart_by_kind_of_client() -> None:
    """One may get through by a way that is closed to another."""
    through = [Append("sentinel-0", "s", str(number), number, number + 0.1, OK) for number in range(10)]
    verdict = judged(append(1, 0), append(2, 8), *through, read("1 2", 9), Read("r", "s", 20, 21, OK))
    (span,) = verdict.without_writes
    assert (span.begin, span.seconds, span.whose) == (0.1, 8.0, "a")
    (window,) = verdict.windows
    assert (window.lost, window.by) == (10, {"sentinel": 10})


def test_times_without_a_primary() -> None:
    verdict = judged(
        says("a", 0, 10), says("b", 0, 12, 503), fault(1, 9.9), says("a", 10, 30, SILENT), says("b", 12, 30)
    )
    (span,) = verdict.without_primary
    assert (span.begin, span.seconds, span.after) == (10, 2, "1 kill redis redis-1")
    assert verdict.two_primaries == ()
    (never,) = judged(says("a", 0, 10, 503)).without_primary
    assert (never.begin, never.seconds) == (0, 10)
    assert judged().without_primary == ()


@pytest.mark.parametrize(
    ("other", "certain"),
    [
        (says("b", 9, 20), True),
        (says("b", 4, 6), True),
        (says("b", 0, 10), True),
        (says("b", 4, 6, question=Question.AGENT), True),
        (Answers("b", 200, 4, 4.1, 4, 4.1), True),  # a single answer within a run of the other one's
        (says("b", 9.995, 20), False),  # while the last answer of the other one was under way
        (Answers("b", 200, 9.5, 12, 9.5, 12), False),  # an answer of which nobody can tell when it was made
    ],
)
def test_two_that_are_primary_together(other: Answers, certain: bool) -> None:  # noqa: FBT001 - a table
    for records in ((says("a", 0, 10), other), (other, says("a", 0, 10))):
        verdict = judged(*records)
        (doubt,) = verdict.two_primaries
        assert doubt.certain is certain
        assert bool(verdict.violations()) is certain


def test_one_after_the_other_is_no_doubt() -> None:
    assert judged(says("a", 0, 10), says("b", 10.01, 20)).two_primaries == ()
    assert judged(says("a", 0, 10), says("b", 5, 20, 503)).two_primaries == ()


def test_the_two_questions_to_one_node_are_no_doubt() -> None:
    verdict = judged(says("a", 0, 10), says("a", 0, 10, question=Question.AGENT), says("a", 10.05, 20, 503))
    assert verdict.two_primaries == ()
    assert verdict.precision_seconds == 0.03


def test_answers_that_are_equal_and_close_are_one_run() -> None:
    run = Answers("a", 200, 0, 0.01, 0, 0.01)
    longer = run.extended(200, 0.02, 0.05)
    assert longer == Answers("a", 200, 0, 0.01, 0.02, 0.05, count=2, spacing=0.05)
    assert run.extended(503, 0.02, 0.05) is None
    assert run.extended(200, 0.02, 0.6) is None, "what it would have said meanwhile nobody knows"


def test_a_history_is_read_as_it_was_written() -> None:
    records: list[Record] = [append(1, 0, UNKNOWN), read("1 2", 1), says("a", 0, 1), fault(1, 2)]
    file = io.StringIO()
    for record in records:
        write(file, record)
    found = load(file.getvalue().splitlines())
    assert [*found.appends, *found.reads, *found.answers, *found.faults] == records


@pytest.mark.parametrize("line", ["", "{}", '{"kind": "x"}', '{"kind": "append"}', "[1]", '{"kind": "append", "ou'])
def test_a_line_that_is_no_record_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 1 is no record"):
        load([line])


@dataclasses.dataclass
class Planted:
    """A run of a cluster that loses some of what it acknowledges, and what it lost."""

    records: list[Record]
    lost: set[str]
    lost_confirmed: set[str]


@st.composite
def runs(draw: st.DrawFn) -> Planted:
    """Clients that append to lists of their own, one after the other, to a primary that may forget a tail of them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    lists: dict[str, list[str]] = {"x": [], "y": []}
    records: list[Record] = []
    acknowledged: dict[str, Append] = {}
    for number in range(draw(st.integers(1, 60))):
        key = rng.choice(["x", "y"])
        at = float(number)
        if rng.random() < 0.1:  # a failover to a replica that is behind
            for name, values in lists.items():
                lists[name] = values[: max(0, len(values) - rng.randrange(3))]
        outcome = rng.choices([OK, FAIL, UNKNOWN], [8, 1, 1])[0]
        if outcome is OK or (outcome is UNKNOWN and rng.random() < 0.5):
            lists[key].append(str(number))
        entry = Append(key, key, str(number), at, at + rng.random(), outcome, outcome is OK and rng.random() < 0.5)
        records.append(entry)
        if outcome is OK:
            acknowledged[f"{key} {number}"] = entry
        if rng.random() < 0.3:
            records.append(Read("r", key, at + 0.99, at + 0.99, OK, tuple(lists[key])))
    records += [Read("r", key, 100, 101, OK, tuple(values)) for key, values in lists.items()]
    there = {f"{key} {value}" for key, values in lists.items() for value in values}
    lost = acknowledged.keys() - there
    rng.shuffle(records)
    return Planted(records, set(lost), {name for name in lost if acknowledged[name].confirmed})


@given(runs())
def test_every_planted_loss_is_found_and_nothing_else(run: Planted) -> None:
    verdict = judged(*run.records)
    assert set(verdict.lost) == run.lost
    assert set(verdict.lost_confirmed) == run.lost_confirmed
    assert sum(window.lost for window in verdict.windows) == len(run.lost)
    assert verdict.phantoms == verdict.foreign == verdict.duplicates == verdict.out_of_order == ()
    assert verdict.came_back == (), "what a primary has forgotten is gone"
    assert bool(verdict.violations()) is bool(run.lost_confirmed)
    json.dumps(verdict.figures())


@given(runs(), st.integers(0, 2**32))
def test_a_planted_disorder_is_found(run: Planted, seed: int) -> None:
    """Of two values of a single client's list that are exchanged, the second one is out of order."""
    ends = [r for r in run.records if isinstance(r, Read) and r.invoked == 100]
    sure = {r.value for r in run.records if isinstance(r, Append) and r.outcome is OK}
    pairs = [(end, pair) for end in ends for pair in itertools.pairwise(end.values) if sure.issuperset(pair)]
    if not pairs:
        return
    end, (first, second) = random.Random(seed).choice(pairs)
    exchanged = {first: second, second: first}
    values = tuple(exchanged.get(value, value) for value in end.values)
    records = [msgspec.structs.replace(end, values=values) if record is end else record for record in run.records]
    assert judged(*records).out_of_order == (f"{end.key} {first}",)
