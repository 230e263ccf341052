"""What is done before the primary is moved on purpose, while it goes on serving: whom it is moved to is made ready."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from srd.cluster import PREFERRED_PRIORITY, Node
from srd.ha.fleet import Fleet, on_all
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.sentinel import SentinelClient
from srd.model import SrdError
from srd.state import Situation

STEP_SECONDS: Final = 1.0
# A sentinel sees a priority by its next INFO, once a second.
PREFERENCE_SECONDS: Final = 3.0
ATTACHING_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 0.05


async def prefer(fleet: Fleet, node: Node, successor: Node) -> list[SentinelClient]:
    """Prefer the successor; return the sentinels that know, that of `node` first. Others would choose anybody."""
    await fleet.redises[successor.name].keep_priority(PREFERRED_PRIORITY, STEP_SECONDS)
    endpoint = endpoint_of(fleet.config, successor)
    try:
        async with asyncio.timeout(PREFERENCE_SECONDS):
            while True:
                seen = await on_all(fleet.sentinels, lambda one: one.priorities(STEP_SECONDS))
                ready = [name for name, shown in seen.items() if shown.get(endpoint) == PREFERRED_PRIORITY]
                if len(ready) >= fleet.config.majority:
                    ready.sort(key=lambda name: name != node.name)
                    return [fleet.sentinels[name] for name in ready]
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        reason = f"the sentinels do not see its priority within {PREFERENCE_SECONDS:g} s; nothing was changed"
        raise SrdError("switch over to", successor.name, reason) from None


async def prefer_no_more(fleet: Fleet, successor: Node) -> None:
    """Take the preference back; a redis that was started again meanwhile says of itself what it should."""
    redis = fleet.redises[successor.name]
    if (await redis.observe(STEP_SECONDS)).priority == PREFERRED_PRIORITY:
        await redis.keep_priority(successor.priority, STEP_SECONDS)


async def attach(fleet: Fleet, s: Situation, successor: Node) -> None:
    """Have replicas follow the successor that the primary can do without; return when they are in step, or soon.

    The primary is that of the situation's own node.
    """
    config, redis = s.config, s.view.redis
    others = [name for name in fleet.redises if name not in (s.node.name, successor.name)]
    attached = {r.endpoint for r in redis.replicas if r.state == "online"} if redis is not None else set()
    in_step = [name for name in others if endpoint_of(config, config.node(name)) in attached]
    spared = in_step[: max(0, len(attached) - max(1, config.min_replicas_to_write))]
    clients = {name: fleet.redises[name] for name in spared}
    moved = await on_all(clients, lambda one: one.follow(endpoint_of(config, successor), STEP_SECONDS))
    new = fleet.redises[successor.name]
    with contextlib.suppress(TimeoutError, RespError):
        async with asyncio.timeout(ATTACHING_SECONDS):
            while not await _online(new, len(moved)):  # noqa: ASYNC110 - redis announces no replica
                await asyncio.sleep(LOOK_SECONDS)


async def _online(redis: RedisClient, replicas: int) -> bool:
    return (await redis.observe(STEP_SECONDS)).online >= replicas
