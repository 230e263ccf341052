"""The history of a walk: what clients did, what nodes answered, what was done to the cluster. JSON, a record a line.

All times are seconds of CLOCK_MONOTONIC, which all that is recorded must share: one kernel.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

import msgspec

SILENT = 0  # the status of a node that did not answer
YES, NO = 200, 503
# Between two answers that are further apart a node may have said something else.
RUN_SECONDS = 0.5


class Outcome(enum.StrEnum):
    """What a client knows of an operation afterwards."""

    OK = "ok"
    FAIL = "fail"  # it was refused, or never sent: it has not been done
    UNKNOWN = "unknown"  # it was sent and not answered: it may have been done, and may yet be


class Question(enum.StrEnum):
    """What is asked of a node to know whether it says that it is primary."""

    PRIMARY = "/primary"
    AGENT = "agent-check"  # `up` is YES, every other word NO


class Append(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="append", tag_field="kind"):
    """RPUSH of one value, which nobody else appends to this key.

    `confirmed` where as many replicas as hold a majority together with the primary said that they have it, too.
    """

    client: str
    key: str
    value: str
    invoked: float
    completed: float
    outcome: Outcome
    confirmed: bool = False
    error: str = ""


class Read(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="read", tag_field="kind"):
    """LRANGE of a whole list; `values` are its own only where the outcome is ok."""

    client: str
    key: str
    invoked: float
    completed: float
    outcome: Outcome
    values: tuple[str, ...] = ()
    error: str = ""


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answers", tag_field="kind"):
    """A run of equal answers of a node to one question, `SILENT` for none; each was asked for when the last had come.

    The instant at which the node made an answer is between question and answer. `spacing` is the longest time from a
    question to the next one's answer: what happened in between for a shorter time was not seen.
    """

    node: str
    status: int
    first_asked: float
    first_answered: float
    last_asked: float
    last_answered: float
    count: int = 1
    spacing: float = 0.0
    question: Question = Question.PRIMARY

    def extended(self, status: int, asked: float, answered: float) -> Answers | None:
        """Return this run with one answer more; None where that answer begins another run."""
        spacing = answered - self.last_asked
        if status != self.status or spacing > RUN_SECONDS:
            return None
        return msgspec.structs.replace(
            self,
            last_asked=asked,
            last_answered=answered,
            count=self.count + 1,
            spacing=max(self.spacing, spacing),
        )


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="fault", tag_field="kind"):
    """What was done to the cluster. `skipped` says why it was not done after all."""

    number: int
    name: str
    nodes: tuple[str, ...]
    began: float
    ended: float
    skipped: str = ""


Record = Append | Read | Answers | Fault


@dataclass(slots=True)
class History:
    """Everything that was recorded, in no order that means anything."""

    appends: list[Append] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take one more record."""
        match record:
            case Append():
                self.appends.append(record)
            case Read():
                self.reads.append(record)
            case Answers():
                self.answers.append(record)
            case Fault():
                self.faults.append(record)


def write(file: TextIO, record: Record) -> None:
    """Append a record as one line."""
    file.write(msgspec.json.encode(record).decode() + "\n")


def load(lines: Iterable[str]) -> History:
    """Return the history; `ValueError` with the number of a line that is none of its records."""
    history = History()
    decoder = msgspec.json.Decoder(Record)
    for number, line in enumerate(lines, start=1):
        try:
            history.add(decoder.decode(line))
        except msgspec.DecodeError as error:
            msg = f"line {number} is no record: {error}"
            raise ValueError(msg) from error
    return history
