"""Situation -> what this node knows of every node of the cluster: the rows of `srd list` and of `/cluster`. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from srd.cluster import Node
from srd.conditions import Severity, conditions
from srd.model import Role
from srd.state import PeerReport, Situation

# A peer reports every second over the keying channel: the word of one that fell silent is not shown as news.
REPORT_MAX_AGE_SECONDS: Final = 2.0


class MemberState(enum.StrEnum):
    """How a node is, in one word: it does its job, it does not, or nobody hears of it."""

    RUNNING = "running"
    DEGRADED = "degraded"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Member:
    """One node. `lag_bytes` is how far its data is behind the primary's; None on the primary, or when unknown."""

    node: Node
    state: MemberState
    role: Role = Role.UNKNOWN
    version: str | None = None
    lag_bytes: int | None = None
    drained: bool = False


def members(situation: Situation, version: str) -> tuple[Member, ...]:
    """Return every node of the cluster, in the order of the file; `version` is this node's own."""
    known = {situation.node.name: own_report(situation, version), **_heard(situation)}
    leading = _primary(situation, known)
    return tuple(_member(node, known.get(node.name), leading) for node in situation.config.nodes)


def own_report(situation: Situation, version: str) -> PeerReport:
    """Return what this node says of itself, to its peers and in its own list."""
    s = situation
    redis = s.view.redis
    return PeerReport(
        node=s.node.name,
        received=s.now,
        version=version,
        initialized=s.view.initialized,
        role=redis.role if redis is not None else Role.UNKNOWN,
        healthy=all(found.severity < Severity.CRITICAL for found in conditions(s)),
        offset=redis.offset if redis is not None else None,
        drained=s.view.drained,
        pause=s.view.pause,
        replid=redis.replid if redis is not None else "",
    )


def _heard(s: Situation) -> Mapping[str, PeerReport]:
    return {name: r for name, r in s.view.peers.items() if s.now - r.received <= REPORT_MAX_AGE_SECONDS}


def _primary(s: Situation, known: Mapping[str, PeerReport]) -> PeerReport | None:
    """Return the report of the node that a majority of the sentinels names."""
    named = s.view.named
    node = s.config.node_at(named.address) if named is not None else None
    return known.get(node.name) if node is not None else None


def _member(node: Node, report: PeerReport | None, leading: PeerReport | None) -> Member:
    if report is None:
        return Member(node, MemberState.UNREACHABLE)
    lag = None
    if leading is not None and leading is not report and leading.offset is not None and report.offset is not None:
        lag = max(0, leading.offset - report.offset)
    state = MemberState.RUNNING if report.healthy else MemberState.DEGRADED
    return Member(node, state, report.role, report.version, lag, report.drained)
