"""The mesh in the kernel: policies for every peer, SAs for every generation of keys, reconciled.

Ownership is by mark, never by memory: policies whose index lies in srd's range, SAs whose reqid does. Everything else
in the tables is somebody else's and only looked at. Nothing is ever flushed.

Order is what keeps plaintext off the wire. Policies: in the order in which the kernel weighs them, so that at every
moment of a first pass a packet meets what it will meet for good or, as before it, no policy; removals last. A
generation of keys: both ends install, then the leader's policies are pinned to the new SPI by UPDPOLICY, which is
atomic (3000 updates under load: 106,413 packets, all ESP), then the follower's, and only then are old SAs deleted. A
policy that has no keys yet is pinned to an SPI that no SA can have: the kernel drops what it covers.

What keying asks for costs what it changes, whatever the size of the mesh; only a pass reads the tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from srd.cluster import Config, Node
from srd.desired import leg_addresses, rules
from srd.ipsec import xfrm
from srd.ipsec.counters import read_xfrm_errors
from srd.ipsec.links import NO_KEYS, Keys, Observed, fresh_link, grouped, link
from srd.ipsec.policies import (
    INDEX_BASE,
    INDEX_SPAN,
    UNKEYED_SPI,
    compile_policy,
    overrides,
    owns_index,
    owns_reqid,
    pinned,
    pinned_address,
)
from srd.ipsec.sas import Generation, inbound_sa, outbound_sa
from srd.model import IpAddress, SrdError
from srd.reconcile import boottime, diff
from srd.state import Kernel, Link, Store

log = structlog.get_logger(__name__)

# How long the old inbound SA goes on receiving what was in flight (strongSwan's delete_rekeyed_delay).
GRACE_SECONDS: Final = 5.0


@dataclass(slots=True)
class _Peer:
    """What is known of a peer's keys beyond what the kernel shows."""

    node: Node
    keys: Keys | None = None  # None after a restart, until the next generation
    # SAs of a generation in the making, as (destination, SPI): no policy asks for them yet.
    pending: set[tuple[IpAddress, int]] = field(default_factory=set)
    # What the peer sends under, since both last spoke of it; None: nobody knows, so no inbound SA may go.
    receives: frozenset[int] | None = None
    # When what is in flight has arrived: under the SPIs that it sent under before, and under any that nobody knew of.
    former: dict[int, float] = field(default_factory=dict)
    grace_ends: float = 0.0


@dataclass(frozen=True, slots=True)
class _Judged:
    """What a pass made of the policies that it found, and of which ones."""

    fingerprint: bytes
    in_use: Mapping[IpAddress, int]  # the peer's address -> the SPI that the kernel's own policies are pinned to
    pins: Mapping[IpAddress, int]
    exposed: frozenset[IpAddress]
    conflicts: tuple[str, ...]
    former: tuple[xfrm.Policy, ...]
    clean: bool


class Mesh:
    """Keeps the kernel's tables as `desired.rules` and the generations of keys want them.

    Every change of the tables is made under one lock, so that a pass never sees half a generation. `wake` asks for a
    pass soon.
    """

    def __init__(
        self,
        *,
        config: Config,
        node: Node,
        socket: xfrm.XfrmSocket,
        store: Store,
        wake: Callable[[], None],
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._clock = clock
        self._node = node
        self._socket = socket
        self._wake = wake
        self._lock = asyncio.Lock()
        # What the last pass that changed nothing was made of; while it is all the same, so is its outcome.
        self._judged: _Judged | None = None
        self._take(config, {})
        # The last pass: what it found, and where each of srd's policies is.
        self._seen = Observed()
        self._indices: dict[xfrm.PolicyIdentity, int] = {}
        self._links: dict[str, Link] = {}
        self._drift = 0
        self._settled = False
        self._write_links = store.writer("links")
        self._write_kernel = store.writer("kernel")

    def _take(self, config: Config, known: Mapping[str, _Peer]) -> None:
        """Want what a file wants; of peers that it has unchanged, what is known stays."""
        self._peers = {
            peer.name: known[peer.name] if peer.name in known and known[peer.name].node == peer else _Peer(peer)
            for peer in config.peers_of(self._node.name)
        }
        # What wins comes first: an exemption is never there without the protected ports above it, nor is what is
        # exempt (a peer's keying) ever refused because its exemption is still to come.
        ranked = sorted(rules(config, self._node).items(), key=lambda item: item[1].rank)
        self._unkeyed = {policy.identity: policy for policy in (compile_policy(*item) for item in ranked)}
        self._at = {address: peer for peer in self._peers.values() for address in peer.node.addresses}
        # What a peer's new keys change, by its address.
        self._to: dict[IpAddress, list[xfrm.Policy]] = {address: [] for address in self._at}
        for policy in self._unkeyed.values():
            if (address := pinned_address(policy)) is not None:
                self._to[address].append(policy)
        self._judged = None

    async def adopt(self, config: Config) -> None:
        """Take a changed file in: policies of new peers stand when this returns, what is of former ones is gone."""
        async with self._lock:
            self._take(config, self._peers)
            self._settled = False  # what is mended now is no drift
        await self.reconcile()

    # --- what keying asks for, in the order in which it asks

    async def forget(self, peer: str) -> None:
        """Give all keys with a peer up at once, because it is trusted no more; the policies drop what they cover."""
        async with self._lock:
            known = self._peer(peer)
            known.keys, known.receives, known.grace_ends = NO_KEYS, frozenset(), 0.0
            known.former.clear()
            known.pending.clear()
        await self.reconcile()

    async def sends(self, peer: str) -> tuple[int, ...]:
        """Return the SPIs that this node's packets to the peer leave under."""
        async with self._lock:
            pins = [self._seen.pins.get(remote, UNKEYED_SPI) for _, remote in self._legs(peer)]
        return tuple(pin for pin in pins if pin != UNKEYED_SPI)

    async def agree(self, peer: str, sends: frozenset[int]) -> None:
        """Take the peer's word for what it sends under, while no keys are in the making: the rest may go.

        Without this, each exchange that breaks half-way would leave keys behind that nobody knows to be unused.
        """
        async with self._lock:
            self._confirm(self._peer(peer), sends)

    async def install(self, generation: Generation) -> None:
        """Make the kernel able to receive under the new keys, and to send; nobody does yet.

        Raises `XfrmError`, `AlreadyExistsError` for an SPI that is taken; `discard` takes back what was installed.
        """
        async with self._lock:
            pending = self._peer_of(generation).pending
            for make in (inbound_sa, outbound_sa):
                for leg in generation.legs:
                    sa = make(generation, leg)
                    await self._socket.add_sa(sa)
                    pending.add((sa.destination, sa.spi))

    async def pin(self, generation: Generation) -> None:
        """Send under the new keys from now on. The peer must be able to receive them."""
        async with self._lock:
            name, keys = generation.peer, Keys.of(generation)
            self._peer_of(generation).keys = keys
            for remote, spi in keys.pins.items():
                for policy in self._to[remote]:
                    await self._repin(pinned(policy, spi))
            self._seen = replace(self._seen, pins={**self._seen.pins, **keys.pins})
            self._links[name] = fresh_link(name, generation, self._seen)
            self._write_links(self._links)

    async def _repin(self, policy: xfrm.Policy) -> None:
        index = self._indices.get(policy.identity)
        if index is None:
            self._wake()  # it is not there, or somebody else's is: the pass knows what to do
        else:
            await self._socket.update_policy(replace(policy, index=index))

    async def retire(self, peer: str) -> None:
        """Both ends send under the new keys: old outbound SAs go now, old inbound ones after the grace."""
        async with self._lock:
            known = self._peer(peer)
            if known.keys is not None:
                self._confirm(known, known.keys.receives)

    def _confirm(self, peer: _Peer, receives: frozenset[int]) -> None:
        """Note what the peer sends under; what is in flight under other keys arrives before the grace ends.

        Each SPI has a grace of its own: were it one for all, keys that are renewed within it would pile up.
        """
        now = self._clock()
        peer.pending.clear()
        if peer.receives is None:
            peer.grace_ends = now + GRACE_SECONDS
        else:
            ended = dict.fromkeys(peer.receives, now + GRACE_SECONDS) | peer.former
            peer.former = {spi: end for spi, end in ended.items() if spi not in receives and now < end}
        peer.receives = receives
        self._wake()

    async def discard(self, generation: Generation) -> None:
        """Give up a generation that nobody sends under: what `install` has installed of it, and nothing else."""
        async with self._lock:
            pending = self._peer(generation.peer).pending
            made = {(leg.local, leg.spi_in) for leg in generation.legs}
            made |= {(leg.remote, leg.spi_out) for leg in generation.legs}
            for destination, spi in made & pending:
                await self._delete_sa(destination, spi)
            pending -= made

    def _peer(self, name: str) -> _Peer:
        try:
            return self._peers[name]
        except KeyError:
            raise SrdError("make keys with", name, "it is no peer any more") from None

    def _peer_of(self, generation: Generation) -> _Peer:
        """Return the peer that a generation is for, if its keys still fit it."""
        if tuple((leg.local, leg.remote) for leg in generation.legs) != self._legs(generation.peer):
            raise SrdError("make keys with", generation.peer, "its addresses have changed meanwhile")
        return self._peer(generation.peer)

    def _legs(self, peer: str) -> tuple[tuple[IpAddress, IpAddress], ...]:
        return leg_addresses(self._node, self._peer(peer).node)

    # --- the reconciler

    async def reconcile(self) -> None:
        """Compare both tables with what is wanted and mend the difference; a second pass changes nothing."""
        async with self._lock:
            table = await self._socket.policy_table()
            sas = [sa for sa in await self._socket.sas() if owns_reqid(sa.reqid)]
            judged = self._judged
            if (
                judged is None
                or judged.fingerprint != table.fingerprint
                or judged.pins != self._pins(judged.in_use, sas)
            ):
                judged = await self._judge(table, sas)
            kept = await self._retire_sas(sas, judged.pins)
            for policy in judged.former:
                await self._socket.delete_policy(policy)
            self._seen = Observed(judged.pins, judged.exposed, grouped(kept))
            self._publish(judged.conflicts, kept)
            self._judged = judged if judged.clean else None
            self._settled = True

    async def _judge(self, table: xfrm.PolicyTable, sas: Iterable[xfrm.SaInfo]) -> _Judged:
        """Read the policies, add and change; what is to be removed is closed, for when its SAs are gone."""
        policies = table.policies()
        owned = {info.policy.identity: info.policy for info in policies if owns_index(info.policy.index)}
        # A policy of an xfrm interface never meets this traffic: its interface is part of its identity.
        others = [info for info in policies if not owns_index(info.policy.index) and not info.interface_id]
        in_use = {
            address: policy.templates[0].spi
            for policy in owned.values()
            if (address := pinned_address(policy)) is not None
        }
        pins = self._pins(in_use, sas)
        wanted = self._wanted(pins)
        # Somebody else's policies stand where these belong: a condition, never overwritten.
        occupied = {info.policy.identity for info in others if not info.sub} & (wanted.keys() - owned.keys())
        changes, former = await self._apply(wanted, owned, occupied)
        return _Judged(
            fingerprint=table.fingerprint,
            in_use=in_use,
            pins=pins,
            exposed=_addresses(occupied),
            conflicts=overrides([info.policy for info in others], wanted, occupied),
            former=former,
            clean=not changes,
        )

    def _pins(self, in_use: Mapping[IpAddress, int], sas: Iterable[xfrm.SaInfo]) -> dict[IpAddress, int]:
        """Return for each peer's address the SPI to send under: the current one, or after a restart that in use."""
        outbound = {(sa.destination, sa.spi) for sa in sas}
        pins = {}
        for peer in self._peers.values():
            for _, remote in leg_addresses(self._node, peer.node):
                if peer.keys is not None:
                    pins[remote] = peer.keys.pins.get(remote, UNKEYED_SPI)
                else:
                    spi = in_use.get(remote, UNKEYED_SPI)
                    pins[remote] = spi if (remote, spi) in outbound else UNKEYED_SPI
        return pins

    def _wanted(self, pins: Mapping[IpAddress, int]) -> dict[xfrm.PolicyIdentity, xfrm.Policy]:
        wanted = dict(self._unkeyed)
        for remote, spi in pins.items():
            if spi != UNKEYED_SPI:
                wanted |= {policy.identity: pinned(policy, spi) for policy in self._to[remote]}
        return wanted

    async def _apply(
        self,
        wanted: Mapping[xfrm.PolicyIdentity, xfrm.Policy],
        owned: Mapping[xfrm.PolicyIdentity, xfrm.Policy],
        occupied: AbstractSet[xfrm.PolicyIdentity],
    ) -> tuple[int, tuple[xfrm.Policy, ...]]:
        """Add and change; return how much that was, and what is to be removed."""
        difference = diff(wanted, {key: replace(policy, index=0) for key, policy in owned.items()})
        self._indices = {key: policy.index for key, policy in owned.items()}
        taken = {index >> 3 for index in self._indices.values()}
        free = (number for number in range(INDEX_BASE, INDEX_BASE + INDEX_SPAN) if number not in taken)
        new = {
            key: replace(policy, index=next(free) << 3 | policy.direction)
            for key, policy in difference.add.items()
            if key not in occupied
        }
        await self._socket.add_policies(list(new.values()))
        self._indices |= {key: policy.index for key, policy in new.items()}
        for key, policy in difference.change.items():
            await self._socket.update_policy(replace(policy, index=owned[key].index))
        former = tuple(owned[key] for key in difference.remove)
        for policy in former:
            if policy.templates:
                await self._socket.update_policy(replace(policy, action=xfrm.Action.BLOCK, templates=()))
            del self._indices[policy.identity]
        for policy in (*new.values(), *former):
            self._count_drift(policy)
        return len(new) + len(difference.change) + len(former), former

    def _count_drift(self, policy: xfrm.Policy) -> None:
        if self._settled:
            self._drift += 1
            log.warning("policy mended", policy=str(policy))

    async def _retire_sas(self, sas: Iterable[xfrm.SaInfo], pins: Mapping[IpAddress, int]) -> list[xfrm.SaInfo]:
        """Delete what no policy and no generation needs any more; return the SAs that stay."""
        now = self._clock()
        kept = []
        for sa in sas:
            if self._needed(sa, pins, now):
                kept.append(sa)
            else:
                await self._delete_sa(sa.destination, sa.spi)
        return kept

    def _needed(self, sa: xfrm.SaInfo, pins: Mapping[IpAddress, int], now: float) -> bool:
        inbound = sa.destination in self._node.addresses
        peer = self._at.get(sa.source if inbound else sa.destination)
        if peer is None:
            return False
        if (sa.destination, sa.spi) in peer.pending:
            return True
        if not inbound:
            return pins[sa.destination] == sa.spi
        return peer.receives is None or sa.spi in peer.receives or now < peer.former.get(sa.spi, peer.grace_ends)

    async def _delete_sa(self, destination: IpAddress, spi: int) -> None:
        try:
            await self._socket.delete_sa(destination, spi)
        except xfrm.MissingError:
            log.debug("the SA was gone already", destination=str(destination), spi=f"{spi:#010x}")

    def _publish(self, conflicts: tuple[str, ...], sas: Iterable[xfrm.SaInfo]) -> None:
        self._links = {name: link(self._node, peer.node, peer.keys, self._seen) for name, peer in self._peers.items()}
        self._write_kernel(
            Kernel(
                policies_installed=not conflicts,
                foreign_overrides=conflicts,
                drift_mended=self._drift,
                xfrm_errors=read_xfrm_errors(),
                udp_ports=frozenset(sa.encapsulation.destination_port for sa in sas if sa.encapsulation is not None),
            )
        )
        self._write_links(self._links)


def _addresses(keys: Iterable[xfrm.PolicyIdentity]) -> frozenset[IpAddress]:
    """Return the addresses that policies are about."""
    return frozenset(
        network.network_address for selector, _, _ in keys for network in (selector.source, selector.destination)
    )


async def watch(socket: xfrm.XfrmSocket, events: xfrm.XfrmEvents, wake: Callable[[], None]) -> None:
    """Wake the reconciler at every change of the tables that is not srd's own, until cancelled."""
    async with events:
        async for event in events:
            if event.pid != socket.pid:
                wake()
