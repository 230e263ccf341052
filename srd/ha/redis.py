"""What srd asks of a redis and tells it, and what the answers mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from srd.cluster import LOCALHOST
from srd.ha.resp import ANSWER_SECONDS, Credentials, Fields, RespError, UnexpectedReplyError, Wire, alive, checked, flag
from srd.model import Endpoint, Role, Secrets
from srd.reconcile import boottime
from srd.state import Redis, ReplicaOf

REDIS_USER: Final = "srd"
APPLICATION_USER: Final = "default"

# More replicas than any cluster has, so that redis refuses every write (-NOREPLICAS) from the next command on, 0.08 ms
# measured, and goes on refusing when srd dies: it fails closed. CLIENT PAUSE would fail open: it ends by itself, and
# what queued meanwhile is then written.
FENCED: Final = 100
# What redis keeps as append-only directory, as `unsaved` names it.
LOG_FILE: Final = "append-only file"
# Nobody listens on port 1 of the loopback (tcpmux, RFC 1078): refused at once, and tried again once a second.
NOBODY: Final = Endpoint(LOCALHOST, 1)
_ROLE: Final = ("ROLE",)
_RESUME: Final = ("CLIENT", "UNPAUSE")
_SHUT: Final = ("CONFIG", "SET", "min-replicas-to-write", str(FENCED))
# Those of applications, which are all of this user (supervise/render.py), subscribers too. Sentinels and srds stay:
# they would all connect anew just when every client does.
_KILL_CLIENTS: Final = ("CLIENT", "KILL", "USER", APPLICATION_USER)


class RedisClient:
    """Asks one redis, as the user `srd`."""

    _QUESTIONS: Final = (
        ("INFO", "server"),
        ("INFO", "replication"),
        ("INFO", "persistence"),
        ("INFO", "keyspace"),
        ("CONFIG", "GET", "min-replicas-to-write"),
        ("CONFIG", "GET", "save"),
        ("CONFIG", "GET", "replica-priority"),
    )

    def __init__(self, endpoint: Endpoint, secrets: Secrets, *, clock: Callable[[], float] = boottime) -> None:
        self._wire = Wire("redis", endpoint, Credentials(REDIS_USER, secrets.srd_password))
        self._clock = clock

    async def observe(self, seconds: float = ANSWER_SECONDS) -> Redis:
        """Return what it says of itself, also while it loads. `ping_seconds` is the time until the whole answer."""
        return await self._observe_after((), seconds)

    async def _observe_after(self, commands: Sequence[tuple[str, ...]], seconds: float) -> Redis:
        asked = self._clock()
        replies = await self._wire.ask(*commands, *self._QUESTIONS, seconds=seconds)
        took = self._clock() - asked
        subject = self._wire.subject
        for _ in commands:
            checked(subject, replies.pop(0), object)
        info = Fields.of_info(subject, replies[:4])
        settings = [Fields.of_list(subject, reply) for reply in replies[4:]]
        return _redis(info, settings, asked=asked, took=took)

    async def keep_fence(self, replicas: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it refuse writes while fewer replicas than this are in touch."""
        await self._do(("CONFIG", "SET", "min-replicas-to-write", str(replicas)), seconds=seconds)

    async def shut(self, seconds: float = ANSWER_SECONDS) -> None:
        """Have it refuse every write from now on, and end its clients' connections; reads go on."""
        await self._do(_SHUT, _KILL_CLIENTS, seconds=seconds)

    async def follow(self, primary: Endpoint, seconds: float = ANSWER_SECONDS) -> None:
        """Make it a replica of another."""
        await self._do(_follow(primary), seconds=seconds)

    async def step_down(self, seconds: float = ANSWER_SECONDS) -> None:
        """Make a primary the replica of nobody: it takes no writes. It can resume its stream by whom it follows next.

        Its own replicas stay connected, and get nothing more (replication.c, replicationSetMaster).
        """
        await self._do(_follow(NOBODY), seconds=seconds)

    async def lead(self, seconds: float = ANSWER_SECONDS) -> Redis:
        """Make it a primary; return what it says of itself then. `RespError`: nobody knows, it may be one later."""
        try:
            return await self._observe_after([("REPLICAOF", "NO", "ONE")], seconds)
        except RespError:
            seen = await self.observe(seconds)  # the answer may be lost where the order was not
            if seen.role is not Role.PRIMARY:
                raise
            return seen

    async def pause_writes(self, milliseconds: int, seconds: float = ANSWER_SECONDS) -> tuple[Role, int]:
        """Have whoever writes wait, for so long at most; return its `position` from then on.

        What waits is done when that ends, unless it is ended first. Redis stops its own expiry meanwhile, so that
        replicas can catch up (CLIENT PAUSE, mode WRITE, redis 6.2).
        """
        pause = ("CLIENT", "PAUSE", str(milliseconds), "WRITE")
        paused, role = await self._wire.ask(pause, _ROLE, seconds=seconds)
        checked(self._wire.subject, paused, object)
        return self._position(role)

    async def resume(self, seconds: float = ANSWER_SECONDS) -> None:
        """End a pause."""
        await self._do(_RESUME, seconds=seconds)

    async def end_clients(self, seconds: float = ANSWER_SECONDS) -> None:
        """End its clients' connections, with them what they wait for, and then the pause in which they do."""
        await self._do(_KILL_CLIENTS, _RESUME, seconds=seconds)

    async def give_way(self, primary: Endpoint, seconds: float = ANSWER_SECONDS) -> None:
        """Make a primary that was replaced a replica of its successor; what its clients write is refused first."""
        await self._do(_SHUT, _follow(primary), _KILL_CLIENTS, seconds=seconds)

    async def keep_priority(self, priority: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it say this of itself to the sentinels: the lower, the sooner it is promoted."""
        await self._do(("CONFIG", "SET", "replica-priority", str(priority)), seconds=seconds)

    async def rewrite_log(self, seconds: float = ANSWER_SECONDS) -> None:
        """Have it write its append-only file anew, from what it holds."""
        await self._do(("BGREWRITEAOF",), seconds=seconds)

    async def role(self, seconds: float = ANSWER_SECONDS) -> Role:
        """Return what it is at this moment; cheaper than `observe`."""
        return (await self.position(seconds))[0]

    async def position(self, seconds: float = ANSWER_SECONDS) -> tuple[Role, int]:
        """Return what it is at this moment, and how many bytes of the stream it has written or read."""
        (reply,) = await self._wire.ask(_ROLE, seconds=seconds)
        return self._position(reply)

    def _position(self, reply: object) -> tuple[Role, int]:
        match checked(self._wire.subject, reply, list):
            case ["master", int(offset), *_]:
                return Role.PRIMARY, offset
            case ["slave", _, _, _, int(offset)]:
                return Role.REPLICA, offset
        raise UnexpectedReplyError("understand", self._wire.subject, f"ROLE is {reply!r}")

    async def _do(self, *commands: tuple[str, ...], seconds: float) -> None:
        for reply in await self._wire.ask(*commands, seconds=seconds):
            checked(self._wire.subject, reply, object)

    async def ping(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return when it serves; `LoadingError` while it loads. A replica does so without its primary, too."""
        (reply,) = await self._wire.ask(("PING",), seconds=seconds)
        alive(self._wire.subject, reply)

    async def close(self) -> None:
        """Close the connection."""
        await self._wire.close()


def _follow(primary: Endpoint) -> tuple[str, ...]:
    return ("REPLICAOF", str(primary.address), str(primary.port))


def _redis(info: Fields, settings: Sequence[Fields], *, asked: float, took: float) -> Redis:
    min_replicas, save, priority = settings
    replica = info.get("role", {"master": False, "slave": True}.__getitem__)
    # Valkey answers redis_version 7.2.4 for ever and says its own version apart.
    version = info.get("valkey_version", "valkey {}".format) if "valkey_version" in info else ""
    return Redis(
        answered=asked,
        version=version or info.get("redis_version", str),
        run_id=info.get("run_id", str),
        role=Role.REPLICA if replica else Role.PRIMARY,
        loading=info.get("loading", flag),
        replid=info.get("master_replid", str),
        offset=info.get("slave_repl_offset" if replica else "master_repl_offset", int),
        uptime_seconds=info.get("uptime_in_seconds", int),
        dbsize=sum(database.get("keys", int) for database in info.lines("db")),
        min_replicas_to_write=min_replicas.get("min-replicas-to-write", int),
        persistence=info.get("aof_enabled", flag) or bool(save.get("save", str)),
        primary=_followed(info) if replica else None,
        link_up=replica and info.get("master_link_status", {"up": True, "down": False}.__getitem__),
        sync_in_progress=replica and info.get("master_sync_in_progress", flag),
        replicas=tuple(_replica(line) for line in info.lines("slave")),
        ping_seconds=took,
        priority=priority.get("replica-priority", int),
        unsaved=_unsaved(info),
        rewriting=_is(info, "aof_rewrite_in_progress") or _is(info, "aof_rewrite_scheduled"),
        rewrite_scheduled=_is(info, "aof_rewrite_scheduled") and not _is(info, "aof_rewrite_in_progress"),
        rewritten="aof_last_bgrewrite_status" not in info or info.get("aof_last_bgrewrite_status", str) == "ok",
        rewrites=info.get("aof_rewrites", int) if "aof_rewrites" in info else 0,
        log_bytes=info.get("aof_current_size", int) if "aof_current_size" in info else None,
        promoted_at_offset=None if replica else _promoted_at(info.get("second_repl_offset", int)),
    )


def _followed(info: Fields) -> Endpoint | None:
    """Return whom a replica follows, None for one that has only stepped down."""
    primary = info.endpoint("master_host", "master_port")
    return None if primary == NOBODY else primary


def _promoted_at(second: int) -> int | None:
    """Return up to where a promoted redis has followed: it answers for that stream below this offset; -1 for none."""
    return second - 1 if second > 0 else None


def _is(info: Fields, name: str) -> bool:
    return name in info and info.get(name, flag)


def _unsaved(info: Fields) -> str | None:
    """Return which file redis could not write; until it can, it refuses writes of clients (MISCONF)."""
    files = {"aof_last_write_status": LOG_FILE, "rdb_last_bgsave_status": "snapshot (RDB)"}
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
