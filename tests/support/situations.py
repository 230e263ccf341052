"""Situations to judge: a whole, healthy node of a cluster of three, and ways to take something away from it."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from srd.changes import ChangeKind, RoleChange
from srd.cluster import Config
from srd.config import parse_config
from srd.model import Endpoint, NodeKind, Role, Service, Suite
from srd.state import (
    Backstop,
    Channel,
    Child,
    ChildState,
    Kernel,
    Lease,
    Link,
    LinkLeg,
    PeerReport,
    Redis,
    ReplicaOf,
    SentinelAnswer,
    Situation,
    View,
    services_of,
)

NOW = 1000.0
WALL = 1_700_000_000.0
OFFSET = 5000

CLUSTER = """
cluster = "orders"
{extra}
[[node]]
name = "redis-1"
addresses = ["192.168.205.10"]
[[node]]
name = "redis-2"
addresses = ["192.168.205.11"]
[[node]]
name = "redis-3"
addresses = ["192.168.205.12"]
kind = "{third}"
"""


def config(extra: str = "", third: NodeKind = NodeKind.REDIS) -> Config:
    return parse_config(CLUSTER.format(extra=extra, third=third), "cluster.toml")


def at(number: int, port: int = 6379) -> Endpoint:
    return Endpoint(ip_address(f"192.168.205.{9 + number}"), port)


def link(peer: str, number: int) -> Link:
    leg = LinkLeg(
        local=ip_address("192.168.205.10"),
        remote=at(number).address,
        spi_in=0x1001,
        spi_out=0x1002,
        policies=True,
        bytes_in=10,
        bytes_out=20,
        packets_in=1,
        packets_out=2,
    )
    return Link(peer=peer, legs=(leg,), suite=Suite.AES_256_GCM, suite_reason="both have AES-NI")


def primary_redis(**changes: Any) -> Redis:
    redis = Redis(
        answered=NOW - 0.1,
        version="7.0.15",
        run_id="a" * 40,
        role=Role.PRIMARY,
        loading=False,
        replid="b" * 40,
        offset=OFFSET,
        uptime_seconds=600,
        dbsize=3,
        min_replicas_to_write=1,
        persistence=True,
        replicas=(ReplicaOf(at(2), "online", OFFSET, 0), ReplicaOf(at(3), "online", OFFSET - 100, 1)),
        ping_seconds=0.0005,
    )
    return replace(redis, **changes)


def replica_redis(**changes: Any) -> Redis:
    return replace(primary_redis(role=Role.REPLICA, primary=at(2), link_up=True, replicas=()), **changes)


def _view(cluster: Config, me: str) -> View:
    replicas = len(cluster.redis_nodes) - 1
    peers = {node.name: index for index, node in enumerate(cluster.nodes, 1) if node.name != me}
    return View(
        children={
            service: Child(ChildState.READY, pid=100 + index, started=NOW - 600, ready_since=NOW - 599)
            for index, service in enumerate(services_of(cluster.node(me)))
        },
        links={name: link(name, number) for name, number in peers.items()},
        channels={
            name: Channel(name, True, NOW - 500, 2, NOW - 60, "X25519MLKEM768", Suite.AES_256_GCM, "", 2, 0)
            for name in peers
        },
        peers={name: PeerReport(name, NOW - 0.1, "0.1.0", True, Role.REPLICA, True, OFFSET) for name in peers},
        kernel=Kernel(policies_installed=True),
        backstop=Backstop(keeper="nftables", mended=0),
        sentinels={
            node.name: SentinelAnswer(node.name, NOW - 0.2, at(1), 3, False, 2, replicas, frozenset({"master"}))
            for node in cluster.voters
        },
        history=(
            RoleChange(
                WALL - 100,
                3,
                at(2),
                at(1),
                kind=ChangeKind.CRASH,
                cause="redis has ended: killed by SIGKILL",
                by=("redis-2",),
                duration_seconds=0.5,
                settling_seconds=0.1,
                known_offset=OFFSET,
                known_age_seconds=0.25,
                taken_offset=OFFSET - 12,
            ),
        ),
        sentinel_events={"+switch-master": 1},
        certificates={"node": WALL + 365 * 86400},
        initialized=True,
        started=NOW - 700,
    )


def primary_situation(**changes: Any) -> Situation:
    """redis-1, the primary; `changes` are fields of the view."""
    cluster = config()
    view = replace(_view(cluster, "redis-1"), redis=primary_redis(), lease=Lease(True, NOW + 3.5, 3, 3, at(1)))
    return Situation(cluster, cluster.node("redis-1"), replace(view, **changes), NOW, WALL)


def replica_situation(**changes: Any) -> Situation:
    """redis-1, a replica of redis-2."""
    cluster = config()
    view = _view(cluster, "redis-1")
    sentinels = {name: replace(answer, primary=at(2)) for name, answer in view.sentinels.items()}
    peers = {
        name: replace(report, role=Role.PRIMARY) if name == "redis-2" else report for name, report in view.peers.items()
    }
    view = replace(view, redis=replica_redis(), lease=Lease(False, 0.0, 3, 3, at(2)), sentinels=sentinels, peers=peers)
    return Situation(cluster, cluster.node("redis-1"), replace(view, **changes), NOW, WALL)


def arbiter_situation(**changes: Any) -> Situation:
    """redis-3, which runs a sentinel and no redis."""
    cluster = config(third=NodeKind.SENTINEL)
    view = replace(_view(cluster, "redis-3"), lease=Lease(False, 0.0, 3, 3, at(1)))
    return Situation(cluster, cluster.node("redis-3"), replace(view, **changes), NOW, WALL)


def with_node(situation: Situation, name: str, **changes: Any) -> Situation:
    """Another cluster.toml, of the same nodes."""
    nodes = (replace(node, **changes) if node.name == name else node for node in situation.config.nodes)
    return replace(situation, config=replace(situation.config, nodes=tuple(nodes)))


def with_child(situation: Situation, service: Service, **changes: Any) -> Situation:
    children = {**situation.view.children, service: replace(situation.view.children[service], **changes)}
    return replace(situation, view=replace(situation.view, children=children))
