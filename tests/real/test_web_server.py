"""The HTTP server on real sockets, asked as balancers, people and attackers ask."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from support.situations import primary_situation, replica_situation
from support.unmanaged import started

from srd.cluster import HttpSection, Node
from srd.model import NodeKind, SrdError
from srd.state import Situation, View
from srd.web.app import WebServer
from srd.web.guard import MAX_HEADER, MAX_HEADERS, MAX_REQUEST_LINE, Timeouts

QUICK = Timeouts(header=0.5, idle=1.0)
PATIENT = Timeouts(header=30, idle=30)
# Long enough for a slow machine, and never waited for when all is well.
PATIENCE = 30.0


def loopback(number: int) -> str:
    """Return an address of 127/8 that no other process of this suite uses."""
    return f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}.{number}"


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def here(situation: Situation, port: int, **limits: int) -> Situation:
    """Move a situation's own node to the loopback."""
    own = Node(situation.node.name, NodeKind.REDIS, (ip_address(loopback(1)),))
    nodes = (own, *situation.config.peers_of(own.name))
    http = HttpSection(port=port, **limits)
    return replace(
        situation, node=own, config=replace(situation.config, nodes=nodes, http=http, listen_localhost=False)
    )


@contextlib.asynccontextmanager
async def serving(
    situation: Situation, timeouts: Timeouts = PATIENT, **limits: int
) -> AsyncIterator[tuple[WebServer, int]]:
    port = free_port(loopback(1))
    now = here(situation, port, **limits)
    server = WebServer(lambda: now, version="0.1.0", timeouts=timeouts)
    async with started(server):
        yield server, port


async def connect(port: int, source: str | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    local = (source, 0) if source is not None else None
    return await asyncio.open_connection(loopback(1), port, local_addr=local)


async def exchange(port: int, request: bytes, source: str | None = None) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    reader, writer = await connect(port, source)
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE):
            return await reader.read()
    finally:
        writer.close()


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), {name.lower(): value for name, value in fields.items()}, body


async def ask(
    port: int, target: str, method: str = "GET", source: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    return parsed(await exchange(port, f"{method} {target} HTTP/1.0\r\n\r\n".encode(), source))


async def test_checks_answer_as_the_situation_says() -> None:
    async with serving(primary_situation()) as (_, port):
        for path, status in (
            ("/primary", 200),
            ("/", 200),
            ("/replica", 503),
            ("/health", 200),
            ("/health?role=replica", 503),
        ):
            answered, headers, body = await ask(port, path)
            document = json.loads(body)
            assert answered == status, path
            assert headers["content-length"] == str(len(body))
            assert headers["content-type"] == "application/json"
            assert headers["server"] == "srd"
            assert document["role"] == "primary"
            assert document["status"] == ("ok" if status == 200 else "unavailable")
            assert ("error_code" in document) == (status == 503)
    async with serving(replica_situation()) as (_, port):
        assert [(await ask(port, path))[0] for path in ("/primary", "/replica?lag=1MB", "/read-only")] == [
            503,
            200,
            200,
        ]
        assert (await ask(port, "/replica?lag=lots"))[0] == 400


async def test_checks_wait_until_it_is_known_what_the_node_is_and_nothing_else_does() -> None:
    port, known = free_port(loopback(1)), asyncio.Event()
    now = here(primary_situation(), port)
    async with started(WebServer(lambda: now, version="0.1.0", known=known)):
        check = asyncio.create_task(ask(port, "/primary"))
        for path in ("/liveness", "/srd", "/metrics"):
            assert (await ask(port, path))[0] == 200
        assert not check.done()
        known.set()
        async with asyncio.timeout(PATIENCE):
            assert (await check)[0] == 200


async def test_head_and_options_have_no_body() -> None:
    async with serving(primary_situation()) as (_, port):
        _, _, body = await ask(port, "/primary")
        for path, status in (("/primary", 200), ("/replica", 503), ("/nowhere", 404)):
            answered, headers, rest = await ask(port, path, "HEAD")
            assert (answered, rest) == (status, b"")
            assert int(headers["content-length"]) > 0
            answered, headers, rest = await ask(port, path, "OPTIONS")
            assert (answered, rest, headers["content-length"]) == (status, b"", "0")
            assert headers["allow"] == "GET, HEAD, OPTIONS"
        assert int((await ask(port, "/primary", "HEAD"))[1]["content-length"]) == len(body)


@pytest.mark.parametrize("version", ["HTTP/1.0\r\n", "HTTP/1.1\r\nConnection: close\r\n"])
async def test_host_is_optional(version: str) -> None:
    async with serving(primary_situation()) as (_, port):
        for host in ("", "Host: balancer.example\r\n"):
            answer = await exchange(port, f"OPTIONS /primary {version}{host}\r\n".encode())
            assert parsed(answer)[0] == 200


@pytest.mark.parametrize(
    "target", ["/healthz", "/primary/", "/primaryx", "//primary", "/PRIMARY", "/srd/../primary", "*", "/favicon.ico"]
)
async def test_paths_match_exactly(target: str) -> None:
    async with serving(primary_situation()) as (_, port):
        assert (await ask(port, target))[0] in (400, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
async def test_nothing_can_be_changed(method: str) -> None:
    async with serving(primary_situation()) as (_, port):
        status, headers, _ = parsed(
            await exchange(port, f"{method} /primary HTTP/1.0\r\nContent-Length: 9\r\n\r\nabc".encode())
        )
        assert status in (400, 405)
        if status == 405:
            assert headers["allow"] == "GET, HEAD, OPTIONS"


async def test_documents() -> None:
    async with serving(primary_situation()) as (_, port):
        node = json.loads((await ask(port, "/srd"))[2])
        assert node["srd"]["node"] == "redis-1"
        assert node["lease"]["held"]
        assert node["replication"][1] == {
            "node": "redis-3",
            "addr": "192.168.205.12:6379",
            "state": "online",
            "lag_bytes": 100,
            "lag_seconds": 1,
        }
        cluster = json.loads((await ask(port, "/cluster"))[2])
        assert [(member["name"], member["role"], member["state"]) for member in cluster["members"]] == [
            ("redis-1", "primary", "running"),
            ("redis-2", "replica", "running"),
            ("redis-3", "replica", "running"),
        ]
        history = json.loads((await ask(port, "/history"))[2])
        assert history == [
            {
                "epoch": 3,
                "at_timestamp": 1_699_999_900.0,
                "from": "192.168.205.11:6379",
                "to": "192.168.205.10:6379",
                "node": None,
                "kind": "crash",
                "before": False,
                "cause": "redis has ended: killed by SIGKILL",
                "by": ["redis-2"],
                "duration_seconds": 0.5,
                "write_gap_seconds": 0.6,
                "lost_bytes": 12,
                "lost_exactly": False,
                "known_offset": 5000,
                "known_age_seconds": 0.25,
                "taken_offset": 4988,
            }
        ]
        assert (await ask(port, "/liveness"))[0] == 200
        status, headers, text = await ask(port, "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert b'srd_primary{cluster="orders",node="redis-1"} 1.0\n' in text


async def test_it_answers_before_anything_was_started() -> None:
    bare = replace(primary_situation(), view=View(started=999.0))
    async with serving(bare) as (_, port):
        for path in ("/primary", "/replica", "/health", "/readiness"):
            status, _, body = await ask(port, path)
            assert (status, json.loads(body)["error_code"]) == (503, "starting")
        for path in ("/srd", "/cluster", "/history", "/metrics", "/liveness"):
            assert (await ask(port, path))[0] == 200


async def test_a_client_that_closed_its_half_is_answered() -> None:
    async with serving(primary_situation()) as (_, port):
        reader, writer = await connect(port)
        writer.write(b"GET /primary HTTP/1.1\r\n\r\nGET /replica HTTP/1.1\r\n\r\n")
        writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            answers = await reader.read()
        assert answers.count(b"HTTP/1.1 200 OK") == 1
        assert answers.count(b"HTTP/1.1 503 ") == 1
        writer.close()


async def test_a_thousand_silent_connections_keep_nobody_else_out() -> None:
    loop = asyncio.get_running_loop()
    async with serving(primary_situation()) as (_, port):
        with contextlib.ExitStack() as opened:
            silent = [opened.enter_context(socket.socket()) for _ in range(1000)]
            for client in silent:
                client.setblocking(False)
                client.bind((loopback(2), 0))
                await asyncio.wait_for(loop.sock_connect(client, (loopback(1), port)), PATIENCE)
            refused = []
            for client in silent:
                with contextlib.suppress(BlockingIOError):
                    refused.append(client.recv(4096))
            assert (await ask(port, "/primary", source=loopback(3)))[0] == 200
            _, _, text = await ask(port, "/metrics", source=loopback(3))
            assert b'reason="max_connections_per_address"} 936.0\n' in text
        assert len(refused) >= 936 - 256  # the rest sat in the listen queue when they were looked at
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in refused)


async def test_silent_connections_from_everywhere_are_gone_after_the_time_limit() -> None:
    async with serving(primary_situation(), Timeouts(header=2.0), max_connections=32) as (_, port):
        silent = await asyncio.gather(*(connect(port, loopback(2 + index)) for index in range(40)))
        answers = []
        for reader, writer in silent:
            async with asyncio.timeout(PATIENCE):
                answers.append(await read_until_closed(reader))
            writer.close()
        assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == 8
        assert answers.count(b"") == 32
        assert (await ask(port, "/primary"))[0] == 200


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionResetError):  # which takes nothing of what was read before
        while more := await reader.read(65536):
            said += more
    return said


async def drip(port: int, data: bytes, at_once: bytes = b"") -> bytes:
    """Send `at_once`, then one byte after the other until the server has had enough; return what it said."""
    reader, writer = await connect(port)
    writer.write(at_once)
    closed = asyncio.ensure_future(read_until_closed(reader))
    try:
        async with asyncio.timeout(PATIENCE):
            for byte in data:
                writer.write(bytes([byte]))
                done, _ = await asyncio.wait([closed], timeout=0.01)
                if done:
                    break
            return await closed
    finally:
        writer.close()


async def test_one_byte_at_a_time_does_not_hold_a_connection() -> None:
    async with serving(primary_situation(), QUICK) as (_, port):
        assert await drip(port, b"GET /primary HTTP/1.1\r\nX-Slow: " + b"a" * 10_000) == b""


async def test_a_second_request_has_its_time_limit_too() -> None:
    async with serving(primary_situation(), QUICK) as (_, port):
        said = await drip(port, b"OPTIONS /primary HTTP/1.1\r\nX: " + b"a" * 10_000, b"OPTIONS / HTTP/1.1\r\n\r\n")
        assert said.count(b"HTTP/1.1 200 OK") == 1


async def test_a_client_that_does_not_read_is_cut() -> None:
    async with serving(primary_situation(), QUICK) as (_, port):
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, (loopback(1), port))
        many = b"GET /metrics HTTP/1.1\r\n\r\n" * 1_000_000
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(loop.sock_sendall(deaf, many), PATIENCE)
        deaf.close()
        assert (await ask(port, "/primary"))[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"PING\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /primary HTTP/9.9\r\n\r\n",
        b"GET /primary HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /" + b"a" * (MAX_REQUEST_LINE + 1) + b" HTTP/1.1\r\n\r\n",
        b"GET /primary HTTP/1.1\r\nX: " + b"a" * (MAX_HEADER + 1) + b"\r\n\r\n",
        b"GET /primary HTTP/1.1\r\n" + b"X: a\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"\0" * 5000,
    ],
)
async def test_what_is_not_a_request_gets_400_and_the_door(request_: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(primary_situation()) as (_, port):
        status, headers, body = parsed(await exchange(port, request_))
        assert (status, headers["server"]) == (400, "srd")
        assert json.loads(body)["error_code"] == "bad_request"
        assert (await ask(port, "/primary"))[0] == 200
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


async def _reset(port: int) -> None:
    _, writer = await connect(port)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n" * 20)
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def _connect_and_leave(port: int) -> None:
    _, writer = await connect(port)
    writer.close()


@pytest.mark.parametrize("rude", [_reset, _connect_and_leave])
async def test_clients_that_vanish_are_not_worth_a_word(
    rude: Callable[[int], Awaitable[None]], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(primary_situation()) as (_, port):
        for _ in range(20):
            await rude(port)
        assert (await ask(port, "/primary"))[0] == 200
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert capsys.readouterr() == ("", "")


async def test_keep_alive_serves_many_requests_on_one_connection() -> None:
    async with serving(primary_situation()) as (_, port):
        reader, writer = await connect(port)
        for _ in range(100):
            writer.write(b"OPTIONS /primary HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(PATIENCE):
                head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def test_a_taken_port_is_one_sentence_and_leaves_nothing_bound() -> None:
    port = free_port(loopback(9))
    with socket.socket() as other:
        other.bind((loopback(9), port))
        other.listen()
        situation = here(primary_situation(), port)
        node = replace(situation.node, addresses=(ip_address(loopback(1)), ip_address(loopback(9))))
        server = WebServer(lambda: replace(situation, node=node), version="0.1.0")
        with pytest.raises(SrdError, match=f"cannot listen on {loopback(9)}:{port}: address already in use"):
            async with started(server):
                pass
        with socket.socket() as again:
            again.bind((loopback(1), port))


async def test_stopping_frees_the_port_and_ends_connections() -> None:
    async with serving(primary_situation()) as (_, port):
        reader, writer = await connect(port)
        writer.write(b"OPTIONS /primary HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
    async with asyncio.timeout(PATIENCE):
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await connect(port)


async def test_who_connected_before_a_stop_is_answered_and_who_says_nothing_does_not_hold_it_up() -> None:
    async with serving(primary_situation()) as (server, port):
        balancer, (_, silent) = await connect(port), await connect(port)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)  # it has begun
        reader, writer = balancer
        writer.write(b"GET /primary HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            assert parsed(await reader.read())[0] == 200
            await stopping
        for each in (writer, silent):
            each.close()


@pytest.mark.parametrize("turns", range(5))
async def test_who_connects_in_the_moment_of_a_stop_is_answered_or_left_to_the_next_server(turns: int) -> None:
    async with serving(primary_situation()) as (server, port):
        with socket.create_connection((loopback(1), port), PATIENCE) as balancer:
            balancer.sendall(b"GET /primary HTTP/1.0\r\n\r\n")
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.stop()
            balancer.settimeout(0.1)
            with contextlib.suppress(TimeoutError):  # still in the queue of the socket, which outlives this server
                assert parsed(balancer.recv(65536))[0] == 200
