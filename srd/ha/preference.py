"""Whom the sentinels are to promote, and whether they know.

They take the greatest offset by their last INFO, which may be a second old (2 of 10 choices were wrong, 2,300 to 2,500
acknowledged writes lost, where a replica's link had stalled just before). Asked now that nothing is written any more,
the replicas say who has most; if they differ, that one gets the lowest replica-priority, and the vote waits until the
sentinels have seen it.

A replica says priority 0 until it is in step. Sentinels that have not looked again since then find nobody good, and
the next attempt comes twice the failover-timeout later (4 of 5 kills 1.5 s after the first start of a cluster took
11 s). So the one that stands for election must have seen somebody who may be promoted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY, Node
from srd.ha.fleet import Fleet, answering, on_all
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.sentinel import OFTEN_MILLISECONDS, SentinelClient
from srd.ha.successor import is_heard
from srd.model import Endpoint, Role
from srd.state import Redis, Situation

log = structlog.get_logger(__name__)

# For one step at all nodes that answer; one that does not is waited for as long.
STEP_SECONDS: Final = 0.5
STEERING_SECONDS: Final = 1.5
LOOK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Look:
    """What the redises that could take over say, and which priority of each replica each sentinel knows; by node."""

    said: Mapping[str, Redis]
    shown: Mapping[str, Mapping[Endpoint, int]]


class Preference:
    """Finds out who has most, and has the sentinels know.

    `own_stream` returns the replication id that this node's redis last had.
    """

    def __init__(self, fleet: Fleet, *, situation: Callable[[], Situation], own_stream: Callable[[], str]) -> None:
        self._fleet, self._situation, self._own_stream = fleet, situation, own_stream

    async def look(self, primary: Node, prefer: str | None) -> Look:
        """Ask everybody at once; no redis where it is known who is to take over from the primary."""
        others = {} if prefer is not None else self._reachable()
        others.pop(primary.name, None)
        async with asyncio.TaskGroup() as group:
            said = group.create_task(on_all(others, lambda redis: redis.observe(STEP_SECONDS)))
            shown = group.create_task(self._shown())
        return Look(said.result(), shown.result())

    async def settle(self, primary: Node, prefer: str | None, look: Look) -> list[str]:
        """Prefer a node, or the replica that has most if they differ; return the sentinels that know whom to choose."""
        best = prefer
        if best is None:
            if look.said and not any(_may_lead(redis) for redis in look.said.values()):
                return []  # nobody is to be promoted unless it is known to have most (ha/coldstart.py)
            best = most_advanced(look.said, self._stream_of(primary))
            if best is None:
                return await self._informed(look)
            log.info("preferring", replica=best, offsets={name: redis.offset for name, redis in look.said.items()})
        endpoint = endpoint_of(self._fleet.config, self._fleet.config.node(best))
        preferred = {best: self._fleet.redises[best]}
        await on_all(preferred, lambda redis: redis.keep_priority(PREFERRED_PRIORITY, STEP_SECONDS))
        sentinels = self._sentinels()
        knowing = await self._that_know(lambda known: known.get(endpoint) == PREFERRED_PRIORITY, len(sentinels))
        return knowing if knowing or prefer is not None else list(sentinels)

    async def _shown(self) -> Mapping[str, Mapping[Endpoint, int]]:
        """Return which priority of each replica each sentinel knows."""
        return await on_all(self._sentinels(), lambda sentinel: sentinel.priorities(STEP_SECONDS))

    async def _informed(self, look: Look) -> list[str]:
        """Return the sentinels that know of a replica which may be promoted; of one that has just come in step later.

        Sentinels that are hurried before that find nobody, and try again twice the failover-timeout later.
        """
        config = self._fleet.config
        able = [endpoint_of(config, config.node(name)) for name, redis in look.said.items() if _may_lead(redis)]

        def knows(known: Mapping[Endpoint, int]) -> bool:
            return not able or any(known.get(endpoint, NEVER_PRIORITY) != NEVER_PRIORITY for endpoint in able)

        return [name for name, known in look.shown.items() if knows(known)] or await self._that_know(knows, 1)

    async def _that_know(self, knows: Callable[[Mapping[Endpoint, int]], bool], wanted: int) -> list[str]:
        """Have the sentinels look often until so many know something of the replicas, or for a while; return these."""
        knowing: list[str] = []
        sentinels = self._sentinels()
        await on_all(sentinels, lambda sentinel: sentinel.look_every(OFTEN_MILLISECONDS, STEP_SECONDS))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STEERING_SECONDS):
                while len(knowing) < wanted:
                    knowing = [name for name, known in (await self._shown()).items() if knows(known)]
                    if len(knowing) < wanted:
                        await asyncio.sleep(LOOK_SECONDS)  # sentinels announce no priority
        return knowing

    def _sentinels(self) -> dict[str, SentinelClient]:
        return answering(self._fleet.sentinels, self._situation().view)

    def _reachable(self) -> dict[str, RedisClient]:
        """Return the clients but for those of nodes of which nobody is heard.

        A sentinel that is silent beside a srd that is heard, being started again say, says nothing of the redis there,
        which may be the one that has most.
        """
        s = self._situation()
        gone = {node.name for node in s.config.voters if node.name in s.view.silent and not is_heard(s, node)}
        return {name: client for name, client in self._fleet.redises.items() if name not in gone or name == s.node.name}

    def _stream_of(self, primary: Node) -> str:
        """Return the replication id of a primary that is gone, as it was last heard; empty if it never was."""
        s = self._situation()
        if primary == s.node:
            return self._own_stream()
        report = s.view.peers.get(primary.name)
        return report.replid if report is not None and report.role is Role.PRIMARY else ""


def _may_lead(redis: Redis) -> bool:
    return redis.role is Role.REPLICA and redis.priority != NEVER_PRIORITY


def most_advanced(said: Mapping[str, Redis], stream: str = "") -> str | None:
    """Return the replica that is to be preferred: the one that has most of one history. None if all have the same.

    `stream` is the replication id of the primary that is gone, empty if it is not known. Who has another history has
    not been in step with that primary, and is not preferred; where nobody is known to have been, the sentinels choose.
    One that is never to be primary, being drained say, does not become it by having most.
    """
    replicas = {name: redis for name, redis in said.items() if _may_lead(redis) and not redis.loading}
    in_stream = {name: redis for name, redis in replicas.items() if redis.replid == stream}
    compared = in_stream or replicas
    if len({redis.replid for redis in compared.values()}) != 1:
        return None
    if len({redis.offset for redis in compared.values()}) == 1 and len(compared) == len(replicas):
        return None
    return max(sorted(compared), key=lambda name: compared[name].offset)
