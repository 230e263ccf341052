"""What srd left in the kernel, and its removal: the one way by which protection goes while a machine is up."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from srd.ipsec import xfrm
from srd.ipsec.policies import owns_index, owns_reqid


@dataclass(frozen=True, slots=True)
class Owned:
    """The objects in the kernel that bear srd's mark, whichever srd installed them."""

    policies: tuple[xfrm.Policy, ...]
    sas: tuple[xfrm.SaInfo, ...]


async def owned(socket: xfrm.XfrmSocket) -> Owned:
    """Return all that is srd's in this network namespace."""
    return Owned(
        policies=tuple(info.policy for info in await socket.policies() if owns_index(info.policy.index)),
        sas=tuple(sa for sa in await socket.sas() if owns_reqid(sa.reqid)),
    )


async def teardown(socket: xfrm.XfrmSocket) -> Owned:
    """Remove all that is srd's, and return what that was.

    The SAs first, then the policies from the one that wins least, those that block last: if it breaks off in between,
    what is still covered is dropped, and nobody reaches the ports of redis and sentinel in plaintext before the end.
    """
    found = await owned(socket)
    for sa in found.sas:
        with contextlib.suppress(xfrm.MissingError):  # it has expired meanwhile
            await socket.delete_sa(sa.destination, sa.spi)
    for policy in sorted(found.policies, key=lambda policy: (policy.action is xfrm.Action.BLOCK, -policy.priority)):
        with contextlib.suppress(xfrm.MissingError):
            await socket.delete_policy(policy)
    return found


def protected_ports(found: Owned) -> frozenset[int]:
    """Return the TCP ports that the policies keep from everybody outside the mesh: those of redis and sentinel."""
    blocking = [policy for policy in found.policies if policy.action is xfrm.Action.BLOCK]
    return frozenset(p.selector.destination_port for p in blocking if p.direction is xfrm.Direction.IN) - {0}
