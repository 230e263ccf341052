"""Wishes to move the primary, whoever has them and wherever they are said: each is passed to the primary's srd."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

from srd.cluster import Node
from srd.ha.fleet import Fleet
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.switchover import FINISHING_SECONDS, Switched, Switchover
from srd.model import AskPeer, Body, RefusedError, Role, SrdError
from srd.reconcile import contained
from srd.state import Situation

log = structlog.get_logger(__name__)

SWITCHOVER_TOPIC: Final = "switchover"
# For all of its steps, each of which has a bound.
SWITCHOVER_SECONDS: Final = 30.0
# For a node that stops: the manager waits for it, and the others replace a primary that stops as one that has died.
LEAVING_SECONDS: Final = 10.0
# With a switchover that hangs just then.
LONGEST_LEAVE_SECONDS: Final = LEAVING_SECONDS + FINISHING_SECONDS
# Of what another srd says of who has asked it.
MOST_TOLD: Final = 100


class Moves:
    """Takes the wishes and has them done one at a time, by `run`, one of the daemon's bodies.

    `switchover` is None on a node without redis, which passes every wish on.
    """

    def __init__(
        self,
        fleet: Fleet,
        node: Node,
        *,
        switchover: Switchover | None,
        situation: Callable[[], Situation],
        ask_peer: AskPeer,
    ) -> None:
        self._fleet, self._node, self._switchover = fleet, node, switchover
        self._situation, self._ask_peer = situation, ask_peer
        self._wanted: asyncio.Queue[tuple[Switchover, str | None, str, asyncio.Future[Switched]]] = asyncio.Queue(1)

    async def switch_over(self, to: str | None, *, dry_run: bool, by: str | None = None) -> Body:
        """Move the primary to a node, or to the fittest; by the primary's srd, wherever this is asked, and by whom.

        Return `from`, `to`, and after it was done `gap_seconds`, `seconds` and whether it is `named` by the sentinels.
        `SrdError` says what speaks against it, or what went wrong.
        """
        by = by if by is not None else self._node.name
        s = self._situation()
        named = s.view.named
        primary = s.config.node_at(named.address) if named is not None else None
        if primary is None:
            raise RefusedError("switch over", "the primary", "no majority of the sentinels names one")
        if primary != self._node:
            body: Body = {"to": to, "dry_run": dry_run, "by": by}
            return await self._ask_peer(primary.name, SWITCHOVER_TOPIC, body, SWITCHOVER_SECONDS)
        if self._switchover is None:
            raise RefusedError("switch over from", self._node.name, "it runs no redis")
        if dry_run:
            return {"from": self._node.name, "to": self._switchover.choose(to).name}
        done: asyncio.Future[Switched] = asyncio.get_running_loop().create_future()
        try:
            self._wanted.put_nowait((self._switchover, to, by, done))
        except asyncio.QueueFull:
            raise RefusedError("switch over from", self._node.name, "another switchover is under way") from None
        # Whoever asks may go away, its connection may be replaced by new keys: what has begun goes on to its end.
        switched = await asyncio.shield(done)
        return {
            "from": self._node.name,
            "to": switched.successor,
            "gap_seconds": switched.gap_seconds,
            "seconds": switched.seconds,
            "named": switched.named,
        }

    async def answer(self, peer: str, body: Body) -> Body:
        """Do what was asked for of another node's srd, which has passed it on."""
        to, by = body.get("to"), body.get("by")
        return await self.switch_over(
            to if isinstance(to, str) else None,
            dry_run=body.get("dry_run") is True,
            by=by[:MOST_TOLD] if isinstance(by, str) else peer,
        )

    async def move_away(self) -> Body | None:
        """Move the primary to the fittest other node if it is here; return what `switch_over` does, None if it is not.

        `SrdError` says why it stays.
        """
        s = self._situation()
        own, redis = endpoint_of(s.config, s.node), s.view.redis
        named = s.view.named
        if named == own:
            return await self.switch_over(None, dry_run=False, by=f"{s.node.name} (srd drain)")
        if redis is not None and redis.role is Role.PRIMARY:
            reason = f"its redis is primary, and the sentinels name {named or 'no one primary'}"
            raise RefusedError("move the primary from", s.node.name, reason, "srd status says more")
        return None

    async def leave(self) -> bool:
        """Move the primary away, if it is here, because this node is about to stop; return whether it is elsewhere.

        Where it stays, the log says why.
        """
        own = self._fleet.redises.get(self._node.name)
        if self._switchover is None or own is None:
            return True
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                await self._switchover.settled()
                if await _leads(own):
                    await self._switchover.run(None, cause="srd was stopped", by=self._node.name)
        except TimeoutError:
            log.warning("stopping as the primary", why=f"a switchover took longer than {LEAVING_SECONDS:g} s")
            return False
        except SrdError as error:
            log.warning("stopping as the primary", why=str(error))
            return False
        return True

    async def run(self) -> None:
        """Do the switchovers that are asked for, one at a time; until cancelled."""
        while True:
            switchover, to, by, done = await self._wanted.get()
            defect = await contained("switchover", partial(_switch, switchover, to, by, done))
            if defect is not None:
                done.set_exception(SrdError("switch over from", self._node.name, defect))


async def _switch(switchover: Switchover, to: str | None, by: str, done: asyncio.Future[Switched]) -> None:
    cause = "srd switchover" if to is None else f"srd switchover --to {to}"
    try:
        done.set_result(await switchover.run(to, cause=cause, by=by))
    except SrdError as error:
        done.set_exception(error)


async def _leads(redis: RedisClient) -> bool:
    """Whether a redis answers that it is primary."""
    try:
        return await redis.role() is Role.PRIMARY
    except RespError:
        return False
