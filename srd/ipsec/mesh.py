"""The mesh in the kernel: policies for every peer, SAs for every generation of keys, reconciled.

Ownership is by mark, never by memory: policies whose index lies in srd's range, SAs whose reqid does. Everything else
in the tables is somebody else's and only looked at. Nothing is ever flushed.

Order is what keeps plaintext off the wire. Policies: in the order in which the kernel weighs them, so that at every
moment of a first pass a packet meets what it will meet for good or, as before it, no policy; removals last. A
generation of keys: the receiver installs, then the sender, then the sender's policies are pinned to the new SPI by
UPDPOLICY, which is atomic (3000 updates under load: 106,413 packets, all ESP), and only then is the old SA deleted.
A policy that has no keys yet is pinned to an SPI that no SA can have: the kernel drops what it covers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from srd.config import Config, Node
from srd.desired import leg_addresses, rules
from srd.ipsec import xfrm
from srd.ipsec.policies import (
    INDEX_BASE,
    INDEX_SPAN,
    UNKEYED_SPI,
    PolicyKey,
    compile_policy,
    overrides,
    owns_index,
    owns_reqid,
    policy_key,
    reqid_of,
)
from srd.ipsec.sas import Generation, inbound_sa, is_worn, outbound_sa
from srd.model import IpAddress, Suite
from srd.reconcile import boottime, diff
from srd.state import Kernel, Link, LinkLeg, Store

log = structlog.get_logger(__name__)

# How long the old inbound SA goes on receiving what was in flight (strongSwan's delete_rekeyed_delay).
GRACE_SECONDS: Final = 5.0
XFRM_STAT: Final = Path("/proc/net/xfrm_stat")


@dataclass(frozen=True, slots=True)
class _Current:
    """What is remembered of a generation once the kernel has its keys: no key."""

    pins: Mapping[IpAddress, int]  # remote address -> outbound SPI
    spis: frozenset[int]
    suite: Suite
    suite_reason: str


class Mesh:
    """Keeps the kernel's tables as `desired.rules` and the generations of keys want them.

    Every change of the tables is made under one lock, so that a pass never sees half a generation.
    """

    def __init__(
        self,
        *,
        config: Config,
        node: Node,
        socket: xfrm.XfrmSocket,
        store: Store,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._clock = clock
        self._config = config
        self._node = node
        self._socket = socket
        self._lock = asyncio.Lock()
        self._rules = rules(config, node)
        self._peers = {reqid_of(peer.name): peer for peer in config.peers_of(node.name)}
        self._current: dict[str, _Current] = {}
        self._retire_at: dict[str, float] = {}
        # Generations that are being installed or switched to, until both ends have confirmed one.
        self._unconfirmed: dict[str, set[int]] = {}
        self._drift = 0
        self._settled = False
        self._write_links = store.writer("links")
        self._write_kernel = store.writer("kernel")

    # --- what keying asks for, in the order in which it asks

    async def install_inbound(self, generation: Generation) -> None:
        """Make the kernel able to receive under the new keys; nobody sends under them yet."""
        async with self._lock:
            # Until both ends have confirmed a switch, any of the generations in the kernel may be in use.
            self._retire_at.pop(generation.peer, None)
            self._unconfirmed.setdefault(generation.peer, set()).update(generation.spis)
            for leg in generation.legs:
                await self._socket.add_sa(inbound_sa(generation, leg))

    async def install_outbound(self, generation: Generation) -> None:
        """Give the kernel the keys to send with; no policy is pinned to them yet."""
        async with self._lock:
            for leg in generation.legs:
                await self._socket.add_sa(outbound_sa(generation, leg))

    async def pin(self, generation: Generation) -> None:
        """Send under the new keys from now on. The peer must be able to receive them."""
        async with self._lock:
            self._current[generation.peer] = _Current(
                pins={leg.remote: leg.spi_out for leg in generation.legs},
                spis=generation.spis,
                suite=generation.suite,
                suite_reason=generation.suite_reason,
            )
            await self._reconcile()

    async def retire(self, peer: str) -> None:
        """Both ends send under the new keys: old outbound SAs go now, old inbound ones after the grace."""
        async with self._lock:
            self._retire_at[peer] = self._clock() + GRACE_SECONDS
            self._unconfirmed.pop(peer, None)
            await self._reconcile()

    async def discard(self, generation: Generation) -> None:
        """Give up a generation that nobody sends under."""
        async with self._lock:
            self._unconfirmed.get(generation.peer, set()).difference_update(generation.spis)
            # The peer chose half of the SPIs: only with the address are they this link's.
            made = {(leg.local, leg.spi_in) for leg in generation.legs}
            made |= {(leg.remote, leg.spi_out) for leg in generation.legs}
            for sa in await self._socket.sas():
                if owns_reqid(sa.reqid) and (sa.destination, sa.spi) in made:
                    await self._delete_sa(sa)

    # --- the reconciler

    async def reconcile(self) -> None:
        """Compare both tables with what is wanted and mend the difference; a second pass changes nothing."""
        async with self._lock:
            await self._reconcile()

    async def _reconcile(self) -> None:
        policies = await self._socket.policies()
        sas = [sa for sa in await self._socket.sas() if owns_reqid(sa.reqid)]
        owned = {policy_key(info.policy): info.policy for info in policies if owns_index(info.policy.index)}
        # A policy of an xfrm interface never meets this traffic: its interface is part of its identity.
        others = [info for info in policies if not owns_index(info.policy.index) and not info.interface_id]
        foreign = [info.policy for info in others]
        pins = self._pins(owned, sas)
        wanted = self._wanted(pins)
        # Somebody else's policies stand where these belong: a condition, never overwritten.
        occupied = {policy_key(info.policy) for info in others if not info.sub} & (wanted.keys() - owned.keys())
        await self._apply(wanted, owned, occupied)
        kept = await self._retire_sas(sas, set(pins.values()))
        self._publish(pins, kept, overrides(foreign, wanted, occupied), occupied)
        self._settled = True

    def _pins(self, owned: Mapping[PolicyKey, xfrm.Policy], sas: Iterable[xfrm.SaInfo]) -> dict[IpAddress, int]:
        """Return for each peer's address the SPI to send under: the current one, or after a restart that in use."""
        outbound = {(sa.destination, sa.spi) for sa in sas}
        in_use = {
            policy.selector.destination.network_address: policy.templates[0].spi
            for policy in owned.values()
            if policy.direction is xfrm.Direction.OUT and policy.templates
        }
        pins = {}
        for peer in self._peers.values():
            current = self._current.get(peer.name)
            for _, remote in leg_addresses(self._node, peer):
                if current is not None:
                    pins[remote] = current.pins.get(remote, UNKEYED_SPI)
                else:
                    spi = in_use.get(remote, UNKEYED_SPI)
                    pins[remote] = spi if (remote, spi) in outbound else UNKEYED_SPI
        return pins

    def _wanted(self, pins: Mapping[IpAddress, int]) -> dict[PolicyKey, xfrm.Policy]:
        wanted: dict[PolicyKey, xfrm.Policy] = {}
        # What wins comes first: an exemption is never there without the protected ports above it, nor is what is
        # exempt (a peer's keying) ever refused because its exemption is still to come.
        for flow, rule in sorted(self._rules.items(), key=lambda item: item[1].rank):
            pin = pins.get(flow.remote, UNKEYED_SPI) if flow.remote is not None else UNKEYED_SPI
            policy = compile_policy(flow, rule, pin)
            wanted[policy_key(policy)] = policy
        return wanted

    async def _apply(
        self,
        wanted: Mapping[PolicyKey, xfrm.Policy],
        owned: Mapping[PolicyKey, xfrm.Policy],
        occupied: AbstractSet[PolicyKey],
    ) -> None:
        difference = diff(wanted, {key: replace(policy, index=0) for key, policy in owned.items()})
        taken = {policy.index >> 3 for policy in owned.values()}
        free = (number for number in range(INDEX_BASE, INDEX_BASE + INDEX_SPAN) if number not in taken)
        for key, policy in difference.add.items():
            if key in occupied:
                continue
            await self._socket.add_policy(replace(policy, index=next(free) << 3 | policy.direction))
            self._count_drift(policy)
        for key, policy in difference.change.items():
            await self._socket.update_policy(replace(policy, index=owned[key].index))
        for key in difference.remove:
            await self._socket.delete_policy(owned[key])
            self._count_drift(owned[key])

    def _count_drift(self, policy: xfrm.Policy) -> None:
        if self._settled:
            self._drift += 1
            log.warning("policy mended", policy=str(policy))

    async def _retire_sas(self, sas: Iterable[xfrm.SaInfo], pinned: set[int]) -> list[xfrm.SaInfo]:
        """Delete what no policy and no generation needs any more; return the SAs that stay."""
        now = self._clock()
        kept = []
        for sa in sas:
            if self._needed(sa, pinned, now):
                kept.append(sa)
            else:
                await self._delete_sa(sa)
        return kept

    def _needed(self, sa: xfrm.SaInfo, pinned: set[int], now: float) -> bool:
        peer = self._peers.get(sa.reqid)
        if peer is None:
            return False
        if sa.spi in self._unconfirmed.get(peer.name, ()):
            return True
        current = self._current.get(peer.name)
        inbound = sa.destination in self._node.addresses
        if current is None:
            # After a restart: traffic goes on under the keys that are pinned, whatever they were.
            return inbound or sa.spi in pinned
        if sa.spi in current.spis:
            return True
        retire_at = self._retire_at.get(peer.name)
        return retire_at is None or (inbound and now < retire_at)

    async def _delete_sa(self, sa: xfrm.SaInfo) -> None:
        try:
            await self._socket.delete_sa(sa.destination, sa.spi)
        except xfrm.MissingError:
            log.debug("the SA was gone already", sa=str(sa))

    def _publish(
        self,
        pins: Mapping[IpAddress, int],
        sas: Iterable[xfrm.SaInfo],
        conflicts: tuple[str, ...],
        occupied: AbstractSet[PolicyKey],
    ) -> None:
        exposed = {
            network.network_address
            for selector, _, _ in occupied
            for network in (selector.source, selector.destination)
        }
        by_identity = {(sa.destination, sa.spi): sa for sa in sas}
        links = {}
        for peer in self._peers.values():
            current = self._current.get(peer.name)
            legs = tuple(
                self._leg(peer.name, local, remote, pins[remote], by_identity, policies=remote not in exposed)
                for local, remote in leg_addresses(self._node, peer)
            )
            links[peer.name] = Link(
                peer=peer.name,
                legs=legs,
                suite=current.suite if current is not None else _suite_of(legs, by_identity),
                suite_reason=current.suite_reason if current is not None else None,
            )
        self._write_kernel(
            Kernel(
                policies_installed=not conflicts,
                foreign_overrides=conflicts,
                drift_mended=self._drift,
                xfrm_errors=read_xfrm_errors(),
            )
        )
        self._write_links(links)

    def _leg(
        self,
        peer: str,
        local: IpAddress,
        remote: IpAddress,
        pin: int,
        sas: Mapping[tuple[IpAddress, int], xfrm.SaInfo],
        *,
        policies: bool,
    ) -> LinkLeg:
        outbound = sas.get((remote, pin))
        current = self._current.get(peer)
        reqid = reqid_of(peer)
        received = [
            sa
            for (destination, spi), sa in sas.items()
            if destination == local and sa.source == remote and sa.reqid == reqid and not sa.larval
            if current is None or spi in current.spis
        ]
        inbound = max(received, key=lambda sa: sa.add_timestamp, default=None)
        used = [sa for sa in (inbound, outbound) if sa is not None]
        return LinkLeg(
            local=local,
            remote=remote,
            spi_in=inbound.spi if inbound is not None else None,
            spi_out=outbound.spi if outbound is not None else None,
            policies=policies,
            bytes_in=inbound.bytes if inbound is not None else 0,
            packets_in=inbound.packets if inbound is not None else 0,
            bytes_out=outbound.bytes if outbound is not None else 0,
            packets_out=outbound.packets if outbound is not None else 0,
            replay_drops=inbound.replay_drops + inbound.replay_window_drops if inbound is not None else 0,
            integrity_failures=inbound.integrity_failures if inbound is not None else 0,
            worn=any(is_worn(sa) for sa in used),
        )


async def watch(socket: xfrm.XfrmSocket, events: xfrm.XfrmEvents, wake: Callable[[], None]) -> None:
    """Wake the reconciler at every change of the tables that is not srd's own, until cancelled."""
    async with events:
        async for event in events:
            if event.pid != socket.pid:
                wake()


class Unprotected:
    """What stands in the mesh's place when ipsec.mode is off: keys are agreed on and go nowhere."""

    async def install_inbound(self, generation: Generation) -> None:
        """Do nothing."""

    async def install_outbound(self, generation: Generation) -> None:
        """Do nothing."""

    async def pin(self, generation: Generation) -> None:
        """Do nothing."""

    async def retire(self, peer: str) -> None:
        """Do nothing."""

    async def discard(self, generation: Generation) -> None:
        """Do nothing."""


def read_xfrm_errors() -> dict[str, int]:
    """Return the counters of /proc/net/xfrm_stat that are not zero; what each means is in docs/ipsec.md."""
    try:
        text = XFRM_STAT.read_text(encoding="ascii")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {name: int(value) for name, value in pairs if value != "0"}


def _suite_of(legs: tuple[LinkLeg, ...], sas: Mapping[tuple[IpAddress, int], xfrm.SaInfo]) -> Suite | None:
    for leg in legs:
        sa = sas.get((leg.remote, leg.spi_out)) if leg.spi_out is not None else None
        if sa is not None and sa.aead in list(Suite):
            return Suite(sa.aead)
    return None
