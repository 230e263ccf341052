"""Connections for acting on the cluster's redises and sentinels, apart from those by which they are watched.

Whoever acts must not queue behind a question that hangs, and nobody who is watched waits for an action.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar

import structlog

from srd.cluster import Config, Node
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.sentinel import SentinelClient
from srd.model import Role, Secrets
from srd.state import View

T = TypeVar("T")
C = TypeVar("C", RedisClient, SentinelClient)

log = structlog.get_logger(__name__)


class Fleet:
    """A client for every node's redis, and one for every voter's sentinel; `redises` and `sentinels` are by node."""

    def __init__(self, config: Config, secrets: Secrets) -> None:
        self._secrets = secrets
        self.config = config
        self.redises: dict[str, RedisClient] = {}
        self.sentinels: dict[str, SentinelClient] = {}
        self._former: list[RedisClient | SentinelClient] = []
        self._fill(config)

    def _fill(self, config: Config) -> None:
        self.redises = {node.name: RedisClient(endpoint_of(config, node), self._secrets) for node in config.redis_nodes}
        self.sentinels = {node.name: SentinelClient(config, node, self._secrets) for node in config.voters}

    async def adopt(self, config: Config) -> None:
        """Act on the nodes of a changed file from now on. What is under way ends by the connections that it has."""
        former, self.config = self.config, config
        if former.voters != config.voters:
            retired, self._former = self._former, [*self.redises.values(), *self.sentinels.values()]
            self._fill(config)
            for client in retired:
                await client.close()

    async def reach(self, seconds: float) -> None:
        """Be in touch with every redis, so that what it is told next costs one round trip."""
        await on_all(self.redises, lambda redis: redis.role(seconds))

    async def have_follow(self, node: Node, seconds: float, among: Collection[str] | None = None) -> list[str]:
        """Have the redis of every other node that is a replica follow this node's; return who has heard that.

        `among` are those nodes that are told, if not all.
        """
        primary = endpoint_of(self.config, node)

        async def follow(redis: RedisClient) -> None:
            if await redis.role(seconds) is Role.REPLICA:
                await redis.follow(primary, seconds)

        others = {name: client for name, client in self._others(node).items() if among is None or name in among}
        return sorted(await on_all(others, follow))

    def _others(self, node: Node) -> dict[str, RedisClient]:
        return {name: client for name, client in self.redises.items() if name != node.name}

    async def close(self) -> None:
        """Close every connection; each is opened again when it is needed."""
        for client in (*self._former, *self.redises.values(), *self.sentinels.values()):
            await client.close()
        self._former.clear()


def answering(clients: Mapping[str, C], view: View) -> dict[str, C]:
    """Return the clients but for those of nodes whose sentinel is known to be silent: each would cost a whole step."""
    return {name: client for name, client in clients.items() if name not in view.silent}


async def on_all(clients: Mapping[str, C], action: Callable[[C], Awaitable[T]]) -> dict[str, T]:
    """Do the same with all at once; return what those answered that answered. Each action has a bound of its own."""

    async def on(name: str, client: C) -> tuple[str, T] | None:
        try:
            return name, await action(client)
        except RespError as error:
            log.debug("not done", error=str(error))
            return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(on(name, client)) for name, client in clients.items()]
    return dict(done for task in tasks if (done := task.result()) is not None)
