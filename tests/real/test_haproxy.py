"""The printed haproxy.cfg and stunnel.conf at work: real haproxy, stunnel at both ends, real redis, our own :8080."""

import asyncio
import contextlib
import datetime as dt
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.situations import NOW, primary_redis, primary_situation, replica_redis
from support.unmanaged import started

from srd.cli.balancer import split_host
from srd.cli.main import srd
from srd.cluster import Config, Node
from srd.config import parse_config
from srd.model import Endpoint, Role
from srd.state import Lease, SentinelAnswer, Situation, View
from srd.supervise.render import stunnel_conf
from srd.trust.authority import tls_name
from srd.trust.bundle import write_bundles
from srd.web.app import WebServer

REDIS_SERVER = "/usr/bin/redis-check-rdb"  # Debian's redis-tools: the same program under another name
PATIENCE = 60.0


def address(number: int) -> str:
    """Return an address of 127/8 that no other process of this suite uses."""
    return f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}.{number}"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]


async def eventually(condition: Callable[[], Awaitable[bool]], *, what: str) -> float:
    """Poll an async condition until it holds; return how long that took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with asyncio.timeout(PATIENCE):
            while not await condition():  # noqa: ASYNC110 - other programs have no event to wait for
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"not within {PATIENCE:g} s: {what}")
    return loop.time() - started


@contextlib.asynccontextmanager
async def running(arguments: Sequence[str], program: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *arguments, executable=program, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def command(port: int, *words: str, host: str = "127.0.0.1") -> bytes:
    """Send one redis command over a new connection; b"" when it is not answered."""
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(" ".join(words).encode() + b"\r\n")
                line = await reader.readline()
                return await reader.readline() if line.startswith(b"$") else line
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


@dataclass
class World:
    """Two nodes on the loopback, a balancer and a client; `primary` is moved by the test."""

    config: Config
    directory: Path
    port: int
    read_only_port: int
    client_port: int
    client_read_only_port: int
    primary: str | None = "redis-1"
    up: frozenset[str] = frozenset({"redis-1", "redis-2"})
    split: bool = False

    def situation(self, node: Node) -> Situation:
        """What srd on `node` would know."""
        if self.primary is None or node.name not in self.up:
            return Situation(self.config, node, View(), NOW)
        leading = Endpoint(self.config.node(self.primary).address, self.config.redis.port)
        held = self.split or node.name == self.primary
        answers = {voter.name: SentinelAnswer(voter.name, NOW, leading, 1, False, 2, 1) for voter in self.config.voters}
        view = View(
            children=primary_situation().view.children,
            redis=primary_redis(role=Role.PRIMARY) if held else replica_redis(primary=leading),
            lease=Lease(held, NOW + 1 if held else 0.0, 2, 2, leading),
            sentinels=answers,
        )
        return Situation(self.config, node, view, NOW)

    async def who(self) -> str:
        return (await command(self.client_port, "GET", "whoami")).decode().strip()

    async def reads_from(self) -> str:
        return (await command(self.client_read_only_port, "GET", "whoami")).decode().strip()

    async def leads_to(self, node: str) -> float:
        async def there() -> bool:
            return await self.who() == node

        return await eventually(there, what=f"clients are led to {node}")

    async def reads_lead_to(self, node: str) -> float:
        async def there() -> bool:
            return await self.reads_from() == node

        return await eventually(there, what=f"readers are led to {node}")


def printed(file: Path, *arguments: str) -> str:
    result = CliRunner().invoke(srd, [arguments[0], "--file", str(file), *arguments[1:]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def haproxy_cfg(world: World) -> Path:
    text = printed(
        world.directory / "cluster.toml",
        "haproxy-config",
        *("--listen", address(20), "--port", str(world.port), "--read-only-port", str(world.read_only_port)),
        *("--stats-socket", str(world.directory / "admin.sock")),
    )
    path = world.directory / "haproxy.cfg"
    path.write_text(text)
    return path


def client_conf(world: World, directory: Path, ca_file: Path, **ports: int) -> Path:
    text = printed(
        directory / "cluster.toml",
        "client-config",
        *("--balancer", f"{address(20)}:{world.port}", "--ca-file", str(ca_file)),
        *("--port", str(ports["port"]), "--pid-file", str(directory / "client.pid")),
        *(("--read-only-port", str(ports["read_only_port"])) if "read_only_port" in ports else ()),
    )
    # haproxy's read-only port is a fixed one in what is printed; here it is whatever was free.
    text = text.replace(f"connect = {address(20)}:6378", f"connect = {address(20)}:{world.read_only_port}")
    path = directory / "client.conf"
    path.write_text(text)
    return path


def pid_in(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return None


@contextlib.asynccontextmanager
async def stunnel_daemon(conf: Path, pid_file: Path) -> AsyncIterator[None]:
    """Run a stunnel that goes into the background by itself, as printed."""
    process = await asyncio.create_subprocess_exec(
        "stunnel4", str(conf), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()

    async def written() -> bool:
        return pid_in(pid_file) is not None

    await eventually(written, what="stunnel's pid file")
    pid = pid_in(pid_file)
    assert pid is not None
    try:
        yield
    finally:
        os.kill(pid, signal.SIGTERM)

        async def gone() -> bool:
            return pid_in(pid_file) is None

        await eventually(gone, what="stunnel has ended")


@contextlib.asynccontextmanager
async def node(world: World, which: Node) -> AsyncIterator[None]:
    host, bundle = str(which.address), world.directory / "bundles" / which.name
    redis_arguments = [
        *("redis-server", "--bind", host, "--port", str(world.config.redis.port), "--save", ""),
        *("--dir", str(bundle), "--protected-mode", "no"),
    ]
    (bundle / "stunnel.conf").write_text(stunnel_conf(world.config, which, bundle))
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(running(redis_arguments, REDIS_SERVER, bundle / "redis.log"))
        stunnel = ["stunnel4", str(bundle / "stunnel.conf")]
        await stack.enter_async_context(running(stunnel, "/usr/bin/stunnel4", bundle / "stunnel.log"))
        web = WebServer(lambda: world.situation(which), version="0.1.0")
        await stack.enter_async_context(started(web))

        async def named() -> bool:
            return await command(world.config.redis.port, "SET", "whoami", which.name, host=host) == b"+OK\r\n"

        await eventually(named, what=f"redis of {which.name} answers")
        yield


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    redis, tls, http, port, read_only_port, client_port, client_read_only_port = free_ports(7)
    text = (
        f'cluster = "orders"\nlisten_localhost = false\n[ipsec]\nmode = "off"\n'
        f"[redis]\nport = {redis}\n[tls]\nport = {tls}\n[http]\nport = {http}\n"
        f'[[node]]\nname = "redis-1"\naddresses = ["{address(1)}"]\n'
        f'[[node]]\nname = "redis-2"\naddresses = ["{address(2)}"]\n'
    )
    (tmp_path / "cluster.toml").write_text(text)
    config = write_bundles(text, tmp_path / "bundles", dt.datetime.now(dt.UTC))
    made = World(config, tmp_path, port, read_only_port, client_port, client_read_only_port)
    ca_file = tmp_path / "bundles" / "client" / "ca.crt"
    conf = client_conf(made, tmp_path, ca_file, port=client_port, read_only_port=client_read_only_port)
    async with contextlib.AsyncExitStack() as stack:
        for which in config.nodes:
            await stack.enter_async_context(node(made, which))
        arguments = ["haproxy", "-db", "-f", str(haproxy_cfg(made))]
        await stack.enter_async_context(running(arguments, "/usr/sbin/haproxy", tmp_path / "haproxy.log"))
        await stack.enter_async_context(stunnel_daemon(conf, tmp_path / "client.pid"))
        yield made


async def test_a_role_change_moves_clients_and_cuts_old_sessions(world: World) -> None:
    await world.leads_to("redis-1")
    reader, writer = await asyncio.open_connection("127.0.0.1", world.client_port)
    writer.write(b"SUBSCRIBE news\r\n")
    assert (await reader.readexactly(4)).startswith(b"*3\r\n")
    loop = asyncio.get_running_loop()
    started = loop.time()
    world.primary = "redis-2"
    cut = asyncio.ensure_future(reader.read())
    moved = await world.leads_to("redis-2")
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(cut, return_exceptions=True)
    print(json.dumps({"new_sessions_seconds": round(moved, 3), "old_cut_seconds": round(loop.time() - started, 3)}))  # noqa: T201
    writer.close()
    await world.leads_to("redis-2")


async def test_readers_go_to_the_replica_and_to_the_primary_when_there_is_none(world: World) -> None:
    await world.leads_to("redis-1")
    await world.reads_lead_to("redis-2")
    world.up = frozenset({"redis-1"})
    await world.reads_lead_to("redis-1")
    assert await world.who() == "redis-1"


async def test_without_a_primary_nobody_is_led_anywhere(world: World) -> None:
    await world.leads_to("redis-1")
    world.primary = None

    async def nowhere() -> bool:
        return await world.who() == ""

    await eventually(nowhere, what="no node takes clients")
    world.primary = "redis-1"
    await world.leads_to("redis-1")


async def test_two_that_both_say_primary_get_nobody(world: World) -> None:
    await world.leads_to("redis-1")
    world.split = True

    async def nowhere() -> bool:
        return await world.who() == ""

    await eventually(nowhere, what="no node takes clients")
    assert [await world.who() for _ in range(5)] == [""] * 5
    world.split = False
    await world.leads_to("redis-1")


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_client_takes_no_other_cluster_for_its_own(world: World, wrong: str, tmp_path: Path) -> None:
    await world.leads_to("redis-1")
    other = tmp_path / "other"
    text = (tmp_path / "cluster.toml").read_text()
    cluster = text.replace('"orders"', '"payments"')
    write_bundles(cluster, other, dt.datetime.now(dt.UTC))
    right_authority = tmp_path / "bundles" / "client" / "ca.crt"
    (other / "cluster.toml").write_text(text if wrong == "authority" else cluster)
    ca_file = other / "client" / "ca.crt" if wrong == "authority" else right_authority
    (port,) = free_ports(1)
    conf = client_conf(world, other, ca_file, port=port)
    async with stunnel_daemon(conf, other / "client.pid"):
        assert await command(port, "PING") == b""
    (other / "cluster.toml").write_text(text)
    async with stunnel_daemon(client_conf(world, other, right_authority, port=port), other / "client.pid"):
        assert await command(port, "PING") == b"+PONG\r\n"


@pytest.mark.parametrize("kind", ["redis", "sentinel"])
@pytest.mark.parametrize("options", [(), ("--read-only-port", "0"), ("--listen", "::1"), ("--port", "7000")])
def test_haproxy_takes_what_is_printed_without_a_word(tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    nodes = "".join(
        f'[[node]]\nname = "n{number}"\naddresses = ["{host}"]\nkind = "{kind if number == 3 else "redis"}"\n'
        for number, host in enumerate(("fd00::1", "fd00::2", "fd00::3"), 1)
    )
    (tmp_path / "cluster.toml").write_text(f'cluster = "orders"\n{nodes}')
    text = printed(tmp_path / "cluster.toml", "haproxy-config", *options)
    (tmp_path / "haproxy.cfg").write_text(text)
    checked = subprocess.run(
        ["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], check=False, capture_output=True, text=True, timeout=60
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert text.count("server n3 ") == (0 if kind == "sentinel" else 1 if "0" in options else 2)


def test_the_name_that_clients_check_is_the_one_that_nodes_bear() -> None:
    file = Path(__file__).parents[2] / "config" / "cluster.toml"
    config = parse_config(file.read_text(), str(file))
    assert f"\ncheckHost = {tls_name(config.cluster)}\n" in printed(file, "client-config", "--balancer", "lb")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lb", ("lb", 6379)),
        ("lb.example.com:7000", ("lb.example.com", 7000)),
        ("10.0.0.1", ("10.0.0.1", 6379)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("fd00::1", ("fd00::1", 6379)),
        ("[fd00::1]", ("fd00::1", 6379)),
        ("[fd00::1]:7000", ("fd00::1", 7000)),
    ],
)
def test_how_a_balancer_may_be_named(text: str, expected: tuple[str, int]) -> None:
    assert split_host(text) == expected


@pytest.mark.parametrize(
    "text", ["", "lb:", "lb:0", "lb:65536", "lb:x", "a b", "x\nconnect = evil", "[::1", "::g", "-x"]
)
def test_how_it_may_not(text: str) -> None:
    result = CliRunner().invoke(srd, ["client-config", "--balancer", text])
    assert result.exit_code == 2
