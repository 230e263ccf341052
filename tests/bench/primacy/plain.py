"""Redis, Sentinel, stunnel and haproxy as the manual has them set up, and nobody who looks after them.

Where it is not the manual's word for word:
* no IPsec: racoon is in no Debian since 11. What a failover takes does not depend on it;
* masterauth on every node: the first one has none there, and could not follow who replaces it;
* each redis and sentinel is told its own address, which on one machine's loopback it cannot know;
* quorum is a majority, as with the manual's three nodes;
* haproxy's file, which is missing there, is the check that HAProxy published for redis: once a second, three in a row.
"""

from __future__ import annotations

import subprocess
import time
from typing import Final

from support.patience import wait
from support.sentinels import PROGRAM

from bench.primacy.places import BALANCER, CLIENT, Place

PASSWORD: Final = "password"
REDIS_CONF: Final = """
bind {address}
port 6379
dir {directory}
requirepass password
masterauth password
bind-source-addr {address}
replica-announce-ip {address}
"""
SENTINEL_CONF: Final = """
bind {address}
port 26379
dir {directory}
bind-source-addr {address}
sentinel announce-ip {address}
sentinel monitor master {primary} 6379 {quorum}
sentinel auth-pass master password
sentinel down-after-milliseconds master 5000
sentinel failover-timeout master 5000
"""
TLS_CONF: Final = """
foreground = yes
pid =
sslVersion = TLSv1.2
options = NO_SSLv2
options = NO_SSLv3
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
"""
STUNNEL_CONF: Final = f"""{TLS_CONF}
key = {{root}}/snakeoil.key
cert = {{root}}/snakeoil.pem
[redis]
accept = {{address}}:6380
connect = {{address}}:6379
"""
CLIENT_CONF: Final = f"""{TLS_CONF}
[redis]
client = yes
accept = 127.0.0.1:6379
connect = {{balancer}}:6379
"""
HAPROXY_CFG: Final = r"""
defaults
    mode tcp
    timeout connect 4s
    timeout server 24d
    timeout client 24d
frontend redis
    bind {balancer}:6379
    default_backend primary
backend primary
    option tcp-check
    tcp-check connect ssl
    tcp-check send AUTH\ password\r\n
    tcp-check expect string +OK
    tcp-check send PING\r\n
    tcp-check expect string +PONG
    tcp-check send info\ replication\r\n
    tcp-check expect string role:master
    tcp-check send QUIT\r\n
    tcp-check expect string +OK
"""
# A sentinel that has voted for another leaves the next failover alone for twice the failover-timeout.
CALM_SECONDS: Final = 11.0


class Plain:
    """The manual's cluster; it is up once it is made."""

    name = "plain Sentinel"
    password = PASSWORD

    def __init__(self, place: Place, extra: str = "") -> None:
        self._place = place
        self._root = place.root / "plain"
        self._root.mkdir(parents=True)
        self._redis: dict[str, int] = {}
        self._changed = 0.0
        self._certificate()
        first = place.address(place.nodes[0])
        for node in place.nodes:
            following = "" if node == place.nodes[0] else f"slaveof {first} 6379\n"
            self._write(node, "redis.conf", REDIS_CONF + following + extra)
            self._write(node, "sentinel.conf", SENTINEL_CONF)
            self._write(node, "stunnel.conf", STUNNEL_CONF)
        self._balancer()
        for node in place.nodes:
            self.revive(node)
        wait(self._unlinked)
        for node in place.nodes:
            self._run(node, "sentinel", "redis-sentinel", "sentinel.conf")
            place.start(f"plain-stunnel-{node}", node, "stunnel4", str(self._root / node / "stunnel.conf"))
        place.start("plain-haproxy", BALANCER, "haproxy", "-db", "-f", str(self._root / "haproxy.cfg"))
        place.start("plain-client", CLIENT, "stunnel4", str(self._root / "client.conf"))

    def _certificate(self) -> None:
        """Make a certificate like the one that Debian's ssl-cert leaves in /etc/ssl."""
        files = ("-keyout", str(self._root / "snakeoil.key"), "-out", str(self._root / "snakeoil.pem"))
        command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=snakeoil", *files)
        subprocess.run(command, check=True, capture_output=True)

    def _write(self, node: str, name: str, template: str) -> None:
        directory = self._root / node
        directory.mkdir(exist_ok=True)
        text = template.format(
            root=self._root,
            directory=directory,
            address=self._place.address(node),
            primary=self._place.address(self._place.nodes[0]),
            quorum=len(self._place.nodes) // 2 + 1,
        )
        (directory / name).write_text(text)

    def _balancer(self) -> None:
        balancer = self._place.address(BALANCER)
        servers = "".join(
            f"    server {node} {self._place.address(node)}:6380 check verify none inter 1s\n"
            for node in self._place.nodes
        )
        (self._root / "haproxy.cfg").write_text(HAPROXY_CFG.replace("{balancer}", balancer) + servers)
        (self._root / "client.conf").write_text(CLIENT_CONF.format(balancer=balancer))

    def _run(self, node: str, what: str, name: str, conf: str) -> int:
        # Some distributions keep one binary only, which looks at the name by which it was called.
        command = ("bash", "-c", f'exec -a {name} {PROGRAM} "$0"', str(self._root / node / conf))
        return self._place.start(f"plain-{what}-{node}", node, *command)

    def _ask(self, node: str, port: int, *words: str) -> list[str]:
        command = ("redis-cli", "--no-auth-warning", "-h", self._place.address(node), "-p", str(port))
        password = ("-a", PASSWORD) if port == 6379 else ()
        done = subprocess.run(
            self._place.command(node, *command, *password, *words), check=False, capture_output=True, text=True
        )
        return done.stdout.split()

    def _unlinked(self) -> str:
        followers = sum("connected" in self._ask(node, 6379, "role") for node in self._place.nodes)
        return "" if followers == len(self._place.nodes) - 1 else f"{followers} replicas are linked"

    def _lacks(self) -> str:
        others = str(len(self._place.nodes) - 1)
        named = set()
        for node in self._place.nodes:
            words = self._ask(node, 26379, "sentinel", "master", "master")
            master = dict(zip(words[::2], words[1::2], strict=False))
            if (master.get("num-slaves"), master.get("num-other-sentinels")) != (others, others):
                return f"the sentinel of {node} does not know all: {master}"
            if master.get("flags") != "master":
                return f"the sentinel of {node} says {master.get('flags')}"
            named.add(master["ip"])
        if len(named) > 1:
            return f"sentinels name {named}"
        if time.monotonic() < self._changed + CALM_SECONDS:
            return "a sentinel that has just voted would not vote again"
        return self._unlinked()

    def wait_whole(self) -> None:
        """Wait until all sentinels agree, all replicas follow, and a failover would be the first one."""
        wait(self._lacks, between=0.5)

    def primary(self) -> str:
        address = self._ask(self._place.nodes[0], 26379, "sentinel", "get-master-addr-by-name", "master")[0]
        return next(node for node in self._place.nodes if self._place.address(node) == address)

    def kill(self, node: str) -> float:
        """End a node's redis by SIGKILL; return when."""
        moment = time.monotonic()
        self._place.kill(self._redis.pop(node))
        return moment

    def changed(self) -> None:
        """Take note that a failover has just been."""
        self._changed = time.monotonic()

    def revive(self, node: str) -> None:
        """Start a node's redis, as a service manager or a person would."""
        self._redis[node] = self._run(node, "redis", "redis-server", "redis.conf")

    def switch_over(self) -> None:
        """Move the primary as Sentinel's users do."""
        assert self._ask(self._place.nodes[0], 26379, "sentinel", "failover", "master") == ["OK"]
