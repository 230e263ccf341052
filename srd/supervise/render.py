"""The configuration files of the children as text. Pure: the same values give the same text.

redis.conf is rendered whole at every start, because Sentinel has CONFIG REWRITE written into it and the last line of a
directive wins. sentinel.conf holds Sentinel's votes and what it learnt; losing that can give two votes in one epoch, so
it is rendered once, for a node that has none, and anew only where a doctor has seen to it that nobody stands for
election (ha/rebuild.py).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

import jinja2

from srd.cluster import MIN_REPLICAS_MAX_LAG, Config, Node
from srd.model import ConfigError, Endpoint, IpAddress, Secret, Secrets

# 24 days: the largest number of seconds that stunnel can hand to poll(2), which takes an int of milliseconds.
_IDLE_TIMEOUT_SECONDS: Final = (2**31 - 1) // 1000

_HELLO_PREFIX: Final = "__sentinel__"
# No blank and no quote: Sentinel writes `auth-pass` back without quoting it (sentinel.c, 7.0).
_PASSWORD: Final = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")

_APPLICATION_COMMANDS: Final = ("+@all", "-@admin", "-@dangerous", "+info", "+role", "+keys", "+sort", "+sort_ro")
_REPLICA_COMMANDS: Final = ("+psync", "+replconf", "+ping")
_SENTINEL_COMMANDS: Final = (
    "+multi",
    "+slaveof",
    "+ping",
    "+exec",
    "+subscribe",
    "+config|rewrite",
    "+role",
    "+publish",
    "+info",
    "+client|setname",
    "+client|kill",
    "+script|kill",
)


def _quoted(value: object) -> str:
    """Quote an argument for redis' configuration parser (sds.c, sdssplitargs)."""
    out = []
    for byte in str(value).encode():
        character = chr(byte)
        if character in '"\\':
            out.append("\\" + character)
        elif " " <= character <= "~":
            out.append(character)
        else:
            out.append(f"\\x{byte:02x}")
    return '"' + "".join(out) + '"'


_environment: Final = jinja2.Environment(
    loader=jinja2.PackageLoader("srd.supervise", "templates"),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # noqa: S701 - not HTML
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters["quoted"] = _quoted


def redis_conf(config: Config, node: Node, secrets: Secrets, directory: Path, primary: Endpoint | None) -> str:
    """Render redis.conf of a node; `primary` is whom it follows, None makes it the primary.

    Nobody is to promote what may be old: a replica says so until it has been in step, or was found to have most
    (ha/coldstart.py), and a primary, of whom no sentinel asks it, for when it is replaced.
    """
    return _environment.get_template("redis.conf.j2").render(
        addresses=_listen_addresses(config, node),
        port=config.redis.port,
        source=_source_address(config, node),
        directory=directory,
        application_password=_password(secrets.redis_password, "redis_password"),
        users=users(config, secrets),
        replication_password=_password(secrets.replication_password, "replication_password"),
        announce=node.address,
        primary=primary,
        min_replicas=config.min_replicas_to_write,
        max_lag=MIN_REPLICAS_MAX_LAG,
        replicas=max(len(config.redis_nodes) - 1, 0),
        settings=[(name, '""' if value == "" else value) for name, value in config.redis.settings.items()],
    )


def sentinel_conf(config: Config, node: Node, secrets: Secrets, directory: Path, primary: Endpoint) -> str:
    """Render the first sentinel.conf of a node; `primary` is who is primary now."""
    return _environment.get_template("sentinel.conf.j2").render(
        addresses=_listen_addresses(config, node),
        port=config.sentinel.port,
        source=_source_address(config, node),
        directory=directory,
        sentinel_password=_password(secrets.sentinel_password, "sentinel_password"),
        announce=node.address,
        master=config.sentinel.master,
        primary=primary,
        quorum=config.quorum,
        down_after_ms=round(config.sentinel.down_after * 1000),
        failover_timeout_ms=round(config.sentinel.failover_timeout * 1000),
        parallel_syncs=config.parallel_syncs,
    )


def stunnel_conf(config: Config, node: Node, directory: Path) -> str:
    """Render stunnel.conf of a node; `directory` holds tls.crt, tls.key and ca.crt, readable by stunnel's user."""
    return _environment.get_template("stunnel.conf.j2").render(
        addresses=node.addresses,
        directory=directory,
        idle_timeout=_IDLE_TIMEOUT_SECONDS,
        tls_port=config.tls.port,
        redis_port=config.redis.port,
    )


def users(config: Config, secrets: Secrets) -> tuple[str, ...]:
    """Return the `user` lines of redis.conf: who may do what. Passwords stand there as digests."""
    channels = (*application_channels(), *config.redis.app_channels)
    commands = (*_APPLICATION_COMMANDS, *(f"+{command}" for command in config.redis.app_commands))
    return (
        _user("default", secrets.redis_password, "~*", "resetchannels", *(f"&{p}" for p in channels), *commands),
        _user("replica", secrets.replication_password, "resetchannels", *_REPLICA_COMMANDS),
        _user("sentinel", secrets.sentinel_password, "allchannels", *_SENTINEL_COMMANDS),
        _user("srd", secrets.srd_password, "~*", "allchannels", "+@all"),
    )


def application_channels() -> tuple[str, ...]:
    """Return globs that match every channel but those that begin as Sentinel's do.

    redis has no pattern that denies, so each glob takes the names that first differ from the prefix at one place.
    """
    return tuple(f"{_HELLO_PREFIX[:index]}[^{letter}]*" for index, letter in enumerate(_HELLO_PREFIX))


def _user(name: str, password: Secret, *rules: str) -> str:
    digest = hashlib.sha256(_password(password, f"password of user {name}").encode()).hexdigest()
    return " ".join(("user", name, "on", f"#{digest}", *rules))


def _password(secret: Secret, name: str) -> str:
    value = secret.reveal()
    if not _PASSWORD.fullmatch(value):
        raise ConfigError("use", name, "a password is 8 to 512 of the characters A-Z a-z 0-9 . _ ~ + / = -")
    return value


def _listen_addresses(config: Config, node: Node) -> tuple[str, ...]:
    own = tuple(str(address) for address in node.addresses)
    return (*own, "127.0.0.1") if config.listen_localhost and "127.0.0.1" not in own else own


def _source_address(config: Config, node: Node) -> IpAddress | None:
    """Return the address to connect to other nodes from: the one that they know, and that IPsec protects.

    Sentinel cannot connect at all from an address of another family, so none is fixed where the families are mixed.
    """
    families = {other.address.version for other in config.nodes}
    return node.address if len(families) == 1 else None
