"""What srd asks of a redis and of a sentinel, and what the answers mean. Every question only reads; `keep_*` set.

Sentinel's answer is made of three commands of one pipeline, GET-MASTER-ADDR-BY-NAME last. The leader of a failover
names the promoted replica there from +promoted-slave on (sentinel.c, sentinelGetCurrentMasterAddress), but goes on
showing the old primary in SENTINEL MASTER until its +switch-master, 1.0 s later by measurement. Where the two differ,
the flags are those of the primary that is being replaced, so they are not taken for flags of the one that is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final

from srd.cluster import Config, Node
from srd.ha.resp import ANSWER_SECONDS, Credentials, Fields, RespError, UnexpectedReplyError, Wire, alive, checked
from srd.model import Endpoint, Role, Secrets
from srd.reconcile import backoff_seconds, boottime
from srd.state import Redis, ReplicaOf, SentinelAnswer

# A lost subscription delays nothing but wake-ups, so it may be sought often.
RESUBSCRIBE_CAP_SECONDS: Final = 1.0
SUBSCRIBED: Final = "subscribed"
PROMOTED: Final = "promoted"

REDIS_USER: Final = "srd"
# requirepass in sentinel.conf is the password of its user `default`.
SENTINEL_USER: Final = "default"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a node's sentinel announced, as `+switch-master`; `subscribed` is this client's own word."""

    node: str
    name: str
    payload: str


class RedisClient:
    """Asks one redis, as the user `srd`."""

    _QUESTIONS: Final = (
        ("INFO", "server"),
        ("INFO", "replication"),
        ("INFO", "persistence"),
        ("INFO", "keyspace"),
        ("CONFIG", "GET", "min-replicas-to-write"),
        ("CONFIG", "GET", "save"),
    )

    def __init__(self, endpoint: Endpoint, secrets: Secrets, *, clock: Callable[[], float] = boottime) -> None:
        self._wire = Wire("redis", endpoint, Credentials(REDIS_USER, secrets.srd_password))
        self._clock = clock

    async def observe(self, seconds: float = ANSWER_SECONDS) -> Redis:
        """Return what it says of itself, also while it loads. `ping_seconds` is the time until the whole answer."""
        asked = self._clock()
        replies = await self._wire.ask(*self._QUESTIONS, seconds=seconds)
        took = self._clock() - asked
        subject = self._wire.subject
        info = Fields.of_info(subject, replies[:4])
        settings = [Fields.of_list(subject, reply) for reply in replies[4:]]
        return _redis(info, *settings, asked=asked, took=took)

    async def keep_fence(self, replicas: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it refuse writes while fewer replicas than this are in touch."""
        (reply,) = await self._wire.ask(("CONFIG", "SET", "min-replicas-to-write", str(replicas)), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def ping(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return when it serves; `LoadingError` while it loads. A replica does so without its primary, too."""
        (reply,) = await self._wire.ask(("PING",), seconds=seconds)
        alive(self._wire.subject, reply)

    async def close(self) -> None:
        """Close the connection."""
        await self._wire.close()


def _redis(info: Fields, min_replicas: Fields, save: Fields, *, asked: float, took: float) -> Redis:
    replica = info.get("role", {"master": False, "slave": True}.__getitem__)
    # Valkey answers redis_version 7.2.4 for ever and says its own version apart.
    version = info.get("valkey_version", "valkey {}".format) if "valkey_version" in info else ""
    return Redis(
        answered=asked,
        version=version or info.get("redis_version", str),
        run_id=info.get("run_id", str),
        role=Role.REPLICA if replica else Role.PRIMARY,
        loading=info.get("loading", _flag),
        replid=info.get("master_replid", str),
        offset=info.get("slave_repl_offset" if replica else "master_repl_offset", int),
        uptime_seconds=info.get("uptime_in_seconds", int),
        dbsize=sum(database.get("keys", int) for database in info.lines("db")),
        min_replicas_to_write=min_replicas.get("min-replicas-to-write", int),
        persistence=info.get("aof_enabled", _flag) or bool(save.get("save", str)),
        primary=info.endpoint("master_host", "master_port") if replica else None,
        link_up=replica and info.get("master_link_status", {"up": True, "down": False}.__getitem__),
        sync_in_progress=replica and info.get("master_sync_in_progress", _flag),
        replicas=tuple(_replica(line) for line in info.lines("slave")),
        ping_seconds=took,
        unsaved=_unsaved(info),
    )


def _unsaved(info: Fields) -> str | None:
    """Return which file redis could not write; until it can, it refuses writes of clients (MISCONF)."""
    files = {"aof_last_write_status": "append-only file", "rdb_last_bgsave_status": "snapshot (RDB)"}
    # A kernel without memory for the copy, or a disk that is full, shows in either.
    failed = (what for name, what in files.items() if name in info and info.get(name, str) != "ok")
    return next(failed, None)


def _replica(line: Fields) -> ReplicaOf:
    return ReplicaOf(
        endpoint=line.endpoint("ip", "port"),
        state=line.get("state", str),
        offset=line.get("offset", int),
        lag_seconds=line.get("lag", int),
    )


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


# Milliseconds; sentinel.c has 10,000, 2,000 and 1,000. A sentinel learns of replicas by INFO only: at its own pace, a
# primary that dies in the first ten seconds of its replicas has nobody that could take over. It demotes a returned
# primary after four publish periods. The ping period stays: it also scales who may be promoted.
PACE: Final = {"info-period": 1000, "publish-period": 500, "ask-period": 200}


class SentinelClient:
    """Asks one node's sentinel."""

    def __init__(self, config: Config, node: Node, secrets: Secrets, *, clock: Callable[[], float] = boottime) -> None:
        self.node = node.name
        self._endpoint = Endpoint(node.address, config.sentinel.port)
        self._credentials = Credentials(SENTINEL_USER, secrets.sentinel_password)
        self._wire = self._new_wire()
        self._master = config.sentinel.master
        self._clock = clock

    def _new_wire(self) -> Wire:
        return Wire("sentinel", self._endpoint, self._credentials)

    async def ask(self, seconds: float = ANSWER_SECONDS) -> SentinelAnswer:
        """Return whom it names and what it knows; `primary` is None when it has never heard of the cluster."""
        asked = self._clock()
        shown, about, named = await self._wire.ask(
            ("SENTINEL", "MASTER", self._master),
            ("INFO", "sentinel"),
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._master),
            seconds=seconds,
        )
        subject = self._wire.subject
        tilt = Fields.of_info(subject, [about]).get("sentinel_tilt", _flag)
        if named is None:
            return SentinelAnswer(self.node, asked, None, 0, tilt, 0, 0)
        host, port = checked(subject, named, list)
        primary = Fields(subject, {"host": host, "port": port}).endpoint("host", "port")
        master = Fields.of_list(subject, shown)
        flags = master.get("flags", lambda text: frozenset(text.split(",")))
        return SentinelAnswer(
            node=self.node,
            asked=asked,
            primary=primary,
            epoch=master.get("config-epoch", int),
            tilt=tilt,
            known_sentinels=master.get("num-other-sentinels", int),
            known_replicas=master.get("num-slaves", int),
            quorum=master.get("quorum", int),
            flags=flags if master.endpoint("ip", "port") == primary else frozenset({PROMOTED}),
        )

    async def keep_pace(self, seconds: float = ANSWER_SECONDS) -> None:
        """See to it that it looks and speaks as often as `PACE` says; it forgets that at each start.

        Changed only where it differs, for this one sentinel: `SENTINEL DEBUG` (redis 7.0) spreads to no other.
        """
        paced = await self.pace(seconds)
        wrong = [word for name, value in PACE.items() if paced[name] != value for word in (name, str(value))]
        if wrong:
            await self._wire.ask(("SENTINEL", "DEBUG", *wrong), seconds=seconds)

    async def pace(self, seconds: float = ANSWER_SECONDS) -> dict[str, int]:
        """Return how often it looks and speaks now, in the terms of `PACE`."""
        (listed,) = await self._wire.ask(("SENTINEL", "DEBUG"), seconds=seconds)
        shown = Fields.of_list(self._wire.subject, listed)
        return {name: shown.get(name, int) for name in PACE}

    async def keep_quorum(self, quorum: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it take so many sentinels for enough to call the primary down."""
        (reply,) = await self._wire.ask(("SENTINEL", "SET", self._master, "quorum", str(quorum)), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def known(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return when it answers and knows the cluster's primary."""
        answer = await self.ask(seconds)
        if answer.primary is None:
            raise UnexpectedReplyError("use", self._wire.subject, f"it knows no primary named {self._master!r}")

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield its events for ever, over a connection of its own that is opened again whenever it is lost.

        `subscribed` comes first and after each loss: what was announced meanwhile was missed, so look at everything.
        """
        failures = 0
        while True:
            with contextlib.suppress(RespError):
                async with contextlib.aclosing(self._new_wire().subscribe("*")) as messages:
                    async for channel, payload in messages:
                        failures = 0
                        yield Event(self.node, channel or SUBSCRIBED, payload)
            failures += 1
            pause = backoff_seconds(failures, random.uniform(-1, 1))  # noqa: S311 - jitter
            await asyncio.sleep(min(pause, RESUBSCRIBE_CAP_SECONDS))

    async def close(self) -> None:
        """Close the connection for questions."""
        await self._wire.close()
