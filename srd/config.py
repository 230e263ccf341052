"""cluster.toml -> `Config`: one file, the same on every node, checked as a whole before anything acts on it.

Strict: an unknown key, a wrong type and an impossible value are errors that name the dotted key and its line.
Pure but for `load_config`, which reads the one file that it is given.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from srd.cluster import (
    DEFAULT_PRIORITY,
    KEYING_CLIENT_PORTS,
    KEYING_PORT,
    MIN_REPLICAS_MAX_LAG,
    NEVER_PRIORITY,
    PREFERRED_PRIORITY,
    Bypass,
    Config,
    HaproxyAgentSection,
    HttpSection,
    IpsecSection,
    Node,
    RedisSection,
    Section,
    SentinelSection,
    TlsSection,
    TrustSection,
)
from srd.model import ConfigError, IpAddress, IpsecMode, NodeKind
from srd.refusal import Refusal

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_BYPASS = re.compile(r"(tcp|udp)/(\d{1,5})")
_HELLO_CHANNEL = "__sentinel__:hello"


class _RawNode(Section, frozen=True):
    name: str
    addresses: list[str]
    kind: NodeKind = NodeKind.REDIS
    priority: Annotated[int, Meta(gt=PREFERRED_PRIORITY, le=1000)] = DEFAULT_PRIORITY
    nofailover: bool = False
    noloadbalance: bool = False


class _RawFile(Section, frozen=True):
    cluster: str
    node: list[_RawNode]
    listen_localhost: bool = True
    redis: RedisSection = RedisSection()
    sentinel: SentinelSection = SentinelSection()
    tls: TlsSection = TlsSection()
    ipsec: IpsecSection = IpsecSection()
    http: HttpSection = HttpSection()
    haproxy_agent: HaproxyAgentSection = HaproxyAgentSection()
    trust: TrustSection = TrustSection()


# What srd decides itself; a second line in redis.conf would win over srd's, silently.
_OWNED_DIRECTIVES: Final = frozenset({
    "aclfile", "appenddirname", "appendfilename", "bind", "daemonize", "dbfilename", "dir", "enable-debug-command",
    "enable-module-command", "enable-protected-configs", "include", "logfile", "masterauth", "masteruser",
    "min-replicas-max-lag", "min-replicas-to-write", "min-slaves-max-lag", "min-slaves-to-write", "pidfile", "port",
    "protected-mode", "rename-command", "replica-announce-ip", "replica-announce-port", "replica-priority", "replicaof",
    "requirepass", "slave-priority", "slaveof", "supervised", "syslog-enabled", "tls-port", "unixsocket", "user",
})  # fmt: skip


def load_config(path: Path) -> Config:
    """Read and check a cluster.toml; `ConfigError` says what is wrong and on which line."""
    return parse_config(read_text(path, "it is in the bundle that srd init made for this node"), str(path))


def read_text(path: Path, remedy: str = "") -> str:
    """Read a file of UTF-8 text; `ConfigError` says why that cannot be, and the remedy."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
        raise ConfigError("read", str(path), reason, remedy) from error


def node_entry(name: str, addresses: Sequence[str], kind: NodeKind = NodeKind.REDIS) -> str:
    """Return a node's entry as text, whatever the values are: `parse_config` judges them.

    A JSON string is a TOML basic string but for surrogate pairs, which TOML does not have.
    """
    values = {"name": name, "addresses": list(addresses)} | ({} if kind is NodeKind.REDIS else {"kind": str(kind)})
    return "\n[[node]]\n" + "".join(f"{key} = {quoted(value)}\n" for key, value in values.items())


def quoted(value: str | Sequence[str]) -> str:
    """Return a value as TOML has it."""
    return json.dumps(value, ensure_ascii=False)


def parse_config(text: str, origin: str) -> Config:
    """Check the text of a cluster.toml; `origin` is how errors name the file."""
    refuse = Refusal(text, origin)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("read", origin, f"it is not TOML: {error}") from error
    try:
        raw = msgspec.convert(document, type=_RawFile, strict=True)
    except msgspec.ValidationError as error:
        raise refuse.invalid(error) from error
    return _Checker(raw, refuse).config()


class _Checker:
    """Checks what types alone cannot say, in the order in which a person reads the file."""

    def __init__(self, raw: _RawFile, refuse: Refusal) -> None:
        self.raw = raw
        self.refuse = refuse

    def config(self) -> Config:
        raw = self.raw
        self._name("cluster", raw.cluster)
        nodes = self._nodes()
        bypass = self._bypass()
        self._ports(bypass)
        config = Config(
            cluster=raw.cluster,
            nodes=nodes,
            listen_localhost=raw.listen_localhost,
            redis=raw.redis,
            sentinel=raw.sentinel,
            tls=raw.tls,
            ipsec=raw.ipsec,
            http=raw.http,
            haproxy_agent=raw.haproxy_agent,
            bypass=bypass,
            revoked=self._revoked(),
        )
        self._arbiters(config)
        self._sentinel(config)
        self._redis()
        return config

    def _name(self, key: str, value: str) -> None:
        if not _NAME.fullmatch(value):
            raise self.refuse.at(key, f"{value!r} is not a name: lower-case letters, digits and -, at most 63")

    def _nodes(self) -> tuple[Node, ...]:
        nodes = tuple(self._node(index, node) for index, node in enumerate(self.raw.node))
        if not any(node.kind is NodeKind.REDIS for node in nodes):
            raise self.refuse.at("node", 'no node of kind = "redis"', "name at least one")
        owners: dict[object, int] = {}
        for index, node in enumerate(nodes):
            for what, key in ((node.name, "name"), *((address, "addresses") for address in node.addresses)):
                first = owners.setdefault(what, index)
                if first != index:
                    raise self.refuse.at(f"node[{index}].{key}", f"{what} is node {nodes[first].name!r} already")
        families = {address.version for address in nodes[0].addresses}
        for index, node in enumerate(nodes):
            if {address.version for address in node.addresses} != families:
                raise self.refuse.at(
                    f"node[{index}].addresses",
                    f"{node.name} and {nodes[0].name} do not have the same IP families",
                    "give every node an IPv4 address, or an IPv6 address, or both",
                )
        return nodes

    def _node(self, index: int, raw: _RawNode) -> Node:
        key = f"node[{index}]"
        self._name(f"{key}.name", raw.name)
        addresses = tuple(self._address(f"{key}.addresses", text) for text in raw.addresses)
        if not addresses:
            raise self.refuse.at(f"{key}.addresses", "no address")
        for version, count in Counter(address.version for address in addresses).items():
            if count > 1:
                raise self.refuse.at(f"{key}.addresses", f"{count} IPv{version} addresses; one per family at most")
        priority = NEVER_PRIORITY if raw.nofailover else raw.priority
        return Node(raw.name, raw.kind, addresses, priority, raw.noloadbalance)

    def _address(self, key: str, text: str) -> IpAddress:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise self.refuse.at(key, f"{text!r} is not an IP address", "host names are not taken here") from None
        unusable = address.is_multicast or address.is_unspecified or address.is_link_local
        if unusable or (address.is_loopback and self.raw.ipsec.mode is IpsecMode.ESP):
            raise self.refuse.at(key, f"{text} is not an address that other nodes can reach")
        return address

    def _bypass(self) -> tuple[Bypass, ...]:
        protected = {self.raw.redis.port: "redis.port", self.raw.sentinel.port: "sentinel.port"}
        found = []
        for text in self.raw.ipsec.bypass:
            match = _BYPASS.fullmatch(text)
            if not match or not 1 <= int(match[2]) <= 65535:  # noqa: PLR2004 - the largest TCP port
                raise self.refuse.at("ipsec.bypass", f"{text!r} is not of the form tcp/22 or udp/123")
            port = int(match[2])
            if match[1] == "tcp" and port in protected:
                raise self.refuse.at("ipsec.bypass", f"{text} is {protected[port]}, which is never in plaintext")
            found.append(Bypass("tcp" if match[1] == "tcp" else "udp", port))
        return tuple(found)

    def _revoked(self) -> frozenset[int]:
        found = set()
        for text in self.raw.trust.revoked:
            serial = text.replace(":", "")
            if not re.fullmatch(r"[0-9A-Fa-f]{1,40}", serial):
                raise self.refuse.at("trust.revoked", f"{text!r} is not a certificate's serial number in hexadecimal")
            found.add(int(serial, 16))
        return frozenset(found)

    def _ports(self, bypass: tuple[Bypass, ...]) -> None:
        raw = self.raw
        taken = {KEYING_PORT: "the keying channel"} | dict.fromkeys(KEYING_CLIENT_PORTS, "the keying channel")
        for entry in bypass:
            if entry.port in taken and entry.protocol == "tcp":
                raise self.refuse.at("ipsec.bypass", f"{entry} belongs to the keying channel, which has its own")
        ports = (
            ("redis.port", raw.redis.port),
            ("sentinel.port", raw.sentinel.port),
            ("tls.port", raw.tls.port),
            ("http.port", raw.http.port),
            ("haproxy_agent.port", raw.haproxy_agent.port),
        )
        owners: dict[int, str] = {}
        for key, port in ports:
            if port in taken:
                raise self.refuse.at(key, f"port {port} is taken by {taken[port]}")
            other = owners.setdefault(port, key)
            if other != key:
                # One of the two may be a default that the file does not show.
                here, there = (key, other) if self.refuse.stands(key) else (other, key)
                raise self.refuse.at(here, f"port {port} is {there} too")

    def _arbiters(self, config: Config) -> None:
        """Refuse arbiters by which the fence would need every replica for every write, or would not hold."""
        replicas = len(config.redis_nodes) - 1
        arbiters = len(config.voters) - len(config.redis_nodes)
        if arbiters > 1 and arbiters >= replicas:
            raise self.refuse.at(
                "node",
                f"{arbiters} arbiters (kind = sentinel) beside {replicas + 1} redis nodes: so that a primary that is "
                f"cut off takes no writes, it would have to demand every replica for every write",
                "have one arbiter beside two redis nodes, or fewer arbiters than replicas; three redis nodes need none",
            )

    def _sentinel(self, config: Config) -> None:
        sentinel = config.sentinel
        if not re.fullmatch(r"[A-Za-z0-9._-]+", sentinel.master):  # sentinel.c: the same set of characters
            raise self.refuse.at("sentinel.master", f"{sentinel.master!r} is not a name that Sentinel takes")
        voters = len(config.voters)
        if config.quorum > voters:
            raise self.refuse.at(
                "sentinel.quorum",
                f"{config.quorum} cannot be reached: {voters} nodes run a sentinel",
                "leave it out",
            )
        if config.quorum < config.majority:
            # After SENTINEL RESET a lone sentinel is its own majority; the quorum is the only guard left then.
            raise self.refuse.at(
                "sentinel.quorum", f"{config.quorum} is less than a majority of {voters}", "leave it out"
            )
        least = MIN_REPLICAS_MAX_LAG + 2
        if sentinel.down_after < least:
            raise self.refuse.at(
                "sentinel.down_after",
                f"{sentinel.down_after:g} s; a primary that is cut off takes writes for up to {least} s",
                f"use {least} or more",
            )

    def _redis(self) -> None:
        for name in self.raw.redis.settings:
            if name.lower() in _OWNED_DIRECTIVES or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise self.refuse.at(f"redis.settings.{name}", "srd sets this itself, or redis has no such directive")
        for name, value in self.raw.redis.settings.items():
            if isinstance(value, str) and re.search(r"[\x00-\x1f]", value):
                raise self.refuse.at(f"redis.settings.{name}", "a value is one line")
        for command in self.raw.redis.app_commands:
            if not re.fullmatch(r"[a-z][a-z0-9_.|-]*", command):
                raise self.refuse.at("redis.app_commands", f"{command!r} is not a command's name")
        for pattern in self.raw.redis.app_channels:
            if not re.fullmatch(r"[\x21-\x7e]+", pattern) or _may_match(pattern, _HELLO_CHANNEL):
                raise self.refuse.at(
                    "redis.app_channels",
                    f"{pattern!r} would open {_HELLO_CHANNEL}, by which anyone can force a failover",
                    "name narrower patterns",
                )


def _may_match(pattern: str, text: str) -> bool:
    """Whether a redis glob can match `text`; every bracket counts as any character, so it errs towards yes."""
    expression = ""
    for part in re.findall(r"\[[^\]]*\]?|\\.|.", pattern):
        if part == "*":
            expression += ".*"
        elif part == "?" or part.startswith("["):
            expression += "."
        else:
            expression += re.escape(part[-1])
    return re.fullmatch(expression, text) is not None
