"""What srd left in the kernel, and its removal: the one way by which protection goes while a machine is up."""

from __future__ import annotations

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

    The SAs first, then the policies from the one that wins least: if it breaks off in between, what is still
    covered is dropped, the ports of redis and sentinel to the last.
    """
    found = await owned(socket)
    for sa in found.sas:
        await socket.delete_sa(sa.destination, sa.spi)
    for policy in sorted(found.policies, key=lambda policy: -policy.priority):
        await socket.delete_policy(policy)
    return found
