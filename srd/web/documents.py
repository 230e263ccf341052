"""Situation -> the JSON documents of :8080. Pure, and nothing invented: what is not known is null or absent.

Key names are those of Patroni's REST API where it has them, so that what reads Patroni reads this.
"""

from __future__ import annotations

from typing import Any, Final

from srd.cluster import Node
from srd.conditions import conditions
from srd.members import Member, members
from srd.model import Endpoint, IpsecMode, Role, Service
from srd.state import Child, ChildState, Redis, Situation, services_of
from srd.web import health
from srd.web.health import Verdict

Document = dict[str, Any]

_RUNNING: Final = "running"
# Anybody may ask, and all that are kept would take 5 ms of the event loop each time; `srd events` has them.
SHOWN_CHANGES: Final = 100


def check_document(verdict: Verdict, situation: Situation, version: str) -> Document:
    """Return the body of a check: the verdict, what `/health` looks at, and the node."""
    parts = health.parts(situation)
    checks = {part: _ok(refusal) for part, refusal in parts.items()}
    head: Document = {"status": "ok" if verdict.ok else "unavailable"}
    if verdict.error_code is not None:
        head["error_code"] = verdict.error_code
    return head | {"description": verdict.description, "checks": checks} | node_document(situation, version)


def _ok(refusal: Verdict | None) -> Document:
    if refusal is None:
        return {"ok": True}
    return {"ok": False, "error_code": refusal.error_code, "description": refusal.description}


def node_document(situation: Situation, version: str) -> Document:
    """Return all that is known of this node: the body of `/srd`."""
    s = situation
    return {
        "state": _state(s),
        "role": s.view.redis.role if s.view.redis is not None else Role.UNKNOWN,
        "drained": s.view.drained,
        "pause": s.paused,
        "paused_until_timestamp": s.view.pause.until if s.paused else None,
        "redis": _redis(s.view.redis) if s.view.redis is not None else None,
        "replication": _replication(s),
        "lag_bytes": health.lag_bytes(s),
        "sentinel": _sentinel(s),
        "lease": _lease(s),
        "ipsec": _ipsec(s),
        "children": [{"service": service} | _child(child) for service, child in s.view.children.items()],
        "certificates": dict(s.view.certificates),
        "kept_data": s.view.kept,
        "conditions": [
            {"code": item.code, "severity": item.severity.name.lower(), "subject": item.subject, "text": item.text}
            for item in conditions(s)
        ],
        "srd": {
            "version": version,
            "cluster": s.config.cluster,
            "node": s.node.name,
            "kind": s.node.kind,
            "uptime_seconds": _seconds(s.now - s.view.started),
        },
    }


def cluster_document(situation: Situation, version: str) -> Document:
    """Return the members of the cluster as this node knows them: the body of `/cluster`."""
    known = members(situation, version)
    return {
        "scope": situation.config.cluster,
        "pause": situation.paused,
        "members": [_member(situation, member) for member in known],
    }


def history_document(situation: Situation) -> list[Document]:
    """Return the last changes of primary that this node knows of, the oldest first: the body of `/history`."""
    return [
        {
            "epoch": change.epoch,
            "at_timestamp": change.at_timestamp,
            "from": _endpoint(change.previous),
            "to": _endpoint(change.current),
            "node": _name_at(situation, change.current),
            **change.facts,
        }
        for change in situation.view.history[-SHOWN_CHANGES:]
    ]


def _seconds(value: float) -> float:
    return round(value, 3)


def _endpoint(endpoint: Endpoint | None) -> str | None:
    return str(endpoint) if endpoint is not None else None


def _name_at(s: Situation, endpoint: Endpoint | None) -> str | None:
    node = s.config.node_at(endpoint.address) if endpoint is not None else None
    return node.name if node is not None else None


def _state(s: Situation) -> str:
    """The word of the first service: `running`, or where it is in its life."""
    services = services_of(s.node)
    if not services:
        return _RUNNING
    child = s.view.children.get(services[0])
    if child is None:
        return ChildState.STARTING
    return _RUNNING if child.state is ChildState.READY else child.state


def _redis(redis: Redis) -> Document:
    return {
        "version": redis.version,
        "run_id": redis.run_id,
        "replid": redis.replid,
        "offset": redis.offset,
        "dbsize": redis.dbsize,
        "loading": redis.loading,
        "uptime_seconds": redis.uptime_seconds,
        "min_replicas_to_write": redis.min_replicas_to_write,
        "persistence": redis.persistence,
        "primary": _endpoint(redis.primary),
        "link_up": redis.link_up if redis.role is Role.REPLICA else None,
        "sync_in_progress": redis.sync_in_progress if redis.role is Role.REPLICA else None,
    }


def _replication(s: Situation) -> list[Document]:
    redis = s.view.redis
    if redis is None:
        return []
    return [
        {
            "node": _name_at(s, item.endpoint),
            "addr": str(item.endpoint),
            "state": item.state,
            "lag_bytes": max(0, redis.offset - item.offset),
            "lag_seconds": item.lag_seconds,
        }
        for item in redis.replicas
    ]


def _sentinel(s: Situation) -> Document:
    own, lease = s.view.sentinels.get(s.node.name), s.view.lease
    return {
        "quorum": s.config.quorum,
        "majority": s.config.majority,
        "known": own.known_sentinels if own is not None else None,
        "reachable": lease.reachable if lease is not None else None,
        "agree": lease.agree if lease is not None else None,
        "master": _endpoint(lease.primary) if lease is not None else None,
        "epoch": own.epoch if own is not None else None,
        "tilt": own.tilt if own is not None else None,
    }


def _lease(s: Situation) -> Document:
    lease = s.view.lease
    held = lease is not None and lease.held and s.now < lease.expires
    return {"held": held, "expires_in_ms": round((lease.expires - s.now) * 1000) if lease is not None and held else 0}


def _ipsec(s: Situation) -> Document:
    required = s.config.ipsec.mode is IpsecMode.ESP
    return {
        "mode": s.config.ipsec.mode,
        "required": required,
        "protected": health.protected(s),
        "peers": [_peer_link(s, peer) for peer in s.config.peers_of(s.node.name)] if required else [],
    }


def _peer_link(s: Situation, peer: Node) -> Document:
    link, channel = s.view.links.get(peer.name), s.view.channels.get(peer.name)
    established = channel.established if channel is not None else None
    return {
        "node": peer.name,
        "state": "protected" if link is not None and link.protected else "blocked",
        "suite": link.suite if link is not None else None,
        "key_exchange": channel.group if channel is not None else None,
        "generation": channel.generation if channel is not None else None,
        "sa_age_seconds": _seconds(s.now - established) if established is not None else None,
        "channel_up": channel.connected if channel is not None else False,
    }


def _child(child: Child) -> Document:
    return {
        "state": child.state,
        "pid": child.pid,
        "adopted": child.adopted,
        "restarts": child.restarts,
        "last_exit": child.last_exit,
        "waiting_for": child.waiting_for,
        "complaint": child.complaint,
    }


def _member(s: Situation, member: Member) -> Document:
    node = member.node
    runs_redis = Service.REDIS in services_of(node)
    url = Endpoint(node.address, s.config.http.port)
    return {
        "name": node.name,
        "kind": node.kind,
        "host": str(node.address),
        "port": s.config.redis.port if runs_redis else None,
        "client_port": s.config.tls.port if runs_redis else None,
        "api_url": f"http://{url}/srd",
        "role": member.role,
        "state": member.state,
        "lag": member.lag_bytes,
        "drained": member.drained,
        "tags": node.tags,
    }
