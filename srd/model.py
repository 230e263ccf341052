"""Values and errors that every part of srd may use. Imports nothing of srd.

Shapes: names are ASCII, addresses are `ipaddress` objects, times are seconds on CLOCK_BOOTTIME
unless a name ends in `_timestamp` (Unix seconds, for showing to people only).
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

IpAddress = IPv4Address | IPv6Address

# sysexits.h: what a service manager and a script can act on without reading the sentence.
EXIT_FAILURE: Final = 1
EXIT_TIMED_OUT: Final = 30  # not of sysexits.h, nor is the next one
EXIT_REFUSED: Final = 40  # srd could, and will not
EXIT_NO_PERMISSION: Final = 77
EXIT_CONFIG: Final = 78


# Where a system's programs are, whatever PATH srd itself was started with; and all that a child of srd finds set.
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLAIN_ENVIRONMENT: Final = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}


class SrdError(Exception):
    """What went wrong, on which object, and what to do about it, as one sentence for the user.

    `operation` is a verb phrase ("read the bundle"), `subject` the object ("/etc/srd/node.key"),
    `reason` what is wrong with it, `remedy` what to do. `exit_status` is that of a command which ends with this error.
    """

    exit_status: int = EXIT_FAILURE

    def __init__(self, operation: str, subject: str, reason: str, remedy: str = "") -> None:
        super().__init__(operation, subject, reason, remedy)
        self.operation = operation
        self.subject = subject
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        where = f" {self.subject}" if self.subject else ""
        todo = f"; {self.remedy}" if self.remedy else ""
        return f"cannot {self.operation}{where}: {self.reason}{todo}"


class ConfigError(SrdError):
    """Something that the operator wrote or placed is wrong; nothing was started or changed."""

    exit_status = EXIT_CONFIG


class NoAnswerError(SrdError):
    """Nobody answers there, or not in time."""


class PermissionRefusedError(SrdError):
    """The process lacks a right that the operation needs."""

    exit_status = EXIT_NO_PERMISSION


class TimedOutError(SrdError):
    """What was asked for is under way, and not done within the time that was given."""

    exit_status = EXIT_TIMED_OUT


class RefusedError(SrdError):
    """What was asked for is possible and would do harm now."""

    exit_status = EXIT_REFUSED


class Secret:
    """A string that never shows itself: not in a repr, an f-string, a log, JSON or a pickle.

    `reveal()` is the one way to read it, so a search for that word finds every place where a secret leaves the type.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __str__(self) -> str:
        return "(hidden)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> str:
        msg = "a Secret cannot be pickled"
        raise TypeError(msg)


# What one srd asks of another, or answers: plain values by name.
Body = Mapping[str, str | int | float | bool | None]
# (peer, topic, body, seconds) -> its answer, or SrdError
AskPeer = Callable[[str, str, Body, float], Awaitable[Body]]


class NodeKind(enum.StrEnum):
    """What a mesh member runs."""

    REDIS = "redis"
    SENTINEL = "sentinel"
    CLIENT = "client"


class Service(enum.StrEnum):
    """The child programs, in the order in which they start."""

    REDIS = "redis"
    SENTINEL = "sentinel"
    STUNNEL = "stunnel"


class Role(enum.StrEnum):
    """What a node's redis is to the cluster; `unknown` until redis has said so."""

    PRIMARY = "primary"
    REPLICA = "replica"
    UNKNOWN = "unknown"


class IpsecMode(enum.StrEnum):
    """Whether traffic between nodes is protected by ESP; `off` is loud wherever health is shown."""

    ESP = "esp"
    OFF = "off"


class Suite(enum.StrEnum):
    """An AEAD for ESP, by its kernel name (crypto/seqiv.c templates; RFC 4106, RFC 7634). ICV 128 bits."""

    AES_256_GCM = "rfc4106(gcm(aes))"
    CHACHA20_POLY1305 = "rfc7539esp(chacha20,poly1305)"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An IP address and a TCP port."""

    address: IpAddress
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)  # noqa: PLR2004 - IP version
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Secrets:
    """The passwords of a cluster, the same on every node; made by `srd init`, kept in the bundle's secrets.toml."""

    redis_password: Secret  # the application's: redis user `default`
    replication_password: Secret  # redis user `replica`, by which replicas follow a primary
    sentinel_password: Secret  # redis user `sentinel`, and what sentinels ask of one another and of clients
    srd_password: Secret  # redis user `srd`, the only administrator


# Of a node's bundle beside cluster.toml; what each is, srd/trust/bundle.py says.
BUNDLE_FILES: Final = ("ca.crt", "node.crt", "node.key", "tls.crt", "tls.key", "secrets.toml")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where srd keeps what it is given (config), what it must keep (state), what a boot forgets (run), and logs.

    `credentials` are files of the bundle that the service manager hands over instead, by name. They are as they were
    when this srd was started, and in no other process' sight: a child gets a copy, never their path.
    """

    config_dir: Path
    state_dir: Path
    run_dir: Path
    log_dir: Path
    credentials: Mapping[str, Path] = field(default_factory=dict)

    @property
    def cluster_file(self) -> Path:
        """The cluster.toml of this node's bundle."""
        return self.config_dir / "cluster.toml"

    @property
    def last_good_file(self) -> Path:
        """A copy of the cluster.toml that srd runs by or has last run by."""
        return self.state_dir / "cluster.toml"

    @property
    def control_socket(self) -> Path:
        """Where the command line finds the daemon."""
        return self.run_dir / "control.sock"

    def bundle_file(self, name: str) -> Path:
        """Return where a file of this node's bundle is."""
        return self.credentials.get(name, self.config_dir / name)

    def service_dir(self, service: Service) -> Path:
        """Return the directory that belongs to a service's own user: its configuration and data.

        stunnel keeps nothing: its copies of certificate and key are where a boot forgets them, in memory.
        """
        return (self.run_dir if service is Service.STUNNEL else self.state_dir) / service

    def log_file(self, service: Service) -> Path:
        """Return the file that a service's output is appended to."""
        return self.log_dir / f"{service}.log"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate says its holder is: SAN URI `srd://CLUSTER/NODE`, IP SANs, the kind of node.

    `serial` and `not_after` (Unix seconds) are the certificate's, 0 before there is one.
    """

    cluster: str
    node: str
    kind: NodeKind
    addresses: tuple[IpAddress, ...]
    serial: int = 0
    not_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a node proves its identity with, as PEM: certificate, private key, and the authority's certificate."""

    identity: Identity
    certificate: bytes
    key: Secret
    authority: bytes


# A pause is for work that somebody does, and ends by itself, so that nobody forgets it for ever.
LONGEST_PAUSE_SECONDS: Final = 7 * 86400.0
CLOCK_TOLERANCE_SECONDS: Final = 3600.0  # between two nodes


@dataclass(frozen=True, slots=True)
class Pause:
    """Until when (Unix seconds, 0: not at all) a person wants srd to do nothing by itself, on any node.

    Of two wishes the one with the greater `number` counts: the Unix second in which it was said, or one more than that
    of the last one that was known.
    """

    number: int = 0
    until: float = 0.0

    def holds(self, wall_clock: float) -> bool:
        """Whether it is that time."""
        return self.until > wall_clock and self.is_possible(wall_clock)

    def is_possible(self, wall_clock: float) -> bool:
        """Whether it ends as soon as any pause does; otherwise a clock was, or is, wrong, and it does not count."""
        return self.until <= wall_clock + LONGEST_PAUSE_SECONDS + CLOCK_TOLERANCE_SECONDS


NO_PAUSE: Final = Pause()
