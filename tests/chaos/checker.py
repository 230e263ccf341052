"""Judges a history, in the manner of Jepsen. Pure.

The model is an append-only list for each key. Every value is appended once, so that a list that is read says of each
append whether it happened, and in which order. From that, without a search:

* **lost**: an acknowledged value that the final list has not. The final list of a key is what the last read says that
  began when no append to the key was under way any more; a key that has none is `unjudged`, never sound.
* **phantom**: a value that was refused, and is there. **foreign**: one that nobody wrote. **duplicate**: one that is
  there twice.
* **out of order**: two values of a list, the first of which was appended after the second had been acknowledged.
* **vanished**: a value that a read saw and a later one did not. **came back**: an acknowledged value that a read missed
  and a later one saw, so that the read was answered by a node that had been left behind.

An append without an answer may have happened or not, and may yet happen: nothing follows from whether it is there.

Replication is asynchronous, so a plain write can be lost in a failover: how many, and when, is a figure. A write that a
majority confirmed must not be.

Two nodes that say at one instant that they are primary, by `/primary` 200 or by the word `up` of the agent-check, are
`certain` where the answers leave no doubt: a node that said yes twice in a row is taken to have said yes in between.
Where only the intervals from question to answer overlap, they are `possible`.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from chaos.history import YES, Answers, Append, Fault, History, Outcome, Question, Read

# Shorter pauses in the writing are a busy machine's.
GAP_SECONDS: Final = 1.0
# Some samples: what is shorter is the time between two questions.
HANDOVER_SECONDS: Final = 0.1
# A write that was acknowledged just before a fault, and not yet replicated, is lost by that fault.
BEFORE_SECONDS: Final = 1.0
START: Final = "the start"
# Of what a verdict lists by name, the figures have the number and the first few.
LISTED: Final = (
    "lost",
    "lost_confirmed",
    "phantoms",
    "foreign",
    "duplicates",
    "out_of_order",
    "vanished",
    "came_back",
    "skipped",
)
SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time, in seconds since the history's beginning, and the fault that began last before its end.

    `whose` is a kind of client, or "" where it is everybody's.
    """

    begin: float
    seconds: float
    after: str
    whose: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """The acknowledged writes that one fault has lost; times are those of their acknowledgement since it began."""

    fault: str
    lost: int
    lost_confirmed: int
    by: dict[str, int]  # how many of them by each kind of client
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Doubt:
    """Two nodes that said that they are primary: both at one instant, or within `seconds` of one another."""

    nodes: tuple[str, str]
    begin: float
    seconds: float
    certain: bool
    after: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the history says. Windows, spans and doubts are in the order of time; a value is named as `key value`."""

    acknowledged: int
    acknowledged_confirmed: int
    unknown: int
    refused: int
    reads: int
    lost: tuple[str, ...]
    lost_confirmed: tuple[str, ...]
    windows: tuple[Window, ...]
    phantoms: tuple[str, ...]
    foreign: tuple[str, ...]
    duplicates: tuple[str, ...]
    out_of_order: tuple[str, ...]
    vanished: tuple[str, ...]
    came_back: tuple[str, ...]
    unjudged: tuple[str, ...]
    skipped: tuple[str, ...]  # faults that were planned and could not be done just then, and why
    without_writes: tuple[Span, ...]
    without_primary: tuple[Span, ...]
    two_primaries: tuple[Doubt, ...]
    precision_seconds: float

    def violations(self) -> list[str]:
        """Say what must never be and was, a sentence each."""
        found = {
            "confirmed writes were lost": self.lost_confirmed,
            "values are there that were refused": self.phantoms,
            "values are there that nobody wrote": self.foreign,
            "values are there twice": self.duplicates,
            "values are out of order": self.out_of_order,
            "lists were never read at the end": self.unjudged,
            "times two nodes were primary at one instant": [d for d in self.two_primaries if d.certain],
        }
        return [f"{len(what)} {words}: {what[0]}" for words, what in found.items() if what]

    def figures(self) -> dict[str, Any]:
        """Return it as one JSON object: counts, windows and spans, and the first few of what is listed by name."""
        out = asdict(self)
        for name in LISTED:
            out[name] = {"count": len(out[name]), "first": out[name][:SHOWN]}
        out["two_primaries"] = sum(doubt.certain for doubt in self.two_primaries)
        out["two_primaries_possible"] = [asdict(doubt) for doubt in self.two_primaries if not doubt.certain]
        seconds: defaultdict[str, float] = defaultdict(float)
        for span in self.without_writes:
            seconds[span.whose] += span.seconds
        out["seconds_without_writes"] = {kind: round(total, 2) for kind, total in seconds.items()}
        out["seconds_without_primary"] = round(sum(span.seconds for span in self.without_primary), 2)
        return out | {"violations": self.violations()}


def judge(history: History) -> Verdict:
    """Return the verdict."""
    calendar = _Calendar(history)
    lists = [_judge_list(key, *found) for key, found in _by_key(history).items()]
    appends = history.appends
    by_path = [run for run in history.answers if run.question is Question.PRIMARY]  # the finer of the two
    acknowledged = [append for append in appends if append.outcome is Outcome.OK]
    lost = sorted(itertools.chain.from_iterable(judged.lost for judged in lists), key=lambda append: append.completed)
    return Verdict(
        acknowledged=len(acknowledged),
        acknowledged_confirmed=sum(append.confirmed for append in acknowledged),
        unknown=sum(append.outcome is Outcome.UNKNOWN for append in appends),
        refused=sum(append.outcome is Outcome.FAIL for append in appends),
        reads=sum(read.outcome is Outcome.OK for read in history.reads),
        lost=_names(lost),
        lost_confirmed=_names(append for append in lost if append.confirmed),
        windows=_windows(lost, calendar),
        phantoms=_all(lists, "phantoms"),
        foreign=_all(lists, "foreign"),
        duplicates=_all(lists, "duplicates"),
        out_of_order=_all(lists, "out_of_order"),
        vanished=_all(lists, "vanished"),
        came_back=_all(lists, "came_back"),
        unjudged=tuple(judged.key for judged in lists if not judged.has_end),
        without_writes=_without_writes(acknowledged, calendar),
        without_primary=_without_primary(by_path, calendar),
        skipped=tuple(f"{describe(fault)}: {fault.skipped}" for fault in history.faults if fault.skipped),
        two_primaries=_two_primaries(history.answers, calendar),
        precision_seconds=round(max((run.spacing for run in by_path if run.status == YES), default=0.0), 3),
    )


class _Calendar:
    """When the history began, and which fault began last before an instant."""

    def __init__(self, history: History) -> None:
        times = [append.invoked for append in history.appends] + [read.invoked for read in history.reads]
        times += [run.first_asked for run in history.answers] + [fault.began for fault in history.faults]
        self.origin = min(times, default=0.0)
        self.faults = sorted((f for f in history.faults if not f.skipped), key=lambda fault: fault.began)
        self._began = [fault.began for fault in self.faults]

    def before(self, time: float) -> Fault | None:
        index = bisect.bisect_right(self._began, time)
        return self.faults[index - 1] if index else None

    def name(self, time: float) -> str:
        fault = self.before(time)
        return describe(fault) if fault else START

    def span(self, begin: float, end: float) -> Span:
        return Span(round(begin - self.origin, 3), round(end - begin, 3), self.name(end))


def kind_of(client: str) -> str:
    """Return what a client is called without its number: all of a kind go the same way."""
    return client.partition("-")[0]


def describe(fault: Fault) -> str:
    """Return a fault in a few words."""
    return f"{fault.number} {fault.name} {' '.join(fault.nodes)}".rstrip()


@dataclass(frozen=True, slots=True)
class _List:
    """What became of one key."""

    key: str
    has_end: bool
    lost: tuple[Append, ...]
    phantoms: tuple[str, ...]
    foreign: tuple[str, ...]
    duplicates: tuple[str, ...]
    out_of_order: tuple[str, ...]
    vanished: tuple[str, ...]
    came_back: tuple[str, ...]


def _by_key(history: History) -> dict[str, tuple[list[Append], list[Read]]]:
    found: defaultdict[str, tuple[list[Append], list[Read]]] = defaultdict(lambda: ([], []))
    for append in history.appends:
        found[append.key][0].append(append)
    for read in history.reads:
        if read.outcome is Outcome.OK:
            found[read.key][1].append(read)
    return dict(sorted(found.items()))


def _judge_list(key: str, appends: list[Append], reads: list[Read]) -> _List:
    reads = sorted(reads, key=lambda read: read.completed)
    written = {append.value: append for append in appends}
    last = max((append.completed for append in appends), default=0.0)
    end = next((read for read in reversed(reads) if read.invoked >= last), None)
    there = set(end.values) if end else set()
    seen = {value for read in reads for value in read.values}
    vanished, came_back = _comings_and_goings(written, reads)
    return _List(
        key=key,
        has_end=end is not None,
        lost=tuple(a for a in appends if end and a.outcome is Outcome.OK and a.value not in there),
        phantoms=_values(key, (v for v in seen if v in written and written[v].outcome is Outcome.FAIL)),
        foreign=_values(key, (v for v in seen if v not in written)),
        duplicates=_values(key, {v for read in reads for v, count in Counter(read.values).items() if count > 1}),
        out_of_order=_values(key, {value for read in reads for value in _out_of_order(written, read.values)}),
        vanished=_values(key, vanished),
        came_back=_values(key, came_back),
    )


def _out_of_order(written: dict[str, Append], values: Sequence[str]) -> Iterable[str]:
    """Yield each value that follows one which was appended after it had been acknowledged."""
    latest = float("-inf")
    for append in (written[value] for value in values if value in written):
        if append.outcome is Outcome.OK and append.completed < latest:
            yield append.value
        latest = max(latest, append.invoked)


def _comings_and_goings(written: dict[str, Append], reads: list[Read]) -> tuple[set[str], set[str]]:
    """Return the values that one read saw and a later one did not, and those that one missed and a later one saw."""
    saw: dict[str, float] = {}  # value -> when the first read that had it was completed
    missed: dict[str, float] = {}
    vanished: set[str] = set()
    came_back: set[str] = set()
    for read in reads:
        values = set(read.values)
        vanished |= {value for value, at in saw.items() if at <= read.invoked and value not in values}
        came_back |= {value for value in values if missed.get(value, read.invoked + 1) <= read.invoked}
        for value in values:
            saw.setdefault(value, read.completed)
        for value, append in written.items():
            if append.outcome is Outcome.OK and append.completed <= read.invoked and value not in values:
                missed.setdefault(value, read.completed)
    return vanished, came_back


def _values(key: str, values: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{key} {value}" for value in sorted(values))


def _names(appends: Iterable[Append]) -> tuple[str, ...]:
    return tuple(f"{append.key} {append.value}" for append in appends)


def _all(lists: list[_List], what: str) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(getattr(judged, what) for judged in lists))


def _windows(lost: list[Append], calendar: _Calendar) -> tuple[Window, ...]:
    """Group the lost writes, which are in the order of time, by fault."""
    found = []
    for fault, group in itertools.groupby(lost, key=lambda a: calendar.before(a.completed + BEFORE_SECONDS)):
        appends = list(group)
        origin = fault.began if fault else calendar.origin
        found.append(
            Window(
                fault=describe(fault) if fault else START,
                lost=len(appends),
                lost_confirmed=sum(append.confirmed for append in appends),
                by=dict(sorted(Counter(kind_of(append.client) for append in appends).items())),
                first=round(appends[0].completed - origin, 3),
                last=round(appends[-1].completed - origin, 3),
            )
        )
    return tuple(found)


def _without_writes(acknowledged: list[Append], calendar: _Calendar) -> tuple[Span, ...]:
    """Return the stretches without a write, for each kind of client: one may get through where another does not."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for append in acknowledged:
        times[kind_of(append.client)].append(append.completed)
    return tuple(
        replace(calendar.span(before, after), whose=kind)
        for kind in sorted(times)
        for before, after in itertools.pairwise(sorted(times[kind]))
        if after - before > GAP_SECONDS
    )


def _without_primary(answers: list[Answers], calendar: _Calendar) -> tuple[Span, ...]:
    """Return the stretches, from the last yes to the next, in which no node said that it is primary."""
    if not answers:
        return ()
    yes = sorted((run for run in answers if run.status == YES), key=lambda run: run.first_asked)
    silent_since = min(run.first_asked for run in answers)
    found = []
    for run in yes:
        found.append((silent_since, run.first_asked))
        silent_since = max(silent_since, run.last_answered)
    found.append((silent_since, max(run.last_answered for run in answers)))
    return tuple(calendar.span(begin, end) for begin, end in found if end - begin > HANDOVER_SECONDS)


def _two_primaries(answers: list[Answers], calendar: _Calendar) -> tuple[Doubt, ...]:
    yes = sorted((run for run in answers if run.status == YES), key=lambda run: run.first_asked)
    found = []
    for index, run in enumerate(yes):
        for other in yes[index + 1 :]:
            if other.first_asked > run.last_answered:
                break
            if other.node != run.node:
                begin = other.first_asked
                end = min(run.last_answered, other.last_answered)
                found.append(
                    Doubt(
                        nodes=(run.node, other.node),
                        begin=round(begin - calendar.origin, 3),
                        seconds=round(end - begin, 3),
                        certain=_certain(run, other),
                        after=calendar.name(begin),
                    )
                )
    return tuple(found)


def _certain(one: Answers, other: Answers) -> bool:
    """Whether both said yes at one instant."""
    together = min(one.last_asked, other.last_asked) > max(one.first_answered, other.first_answered)
    return together or _within(one, other) or _within(other, one)


def _within(long: Answers, short: Answers) -> bool:
    """Whether an answer of `short` was made between two of `long`."""
    begin, end = long.first_answered, long.last_asked
    first = begin <= short.first_asked and short.first_answered <= end
    return first or (begin <= short.last_asked and short.last_answered <= end)
