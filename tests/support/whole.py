"""A cluster as its users have it, without IPsec: `srd run` for each node, and the power of each.

It has the loopback of a network namespace of its own. What ends here is what was started here: each srd by its own
process, its children by what it has recorded of them.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redis import Redis as RawRedis
from redis.exceptions import RedisError

from srd.config import parse_config
from srd.ha.redis import REDIS_USER
from srd.ha.sentinel import SENTINEL_USER
from srd.model import Paths, Secret, Secrets, Service, SrdError
from srd.supervise.adopt import REGISTER_NAME, Record, Register, Verdict, look_up
from srd.trust.bundle import Bundle
from support.clusters import make_bundles, paths_of
from support.directories import passable
from support.namespace import inside, ip, run

PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.1


def whole_toml(kinds: tuple[str, ...], extra: str = "") -> str:
    """Return a cluster of nodes n1.. on 127.0.1.1..; `extra` are lines of [redis]."""
    nodes = "".join(
        f'[[node]]\nname = "n{number}"\naddresses = ["127.0.1.{number}"]\nkind = "{kind}"\n'
        for number, kind in enumerate(kinds, 1)
    )
    return (
        f'cluster = "whole"\nlisten_localhost = false\n{nodes}[ipsec]\nmode = "off"\n'
        f'[redis]\nuser = "redis"\n{extra}\n[sentinel]\nuser = "redis"\ndown_after = 4\n[tls]\nuser = "stunnel4"\n'
    )


class Whole:
    """The nodes of a cluster, by name, and what a person can do to them."""

    def __init__(self, root: Path, text: str, namespace: str) -> None:
        self.root = root
        self._namespace = namespace
        self.config = parse_config(text, "test")
        self.bundles: dict[str, Bundle] = make_bundles(root, text)
        self.names = [node.name for node in self.config.nodes]
        self.redises = [node.name for node in self.config.redis_nodes]
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def paths(self, name: str) -> Paths:
        return paths_of(self.root, name)

    def data(self, name: str) -> Path:
        return self.paths(name).service_dir(Service.REDIS)

    def power_on(self, *names: str) -> None:
        for name in names:
            paths = self.paths(name)
            directories = {"CONFIG": paths.config_dir, "STATE": paths.state_dir, "RUN": paths.run_dir}
            directories["LOG"] = paths.log_dir
            environment = {"PATH": os.environ["PATH"]} | {
                f"SRD_{what}_DIR": str(path) for what, path in directories.items()
            }
            with (self.root / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    ["ip", "netns", "exec", self._namespace, sys.executable, "-m", "srd", "run"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )

    def power_off(self, *names: str) -> None:
        """End what these nodes run as a power cut does, all at once, and forget what a boot forgets."""
        ended = [self.running.pop(name) for name in names if name in self.running]
        for process in ended:
            process.kill()
        for name in names:
            self._end_children(name)
            shutil.rmtree(self.paths(name).run_dir, ignore_errors=True)
        for process in ended:
            process.wait()

    def kill(self, name: str, service: Service) -> None:
        """End one child; its srd sees that."""
        _end(Register(self.paths(name).run_dir / REGISTER_NAME).load()[service])

    def freeze(self, name: str, service: Service) -> None:
        """Stop one child as SIGSTOP does."""
        os.kill(Register(self.paths(name).run_dir / REGISTER_NAME).load()[service].pid, signal.SIGSTOP)

    def children(self, name: str) -> list[int]:
        """Return the processes of a node's programs."""
        return [record.pid for record in Register(self.paths(name).run_dir / REGISTER_NAME).load().values()]

    def _end_children(self, name: str) -> None:
        with suppress(SrdError):
            for record in Register(self.paths(name).run_dir / REGISTER_NAME).load().values():
                _end(record)

    # --- what is asked

    def get(self, name: str, path: str) -> tuple[int, Any]:
        url = f"http://{self.config.node(name).address}:{self.config.http.port}{path}"
        try:
            with inside(self._namespace), urllib.request.urlopen(url, timeout=2) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except (OSError, ValueError):
            return 0, None

    def state(self, name: str) -> dict[str, Any]:
        return self.get(name, "/srd")[1] or {}

    def codes(self, name: str) -> set[str]:
        return {condition["code"] for condition in self.state(name).get("conditions", [{"code": "unheard"}])}

    def primaries(self) -> list[str]:
        return [name for name in self.redises if self.get(name, "/primary")[0] == 200]

    def wait(self, question: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> float:
        began = time.monotonic()
        while not question():
            if time.monotonic() - began > seconds:
                raise AssertionError(f"not within {seconds:g} s: {what}\n{self.logs()}")
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    def wait_primary(self, *names: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until one node leads, one of these if any are named, and return it."""
        self.wait(lambda: set(self.primaries()) & set(names or self.redises), f"a primary, {names}", seconds)
        (leader,) = self.primaries()
        return leader

    def wait_whole(self, *names: str) -> None:
        """Wait until these nodes, or all, have no condition but that there is no IPsec."""
        for name in names or self.names:
            self.wait(lambda name=name: not self.codes(name) - {"ipsec_off", "no_persistence"}, f"{name} is well")  # type: ignore[misc]

    @contextmanager
    def redis(self, name: str) -> Iterator[RawRedis]:
        """Be in touch with a node's redis, in this thread, as the user srd."""
        with self._reach(name, self.config.redis.port, REDIS_USER, self._secrets(name).srd_password) as client:
            yield client

    def ask_sentinel(self, name: str, *words: str) -> Any:
        password = self._secrets(name).sentinel_password
        with self._reach(name, self.config.sentinel.port, SENTINEL_USER, password) as client:
            return client.execute_command("SENTINEL", *words)

    def _secrets(self, name: str) -> Secrets:
        secrets = self.bundles[name].secrets
        assert secrets is not None
        return secrets

    @contextmanager
    def _reach(self, name: str, port: int, user: str, password: Secret) -> Iterator[RawRedis]:
        client = RawRedis(
            host=str(self.config.node(name).address),
            port=port,
            password=password.reveal(),
            username=user,
            socket_timeout=5,
            decode_responses=True,
        )
        with inside(self._namespace), client:
            yield client

    def ask(self, name: str, *command: object) -> Any:
        with self.redis(name) as client:
            return client.execute_command(*command)

    def keys(self, name: str) -> set[str]:
        with self.redis(name) as client:
            try:
                return set(client.keys("*"))
            except RedisError:
                return set()

    def in_step(self, *names: str) -> bool:
        """Whether these replicas have all that the primary has."""
        primaries = self.primaries()
        if len(primaries) != 1:
            return False
        have = self.keys(primaries[0])
        return all(self.keys(name) == have for name in names or self.redises)

    def logs(self) -> str:
        found = []
        for name in self.names:
            path = self.root / f"{name}.log"
            if path.exists():
                found.append(f"--- {name}\n" + "\n".join(path.read_text().splitlines()[-15:]))
        return "\n".join(found)


def _end(record: Record) -> None:
    """End a child and return when it has ended."""
    found = look_up(record)
    if found.verdict is Verdict.ALIVE and found.pidfd is not None:
        signal.pidfd_send_signal(found.pidfd, signal.SIGKILL)
        select.select([found.pidfd], [], [], 10)
        os.close(found.pidfd)


@contextmanager
def whole(*kinds: str, extra: str = "") -> Iterator[Whole]:
    """Make a cluster whose nodes are off; whatever runs at the end is ended."""
    with passable() as root:
        namespace = root.name
        run("ip", "netns", "add", namespace)
        try:
            ip(namespace, "link", "set", "lo", "up")
            made = Whole(root, whole_toml(kinds or ("redis",) * 3, extra), namespace)
            try:
                yield made
            finally:
                made.power_off(*made.names)
        finally:
            run("ip", "netns", "del", namespace)
