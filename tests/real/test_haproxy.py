"""The printed haproxy.cfg and stunnel.conf at work: real haproxy, stunnel at both ends, redis, our :8080 and :8081."""

import asyncio
import contextlib
import csv
import datetime as dt
import json
import os
import signal
import socket
import statistics
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.situations import NOW, primary_redis, primary_situation, replica_redis
from support.unmanaged import no_store

from srd.cli.balancer import split_host
from srd.cli.main import srd
from srd.cluster import Config, Node
from srd.config import parse_config
from srd.listening import Listeners
from srd.model import Endpoint, Role
from srd.state import Lease, SentinelAnswer, Situation, View
from srd.supervise.render import stunnel_conf
from srd.trust.authority import tls_name
from srd.trust.bundle import write_bundles
from srd.web import agent
from srd.web.agent import AgentServer, Answer, Question, Word
from srd.web.app import BACKLOG, WebServer

REDIS_SERVER = "/usr/bin/redis-check-rdb"  # Debian's redis-tools: the same program under another name
PATIENCE = 60.0
# Of what takes some milliseconds when nothing else runs on the machine.
AT_ONCE = 0.5


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


class Daemon:
    """What srd of one node says to a balancer, and the sockets that it says it by."""

    def __init__(self, situation: Callable[[], Situation]) -> None:
        self.web = WebServer(situation, version="0.1.0")
        self.agent = AgentServer(situation)
        self._http = Listeners("http", no_store(), backlog=BACKLOG)
        self._agent = Listeners("agent", no_store(), backlog=BACKLOG)

    async def start(self) -> None:
        await self.agent.start(self._agent)
        await self.web.start(self._http)

    async def die(self, *, kept: bool = True) -> None:
        """Answer no more; the sockets stay, as in a service manager's hands, unless they are not `kept`."""
        await self.agent.stop()
        await self.web.stop()
        if not kept:
            self._http.close()
            self._agent.close()

    async def lose_http(self) -> None:
        """Refuse checks of :8080, while the agent goes on."""
        await self.web.stop()
        self._http.close()

    async def regain_http(self) -> None:
        await self.web.start(self._http)


@dataclass
class World:
    """Two nodes on the loopback, a balancer and a client; the test changes who is primary."""

    config: Config
    directory: Path
    port: int
    read_only_port: int
    client_port: int
    client_read_only_port: int
    primary: str | None = "redis-1"
    up: frozenset[str] = frozenset({"redis-1", "redis-2"})
    split: bool = False
    reigns: bool = True  # not while one has ceased to be primary and the next one is none yet
    daemons: dict[str, Daemon] = field(default_factory=dict)

    def becomes(self, **changes: object) -> None:
        """Have something come true, and every srd know it."""
        for name, value in changes.items():
            setattr(self, name, value)
        for daemon in self.daemons.values():
            daemon.agent.wake()

    def situation(self, node: Node) -> Situation:
        """What srd on `node` would know."""
        if self.primary is None or node.name not in self.up:
            return Situation(self.config, node, View(), NOW)
        leading = Endpoint(self.config.node(self.primary).address, self.config.redis.port)
        held = self.reigns and (self.split or node.name == self.primary)
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

    async def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return what haproxy knows of each (backend, server)."""
        reader, writer = await asyncio.open_unix_connection(self.directory / "admin.sock")
        writer.write(b"show stat\n")
        rows = csv.DictReader((await reader.read()).decode().removeprefix("# ").splitlines())
        writer.close()
        return {(row["pxname"], row["svname"]): row for row in rows if row["svname"].startswith("redis-")}

    async def settled(self) -> None:
        """Return when every check has made up its mind, and every agent-check waits for news."""

        async def all_wait() -> bool:
            held = [connection.question for each in self.daemons.values() for connection in each.agent._open]
            rows = (await self.statistics()).values()
            return None not in held and len(held) == len(rows) and all("/" not in row["status"] for row in rows)

        await eventually(all_wait, what="haproxy is sure of all that it knows")

    async def leads_nowhere(self) -> float:
        async def nowhere() -> bool:
            return await self.who() == ""

        return await eventually(nowhere, what="no node takes clients")

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
        daemon = world.daemons[which.name] = Daemon(lambda: world.situation(which))
        await daemon.start()
        stack.push_async_callback(daemon.die, kept=False)

        async def named() -> bool:
            return await command(world.config.redis.port, "SET", "whoami", which.name, host=host) == b"+OK\r\n"

        await eventually(named, what=f"redis of {which.name} answers")
        yield


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    redis, tls, http, checks, port, read_only_port, client_port, client_read_only_port = free_ports(8)
    text = (
        f'cluster = "orders"\nlisten_localhost = false\n[ipsec]\nmode = "off"\n'
        f"[redis]\nport = {redis}\n[tls]\nport = {tls}\n[http]\nport = {http}\n"
        f"[haproxy_agent]\nport = {checks}\n"
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
        haproxy_cfg(made)
        await stack.enter_async_context(stunnel_daemon(conf, tmp_path / "client.pid"))
        yield made


@contextlib.asynccontextmanager
async def balanced(world: World, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run haproxy, as printed."""
    arguments = ["haproxy", "-db", "-f", str(world.directory / "haproxy.cfg"), *options]
    async with running(arguments, "/usr/sbin/haproxy", world.directory / "haproxy.log") as haproxy:
        yield haproxy


@pytest.fixture
async def led(world: World) -> AsyncIterator[World]:
    """The same, with a balancer that leads to redis-1."""
    async with balanced(world):
        await world.leads_to("redis-1")
        await world.settled()
        yield world


@contextlib.asynccontextmanager
async def session(world: World) -> AsyncIterator[asyncio.Task[bytes]]:
    """Subscribe to a channel on which nothing is said; the task is done when the session ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.client_port)
    writer.write(b"SUBSCRIBE news\r\n")
    assert (await reader.readexactly(4)).startswith(b"*3\r\n")
    cut = asyncio.create_task(_end_of(reader))
    try:
        yield cut
    finally:
        cut.cancel()
        writer.close()


async def _end_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def summed_up(what: str, seconds: Sequence[float]) -> dict[str, float]:
    found = {"median_ms": statistics.median(seconds) * 1000, "max_ms": max(seconds) * 1000}
    return {f"{what}_{name}": round(value, 1) for name, value in found.items()}


async def test_a_role_change_moves_clients_and_cuts_old_sessions(led: World) -> None:
    loop = asyncio.get_running_loop()
    moved, cuts = [], []
    for primary in ["redis-2", "redis-1"] * 5:
        async with session(led) as cut:
            started = loop.time()
            cut.add_done_callback(lambda _: cuts.append(loop.time() - started))  # noqa: B023 - of this round
            led.becomes(primary=primary)
            await led.leads_to(primary)
            moved.append(loop.time() - started)
            async with asyncio.timeout(PATIENCE):
                await cut
        await led.settled()
    print(json.dumps(summed_up("new_sessions", moved) | summed_up("old_cut", cuts)))  # noqa: T201
    assert max(*moved, *cuts) < AT_ONCE


async def test_readers_go_to_the_replica_and_to_the_primary_when_there_is_none(led: World) -> None:
    await led.reads_lead_to("redis-2")
    led.becomes(up=frozenset({"redis-1"}))
    await led.reads_lead_to("redis-1")
    assert await led.who() == "redis-1"


async def test_without_a_primary_nobody_is_led_anywhere(led: World) -> None:
    led.becomes(primary=None)
    await led.leads_nowhere()
    led.becomes(primary="redis-1")
    await led.leads_to("redis-1")


async def test_who_comes_between_two_primaries_is_held_and_led_to_the_second(world: World) -> None:
    cfg = world.directory / "haproxy.cfg"
    held = cfg.read_text().replace("inspect-delay 10ms", "inspect-delay 500ms")  # longer than this machine may be busy
    assert held.count("inspect-delay 500ms") == 2, "those who write, and those who only read"
    cfg.write_text(held)
    async with balanced(world):
        await world.leads_to("redis-1")
        await world.settled()
        for primary in ("redis-2", "redis-1", "redis-2"):
            world.becomes(reigns=False)
            await world.leads_nowhere()
            await world.settled()
            asked = asyncio.create_task(world.who())
            await asyncio.sleep(0.05)
            assert not asked.done()
            world.becomes(primary=primary, reigns=True)
            assert await asked == primary
            await world.settled()


async def test_two_that_both_say_primary_get_nobody(led: World) -> None:
    led.becomes(split=True)
    await led.leads_nowhere()
    assert [await led.who() for _ in range(5)] == [""] * 5
    led.becomes(split=False)
    await led.leads_to("redis-1")


async def test_a_primary_whose_http_says_nothing_is_down(led: World) -> None:
    await led.daemons["redis-1"].lose_http()
    took = await led.leads_nowhere()
    print(json.dumps({"refused_seconds": round(took, 2)}))  # noqa: T201
    row = (await led.statistics())["redis_primary", "redis-1"]
    assert (row["status"], row["agent_status"], row["check_status"]) == ("DOWN", "* L7OK", "L4CON")
    await led.daemons["redis-1"].regain_http()
    await led.leads_to("redis-1")


async def test_a_srd_that_is_soon_back_costs_nobody_anything(led: World) -> None:
    async with session(led) as cut:
        for _ in range(2):
            await led.daemons["redis-1"].die()
            await asyncio.sleep(1.5)  # half of what a check waits
            assert await led.who() == "redis-1"
            await led.daemons["redis-1"].start()
            await asyncio.sleep(1.5)
        assert not cut.done()


async def test_the_last_word_of_a_srd_that_is_gone_stands_until_http_says_otherwise(led: World) -> None:
    loop = asyncio.get_running_loop()
    async with session(led) as cut:
        started = loop.time()
        await led.daemons["redis-1"].die()
        while loop.time() - started < PATIENCE:
            if await led.who() != "redis-1":
                break
            await asyncio.sleep(0.1)
        took = loop.time() - started
        async with asyncio.timeout(1):
            await cut  # whom haproxy refuses, it has cut
        print(json.dumps({"hung_seconds": round(took, 2)}))  # noqa: T201
        assert 6 < took < 10  # 7.6 s at most, by haproxy.cfg
    await led.leads_nowhere()
    led.becomes(primary="redis-2")
    await led.leads_to("redis-2")
    await led.daemons["redis-1"].start()  # and what it said last, half a minute ago, counts no more
    for _ in range(20):
        assert await led.who() == "redis-2"
        await asyncio.sleep(0.1)


async def test_a_balancer_that_is_started_anew_knows_at_once_who_is_primary(world: World) -> None:
    took = []
    for primary in ("redis-1", "redis-2", "redis-2"):
        world.becomes(primary=primary)
        async with balanced(world):
            took.append(await world.leads_to(primary))
            await world.settled()
    print(json.dumps(summed_up("from_start", took)))  # noqa: T201
    assert max(took) < 2  # the start of the program is in it


async def test_a_reload_of_the_balancer_knows_at_once_too(led: World) -> None:
    async with balanced(led) as old, balanced(led, "-sf", str(old.pid)):
        await old.wait()
        assert await led.leads_to("redis-1") < 2


async def test_nobody_is_led_to_a_node_that_was_never_heard(world: World) -> None:
    for daemon in world.daemons.values():
        await daemon.agent.stop()
    async with balanced(world):
        await asyncio.sleep(1)
        assert await world.who() == await world.reads_from() == ""


async def test_a_drained_node_keeps_its_sessions_and_is_back_when_it_is_ready(
    led: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drained(question: Question, situation: Situation) -> Answer:
        mine = situation.node.name == "redis-1" and question is Question.PRIMARY
        return Answer(Word.DRAIN, reason="by operator") if mine else answer(question, situation)

    answer = agent.answer
    async with session(led) as cut:
        monkeypatch.setattr(agent, "answer", drained)
        led.becomes()
        await led.leads_nowhere()
        assert not cut.done()
        monkeypatch.setattr(agent, "answer", answer)
        led.becomes()
        await led.leads_to("redis-1")
        assert not cut.done()


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_client_takes_no_other_cluster_for_its_own(led: World, wrong: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    text = (tmp_path / "cluster.toml").read_text()
    cluster = text.replace('"orders"', '"payments"')
    write_bundles(cluster, other, dt.datetime.now(dt.UTC))
    right_authority = tmp_path / "bundles" / "client" / "ca.crt"
    (other / "cluster.toml").write_text(text if wrong == "authority" else cluster)
    ca_file = other / "client" / "ca.crt" if wrong == "authority" else right_authority
    (port,) = free_ports(1)
    conf = client_conf(led, other, ca_file, port=port)
    async with stunnel_daemon(conf, other / "client.pid"):
        assert await command(port, "PING") == b""
    (other / "cluster.toml").write_text(text)
    async with stunnel_daemon(client_conf(led, other, right_authority, port=port), other / "client.pid"):
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
