"""Situation -> what the command line shows. Pure. `schema` grows when a key changes its meaning or goes away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from srd.cluster import Node
from srd.conditions import Condition, Severity, conditions
from srd.findings import Finding
from srd.members import Member
from srd.members import members as known_members
from srd.model import Endpoint, IpsecMode, NodeKind, Role
from srd.state import ChildState, Situation, services_of

SCHEMA: Final = 1

Document = dict[str, Any]

_HEALTH: Final[Mapping[Severity, str]] = {Severity.WARNING: "degraded", Severity.CRITICAL: "critical"}


def status(situation: Situation, version: str) -> Document:
    """Return one node at a glance."""
    s = situation
    redis = s.view.redis
    return _head(s) | {
        "version": version,
        "kind": s.node.kind,
        "address": str(s.node.address),
        "uptime_seconds": _seconds(s.now - s.view.started),
        "health": _health(conditions(s)),
        "role": _own_role(s),
        "drained": s.view.drained,
        "paused_until_timestamp": s.view.pause.until if s.paused else None,
        "primary": _primary(s),
        "lease": _lease(s),
        "links": _link_counts(s),
        "redis": None
        if redis is None
        else {"version": redis.version, "keys": redis.dbsize, "offset": redis.offset, "loading": redis.loading},
        "children": _children(s),
        "kept_data": s.view.kept,
        "conditions": [_condition(item) for item in conditions(s)],
    }


def one_line(situation: Situation) -> str:
    """Return one node in one line, for the service manager's status."""
    view = situation.view
    role = view.redis.role if view.redis is not None else "no redis yet"
    links = sum(1 for link in view.links.values() if link.protected)
    worst = next(iter(conditions(situation)), None)
    trouble = f"; {worst.code}: {worst.subject} {worst.text}" if worst is not None else ""
    return f"{role}, {links} of {len(view.links)} links protected{trouble}"


def members(situation: Situation, version: str) -> Document:
    """Return every node of the cluster as this one knows it."""
    return _head(situation) | {
        "primary": _primary(situation),
        "paused_until_timestamp": situation.view.pause.until if situation.paused else None,
        "members": [_member(situation, member) for member in known_members(situation, version)],
    }


def links(situation: Situation, _version: str) -> Document:
    """Return the protection of every link, leg by leg."""
    s = situation
    return _head(s) | {
        "required": s.config.ipsec.mode is IpsecMode.ESP,
        "protected_ports": [s.config.redis.port, s.config.sentinel.port],
        "bypass": [str(entry) for entry in s.config.bypass],
        "udp_ports": sorted({*s.config.udp_ports, *(s.view.kernel.udp_ports if s.view.kernel is not None else ())}),
        "links": [_link(s, peer) for peer in s.config.peers_of(s.node.name)],
        "kernel": None
        if s.view.kernel is None
        else {
            "policies_installed": s.view.kernel.policies_installed,
            "foreign_overrides": list(s.view.kernel.foreign_overrides),
            "drift_mended": s.view.kernel.drift_mended,
            "xfrm_errors": dict(s.view.kernel.xfrm_errors),
        },
    }


def children(situation: Situation, _version: str) -> Document:
    """Return every child program."""
    return _head(situation) | {"children": _children(situation)}


def events(situation: Situation, _version: str) -> Document:
    """Return the changes of primary that are known, the oldest first, and how often Sentinel published what."""
    return _head(situation) | {
        "events": [
            {
                "at_timestamp": change.at_timestamp,
                "epoch": change.epoch,
                "from": _endpoint(situation, change.previous),
                "to": _endpoint(situation, change.current),
                **change.facts,
            }
            for change in situation.view.history
        ],
        "sentinel_events": dict(situation.view.sentinel_events),
    }


def examination(findings: Sequence[Finding], unsettled: str | None, done: Sequence[str]) -> Document:
    """Return what `srd doctor` shows: what was found, why more could not be judged, what was (or would be) done."""
    return {"findings": [asdict(finding) for finding in findings], "unsettled": unsettled, "done": list(done)}


def _head(s: Situation) -> Document:
    return {"schema": SCHEMA, "cluster": s.config.cluster, "node": s.node.name, "at_timestamp": _seconds(s.wall_clock)}


def _seconds(value: float) -> float:
    return round(value, 3)


def _since(s: Situation, instant: float | None) -> float | None:
    return _seconds(s.now - instant) if instant is not None else None


def _health(found: tuple[Condition, ...]) -> str:
    return _HEALTH[max(item.severity for item in found)] if found else "ok"


def _condition(item: Condition) -> Document:
    return {"code": item.code, "severity": item.severity.name.lower(), "subject": item.subject, "text": item.text}


def _endpoint(s: Situation, endpoint: Endpoint | None) -> Document | None:
    if endpoint is None:
        return None
    node = s.config.node_at(endpoint.address)
    return {"node": node.name if node is not None else None, "address": str(endpoint)}


def _primary(s: Situation) -> Document | None:
    """Return whom a majority of the sentinels names, as far as this node can tell."""
    lease = s.view.lease
    if lease is None or lease.reachable < s.config.majority:
        return None
    return _endpoint(s, lease.primary)


def _lease(s: Situation) -> Document:
    lease = s.view.lease
    left = lease.expires - s.now if lease is not None and lease.held else 0.0
    return {
        "held": left > 0,
        "expires_in_seconds": _seconds(max(left, 0.0)),
        "agree": lease.agree if lease is not None else 0,
        "reachable": lease.reachable if lease is not None else 0,
        "majority": s.config.majority,
        "sentinels": len(s.config.voters),
    }


def _own_role(s: Situation) -> str:
    if s.node.kind is not NodeKind.REDIS:
        return s.node.kind
    return s.view.redis.role if s.view.redis is not None else Role.UNKNOWN


def _link_counts(s: Situation) -> Document:
    peers = s.config.peers_of(s.node.name)
    return {
        "required": s.config.ipsec.mode is IpsecMode.ESP,
        "protected": sum(1 for peer in peers if peer.name in s.view.links and s.view.links[peer.name].protected),
        "total": len(peers),
    }


def _children(s: Situation) -> list[Document]:
    found: list[Document] = []
    for service in services_of(s.node):
        child = s.view.children.get(service)
        if child is None:
            found.append({"service": service, "state": ChildState.STOPPED, "pid": None, "restarts": 0})
            continue
        found.append(
            {
                "service": service,
                "state": child.state,
                "pid": child.pid,
                "uptime_seconds": _since(s, child.started) if child.pid is not None else None,
                "ready_seconds": _since(s, child.ready_since),
                "adopted": child.adopted,
                "restarts": child.restarts,
                "exits": dict(child.exits),
                "last_exit": child.last_exit,
                "retry_in_seconds": _seconds(max(0.0, child.retry_at - s.now)) if child.retry_at is not None else None,
                "waiting_for": child.waiting_for,
                "complaint": child.complaint,
                "symptom": child.symptom,
            }
        )
    return found


def _member(s: Situation, member: Member) -> Document:
    node = member.node
    link = s.view.links.get(node.name)
    return {
        "node": node.name,
        "kind": node.kind,
        "address": str(node.address),
        "state": member.state,
        "role": member.role if node.kind is NodeKind.REDIS else node.kind,
        "version": member.version,
        "lag_bytes": member.lag_bytes,
        "drained": member.drained,
        "tags": node.tags,
        "link": None
        if node == s.node
        else {
            "protected": link is not None and link.protected,
            "suite": link.suite if link is not None else None,
        },
    }


def _link(s: Situation, peer: Node) -> Document:
    link, channel = s.view.links.get(peer.name), s.view.channels.get(peer.name)
    return {
        "peer": peer.name,
        "kind": peer.kind,
        "address": str(peer.address),
        "protected": link is not None and link.protected,
        "suite": link.suite if link is not None else None,
        "suite_reason": link.suite_reason if link is not None else None,
        "legs": [
            {
                "local": str(leg.local),
                "remote": str(leg.remote),
                "spi_in": f"{leg.spi_in:08x}" if leg.spi_in else None,
                "spi_out": f"{leg.spi_out:08x}" if leg.spi_out else None,
                "policies": leg.policies,
                "bytes_in": leg.bytes_in,
                "bytes_out": leg.bytes_out,
                "packets_in": leg.packets_in,
                "packets_out": leg.packets_out,
                "replay_drops": leg.replay_drops,
                "integrity_failures": leg.integrity_failures,
            }
            for leg in (link.legs if link is not None else ())
        ],
        "channel": None
        if channel is None
        else {
            "connected": channel.connected,
            "generation": channel.generation,
            "key_age_seconds": _since(s, channel.established),
            "next_rekey_seconds": _seconds(max(0.0, channel.renewal - s.now)) if channel.renewal is not None else None,
            "key_exchange": channel.group,
            "keyings": channel.keyings,
            "failures": channel.failures,
            "last_error": channel.last_error,
        },
    }
