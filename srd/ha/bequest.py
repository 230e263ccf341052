"""What the srd of a primary that is gone, or has switched over, gives to its successor.

That is the rest of its lease, or where it has none any more, the assurance that it takes none (ha/custody.py).
"""

from __future__ import annotations

from collections.abc import Callable

from srd.ha.custody import Custody
from srd.ha.lease import endpoint_of
from srd.ha.losses import Losses
from srd.model import Body, RefusedError, Role, Service
from srd.state import Situation


class Bequest:
    """Gives the rest of this node's lease to one other node; `judge` has it judged again at once."""

    def __init__(
        self, *, custody: Custody, losses: Losses, situation: Callable[[], Situation], judge: Callable[[], None]
    ) -> None:
        self._custody, self._losses, self._situation, self._judge = custody, losses, situation, judge

    async def answer(self, peer: str, _: Body) -> Body:
        """Give what is left of the lease to the node whose redis is promoted; return for how many `seconds`: maybe 0.

        `assured` is for how many this node has none itself, unless it is named in a newer epoch.
        `RefusedError` says why not: this node's redis may be primary itself, or it is somebody else's.
        """
        s = self._situation()
        child, redis = s.view.children.get(Service.REDIS), s.view.redis
        runs = child is not None and child.pid is not None
        if not self._custody.is_heir(peer, s.now):
            if runs and (redis is None or redis.role is not Role.REPLICA):
                raise RefusedError("give", "the lease", f"the redis of {s.node.name} may be primary itself")
            named = s.view.named
            if named not in (None, endpoint_of(s.config, s.node), endpoint_of(s.config, s.config.node(peer))):
                raise RefusedError("give", "the lease", f"the sentinels name {named}")
        if self._custody.give(peer, s.now) > 0:
            self._losses.given()
        elif not self._assure(peer, s):
            raise RefusedError("give", "the lease", f"{s.node.name} has none, and cannot say that nobody has one")
        self._judge()
        return self._custody.tell(s.now)

    def _assure(self, peer: str, s: Situation) -> bool:
        """Give the assurance, where nobody named before this node can have a lease still either."""
        lease = s.view.lease
        if lease is None or lease.primary != endpoint_of(s.config, s.node) or not lease.settled:
            return False
        return self._custody.assure(peer, s.now, lease.epoch)
