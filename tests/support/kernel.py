"""A kernel's SA and policy tables for tests of the mesh: the rules of XFRM, and what would happen to a packet.

`tests/support/contract.py` holds it to the real kernel.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from srd.ipsec.xfrm import (
    Action,
    AlreadyExistsError,
    Direction,
    Lifetime,
    MissingError,
    Policy,
    PolicyInfo,
    Sa,
    SaInfo,
    Selector,
)

IpAddress = IPv4Address | IPv6Address
Identity = tuple[Selector, Direction, object]
# errno.h
EEXIST, ENOENT, ESRCH = 17, 2, 3


class Fate(enum.Enum):
    """What the kernel does with a packet."""

    PLAINTEXT = "plaintext"
    ESP = "esp"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Packet:
    """A packet as a policy sees it."""

    direction: Direction
    source: IpAddress
    destination: IpAddress
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    mark: int = 0


def identity(policy: Policy) -> Identity:
    return policy.selector, policy.direction, policy.mark


class FakeTable:
    """The shape of `PolicyTable`."""

    def __init__(self, policies: list[PolicyInfo]) -> None:
        self._policies = policies
        self.fingerprint = repr([info.policy for info in policies]).encode()

    def policies(self) -> list[PolicyInfo]:
        return self._policies


class FakeKernel:
    """The shape of `XfrmSocket`. `changed` is called after each change, before anyone else can act."""

    pid = 1

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._policies: dict[Identity, Policy] = {}
        self._sas: dict[tuple[IpAddress, int], Sa] = {}
        self._numbers = itertools.count(1)
        self._changed = changed
        self.changes: list[str] = []
        # Bytes and packets under an SA, where a test says so.
        self.carried: dict[tuple[IpAddress, int], tuple[int, int]] = {}

    async def policy_table(self) -> FakeTable:
        return FakeTable(await self.policies())

    async def add_policies(self, policies: Sequence[Policy]) -> None:
        for policy in policies:
            await self.add_policy(policy)

    async def policies(self) -> list[PolicyInfo]:
        return [PolicyInfo(policy, Lifetime(), 0, 0) for policy in self._policies.values()]

    async def sas(self) -> list[SaInfo]:
        return [_info(sa, *self.carried.get(key, (0, 0))) for key, sa in self._sas.items()]

    async def add_policy(self, policy: Policy) -> None:
        if identity(policy) in self._policies:
            raise AlreadyExistsError("add", str(policy), EEXIST)
        self._put(policy)

    async def update_policy(self, policy: Policy) -> None:
        before = self._policies.get(identity(policy))
        if before is None:
            self._put(policy)
            return
        # The place in the table, and so the rank among equals, is that of a new policy; the index is the old one.
        del self._policies[identity(policy)]
        self._note("update", replace(policy, index=before.index))

    async def delete_policy(self, policy: Policy) -> None:
        for key, other in self._policies.items():
            by_index = other.index == policy.index and other.mark == policy.mark
            if by_index if policy.index else key == identity(policy):
                del self._policies[key]
                self.changes.append(f"delete {other}")
                self._changed()
                return
        raise MissingError("delete", str(policy), ENOENT)

    async def add_sa(self, sa: Sa) -> None:
        if (sa.destination, sa.spi) in self._sas:
            raise AlreadyExistsError("add", str(sa), EEXIST)
        self._sas[sa.destination, sa.spi] = sa
        self.changes.append(f"add {sa}")
        self._changed()

    async def delete_sa(self, destination: IpAddress, spi: int) -> None:
        if (destination, spi) not in self._sas:
            raise MissingError("delete", f"{destination} {spi}", ESRCH)
        self.changes.append(f"delete {self._sas.pop((destination, spi))}")
        self._changed()

    def flush_sas(self) -> None:
        self._sas.clear()

    def flush_policies(self) -> None:
        self._policies.clear()

    def _put(self, policy: Policy) -> None:
        taken = {other.index for other in self._policies.values()}
        index = policy.index
        if not index or index in taken:
            index = next(n << 3 | policy.direction for n in self._numbers if n << 3 | policy.direction not in taken)
        self._note("add", replace(policy, index=index))

    def _note(self, verb: str, policy: Policy) -> None:
        self._policies[identity(policy)] = policy
        self.changes.append(f"{verb} {policy}")
        self._changed()

    def fate(self, packet: Packet) -> Fate:
        """Return what happens to a packet: the lowest priority decides, the oldest among equals."""
        matching = [
            policy
            for policy in self._policies.values()
            if policy.direction is packet.direction
            and _selects(policy.selector, packet)
            and (policy.mark is None or packet.mark & policy.mark.mask == policy.mark.value)
        ]
        if not matching:
            return Fate.PLAINTEXT
        policy = min(matching, key=lambda policy: policy.priority)
        if policy.action is Action.BLOCK:
            return Fate.DROPPED
        if not policy.templates:
            return Fate.PLAINTEXT
        (template,) = policy.templates
        if packet.direction is Direction.IN:
            return Fate.DROPPED  # it came in plaintext; inside ESP it would have met this policy with its SA
        sa = self._sas.get((packet.destination, template.spi))
        return Fate.ESP if sa is not None and sa.reqid == template.reqid else Fate.DROPPED


@functools.cache
def _selects(selector: Selector, packet: Packet) -> bool:
    return (
        selector.source.version == packet.source.version
        and packet.source in selector.source
        and packet.destination in selector.destination
        and selector.protocol in (0, packet.protocol)
        and (packet.source_port ^ selector.source_port) & selector.source_port_mask == 0
        and (packet.destination_port ^ selector.destination_port) & selector.destination_port_mask == 0
    )


def _info(sa: Sa, carried_bytes: int, carried_packets: int) -> SaInfo:
    return SaInfo(
        source=sa.source,
        destination=sa.destination,
        spi=sa.spi,
        reqid=sa.reqid,
        protocol=50,
        mode=sa.mode,
        selector=sa.selector,
        larval=False,
        aead=sa.aead.name,
        key_bits=256,
        icv_bits=sa.aead.icv_bits,
        direction=None,
        esn=sa.esn,
        replay_window=sa.replay_window,
        lifetime=sa.lifetime,
        bytes=carried_bytes,
        packets=carried_packets,
        add_timestamp=0,
        use_timestamp=0,
        sequence=0,
        output_sequence=0,
        replay_window_drops=0,
        replay_drops=0,
        integrity_failures=0,
        mark=sa.mark,
    )
