"""(Config, View, now) -> what ought to be: the one place where policy is decided. Pure.

XFRM priorities: the lower number wins, and every protected port stands above every exemption. An exemption for ssh must
accept source port 22 from a peer's address; were it above the protected ports, whoever spoofs that address with that
source port would reach redis in plaintext.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT, Config, Node
from srd.model import Endpoint, IpAddress, IpsecMode, NodeKind, Service
from srd.state import ChildState, Situation, View, services_of

TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
# RFC 4861: neighbour solicitation and advertisement. Without these two a pair of hosts that has no keys yet cannot
# even find each other's link address, and so never gets keys.
NEIGHBOUR_DISCOVERY_TYPES: Final = (135, 136)

KEYING_CLIENT_PORT_MASK: Final = 0xFFF8


class Treatment(enum.StrEnum):
    """What the kernel does with matching packets: ESP is required, or they pass in plaintext, or they are dropped."""

    ESP = "esp"
    PASS = "pass"  # noqa: S105 - a word, not a password
    BLOCK = "block"


class Way(enum.StrEnum):
    """The direction of a packet, seen from this node."""

    IN = "in"
    OUT = "out"


class Rank(enum.IntEnum):
    """Priorities of policies, the lower one first."""

    PROTECTED_PORT = 50
    NEIGHBOUR_DISCOVERY = 100
    KEYING = 110
    ENCAPSULATION = 115
    EXEMPTION = 120
    PEER = 1000
    SELF = 1500
    NOBODY_ELSE = 2000


@dataclass(frozen=True, slots=True)
class Ports:
    """One side's ports: `value` 0 with `mask` 0 is any port. For ICMPv6 the value is the type (source side)."""

    value: int = 0
    mask: int = 0


ANY_PORT: Final = Ports()


@dataclass(frozen=True, slots=True)
class Flow:
    """Which packets: the identity of a rule. `local` or `remote` None is any address of the family."""

    way: Way
    family: int
    local: IpAddress | None
    remote: IpAddress | None
    protocol: int = 0
    local_ports: Ports = ANY_PORT
    remote_ports: Ports = ANY_PORT
    marked: bool = False  # only packets of sockets that bear srd's mark


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to a flow. `peer` is set where `treatment` is ESP."""

    rank: Rank
    treatment: Treatment
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whether a service ought to run now; if not, `waiting_for` says in words what it waits for."""

    run: bool
    waiting_for: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """How redis may start: as primary (`primary` None), or as replica of `primary`; `hold` says why not yet.

    `keep`: this node may have what the primary has not, although it was in step with one. `led`: the srd of `primary`
    says that its redis is one. For a sentinel without a file, and of no account for redis: `named` is whom the
    sentinels name, be redis on hold or not, and `doubted` that one of them takes that one for down, or replaces it.
    """

    primary: Endpoint | None = None
    hold: str | None = None
    keep: bool = False
    led: bool = False
    named: Endpoint | None = field(default=None, compare=False)
    doubted: bool = field(default=False, compare=False)


def leg_addresses(mine: Node, theirs: Node) -> tuple[tuple[IpAddress, IpAddress], ...]:
    """Return the (local, remote) address pairs of two nodes, one per IP family that both have, IPv4 first."""
    pairs = [
        (local, remote) for local in mine.addresses for remote in theirs.addresses if local.version == remote.version
    ]
    return tuple(sorted(pairs, key=lambda pair: pair[0].version))


def rules(config: Config, node: Node) -> Mapping[Flow, Rule]:
    """Return every policy that this node wants in the kernel."""
    if config.ipsec.mode is IpsecMode.OFF:
        return {}
    found: dict[Flow, Rule] = {}
    for peer in config.peers_of(node.name):
        for local, remote in leg_addresses(node, peer):
            for way in Way:
                found.update(_pair_rules(config, peer.name, way, local, remote))
    for family in sorted({address.version for address in node.addresses}):
        found.update(_outsider_rules(config, node, family))
    return found


def _pair_rules(
    config: Config, peer: str, way: Way, local: IpAddress, remote: IpAddress
) -> Iterator[tuple[Flow, Rule]]:
    def flow(protocol: int = 0, *, here: Ports = ANY_PORT, there: Ports = ANY_PORT, marked: bool = False) -> Flow:
        return Flow(way, local.version, local, remote, protocol, here, there, marked)

    for port in (config.redis.port, config.sentinel.port):
        yield flow(TCP, here=_exactly(port)), Rule(Rank.PROTECTED_PORT, Treatment.ESP, peer)
        yield flow(TCP, there=_exactly(port)), Rule(Rank.PROTECTED_PORT, Treatment.ESP, peer)
    if local.version == 6:  # noqa: PLR2004 - IP version
        for icmp_type in NEIGHBOUR_DISCOVERY_TYPES:
            # struct xfrm_selector keeps the ICMP type in the source port, whichever side sends.
            kind = _exactly(icmp_type)
            sent = flow(ICMPV6, here=kind) if way is Way.OUT else flow(ICMPV6, there=kind)
            yield sent, Rule(Rank.NEIGHBOUR_DISCOVERY, Treatment.PASS)
    clients = Ports(KEYING_CLIENT_PORTS.start, KEYING_CLIENT_PORT_MASK)
    marked = way is Way.OUT  # received packets carry no mark; both ports bound the inbound side
    yield flow(TCP, here=_exactly(KEYING_PORT), there=clients, marked=marked), Rule(Rank.KEYING, Treatment.PASS)
    yield flow(TCP, here=clients, there=_exactly(KEYING_PORT), marked=marked), Rule(Rank.KEYING, Treatment.PASS)
    for port in config.udp_ports if way is Way.IN else ():
        # ESP in UDP meets the policies before it is taken out of UDP. What else comes there ends in a socket that
        # nobody reads; and none leaves from there: a program that sends from this port would have to share it with srd.
        yield flow(UDP, here=_exactly(port), there=_exactly(port)), Rule(Rank.ENCAPSULATION, Treatment.PASS)
    for bypass in config.bypass:
        protocol = TCP if bypass.protocol == "tcp" else UDP
        yield flow(protocol, here=_exactly(bypass.port)), Rule(Rank.EXEMPTION, Treatment.PASS)
        yield flow(protocol, there=_exactly(bypass.port)), Rule(Rank.EXEMPTION, Treatment.PASS)
    yield flow(), Rule(Rank.PEER, Treatment.ESP, peer)


def _outsider_rules(config: Config, node: Node, family: int) -> Iterator[tuple[Flow, Rule]]:
    """Nobody outside the mesh reaches redis or sentinel, or is reached there; a node may still reach its own address.

    The latter because Sentinel goes on speaking, with its password, to a node that has left the cluster.
    """
    own = [address for address in node.addresses if address.version == family]
    for way in Way:
        for port in (config.redis.port, config.sentinel.port):
            for flow in (
                Flow(way, family, None, None, TCP, local_ports=_exactly(port)),
                Flow(way, family, None, None, TCP, remote_ports=_exactly(port)),
            ):
                yield flow, Rule(Rank.NOBODY_ELSE, Treatment.BLOCK)
        for address in own:
            yield Flow(way, family, address, address), Rule(Rank.SELF, Treatment.PASS)


def _exactly(port: int) -> Ports:
    return Ports(port, 0xFFFF)


def needs_restart(old: Config, new: Config, node: Node) -> tuple[str, ...]:
    """Return the dotted keys that differ and that a running srd cannot take in; the others it can.

    Other nodes, exemptions, suites, revoked certificates and HTTP's bounds may change, but of the node's own entry
    only its priority, and whether readers are led to it.
    """
    sections = {table: getattr(old, table).__struct_fields__ for table in ("redis", "sentinel", "tls")}
    sections |= {"ipsec": ("mode",), "http": ("port",), "haproxy_agent": ("port",)}
    changed = [
        f"{table}.{key}"
        for table, keys in sections.items()
        for key in keys
        if getattr(getattr(old, table), key) != getattr(getattr(new, table), key)
    ]
    changed += [key for key in ("cluster", "listen_localhost") if getattr(old, key) != getattr(new, key)]
    mine = next((other for other in new.nodes if other.name == node.name), None)
    return tuple(changed) if mine == node else (*changed, f"node {node.name}")


def voters_changed(old: Config, new: Config) -> tuple[str, ...]:
    """Return the voters that only one of the two files has, or has at these addresses, by name.

    Two majorities, by an old and by a new file, share a voter only if no more than one has come or gone: {1, 2} is a
    majority of 1, 2 and 3, and {3, 4, 5} is one of 1 to 5; and of 1, 2 and 4, {2, 4} is one, and {1, 3} was before.
    """
    before, after = ({(voter.name, voter.addresses) for voter in config.voters} for config in (old, new))
    return tuple(sorted({name for name, _ in before ^ after}))


def differences(old: Config, new: Config) -> dict[str, list[str] | bool]:
    """Return what a reload changes, for people: names of nodes, serials in hex, and whether any other setting does."""
    before, after = ({node.name for node in config.nodes} for config in (old, new))
    named = replace(old, nodes=new.nodes, revoked=new.revoked, parting_udp_ports=new.parting_udp_ports)
    return {
        "added": sorted(after - before),
        "removed": sorted(before - after),
        "trusted_no_more": sorted(f"{serial:x}" for serial in new.revoked - old.revoked),
        "trusted_again": sorted(f"{serial:x}" for serial in old.revoked - new.revoked),
        "settings": named != new or _tagged_anew(old, new),
    }


def _tagged_anew(old: Config, new: Config) -> bool:
    """Whether a node that stays has another priority, or is led readers to where it was not, or the reverse."""
    before = {node.name: (node.priority, node.noloadbalance) for node in old.nodes}
    after = {node.name: (node.priority, node.noloadbalance) for node in new.nodes}
    return any(before[name] != after[name] for name in before.keys() & after.keys())


def services(
    situation: Situation, start: Start, by_hand: Collection[Service] = frozenset()
) -> Mapping[Service, Wanted]:
    """Return which children ought to run: policies, then keys with a majority, then redis, sentinel, stunnel.

    A service that runs goes on running when a peer is lost: only its start waits. During a pause, what has ended is
    started `by_hand` alone; what this srd has not seen end is started, for a person has started the machine, or srd.
    """
    wanted: dict[Service, Wanted] = {}
    blocked = _unprotected(situation)
    for service in services_of(situation.node):
        child = situation.view.children.get(service)
        if child is not None and child.state in (ChildState.STARTING, ChildState.READY, ChildState.DEGRADED):
            wanted[service] = Wanted(run=True)
        elif situation.paused and child is not None and child.last_exit is not None and service not in by_hand:
            wanted[service] = Wanted(run=False, waiting_for="the end of the pause: srd resume, or srd restart")
        elif blocked:
            wanted[service] = Wanted(run=False, waiting_for=blocked)
        else:
            reason = _missing_for(service, situation.view, situation.node, start)
            wanted[service] = Wanted(run=reason is None, waiting_for=reason)
    return wanted


def _unprotected(situation: Situation) -> str | None:
    config, view = situation.config, situation.view
    if config.ipsec.mode is IpsecMode.OFF:
        return None
    if view.kernel is None or not view.kernel.policies_installed:
        return "the IPsec policies"
    peers = [peer.name for peer in config.peers_of(situation.node.name) if peer.votes]
    keyed = 1 + sum(1 for name in peers if (link := view.links.get(name)) is not None and link.protected)
    if keyed < config.majority:
        return f"keys with a majority of the nodes ({keyed} of {config.majority}, this one included)"
    return None


def _missing_for(service: Service, view: View, node: Node, start: Start) -> str | None:
    redis = view.children.get(Service.REDIS)
    redis_ready = redis is not None and redis.state is ChildState.READY
    if service is Service.REDIS:
        return start.hold
    if service is Service.SENTINEL:
        # A node that has been part of the cluster starts its sentinel first: after a power cut of all nodes, the
        # sentinels must agree before any redis may know what to start as.
        if node.kind is NodeKind.SENTINEL or view.initialized or redis_ready:
            return None
        return "redis"
    return None if redis_ready else "redis"
