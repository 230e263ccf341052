"""The changes of primary as a history that every node keeps for itself, and how two accounts become one. Pure.

Each node sees a change by itself; why it came about, and how much was lost, only some know: the srd beside a primary
that died, those that had it replaced, the one that is primary now. They tell the others (ha/chronicle.py).
`merge` makes one account of two, so that it matters neither in which order they come nor how often: it is commutative,
associative and idempotent, and once everybody has been told everything, all nodes have the same history.

A change is known by its epoch and its new primary. Sentinel makes a new epoch for each failover, and one sentinel is
elected in it; two primaries in one epoch are a cluster that is split (ha/doctor.py), and then both are entered.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Iterable
from typing import Annotated, Final, TypeVar

import msgspec

from srd.changes import ChangeKind, RoleChange
from srd.model import Body, Endpoint, SrdError

T = TypeVar("T", int, float)
V = TypeVar("V", Endpoint, str)

KEPT: Final = 1000
_SCHEMA: Final = 1
_RANK: Final = {kind: rank for rank, kind in enumerate(ChangeKind)}

Key = tuple[int, str]
History = tuple[RoleChange, ...]

# What comes from a file or from another node is bounded, and a NaN or an infinity is within no bounds.
_Moment = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Text = Annotated[str, msgspec.Meta(max_length=300)]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change in the file and between nodes. What a newer srd has added is left out, so that nodes may differ."""

    at_timestamp: _Moment
    epoch: _Count
    previous: _Text | None = None
    current: _Text
    kind: ChangeKind
    before: bool = False
    cause: _Text | None = None
    by: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=64)] = ()
    duration_seconds: _Moment | None = None
    gap_seconds: _Moment | None = None
    settling_seconds: _Moment | None = None
    known_offset: _Count | None = None
    known_age_seconds: _Moment | None = None
    taken_offset: _Count | None = None
    complete: bool = False


class _File(msgspec.Struct, frozen=True, kw_only=True):
    schema: int
    cluster: str
    changes: tuple[_Entry, ...]


def key_of(change: RoleChange) -> Key:
    """Return what tells a change from every other."""
    return change.epoch, str(change.current)


def merge(one: RoleChange, other: RoleChange) -> RoleChange:
    """Return what two accounts of the same change say together.

    How it came about is told by the one that knows best, and by both if they know it alike; what was measured is
    taken from either. `ValueError` if they are of different changes.
    """
    if key_of(one) != key_of(other):
        msg = f"{key_of(one)} and {key_of(other)} are different changes"
        raise ValueError(msg)
    better, worse = (one, other) if _RANK[one.kind] >= _RANK[other.kind] else (other, one)
    equal = one.kind is other.kind
    known = max((_known(one), _known(other)))
    before, at = min((one.before, one.at_timestamp), (other.before, other.at_timestamp))
    return dataclasses.replace(
        better,
        at_timestamp=at,
        before=before,
        previous=_either(better.previous, worse.previous) if equal else better.previous,
        cause=_either(better.cause, worse.cause) if equal else better.cause,
        by=tuple(sorted({*better.by, *worse.by})) if equal else better.by,
        duration_seconds=_pick(min, better.duration_seconds, worse.duration_seconds)
        if equal
        else better.duration_seconds,
        gap_seconds=_pick(min, one.gap_seconds, other.gap_seconds),
        settling_seconds=_pick(min, one.settling_seconds, other.settling_seconds),
        known_offset=known[0] if known[0] >= 0 else None,
        known_age_seconds=-known[1] if known[0] >= 0 else None,
        # The greater one is the smaller loss: what is said to be lost is lost.
        taken_offset=_pick(max, one.taken_offset, other.taken_offset),
        complete=one.complete or other.complete,
    )


def _known(change: RoleChange) -> tuple[int, float]:
    """Return how far the old primary is known to have come and, negative, how old that is: the greatest says most."""
    if change.known_offset is None:
        return -1, 0.0
    return change.known_offset, -(change.known_age_seconds or 0.0)


def _either(one: V | None, other: V | None) -> V | None:
    """Return the one that is known, or one of two by a rule that everybody has."""
    return max((one, other), key=lambda value: (value is not None, str(value)))


def _pick(choose: Callable[[Iterable[T]], T], *values: T | None) -> T | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def entered(history: History, change: RoleChange) -> History:
    """Return the history with an account of a change: merged into what is known of it, or in its place by epoch."""
    return _united((*history, change))


def _united(changes: Iterable[RoleChange]) -> History:
    found: dict[Key, RoleChange] = {}
    for change in changes:
        key = key_of(change)
        found[key] = merge(found[key], change) if key in found else change
    return tuple(sorted(found.values(), key=lambda each: (each.epoch, each.at_timestamp, str(each.current))))[-KEPT:]


def encode(cluster: str, history: History) -> bytes:
    """Return the content of the file."""
    file = _File(schema=_SCHEMA, cluster=cluster, changes=tuple(_entry(change) for change in history))
    return msgspec.json.encode(file) + b"\n"


def decode(cluster: str, content: bytes) -> History:
    """Read the content of the file; `ValueError` says why it is none of this cluster."""
    file = msgspec.json.decode(content, type=_File)  # its errors are ValueErrors
    if file.schema != _SCHEMA:
        msg = f"it has schema {file.schema}, this srd knows {_SCHEMA}"
        raise ValueError(msg)
    if file.cluster != cluster:
        msg = f"it is of the cluster {file.cluster}"
        raise ValueError(msg)
    return _united(_change(entry) for entry in file.changes)


def word_of(change: RoleChange) -> Body:
    """Return an account as one srd tells it to another: plain values by name."""
    said: dict[str, str | int | float | bool | None] = msgspec.to_builtins(_entry(change))
    return said | {"by": "\n".join(change.by)}


def account_of(body: Body) -> RoleChange:
    """Read what another srd has told; `SrdError` when it is no account of a change."""
    by = body.get("by")
    try:
        told = {**body, "by": tuple(by.split("\n")) if isinstance(by, str) and by else ()}
        return _change(msgspec.convert(told, _Entry))
    except ValueError as error:
        raise SrdError("understand", "an account of a change of primary", str(error)) from error


def _entry(change: RoleChange) -> _Entry:
    values = {field.name: getattr(change, field.name) for field in dataclasses.fields(change)}
    previous = str(change.previous) if change.previous is not None else None
    return _Entry(**{**values, "previous": previous, "current": str(change.current)})


def _change(entry: _Entry) -> RoleChange:
    values = msgspec.structs.asdict(entry)
    previous = _endpoint(entry.previous) if entry.previous is not None else None
    by = tuple(sorted(set(entry.by)))
    return RoleChange(**{**values, "previous": previous, "current": _endpoint(entry.current), "by": by})


def _endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    return Endpoint(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")), int(port))
