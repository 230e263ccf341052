"""The clients of a walk, and what asks every node whether it is primary: one process, which writes the history.

    python -m chaos.clients FILE CONFIRMATIONS NODE...

Prints `writing` once all runs, ends when its standard input says `end` or ends, reads every list once more, and prints
what it did as one JSON object. It runs in the lab's root namespace as root and opens each socket where it belongs: the
clients' on the station `client`, at the stunnel there, so that all they say goes through TLS and haproxy; those of the
client of Sentinel on a node, as only the mesh reaches sentinels and redis themselves; those for `/primary` and the
agent-check on the node that is asked, so that a cut or a slow wire delays no answer.
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from chaos.history import NO, SILENT, YES, Answers, Append, Outcome, Question, Read, Record, write
from support.stations import Streams, connect

PASSWORD: Final = Path("/run/lab/redis_password")
STUNNEL: Final = ("127.0.0.1", 6379)
SENTINEL_PORT, MASTER = 26379, "master"
HTTP: Final = ("127.0.0.1", 8080)
AGENT: Final = ("127.0.0.1", 8081)
# What haproxy asks, whose answer is the status alone.
OPTIONS: Final = b"OPTIONS /primary HTTP/1.1\r\nHost: localhost\r\n\r\n"
# For an answer. The lab's nodes share one CPU: what is late there is not lost.
ANSWER_SECONDS: Final = 3.0
CONFIRM_MILLISECONDS: Final = 5000
SENTINEL_SECONDS: Final = 1.0
STATUS_SECONDS: Final = 2.0
SAMPLE_SECONDS: Final = 0.02
# Whoever asks the agent sooner is taken for one that knows its last answer, and waits for another (srd/web/agent.py).
AGENT_SECONDS: Final = 0.12
WRITE_SECONDS: Final = 0.1
READ_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 60.0
# A list is read as a whole, and often.
VALUES_PER_KEY: Final = 200
PLAIN, CONFIRMED, READERS = 2, 2, 2

Reply = int | str | None | list["Reply"]
# How a connection is opened, given a station and an address there.
Reach = Callable[[str, tuple[str, int]], Awaitable[Streams]]


class RefusedError(Exception):
    """Redis answered, with an error: it has not done what it was asked."""


class Redis:
    """One connection at a time to whatever the balancer leads to, opened anew after every error."""

    def __init__(self, password: str, reach: Reach = connect) -> None:
        self._password = password
        self._reach = reach
        self._streams: Streams | None = None

    async def ready(self) -> None:
        """Be connected; `OSError`, `EOFError` or `RefusedError` where that cannot be: nothing has been asked then."""
        if self._streams is not None:
            return
        async with asyncio.timeout(ANSWER_SECONDS):
            self._streams = await self._reach("client", STUNNEL)
        await self.ask("AUTH", self._password)

    async def ask(self, *words: str, seconds: float = ANSWER_SECONDS) -> Reply:
        """Return the answer; `RefusedError`, or `OSError` and `EOFError` where nobody knows what came of it."""
        try:
            if self._streams is None:
                raise ConnectionError("not connected")
            reader, writer = self._streams
            parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
            writer.write(f"*{len(words)}\r\n{parts}".encode())
            async with asyncio.timeout(seconds):
                return await _reply(reader)
        except (OSError, EOFError, RefusedError):
            # After an error the balancer may have a better node.
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _reply(reader: asyncio.StreamReader) -> Reply:
    line = (await reader.readuntil(b"\r\n"))[:-2].decode()
    kind, text = line[:1], line[1:]
    if kind == "-":
        raise RefusedError(text)
    if kind == "$":
        return (await reader.readexactly(int(text) + 2))[:-2].decode() if int(text) >= 0 else None
    if kind == "*":
        return [await _reply(reader) for _ in range(int(text))]
    return int(text) if kind == ":" else text


class BySentinel:
    """A way to the redis that a sentinel names, the first one to answer, from a node of the mesh."""

    def __init__(self, station: str, sentinels: list[tuple[str, int]], password: str) -> None:
        self._station = station
        self._sentinels = sentinels
        self._password = password

    async def __call__(self, _station: str, _address: tuple[str, int]) -> Streams:
        """Return the connection; `OSError` where no sentinel answers, or what it names does not."""
        for address in self._sentinels:
            with contextlib.suppress(OSError, EOFError, RefusedError):
                async with asyncio.timeout(SENTINEL_SECONDS):
                    named = await self._ask(address)
                if isinstance(named, list):
                    host, port = map(str, named)
                    return await connect(self._station, (host, int(port)))
        raise ConnectionError("no sentinel names a primary that can be reached")

    async def _ask(self, address: tuple[str, int]) -> Reply:
        sentinel = Redis(self._password, lambda *_: connect(self._station, address))
        try:
            await sentinel.ready()
            return await sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        finally:
            sentinel.close()


class Clients:
    """All of them; `end` is set when they are to stop. One goes `by_sentinel`, where that is given.

    No key that begins with `prefix` may have been written before: whatever a list holds is theirs.
    """

    def __init__(
        self,
        file: TextIO,
        password: str,
        confirmations: int,
        reach: Reach = connect,
        *,
        by_sentinel: Reach | None = None,
        prefix: str = "chaos",
    ) -> None:
        self._file = file
        self._password = password
        self._reach = reach
        self._by_sentinel = by_sentinel
        self._confirmations = confirmations
        self._prefix = prefix
        self._keys: dict[str, list[str]] = {}  # by writer
        self.counts: Counter[str] = Counter()
        self.end = asyncio.Event()

    async def run(self, nodes: list[str]) -> None:
        """Write, read and ask until the end."""
        async with asyncio.TaskGroup() as group:
            for number in range(PLAIN):
                group.create_task(self._write(f"plain-{number}", 0, self._reach))
            for number in range(CONFIRMED):
                group.create_task(self._write(f"confirmed-{number}", self._confirmations, self._reach))
            if self._by_sentinel is not None:
                group.create_task(self._write("sentinel-0", 0, self._by_sentinel))
            for number in range(READERS):
                group.create_task(self._read(f"reader-{number}"))
            for node in nodes:
                for way in WAYS:
                    group.create_task(self._watch(node, way))

    async def _write(self, client: str, confirmations: int, reach: Reach) -> None:
        redis = Redis(self._password, reach)
        keys = self._keys.setdefault(client, [])
        async for number in paced(WRITE_SECONDS, self.end.is_set):
            if number % VALUES_PER_KEY == 0:
                keys.append(f"{self._prefix}:{client}:{number // VALUES_PER_KEY}")
            self._record(await self.append(redis, client, keys[-1], str(number), confirmations))
        redis.close()

    async def append(self, redis: Redis, client: str, key: str, value: str, confirmations: int) -> Append:
        """Append a value and, with `confirmations`, have so many replicas confirm it; return what came of it."""
        outcome, confirmed, error = Outcome.FAIL, False, ""
        invoked = time.monotonic()
        completed = None
        try:
            await redis.ready()
            invoked, outcome = time.monotonic(), Outcome.UNKNOWN
            await redis.ask("RPUSH", key, value)
            completed, outcome = time.monotonic(), Outcome.OK
            if confirmations:
                seconds = ANSWER_SECONDS + CONFIRM_MILLISECONDS / 1000
                replicas = await redis.ask("WAIT", str(confirmations), str(CONFIRM_MILLISECONDS), seconds=seconds)
                confirmed = isinstance(replicas, int) and replicas >= confirmations
        except RefusedError as refusal:
            outcome = outcome if outcome is Outcome.OK else Outcome.FAIL
            error = str(refusal)
        except (OSError, EOFError) as failure:
            error = str(failure) or type(failure).__name__
        return Append(client, key, value, invoked, completed or time.monotonic(), outcome, confirmed, error)

    async def _read(self, client: str) -> None:
        redis, rng = Redis(self._password, self._reach), random.Random(client)
        async for _ in paced(READ_SECONDS, self.end.is_set):
            written = [keys for keys in self._keys.values() if keys]
            if written:
                keys = rng.choice(written)
                # Mostly the list that grows, now and then one that should change no more.
                await self._read_list(redis, client, keys[-1] if rng.random() < 0.8 else rng.choice(keys))
        redis.close()

    async def _read_list(self, redis: Redis, client: str, key: str) -> bool:
        outcome, error = Outcome.FAIL, ""
        values: tuple[str, ...] = ()
        invoked = time.monotonic()
        try:
            await redis.ready()
            invoked = time.monotonic()
            found = await redis.ask("LRANGE", key, "0", "-1")
            values = tuple(map(str, found)) if isinstance(found, list) else ()
            outcome = Outcome.OK
        except (OSError, EOFError, RefusedError) as failure:
            error = str(failure) or type(failure).__name__
        self._record(Read(client, key, invoked, time.monotonic(), outcome, values, error))
        return outcome is Outcome.OK

    async def read_all(self) -> None:
        """Read every list once; the balancer may have to find a primary first."""
        redis = Redis(self._password, self._reach)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for key in (key for keys in self._keys.values() for key in keys):
            async for _ in paced(WRITE_SECONDS, lambda: time.monotonic() > deadline):
                if await self._read_list(redis, "last", key):
                    break
        redis.close()

    async def _watch(self, node: str, way: _Way) -> None:
        """Ask a node for ever whether it is primary, and record the runs of equal answers."""
        streams: Streams | None = None
        run: Answers | None = None
        async for _ in paced(way.seconds, self.end.is_set):
            asked = time.monotonic()
            try:
                async with asyncio.timeout(STATUS_SECONDS):
                    streams = streams or await self._reach(node, way.address)
                    status = await way.ask(*streams)
            except (OSError, EOFError):
                status = SILENT
            answered = time.monotonic()
            if streams is not None and (status == SILENT or not way.stays):
                streams[1].close()
                streams = None
            longer = run.extended(status, asked, answered) if run else None
            if run is not None and longer is None:
                self._record(run)
            run = longer or Answers(node, status, asked, answered, asked, answered, question=way.question)
        if run is not None:
            self._record(run)
        if streams is not None:
            streams[1].close()

    def _record(self, record: Record) -> None:
        self.counts[type(record).__name__.lower()] += 1
        write(self._file, record)


async def paced(seconds: float, over: Callable[[], bool]) -> AsyncIterator[int]:
    """Yield 0, 1, 2, ... until it is over, this long apart or as soon as the last one is done with."""
    number = 0
    while not over():
        due = time.monotonic() + seconds
        yield number
        number += 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Ask over a connection that stays open; return the status of the answer."""
    writer.write(OPTIONS)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((line for line in head.lower().split("\r\n") if line.startswith("content-length:")), "0")
    await reader.readexactly(int(length.rpartition(":")[2]))
    return int(head.split(" ", 2)[1])


async def _word(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Ask as haproxy's agent-check does; return what the word means for the server."""
    writer.write(b"primary\n")
    return YES if (await reader.readuntil(b"\n")).split()[0] == b"up" else NO


@dataclass(frozen=True, slots=True)
class _Way:
    """How often a node is asked a question, where, and whether the connection is asked again."""

    question: Question
    address: tuple[str, int]
    seconds: float
    ask: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[int]]
    stays: bool


WAYS: Final = (
    _Way(Question.PRIMARY, HTTP, SAMPLE_SECONDS, _status, stays=True),
    _Way(Question.AGENT, AGENT, AGENT_SECONDS, _word, stays=False),
)


async def run(clients: Clients, nodes: list[str]) -> None:
    """Run until standard input ends or says `end`; then read every list once more."""
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(nodes))
        print("writing", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        clients.end.set()
    await clients.read_all()


def main(file: str, confirmations: str, *nodes: str) -> None:
    """Run the clients, and say what they did."""
    secrets = tomllib.loads(Path(f"/var/lab/bundles/{nodes[-1]}/secrets.toml").read_text())
    sentinels = [(socket.gethostbyname(node), SENTINEL_PORT) for node in reversed(nodes)]
    by_sentinel = BySentinel(nodes[-1], sentinels, secrets["sentinel_password"])
    with Path(file).open("w") as history:
        # One walk after the other in one cluster: each has a directory of its own.
        walk = Path(file).parent.name
        password = PASSWORD.read_text().strip()
        clients = Clients(history, password, int(confirmations), by_sentinel=by_sentinel, prefix=walk)
        asyncio.run(run(clients, list(nodes)))
    print(json.dumps(clients.counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
