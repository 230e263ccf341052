"""The parameters of a check, taken strictly: one that is ignored would widen what its caller asked for. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from srd.model import Role

_UNITS: Final = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_SIZE: Final = re.compile(r"([0-9]{1,15})\s*([kmgt]?b)?", re.IGNORECASE)
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class ReplicationState(enum.StrEnum):
    """How far a replica is with its primary, in the words of redis' ROLE command."""

    CONNECT = "connect"
    SYNC = "sync"
    CONNECTED = "connected"


class Part(enum.StrEnum):
    """What `/health?checks=` can be narrowed to."""

    IPSEC = "ipsec"
    REDIS = "redis"
    SENTINEL = "sentinel"
    STUNNEL = "stunnel"


@dataclass(frozen=True, slots=True)
class Query:
    """The parameters of a check; None where the caller did not ask."""

    lag: int | None = None
    max_lag_seconds: float | None = None
    replication_state: ReplicationState | None = None
    checks: frozenset[Part] | None = None
    role: Role | None = None


NO_QUERY: Final = Query()


class BadQueryError(ValueError):
    """A parameter that cannot be honoured; ignoring it would widen what the caller asked for."""


def parse_size(text: str) -> int:
    """Return the bytes in `64MB`, `16kB`, `1048576`: the units that Patroni takes, powers of 1024."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise BadQueryError("lag is a size such as 1048576, 16kB, 64MB or 1GB")
    return int(match[1]) * _UNITS[(match[2] or "").lower()]


def parse_query(parameters: Mapping[str, str], allowed: frozenset[str]) -> Query:
    """Return the parameters of a check that takes those in `allowed`; `BadQueryError` says what is wrong."""
    if unknown := sorted(set(parameters) - allowed):
        takes = f"takes {', '.join(sorted(allowed))}" if allowed else "takes no parameter"
        raise BadQueryError(f"no such parameter: {unknown[0][:40]!r}; this path {takes}")
    seconds = parameters.get("max_lag_seconds")
    if seconds is not None and not _SECONDS.fullmatch(seconds):
        raise BadQueryError("max_lag_seconds is a number of seconds")
    return Query(
        lag=parse_size(parameters["lag"]) if "lag" in parameters else None,
        max_lag_seconds=float(seconds) if seconds is not None else None,
        replication_state=_choice("replication_state", parameters, ReplicationState),
        checks=_parts(parameters["checks"]) if "checks" in parameters else None,
        role=_role_asked(parameters),
    )


def _choice(name: str, parameters: Mapping[str, str], values: type[ReplicationState]) -> ReplicationState | None:
    if name not in parameters:
        return None
    if parameters[name] not in list(values):
        raise BadQueryError(f"{name} is one of {', '.join(values)}")
    return values(parameters[name])


def _role_asked(parameters: Mapping[str, str]) -> Role | None:
    text = parameters.get("role")
    if text not in (None, Role.PRIMARY, Role.REPLICA):
        raise BadQueryError(f"role is {Role.PRIMARY} or {Role.REPLICA}")
    return Role(text) if text is not None else None


def _parts(text: str) -> frozenset[Part]:
    names = text.split(",")
    if not all(name in list(Part) for name in names):
        raise BadQueryError(f"checks is a list, with commas, of {', '.join(Part)}")
    return frozenset(Part(name) for name in names)
