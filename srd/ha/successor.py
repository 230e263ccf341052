"""Who may be primary after this node, on purpose: what speaks against each other node, and whom to choose. Pure."""

from __future__ import annotations

from typing import Final

from srd.cluster import NEVER_PRIORITY, Config, Node
from srd.ha.lease import FAILOVER_FLAG, PROMOTED_FLAG, endpoint_of, fresh
from srd.model import RefusedError, Role
from srd.state import Redis, Situation

# How far behind a successor may be: what a link carries in far less than writes are held up (ha/switchover.py).
LAG_BYTES: Final = 1 << 20
LAG_SECONDS: Final = 1
# A srd says something each second.
REPORT_SECONDS: Final = 2.5


def is_heard(s: Situation, node: Node, within: float = REPORT_SECONDS) -> bool:
    """Return whether the srd of another node has said something within so many seconds."""
    report = s.view.peers.get(node.name)
    return report is not None and s.now - report.received <= within


def obstacles(s: Situation, successor: Node) -> list[str]:
    """Return, in words, what speaks against moving the primary from this node to another one now. Pure."""
    found = _own_obstacles(s)
    redis, name, endpoint = s.view.redis, successor.name, endpoint_of(s.config, successor)
    report, channel = s.view.peers.get(name), s.view.channels.get(name)
    if channel is not None and not channel.connected:
        found.append(f"the keying channel to {name} is down")
    if report is None or not is_heard(s, successor):
        found.append(f"the srd of {name} is not heard")
    elif not report.healthy:
        found.append(f"{name} says that it does not do its job")
    if report is not None and report.drained:
        found.append(f"{name} is drained")
    replica = next((r for r in redis.replicas if r.endpoint == endpoint), None) if redis is not None else None
    if replica is None or replica.state != "online" or redis is None:
        found.append(f"the redis of {name} is no replica that is in step")
    elif replica.lag_seconds > LAG_SECONDS or redis.offset - replica.offset > LAG_BYTES:
        found.append(f"the redis of {name} is {redis.offset - replica.offset} bytes and {replica.lag_seconds} s behind")
    return found


def _own_obstacles(s: Situation) -> list[str]:
    redis, lease = s.view.redis, s.view.lease
    if redis is None or redis.role is not Role.PRIMARY or lease is None or not lease.held or s.now >= lease.expires:
        return [f"{s.node.name} is not the primary that a majority of the sentinels names"]
    answers = fresh(s.config, s.view.sentinels, s.now).values()
    # Until its leader has ended a failover, it refuses to make the epoch of another (sentinel.c, -INPROG).
    if any(answer.flags & {FAILOVER_FLAG, PROMOTED_FLAG} for answer in answers):
        return ["a failover of the sentinels has not ended yet"]
    naming = sum(1 for answer in answers if answer.primary == endpoint_of(s.config, s.node) and not answer.tilt)
    if naming < s.config.majority:
        return [f"{naming} of {len(s.config.voters)} sentinels name it; {s.config.majority} are a majority"]
    return ["it takes no writes now, being fenced"] if s.view.fenced else []


def choose(s: Situation, wanted: str | None) -> Node:
    """Return whom to move the primary to; `RefusedError` says what speaks against it, or against each."""
    candidates = [node for node in s.config.redis_nodes if node != s.node and wanted in (None, node.name)]
    if wanted is None:
        candidates = [node for node in candidates if node.priority != NEVER_PRIORITY]
    if not candidates:
        reason = f"there is no other node that runs redis and is named {wanted}" if wanted else "there is no other node"
        raise RefusedError("switch over to", wanted or "another node", reason, "srd list shows the nodes")
    against = {node: obstacles(s, node) for node in candidates}
    fit = [node for node in candidates if not against[node]]
    if not fit:
        reasons = dict.fromkeys(reason for found in against.values() for reason in found)
        raise RefusedError("switch over to", wanted or "another node", "; ".join(reasons), "srd status says more")
    return min(fit, key=lambda node: (node.priority, -_offset(s.view.redis, s.config, node)))


def _offset(redis: Redis | None, config: Config, node: Node) -> int:
    endpoint = endpoint_of(config, node)
    return next((r.offset for r in redis.replicas if r.endpoint == endpoint), 0) if redis is not None else 0
