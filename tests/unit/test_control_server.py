"""The control socket: a real server in this process, asked by the real client from a thread."""

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from support.situations import arbiter_situation, primary_redis, primary_situation, replica_situation

from srd.control import client, documents
from srd.control.server import ControlServer
from srd.model import RefusedError, SrdError
from srd.state import Situation, View

PATHS = ("/v1/status", "/v1/list", "/v1/links", "/v1/children", "/v1/events")


@contextlib.asynccontextmanager
async def serving(path: Path, situation: Situation) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, lambda: situation, version="0.1.0")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def get(path: Path, what: str) -> dict[str, object]:
    return await asyncio.to_thread(client.get, path, what, timeout=10)


@pytest.mark.parametrize("situation", [primary_situation(), replica_situation(), arbiter_situation()])
async def test_every_path_answers_json_with_a_schema(tmp_path: Path, situation: Situation) -> None:
    async with serving(tmp_path / "s", situation):
        for what in PATHS:
            document = await get(tmp_path / "s", what)
            assert document["schema"] == 1
            assert document["cluster"] == "orders"
            assert document["node"] == situation.node.name


async def test_a_node_that_knows_nothing_yet_can_be_asked(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", replace(primary_situation(), view=View())):
        for what in PATHS:
            assert (await get(tmp_path / "s", what))["schema"] == 1


async def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path / "s", primary_situation()):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    finally:
        os.umask(before)


async def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    async with serving(path, primary_situation()):
        assert (await get(path, "/v1/status"))["node"] == "redis-1"
    assert not path.exists()


async def test_a_live_daemon_keeps_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path, primary_situation()):
        second = ControlServer(path, primary_situation, version="0.1.0")
        with pytest.raises(SrdError, match="another srd answers there"):
            await second.start()
        await second.stop()
        assert (await get(path, "/v1/status"))["node"] == "redis-1"


async def test_what_is_not_a_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(SrdError, match="is not a socket"):
        await ControlServer(path, primary_situation, version="0.1.0").start()
    assert path.read_text() == "precious"


async def test_a_missing_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SrdError, match="no such file or directory"):
        await ControlServer(tmp_path / "none" / "s", primary_situation, version="0.1.0").start()


async def test_stopping_leaves_the_socket_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path, primary_situation()):
        path.unlink()
        async with serving(path, replica_situation()):
            pass
        path.write_text("successor")
    assert path.exists()


async def test_unknown_paths_and_methods(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path, primary_situation()):
        with pytest.raises(SrdError, match="it answers 404 to /v1/cows"):
            await get(path, "/v1/cows")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"POST /v1/status HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.0 405 ")
        writer.close()


async def test_an_action_is_done_by_post_only_and_says_what_came_of_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    asked: list[Mapping[str, str]] = []

    async def act(query: Mapping[str, str]) -> dict[str, object]:
        asked.append(query)
        if query.get("peer") == "nobody":
            raise RefusedError("rekey", "nobody", "it is no peer", "name another")
        return {"done": True}

    server = ControlServer(path, primary_situation, version="0.1.0", actions={"/v1/rekey": act})
    await server.start()
    try:
        with pytest.raises(SrdError, match="it answers 405"):
            await get(path, "/v1/rekey?peer=redis-2")
        assert asked == []
        answer = await asyncio.to_thread(client.post, path, "/v1/rekey?peer=redis-2", timeout=10)
        assert answer == {"schema": 1, "done": True}
        assert asked == [{"peer": "redis-2", "by": f"pid {os.getpid()}, uid {os.getuid()}"}]
        # Whatever the query holds, it is one value in the log.
        await asyncio.to_thread(client.post, path, "/v1/rekey?event=x&action=y&by=z", timeout=10)
        with pytest.raises(SrdError, match="cannot rekey nobody: it is no peer; name another") as caught:
            await asyncio.to_thread(client.post, path, "/v1/rekey?peer=nobody", timeout=10)
        assert caught.value.exit_status == RefusedError.exit_status
    finally:
        await server.stop()


async def test_the_client_says_why_it_cannot_ask(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(SrdError, match="there is no such socket; is srd running"):
        await get(path, "/v1/status")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        with pytest.raises(SrdError, match="nobody listens there"):
            await get(path, "/v1/status")
        deaf.listen()
        with pytest.raises(SrdError, match=r"no answer within 0\.05 s"):
            await asyncio.to_thread(client.get, path, "/v1/status", timeout=0.05)
    with pytest.raises(SrdError, match="too long"):
        await get(tmp_path / ("x" * 200), "/v1/status")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "answers nothing"),
        (b"garbage", "answers nothing"),
        (b"HTTP/1.0 500 Oops\r\n\r\n", "answers 500"),
        (b"HTTP/1.0 200 OK\r\n\r\n{", "not JSON"),
    ],
)
async def test_the_client_believes_no_nonsense(tmp_path: Path, answer: bytes, why: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(talk, tmp_path / "s"):
        with pytest.raises(SrdError, match=why):
            await get(tmp_path / "s", "/v1/status")


def test_status_says_who_is_primary_and_how_well_this_node_is() -> None:
    document = documents.status(primary_situation(), "0.1.0")
    assert document["health"] == "ok"
    assert document["role"] == "primary"
    assert document["primary"] == {"node": "redis-1", "address": "192.168.205.10:6379"}
    assert document["links"] == {"required": True, "protected": 2, "total": 2}
    assert documents.status(primary_situation(links={}), "0.1.0")["health"] == "degraded"
    assert documents.status(primary_situation(children={}), "0.1.0")["health"] == "critical"


def test_nobody_is_called_primary_by_less_than_a_majority() -> None:
    lease = primary_situation().view.lease
    assert lease is not None
    alone = primary_situation(lease=replace(lease, held=False, reachable=1))
    assert documents.status(alone, "0.1.0")["primary"] is None


def test_list_shows_lag_and_links_and_who_fell_silent() -> None:
    whole = primary_situation()
    peers = {**whole.view.peers, "redis-3": replace(whole.view.peers["redis-3"], offset=4900)}
    first, second, third = documents.members(primary_situation(peers=peers), "0.1.0")["members"]
    assert (first["role"], first["state"], first["link"], first["lag_bytes"]) == ("primary", "running", None, None)
    assert (second["role"], second["lag_bytes"], second["link"]["protected"]) == ("replica", 0, True)
    assert third["lag_bytes"] == 100
    silent = replace(primary_situation(), now=whole.now + 3)
    assert [member["state"] for member in documents.members(silent, "0.1.0")["members"]][1:] == ["unreachable"] * 2


def test_no_document_holds_a_key_of_redis_replication() -> None:
    text = json.dumps([documents.status(primary_situation(), "0.1.0"), documents.links(primary_situation(), "0.1.0")])
    assert primary_redis().replid not in text
