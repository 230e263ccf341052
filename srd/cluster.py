"""What a cluster is: the frozen values of a valid cluster.toml. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from srd.model import ConfigError, Endpoint, IpAddress, IpsecMode, NodeKind, Suite

LOCALHOST: Final = IPv4Address("127.0.0.1")

KEYING_PORT: Final = 849
# One mask (0xfff8) covers exactly these eight client ports; all are privileged, so no application can bind one.
KEYING_CLIENT_PORTS: Final = range(840, 848)

# Sentinel pings once a second, so a silent loss is seen up to a second late (sentinel.c SENTINEL_PING_PERIOD): a lease
# that ends a second before `down_after` has ended before any majority can begin to replace its holder by itself. srd
# has them begin sooner, after ha/failover.py's REPLACE_SECONDS, and before those, too, a lease has ended.
LEASE_MARGIN_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 2.0
# redis' own fence: a primary that is cut off stops acknowledging writes after at most MIN_REPLICAS_MAX_LAG + 2 s
# (2.06 to 2.94 s measured for 2), which must be over before a majority can promote another one.
MIN_REPLICAS_MAX_LAG: Final = 2

DEFAULT_PRIORITY: Final = 100  # redis' own
NEVER_PRIORITY: Final = 0  # no sentinel makes it primary
PREFERRED_PRIORITY: Final = 1  # of the replica that a failover or a switchover is about to make primary

SUITES: Final = {"aes-256-gcm": Suite.AES_256_GCM, "chacha20-poly1305": Suite.CHACHA20_POLY1305}

SuiteName = Literal["aes-256-gcm", "chacha20-poly1305"]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file: unknown keys are refused, values never change."""


class RedisSection(Section, frozen=True):
    """`[redis]`: the data server. `settings` are further redis.conf directives, verbatim."""

    port: Port = 6379
    program: str = "redis-server"
    user: str = "redis"
    settings: dict[str, str | int] = {}
    app_commands: tuple[str, ...] = ()
    app_channels: tuple[str, ...] = ()
    stop_grace: Seconds = 15.0


class SentinelSection(Section, frozen=True):
    """`[sentinel]`: who is primary. `quorum` defaults to a majority of the nodes that run a sentinel."""

    port: Port = 26379
    user: str = "redis"
    master: str = "master"
    quorum: int | None = None
    down_after: Seconds = 5.0
    failover_timeout: Seconds = 5.0


class TlsSection(Section, frozen=True):
    """`[tls]`: where clients connect."""

    port: Port = 6380
    program: str = "stunnel4"
    user: str = "stunnel4"


class IpsecSection(Section, frozen=True):
    """`[ipsec]`: protection between nodes. `bypass` names what may pass in plaintext, as `tcp/22`.

    `suites` are those that may be used, the preferred one first; none given, each pair uses what it runs best. `encap`
    puts ESP into UDP, for networks that drop protocol 50.
    """

    mode: IpsecMode = IpsecMode.ESP
    bypass: tuple[str, ...] = ("tcp/22",)
    suites: tuple[SuiteName, ...] = ()
    encap: Literal["none", "udp"] = "none"
    encap_port: Port = 4500


class TrustSection(Section, frozen=True):
    """`[trust]`: certificates that are not let in any more, by their serial numbers in hexadecimal."""

    revoked: tuple[str, ...] = ()


class HttpSection(Section, frozen=True):
    """`[http]`: the read-only health and metrics server."""

    port: Port = 8080
    max_connections: Annotated[int, Meta(ge=8, le=65536)] = 512
    max_connections_per_address: Annotated[int, Meta(ge=4, le=65536)] = 64


class HaproxyAgentSection(Section, frozen=True):
    """`[haproxy_agent]`: where haproxy's agent-check asks; `[http]` has its bounds."""

    port: Port = 8081


@dataclass(frozen=True, slots=True)
class Node:
    """A member of the mesh: at most one address per IP family, the first one is the one that redis announces.

    `priority` is redis' replica-priority: the lower, the sooner it becomes primary; 0 never by itself. With
    `noloadbalance` no balancer leads readers to it while it is a replica.
    """

    name: str
    kind: NodeKind
    addresses: tuple[IpAddress, ...]
    # It is the same node with others.
    priority: int = field(default=DEFAULT_PRIORITY, compare=False)
    noloadbalance: bool = field(default=False, compare=False)

    @property
    def address(self) -> IpAddress:
        """The address by which redis and sentinel know this node."""
        return self.addresses[0]

    @property
    def votes(self) -> bool:
        """Whether a sentinel runs here."""
        return self.kind in (NodeKind.REDIS, NodeKind.SENTINEL)

    @property
    def tags(self) -> Mapping[str, int | bool]:
        """What cluster.toml asks for that is not as everywhere: `nofailover`, `priority`, `noloadbalance`."""
        tags: dict[str, int | bool] = {}
        if self.priority != DEFAULT_PRIORITY:
            never = self.priority == NEVER_PRIORITY
            tags |= {"nofailover": True} if never else {"priority": self.priority}
        return tags | ({"noloadbalance": True} if self.noloadbalance else {})


@dataclass(frozen=True, slots=True)
class Bypass:
    """Traffic between nodes that may pass in plaintext."""

    protocol: Literal["tcp", "udp"]
    port: int

    def __str__(self) -> str:
        return f"{self.protocol}/{self.port}"


@dataclass(frozen=True, slots=True)
class Config:
    """A whole, valid cluster.toml."""

    cluster: str
    nodes: tuple[Node, ...]
    listen_localhost: bool
    redis: RedisSection
    sentinel: SentinelSection
    tls: TlsSection
    ipsec: IpsecSection
    http: HttpSection
    haproxy_agent: HaproxyAgentSection
    bypass: tuple[Bypass, ...]
    revoked: frozenset[int] = frozenset()
    parting_udp_ports: frozenset[int] = frozenset()  # of keys that were made by a former file and may be in use

    @property
    def suites(self) -> tuple[Suite, ...]:
        """The suites that may be used, the preferred one first; empty for what each pair runs best."""
        return tuple(SUITES[name] for name in self.ipsec.suites)

    @property
    def udp_port(self) -> int | None:
        """The port of ESP in UDP on every node, None for ESP alone."""
        return self.ipsec.encap_port if self.ipsec.mode is IpsecMode.ESP and self.ipsec.encap == "udp" else None

    @property
    def udp_ports(self) -> tuple[int, ...]:
        """The ports that ESP in UDP may come in at."""
        return tuple(sorted(self.parting_udp_ports | ({self.udp_port} if self.udp_port is not None else set())))

    def node(self, name: str) -> Node:
        """Return the node of that name; `KeyError` when the file has none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def peers_of(self, name: str) -> tuple[Node, ...]:
        """Return every other member of the mesh, in the order of the file."""
        return tuple(node for node in self.nodes if node.name != name)

    def open_endpoints(self, node: Node, port: int) -> tuple[Endpoint, ...]:
        """Return where srd of this node serves whoever asks: its addresses, and 127.0.0.1 where that is wanted."""
        local = (LOCALHOST,) if self.listen_localhost and LOCALHOST not in node.addresses else ()
        return tuple(Endpoint(address, port) for address in (*node.addresses, *local))

    def joined_by(self, client: Node) -> Config:
        """Return the cluster with one more client than the file has; `ConfigError` when its certificate does not fit.

        It must have the same IP families: what one of its other addresses sent would be in plaintext.
        """
        refused = partial(ConfigError, "let in", client.name)
        if client.kind is not NodeKind.CLIENT:
            raise refused(f"cluster.toml has no such node, and only a client may join without, not a {client.kind}")
        if any(node.name == client.name for node in self.nodes):
            raise refused("cluster.toml has a node of that name")
        for address in client.addresses:
            if (node := self.node_at(address)) is not None:
                raise refused(f"{address} is node {node.name!r} already")
        if sorted(a.version for a in client.addresses) != sorted(a.version for a in self.nodes[0].addresses):
            raise refused(f"it does not have one address of each IP family that {self.nodes[0].name} has")
        return replace(self, nodes=(*self.nodes, client))

    def node_at(self, address: IpAddress) -> Node | None:
        """Return the node that has this address."""
        return next((node for node in self.nodes if address in node.addresses), None)

    @property
    def redis_nodes(self) -> tuple[Node, ...]:
        """The nodes that hold data, in the order of the file; the first one is the first primary."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.REDIS)

    @property
    def voters(self) -> tuple[Node, ...]:
        """The nodes that run a sentinel."""
        return tuple(node for node in self.nodes if node.votes)

    @property
    def majority(self) -> int:
        """How many sentinels are more than half of them."""
        return len(self.voters) // 2 + 1

    @property
    def quorum(self) -> int:
        """How many sentinels must agree that the primary is down."""
        return self.sentinel.quorum or self.majority

    @property
    def min_replicas_to_write(self) -> int:
        """How many replicas must be in touch for the primary to take a write.

        Floor(N/2) of N redis nodes: with 1 in a cluster of 5, a primary and one replica in a minority would go on
        taking writes. And so many that the other side of a cut cannot elect anyone: with k replicas beside the primary,
        V - 1 - k of V voters are there at most, which must be no majority, or no redis among them. Without arbiters the
        former is always enough.
        """
        return max(len(self.redis_nodes) // 2, min((len(self.voters) - 1) // 2, len(self.redis_nodes) - 1))

    @property
    def advice(self) -> tuple[str, ...]:
        """What speaks against this number of nodes, in sentences; nothing from three voters on, two of them redis."""
        redis, voters = len(self.redis_nodes), len(self.voters)
        if redis == 1:
            return ("with one redis node nothing takes over when it is lost: three are what srd is for",)
        if voters == 2:  # noqa: PLR2004 - and both redis
            lost = "with two nodes no majority is left when either is lost: nobody takes over, nobody takes writes"
            return (f'{lost}; add a third node, which may be an arbiter (kind = "sentinel")',)
        return ()

    @property
    def appends(self) -> bool:
        """Whether redis keeps an append-only file, and loads that one and no other."""
        return str(self.redis.settings.get("appendonly", "yes")).lower() == "yes"

    @property
    def parallel_syncs(self) -> int:
        """How many replicas a failover has follow the new primary at once: all of them."""
        return max(len(self.redis_nodes) - 1, 1)

    @property
    def primary_lease(self) -> float:
        """How long, in seconds from when they were asked, the word of a majority of sentinels holds."""
        return min(LEASE_SECONDS, self.sentinel.down_after - LEASE_MARGIN_SECONDS)
