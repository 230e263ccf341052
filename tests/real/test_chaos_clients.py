"""tests/chaos/clients.py against a real redis and its replica: what a client claims to know of each write is so."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import clients
from chaos.checker import judge
from chaos.clients import AGENT, HTTP, Clients, Redis, Streams
from chaos.history import NO, SILENT, YES, Answers, Append, History, Outcome, Question, load
from support.nodes import eventually, free_ports

Listening = tuple[asyncio.Server, tuple[str, int]]

PASSWORD = "application"
# Some distributions keep one binary only, which looks at the name by which it was called.
PROGRAM = shutil.which("redis-server") or shutil.which("redis-check-rdb") or "redis-server"


@dataclass
class Pair:
    """A primary and its replica, and where a client finds the primary."""

    port: int
    primary: subprocess.Popen[bytes]

    async def reach(self, station: str, address: tuple[str, int]) -> Streams:
        del station, address
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, *words: str) -> clients.Reply:
        redis = Redis(PASSWORD, self.reach)
        await redis.ready()
        try:
            return await redis.ask(*words)
        finally:
            redis.close()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Pair]:
    ports = free_ports(2)
    auth = ["--requirepass", PASSWORD, "--masterauth", PASSWORD, "--save", "", "--repl-diskless-sync-delay", "0"]
    with contextlib.ExitStack() as stack:
        processes = []
        for port, role in zip(ports, ([], ["--replicaof", f"127.0.0.1 {ports[0]}"]), strict=True):
            (home := directory / str(port)).mkdir()
            command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home), *auth, *role]
            process = subprocess.Popen(command, executable=PROGRAM, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield Pair(ports[0], processes[0])


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    with running(tmp_path) as pair:

        async def linked() -> bool:
            with contextlib.suppress(OSError):
                return "state=online" in str(await pair.ask("INFO", "replication"))
            return False

        await eventually(linked, "the replica is linked")
        yield pair


async def append(pair: Pair, value: str, confirmations: int = 0, redis: Redis | None = None) -> Append:
    redis = redis or Redis(PASSWORD, pair.reach)
    try:
        return await Clients(io.StringIO(), PASSWORD, 1, pair.reach).append(redis, "c", "k", value, confirmations)
    finally:
        redis.close()


async def test_an_acknowledged_write_is_confirmed_when_a_replica_has_it(pair: Pair) -> None:
    plain, confirmed = await append(pair, "1"), await append(pair, "2", 1)
    assert (plain.outcome, plain.confirmed) == (Outcome.OK, False)
    assert (confirmed.outcome, confirmed.confirmed) == (Outcome.OK, True)
    assert plain.invoked <= plain.completed <= confirmed.invoked
    assert await pair.ask("LRANGE", "k", "0", "-1") == ["1", "2"]


async def test_a_write_that_no_replica_confirms_is_acknowledged_and_no_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CONFIRM_MILLISECONDS", 100)
    found = await append(pair, "1", 2)
    assert (found.outcome, found.confirmed) == (Outcome.OK, False)


async def test_a_write_that_redis_refuses_has_not_been_done(pair: Pair) -> None:
    await pair.ask("CONFIG", "SET", "min-replicas-to-write", "5")
    found = await append(pair, "1")
    assert found.outcome is Outcome.FAIL
    assert found.error.startswith("NOREPLICAS")
    assert await pair.ask("LLEN", "k") == 0


async def test_of_a_write_without_an_answer_nobody_knows(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ANSWER_SECONDS", 0.2)
    redis = Redis(PASSWORD, pair.reach)
    await redis.ready()
    os.kill(pair.primary.pid, signal.SIGSTOP)
    found = await append(pair, "1", redis=redis)
    assert found.outcome is Outcome.UNKNOWN
    os.kill(pair.primary.pid, signal.SIGCONT)

    async def there() -> bool:
        return await pair.ask("LRANGE", "k", "0", "-1") == ["1"]

    await eventually(there, "it was done after all")


async def test_a_write_to_nobody_has_not_been_done(pair: Pair) -> None:
    redis = Redis(PASSWORD, pair.reach)
    await redis.ready()
    pair.primary.kill()
    pair.primary.wait()
    assert (await append(pair, "1", redis=redis)).outcome is Outcome.UNKNOWN, "it was sent, or may have been"
    assert (await append(pair, "2")).outcome is Outcome.FAIL


def http(status: list[str]) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(f"HTTP/1.1 {status[-1]}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    return answer


def agent(status: list[str]) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"primary\n"
        writer.write(b"up ready\n" if status[-1].startswith("200") else b"down # wrong_role: the role is replica\n")
        writer.close()

    return answer


async def listening(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Listening:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()


async def test_all_of_them_together_write_a_history_that_is_sound(pair: Pair) -> None:
    """Beside a node that becomes primary, and one that is not there."""
    status = ["503 No"]
    (web, web_address), (checks, checks_address) = await listening(http(status)), await listening(agent(status))
    addresses = {HTTP: web_address, AGENT: checks_address}

    async def reach(station: str, address: tuple[str, int]) -> Streams:
        if address not in addresses:
            return await pair.reach(station, address)
        if station == "gone":
            raise ConnectionRefusedError
        return await asyncio.open_connection(*addresses[address])

    file = io.StringIO()
    everybody = Clients(file, PASSWORD, 1, reach)
    async with web, checks, asyncio.TaskGroup() as group:
        group.create_task(everybody.run(["here", "gone"]))

        async def seen(kind: str, count: int) -> bool:
            return everybody.counts[kind] >= count

        await eventually(lambda: seen("append", 20), "writes")
        await eventually(lambda: seen("read", 4), "reads")
        status.append("200 OK")
        await eventually(lambda: seen("answers", 2), "another answer to either question")
        everybody.end.set()
    await everybody.read_all()
    history = load(file.getvalue().splitlines())
    assert judge(history).violations() == []
    assert len({entry.client for entry in history.appends}) == clients.PLAIN + clients.CONFIRMED
    assert all(entry.outcome is Outcome.OK for entry in history.appends)
    for question in Question:
        assert statuses(history, "here", question) == [NO, YES]
        assert statuses(history, "gone", question) == [SILENT]


def statuses(history: History, node: str, question: Question) -> list[int]:
    runs: list[Answers] = [run for run in history.answers if (run.node, run.question) == (node, question)]
    return [run.status for run in sorted(runs, key=lambda run: run.first_asked)]
