"""Situation -> verdict, one for each path that a balancer or a monitor may ask. Pure.

A verdict rests on evidence with an age: what redis and the sentinels said, and when they were asked. That two nodes
never both answer `/primary` with 200 is the lease's doing: a majority of all sentinels named this node, and `now` is
before the instant at which any majority can begin to replace it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from srd.model import IpsecMode, NodeKind, Role, Service
from srd.reconcile import Loop
from srd.state import Child, ChildState, Redis, Situation, services_of
from srd.web.query import NO_QUERY, BadQueryError, Part, Query, ReplicationState, parse_query

STATUS_MAX_AGE_SECONDS: Final = 2.0
# What `/readiness` allows a replica to be behind when `lag=` is not given.
READINESS_LAG_BYTES: Final = 64 * 1024 * 1024

OK: Final = 200
BAD_REQUEST: Final = 400
UNAVAILABLE: Final = 503


class ErrorCode(enum.StrEnum):
    """Why a check says no; stable, for scripts to compare with."""

    STARTING = "starting"
    STALE_STATUS = "stale_status"
    REDIS_DOWN = "redis_down"
    REDIS_LOADING = "redis_loading"
    WRONG_ROLE = "wrong_role"
    SENTINEL_DOWN = "sentinel_down"
    SENTINEL_NO_QUORUM = "sentinel_no_quorum"
    SENTINEL_DISAGREES = "sentinel_disagrees"
    LEASE_EXPIRED = "lease_expired"
    HANDED_OVER = "handed_over"
    FENCED = "fenced"
    IPSEC_UNPROTECTED = "ipsec_unprotected"
    STUNNEL_DOWN = "stunnel_down"
    REPLICA_LINK_DOWN = "replica_link_down"
    REPLICA_SYNCING = "replica_syncing"
    REPLICA_LAGGING = "replica_lagging"
    DRAINED = "drained"
    NOT_BALANCED = "not_balanced"
    BAD_REQUEST = "bad_request"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer: an HTTP status, what it means in one sentence, and a stable code unless it is 200."""

    status: int
    description: str
    error_code: ErrorCode | None = None

    @property
    def ok(self) -> bool:
        """Whether the check passes."""
        return self.status == OK


def judge(path: str, parameters: Mapping[str, str], situation: Situation) -> Verdict:
    """Return the verdict for one of `CHECK_PATHS`; `KeyError` for another path."""
    check, allowed = _CHECKS[path]
    try:
        query = parse_query(parameters, allowed)
    except BadQueryError as error:
        return Verdict(BAD_REQUEST, str(error), ErrorCode.BAD_REQUEST)
    return check(situation, query)


def alive(loops: tuple[Loop, ...], now: float, limit: float) -> Verdict:
    """Whether every control loop has finished a pass, well or badly, within `limit` seconds."""
    for loop in loops:
        silent = now - loop.last_tick
        if silent > limit:
            return _no(ErrorCode.STALE_STATUS, f"the loop {loop.name} has not finished a pass for {silent:.1f} s")
    return Verdict(OK, "every loop runs")


def primary(situation: Situation, _query: Query = NO_QUERY) -> Verdict:
    """Whether clients may write here: 200 on at most one node of the cluster at any instant."""
    refusal = (
        _redis(situation)
        or _role(situation, Role.PRIMARY)
        or _stunnel(situation)
        or _ipsec(situation)
        or _fence(situation)
        or _handed_over(situation)
        or _lease(situation)
        or _drained(situation)
    )
    return refusal or Verdict(OK, f"{situation.node.name} is the primary, and a majority of the sentinels says so")


def leader(situation: Situation, _query: Query = NO_QUERY) -> Verdict:
    """Whether a majority of the sentinels names this node, whatever its redis does."""
    return _lease(situation) or Verdict(OK, f"a majority of the sentinels names {situation.node.name}")


def standby_leader(situation: Situation, _query: Query = NO_QUERY) -> Verdict:
    """Reserved for clusters that follow another cluster, which srd has not."""
    return _no(ErrorCode.WRONG_ROLE, f"{situation.config.cluster} follows no other cluster")


def replica(situation: Situation, query: Query = NO_QUERY) -> Verdict:
    """Whether clients may read here from a replica that follows the primary which the sentinels name."""
    verdict = _in_step(situation, query)
    if verdict.ok and situation.config.node(situation.node.name).noloadbalance:
        return _no(ErrorCode.NOT_BALANCED, f"noloadbalance: no readers are led to {situation.node.name}")
    return verdict


def _in_step(situation: Situation, query: Query) -> Verdict:
    refusal = (
        _redis(situation)
        or _role(situation, Role.REPLICA)
        or _stunnel(situation)
        or _ipsec(situation)
        or _replication(situation)
        or _lag(situation, query)
        or _drained(situation)
    )
    return refusal or Verdict(OK, f"{situation.node.name} is a replica in step with the primary")


def read_only(situation: Situation, query: Query = NO_QUERY) -> Verdict:
    """Whether clients may read here, from the primary or from a replica."""
    first = primary(situation)
    if first.ok or first.error_code is not ErrorCode.WRONG_ROLE:
        return first
    return replica(situation, query)


def health(situation: Situation, query: Query = NO_QUERY) -> Verdict:
    """Whether this node does its job, whatever its role is."""
    for part, refusal in parts(situation).items():
        if refusal is not None and (query.checks is None or part in query.checks):
            return refusal
    for part in sorted(query.checks or ()):
        if part not in parts(situation):
            return _no(ErrorCode.WRONG_ROLE, f"{situation.node.name} runs no {part}")
    if query.role is Role.PRIMARY:
        return primary(situation)
    if query.role is Role.REPLICA:
        return replica(situation)
    return Verdict(OK, f"{situation.node.name} does its job")


def readiness(situation: Situation, query: Query = NO_QUERY) -> Verdict:
    """Whether this node can take its share: the primary, or a replica that is not far behind."""
    if situation.node.kind is not NodeKind.REDIS:
        return health(situation)
    verdict = primary(situation)
    if verdict.error_code is ErrorCode.WRONG_ROLE:
        verdict = _in_step(situation, query)
    if verdict.ok and query.lag is None and (lag_bytes(situation) or 0) > READINESS_LAG_BYTES:
        return _no(ErrorCode.REPLICA_LAGGING, f"{lag_bytes(situation)} bytes behind, {READINESS_LAG_BYTES} allowed")
    return verdict


def parts(situation: Situation) -> Mapping[Part, Verdict | None]:
    """Return what `/health` looks at on a node of this kind: None for each part that is as it should be."""
    found = {Part.IPSEC: _ipsec(situation)}
    services = services_of(situation.node)
    if Service.REDIS in services:
        found[Part.REDIS] = _redis(situation)
    if Service.SENTINEL in services:
        found[Part.SENTINEL] = _child(situation, Service.SENTINEL, ErrorCode.SENTINEL_DOWN) or _named(situation)
    if Service.STUNNEL in services:
        found[Part.STUNNEL] = _stunnel(situation)
    return found


def lag_bytes(situation: Situation) -> int | None:
    """How many bytes of the stream this replica is behind what its primary last reported; None when unknown."""
    reported = _primary_offset(situation)
    redis = situation.view.redis
    if redis is None or reported is None:
        return None
    return max(0, reported[0] - redis.offset)


def _primary_offset(s: Situation) -> tuple[int, float] | None:
    """Return the primary's offset and when its report came in."""
    redis = s.view.redis
    if redis is None or redis.role is not Role.REPLICA or redis.primary is None:
        return None
    node = s.config.node_at(redis.primary.address)
    report = s.view.peers.get(node.name) if node is not None else None
    if report is None or report.role is not Role.PRIMARY or report.offset is None:
        return None
    if s.now - report.received > STATUS_MAX_AGE_SECONDS:
        return None
    return report.offset, report.received


def lag_seconds(situation: Situation) -> float | None:
    """Return an upper bound of how old this replica's data is; None when nothing proves one.

    A replica that holds all that the primary had when it reported is at most as old as that report.
    """
    reported = _primary_offset(situation)
    if reported is None or lag_bytes(situation) != 0:
        return None
    return max(0.0, situation.now - reported[1])


def replication_state(situation: Situation) -> ReplicationState | None:
    """Return where this replica is with its primary; None when this is not a replica."""
    redis = situation.view.redis
    if redis is None or redis.role is not Role.REPLICA:
        return None
    if redis.sync_in_progress:
        return ReplicationState.SYNC
    return ReplicationState.CONNECTED if redis.link_up else ReplicationState.CONNECT


def protected(situation: Situation) -> bool:
    """Whether policies stand and the links with a majority of the voters, this node included, carry ESP."""
    return situation.config.ipsec.mode is IpsecMode.ESP and _ipsec(situation) is None


def answers(situation: Situation) -> bool:
    """Whether redis has answered within `STATUS_MAX_AGE_SECONDS`, loading or not."""
    refusal = _redis(situation)
    return refusal is None or refusal.error_code is ErrorCode.REDIS_LOADING


def _no(code: ErrorCode, description: str) -> Verdict:
    return Verdict(UNAVAILABLE, description, code)


def _coming(child: Child) -> bool:
    """Whether a child is on its way up for the first time, rather than down."""
    first_life = child.restarts == 0 and child.last_exit is None and not child.exits
    return first_life and child.state in (ChildState.STOPPED, ChildState.STARTING)


def _redis(s: Situation) -> Verdict | None:
    if s.node.kind is not NodeKind.REDIS:
        return _no(ErrorCode.WRONG_ROLE, f"{s.node.name} runs no redis")
    child = s.view.children.get(Service.REDIS)
    if child is None:
        return _no(ErrorCode.STARTING, "redis is not started yet")
    if child.state in (ChildState.STOPPED, ChildState.BACKOFF, ChildState.STOPPING):
        return _no(ErrorCode.STARTING if _coming(child) else ErrorCode.REDIS_DOWN, f"redis is {child.in_words}")
    redis = s.view.redis
    # An answer of a former process says nothing about this one.
    if redis is None or (child.started is not None and redis.answered < child.started):
        if _coming(child) or s.now - s.view.started <= STATUS_MAX_AGE_SECONDS:
            return _no(ErrorCode.STARTING, "redis has not answered yet")
        return _no(ErrorCode.REDIS_DOWN, "redis does not answer")
    return _redis_answer(child, redis, s.now - redis.answered)


def _redis_answer(child: Child, redis: Redis, age: float) -> Verdict | None:
    if age > STATUS_MAX_AGE_SECONDS:
        code = ErrorCode.REDIS_DOWN if child.state is ChildState.DEGRADED else ErrorCode.STALE_STATUS
        return _no(code, f"redis last answered {age:.1f} s ago")
    if redis.loading:
        return _no(ErrorCode.REDIS_LOADING, "redis is loading its data set")
    return None


def _role(s: Situation, wanted: Role) -> Verdict | None:
    redis = s.view.redis
    role = redis.role if redis is not None else Role.UNKNOWN
    return None if role is wanted else _no(ErrorCode.WRONG_ROLE, f"the role is {role}")


def _child(s: Situation, service: Service, code: ErrorCode) -> Verdict | None:
    child = s.view.children.get(service)
    if child is None:
        return _no(ErrorCode.STARTING, f"{service} is not started yet")
    if child.state is ChildState.READY:
        return None
    return _no(ErrorCode.STARTING if _coming(child) else code, f"{service} is {child.in_words}")


def _stunnel(s: Situation) -> Verdict | None:
    return _child(s, Service.STUNNEL, ErrorCode.STUNNEL_DOWN)


def _ipsec(s: Situation) -> Verdict | None:
    if s.config.ipsec.mode is IpsecMode.OFF:
        return None
    if s.view.kernel is None:
        return _no(ErrorCode.STARTING, "the IPsec policies are not installed yet")
    if not s.view.kernel.policies_installed:
        return _no(ErrorCode.IPSEC_UNPROTECTED, "not every IPsec policy is installed")
    voters = [peer.name for peer in s.config.peers_of(s.node.name) if peer.votes]
    keyed = sum(1 for name in voters if (link := s.view.links.get(name)) is not None and link.protected)
    keyed += s.node.votes
    if keyed < s.config.majority:
        text = f"keys with {keyed} of the {s.config.majority} nodes that are a majority, this one included"
        return _no(ErrorCode.IPSEC_UNPROTECTED, text)
    return None


def _fence(s: Situation) -> Verdict | None:
    return _no(ErrorCode.FENCED, "it takes no writes, as another may be primary by now") if s.view.fenced else None


def _drained(s: Situation) -> Verdict | None:
    """The last thing to be looked at: with this word the node could do it, and is not to be asked to."""
    return _no(ErrorCode.DRAINED, f"{s.node.name} is drained: it takes nobody new") if s.view.drained else None


def _handed_over(s: Situation) -> Verdict | None:
    heir = s.view.lease.heir if s.view.lease is not None else None
    return _no(ErrorCode.HANDED_OVER, f"the lease was handed over to {heir}") if heir is not None else None


def _lease(s: Situation) -> Verdict | None:
    lease = s.view.lease
    if lease is None:
        return _no(ErrorCode.STARTING, "no sentinel has been asked yet")
    if not lease.held:
        if lease.reachable < s.config.majority:
            text = f"{lease.reachable} of {len(s.config.voters)} sentinels answer; {s.config.majority} are a majority"
            return _no(ErrorCode.SENTINEL_NO_QUORUM, text)
        if lease.primary is not None and lease.primary.address in s.node.addresses:
            doubt = any("down" in flag for answer in s.view.sentinels.values() for flag in answer.flags)
            waits = "the sentinels name this node, which waits until that has lasted"
            text = "the sentinels name this node, and see it down" if doubt else waits
            return _no(ErrorCode.SENTINEL_DISAGREES, text)
        return _no(ErrorCode.SENTINEL_DISAGREES, f"the sentinels name {lease.primary or 'no one primary'}")
    if s.now >= lease.expires:
        return _no(ErrorCode.LEASE_EXPIRED, f"the lease ended {s.now - lease.expires:.1f} s ago")
    return None


def _named(s: Situation) -> Verdict | None:
    """A primary that the sentinels do not name serves nobody; a replica needs no lease."""
    redis = s.view.redis
    if redis is None or redis.role is not Role.PRIMARY:
        return None
    return _lease(s)


def _replication(s: Situation) -> Verdict | None:
    state = replication_state(s)
    redis, lease = s.view.redis, s.view.lease
    if state is ReplicationState.SYNC:
        return _no(ErrorCode.REPLICA_SYNCING, "a full synchronisation is in progress")
    if redis is None or state is not ReplicationState.CONNECTED:
        return _no(ErrorCode.REPLICA_LINK_DOWN, "no link to the primary")
    if lease is None:
        return _no(ErrorCode.STARTING, "no sentinel has been asked yet")
    fresh = sum(1 for answer in s.view.sentinels.values() if s.now - answer.asked <= s.config.primary_lease)
    if min(fresh, lease.reachable) < s.config.majority:
        return _no(ErrorCode.SENTINEL_NO_QUORUM, "no majority of the sentinels says who the primary is")
    if lease.primary is None or lease.primary != redis.primary:
        text = f"it follows {redis.primary}, the sentinels name {lease.primary or 'no one primary'}"
        return _no(ErrorCode.SENTINEL_DISAGREES, text)
    return None


def _lag(s: Situation, query: Query) -> Verdict | None:
    if query.replication_state not in (None, replication_state(s)):
        return _no(ErrorCode.REPLICA_LINK_DOWN, f"the state of replication is {replication_state(s)}")
    behind, seconds = lag_bytes(s), lag_seconds(s)
    if query.lag is not None and (behind is None or behind > query.lag):
        known = f"{behind} bytes behind" if behind is not None else "how far behind it is, is not known"
        return _no(ErrorCode.REPLICA_LAGGING, f"{known}; {query.lag} allowed")
    if query.max_lag_seconds is not None and (seconds is None or seconds > query.max_lag_seconds):
        known = f"up to {seconds:.1f} s behind" if seconds is not None else "how old its data is, is not known"
        return _no(ErrorCode.REPLICA_LAGGING, f"{known}; {query.max_lag_seconds:g} s allowed")
    return None


_NOTHING: Final[frozenset[str]] = frozenset()
_REPLICA_PARAMETERS: Final = frozenset({"lag", "max_lag_seconds", "replication_state"})
_CHECKS: Final[Mapping[str, tuple[Callable[[Situation, Query], Verdict], frozenset[str]]]] = {
    "/": (primary, _NOTHING),
    "/primary": (primary, _NOTHING),
    "/read-write": (primary, _NOTHING),
    "/master": (primary, _NOTHING),
    "/leader": (leader, _NOTHING),
    "/standby-leader": (standby_leader, _NOTHING),
    "/replica": (replica, _REPLICA_PARAMETERS),
    "/read-only": (read_only, _REPLICA_PARAMETERS),
    "/health": (health, frozenset({"checks", "role"})),
    "/readiness": (readiness, frozenset({"lag"})),
}
CHECK_PATHS: Final = frozenset(_CHECKS)
# Other names of /primary.
ALIASES: Final = frozenset({"/", "/read-write", "/master"})
