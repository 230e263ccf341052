"""What srd's policies are in the kernel's terms, which of the kernel's objects are srd's, and which others defeat them.

Ownership is by mark, never by memory: policies whose index lies in srd's range, SAs whose reqid does. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from srd.desired import Flow, Rule, Treatment, Way
from srd.ipsec import xfrm
from srd.model import IpAddress

REQID_BASE: Final = 0x5D00_0000
REQID_SPAN: Final = 1 << 20
# A policy's index is n << 3 | direction. The kernel counts up from 1 when it chooses; this is far above.
INDEX_BASE: Final = 0x1500_0000
INDEX_SPAN: Final = 1 << 20
# RFC 4303 section 2.1 reserves SPIs 1 to 255: no SA ever has this one, so a policy pinned to it lets nothing out.
UNKEYED_SPI: Final = 1
# SO_MARK of the keying channel's sockets; unmarked packets do not match its outbound exemption.
KEYING_MARK: Final = 0x0073_7264

_DIRECTIONS: Final = {Way.IN: xfrm.Direction.IN, Way.OUT: xfrm.Direction.OUT}


def reqid_of(peer: str) -> int:
    """Return the reqid of a peer's SAs: the same on every start, so that a restarted srd knows its own.

    Two names may share one (one chance in a million for a pair); that is harmless, since each SA also carries the
    addresses of its pair as its selector.
    """
    digest = hashlib.blake2b(peer.encode(), digest_size=4).digest()
    return REQID_BASE + int.from_bytes(digest, "big") % REQID_SPAN


def owns_reqid(reqid: int) -> bool:
    """Whether an SA with this reqid is srd's."""
    return REQID_BASE <= reqid < REQID_BASE + REQID_SPAN


def owns_index(index: int) -> bool:
    """Whether a policy with this index is srd's."""
    return INDEX_BASE <= index >> 3 < INDEX_BASE + INDEX_SPAN


def compile_policy(flow: Flow, rule: Rule) -> xfrm.Policy:
    """Translate a rule into the kernel's terms: pinned to no keys, if it is one that can be. The index is left 0."""
    anything = "0.0.0.0/0" if flow.family == 4 else "::/0"  # noqa: PLR2004 - IP version
    local = ip_network(flow.local if flow.local is not None else anything)
    remote = ip_network(flow.remote if flow.remote is not None else anything)
    outbound = flow.way is Way.OUT
    source_ports, destination_ports = (
        (flow.local_ports, flow.remote_ports) if outbound else (flow.remote_ports, flow.local_ports)
    )
    templates: tuple[xfrm.Template, ...] = ()
    if rule.treatment is Treatment.ESP and rule.peer is not None:
        templates = (xfrm.Template(reqid=reqid_of(rule.peer), spi=UNKEYED_SPI if outbound else 0),)
    return xfrm.Policy(
        selector=xfrm.Selector(
            source=local if outbound else remote,
            destination=remote if outbound else local,
            protocol=flow.protocol,
            source_port=source_ports.value,
            source_port_mask=source_ports.mask,
            destination_port=destination_ports.value,
            destination_port_mask=destination_ports.mask,
        ),
        direction=_DIRECTIONS[flow.way],
        action=xfrm.Action.BLOCK if rule.treatment is Treatment.BLOCK else xfrm.Action.ALLOW,
        priority=rule.rank,
        templates=templates,
        mark=xfrm.Mark(KEYING_MARK) if flow.marked else None,
    )


def pinned_address(policy: xfrm.Policy) -> IpAddress | None:
    """Return whom the policy sends to under the SPI that it is pinned to; None for one that is not pinned."""
    if policy.direction is not xfrm.Direction.OUT or not policy.templates:
        return None
    return policy.selector.destination.network_address


def pinned(policy: xfrm.Policy, spi: int) -> xfrm.Policy:
    """Return the policy pinned to an SPI: what matches it leaves under the SA of that SPI, or not at all."""
    return replace(policy, templates=tuple(replace(template, spi=spi) for template in policy.templates))


def overrides(
    foreign: Iterable[xfrm.Policy],
    wanted: Mapping[xfrm.PolicyIdentity, xfrm.Policy],
    occupied: AbstractSet[xfrm.PolicyIdentity],
) -> tuple[str, ...]:
    """Name foreign policies that defeat srd's: they come before one that protects, or stand in the place of one.

    The kernel takes the lower priority, and keeps one policy for each selector, direction and mark.
    """
    protecting = [policy for policy in wanted.values() if policy.templates or policy.action is xfrm.Action.BLOCK]
    return tuple(
        sorted(
            str(other)
            for other in foreign
            if other.identity in occupied
            or any(
                other.direction is mine.direction
                and other.priority <= mine.priority
                and _overlap(other.selector, mine.selector)
                for mine in protecting
            )
        )
    )


def _overlap(one: xfrm.Selector, two: xfrm.Selector) -> bool:
    """Whether some packet matches both selectors."""
    return (
        one.source.version == two.source.version
        and one.source.overlaps(two.source)
        and one.destination.overlaps(two.destination)
        and (not one.protocol or not two.protocol or one.protocol == two.protocol)
        and _ports_meet(one.source_port, one.source_port_mask, two.source_port, two.source_port_mask)
        and _ports_meet(
            one.destination_port, one.destination_port_mask, two.destination_port, two.destination_port_mask
        )
    )


def _ports_meet(port: int, mask: int, other: int, other_mask: int) -> bool:
    return (port ^ other) & mask & other_mask == 0
