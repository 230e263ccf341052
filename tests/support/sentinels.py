"""Three real redis and three real sentinels on 127.0.1.1-3, started as a test wants them, and waiting for them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from redis.asyncio import Redis as RawRedis

from srd.cluster import Config
from srd.config import parse_config
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.ha.resp import RespError
from srd.ha.sentinel import SentinelClient
from srd.model import Endpoint, Secret, Secrets
from support.patience import retrying

SECRETS = Secrets(Secret("application"), Secret("replication"), Secret("between-sentinels"), Secret("administrator"))
WRONG = Secrets(Secret("wrong-one"), Secret("wrong-two"), Secret("wrong-three"), Secret("wrong-four"))
# Some distributions keep one binary only, which looks at the name by which it was called.
PROGRAM = shutil.which("redis-server") or shutil.which("redis-check-rdb") or "redis-server"

REDIS_CONF = """
bind {address}
port {port}
dir {directory}
save ""
appendonly {appendonly}
bind-source-addr {address}
protected-mode yes
min-replicas-to-write 1
repl-diskless-sync-delay 0
requirepass application
user default on >application ~* +@all
user replica on >replication +psync +replconf +ping
user sentinel on >between-sentinels allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish \
+info +client|setname +client|kill +script|kill
user srd on >administrator ~* allchannels +@all
masteruser replica
masterauth replication
replica-announce-ip {address}
"""
SENTINEL_CONF = """
bind {address}
port {port}
dir {directory}
bind-source-addr {address}
requirepass between-sentinels
sentinel announce-ip {address}
sentinel announce-port {port}
sentinel monitor master {primary} {redis_port} 2
sentinel auth-user master sentinel
sentinel auth-pass master between-sentinels
sentinel down-after-milliseconds master 4000
sentinel failover-timeout master 4000
sentinel parallel-syncs master 2
"""


def free_ports(count: int) -> list[int]:
    """Return ports that are free on all three addresses."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.1.1", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError):
                for address in ("127.0.1.2", "127.0.1.3"):
                    stack.enter_context(socket.socket()).bind((address, port))
                ports.append(port)
        return ports


class Cluster:
    """Real programs in a directory of their own; each is ended by its pid."""

    def __init__(self, root: Path) -> None:
        redis_port, sentinel_port = free_ports(2)
        nodes = "".join(f'[[node]]\nname = "n{i}"\naddresses = ["127.0.1.{i}"]\n' for i in (1, 2, 3))
        self.config: Config = parse_config(
            f'cluster = "c"\n{nodes}[ipsec]\nmode = "off"\n[redis]\nport = {redis_port}\n'
            f"[sentinel]\nport = {sentinel_port}\ndown_after = 4\nfailover_timeout = 4\n",
            "test",
        )
        self.root = root
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def endpoint(self, name: str) -> Endpoint:
        return endpoint_of(self.config, self.config.node(name))

    def redis(self, name: str, primary: str | None = "n1", extra: str = "", appendonly: str = "no") -> None:
        directory = self._directory(f"redis-{name}")
        text = REDIS_CONF.format(
            address=self.config.node(name).address,
            port=self.config.redis.port,
            directory=directory,
            appendonly=appendonly,
        )
        if primary not in (None, name):
            text += f"replicaof {self.endpoint(primary or '').address} {self.config.redis.port}\n"
        self._start(f"redis-{name}", "redis-server", directory, text + extra)

    def sentinel(self, name: str) -> None:
        directory = self._directory(f"sentinel-{name}")
        text = SENTINEL_CONF.format(
            address=self.config.node(name).address,
            port=self.config.sentinel.port,
            directory=directory,
            primary=self.endpoint("n1").address,
            redis_port=self.config.redis.port,
        )
        self._start(f"sentinel-{name}", "redis-sentinel", directory, text)

    def _directory(self, what: str) -> Path:
        directory = self.root / what
        directory.mkdir(exist_ok=True)
        return directory

    def _start(self, what: str, name: str, directory: Path, text: str) -> None:
        conf = directory / "it.conf"
        if name == "redis-server" or not conf.exists():
            conf.write_text(text)
        with (directory / "log").open("ab") as log:
            arguments = [name, str(conf)]
            self.running[what] = subprocess.Popen(arguments, executable=PROGRAM, stdout=log, stderr=log)

    def send(self, what: str, number: signal.Signals) -> None:
        self.running[what].send_signal(number)

    def kill(self, what: str) -> None:
        process = self.running.pop(what)
        process.kill()
        process.wait()

    def kill_all(self) -> None:
        for what in list(self.running):
            self.kill(what)


async def until(question: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    """Ask again until the answer is yes; an error is a no. The bound is the test's patience, not a measure."""
    async for attempt in retrying(RespError, seconds=seconds):
        with attempt:
            if not await question():
                raise RespError("wait for", "the programs", "not yet")


@contextlib.asynccontextmanager
async def redis_client(cluster: Cluster, name: str, secrets: Secrets = SECRETS) -> AsyncIterator[RedisClient]:
    client = RedisClient(cluster.endpoint(name), secrets)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        yield client


@contextlib.asynccontextmanager
async def sentinel_client(cluster: Cluster, name: str, secrets: Secrets = SECRETS) -> AsyncIterator[SentinelClient]:
    client = SentinelClient(cluster.config, cluster.config.node(name), secrets)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        yield client


async def whole(cluster: Cluster) -> None:
    """Start everything and wait until every sentinel knows the two others and both replicas."""
    for name in ("n1", "n2", "n3"):
        cluster.redis(name)
    for name in ("n2", "n3"):
        async with redis_client(cluster, name) as client:

            async def linked(client: RedisClient = client) -> bool:
                return (await client.observe()).link_up

            await until(linked)
    # Only now: a sentinel reads a primary's replicas when it connects, and then every 10 s (SENTINEL_INFO_PERIOD).
    for name in ("n1", "n2", "n3"):
        cluster.sentinel(name)
    for name in ("n1", "n2", "n3"):
        async with sentinel_client(cluster, name) as asked:

            async def complete(asked: SentinelClient = asked) -> bool:
                answer = await asked.ask()
                met = answer.known_sentinels == answer.known_replicas == 2
                return met and answer.flags == frozenset({"master"})

            await until(complete)


def raw(cluster: Cluster, name: str) -> RawRedis:
    return RawRedis(host=str(cluster.endpoint(name).address), port=cluster.config.redis.port, password="application")
