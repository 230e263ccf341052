"""What is observed: one writer per key, and immutable snapshots for every reader.

Readers never ask the world: they take `Store.view()`, which is whole and never changes afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from srd.changes import RoleChange
from srd.cluster import Config, Node
from srd.findings import Finding
from srd.model import NO_PAUSE, Endpoint, IpAddress, NodeKind, Pause, Role, Service, Suite


class ChildState(enum.StrEnum):
    """Where a child is in its life; the table of transitions is in supervise/machine.py."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"
    BACKOFF = "backoff"


class Symptom(enum.StrEnum):
    """What is the matter with a child that runs and does not answer; supervise/pulse.py tells them apart."""

    SLOW = "slow"  # it uses the CPU, or waits for a disk
    HUNG = "hung"  # it does neither
    STOPPED = "stopped"  # by SIGSTOP
    TRACED = "traced"  # by a debugger


@dataclass(frozen=True, slots=True)
class Child:
    """One supervised program.

    `started`, `retry_at` and `lately`, when srd has seen it end unasked, are CLOCK_BOOTTIME seconds.
    """

    state: ChildState
    pid: int | None = None
    started: float | None = None
    ready_since: float | None = None
    adopted: bool = False
    restarts: int = 0
    exits: Mapping[str, int] = field(default_factory=dict)
    last_exit: str | None = None
    retry_at: float | None = None
    waiting_for: str | None = None
    complaint: str | None = None  # what its probe says, of one that runs
    outdated: bool = False  # it was started by another cluster.toml than srd's
    symptom: Symptom | None = None
    lately: tuple[float, ...] = ()

    @property
    def in_words(self) -> str:
        """Its state, and what keeps it from being ready, as far as that is known."""
        if self.waiting_for:
            return f"{self.state}, it waits for {self.waiting_for}"
        return f"{self.state}: {self.complaint}" if self.complaint else str(self.state)


@dataclass(frozen=True, slots=True)
class LinkLeg:
    """One address pair of a link and its pair of SAs. SPIs are host integers, ages come from `Link.established`."""

    local: IpAddress
    remote: IpAddress
    spi_in: int | None
    spi_out: int | None
    policies: bool
    bytes_in: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    packets_out: int = 0
    replay_drops: int = 0
    integrity_failures: int = 0
    worn: bool = False  # an SA has carried as much as one key should


@dataclass(frozen=True, slots=True)
class Link:
    """The protection between this node and one peer, as the kernel has it."""

    peer: str
    legs: tuple[LinkLeg, ...] = ()
    suite: Suite | None = None
    suite_reason: str | None = None

    @property
    def keyed(self) -> bool:
        """Both SAs are installed, the outbound policy pinned to the outbound one, on every leg."""
        return bool(self.legs) and all(leg.spi_in and leg.spi_out for leg in self.legs)

    @property
    def protected(self) -> bool:
        """It is keyed, and every policy that makes use of the keys stands."""
        return self.keyed and all(leg.policies for leg in self.legs)

    @property
    def worn(self) -> bool:
        """New keys are due before their time: some SA is past the soft limit of its bytes or packets."""
        return any(leg.worn for leg in self.legs)


@dataclass(frozen=True, slots=True)
class Channel:
    """The keying connection to one peer. `since`, `established` and `renewal` are CLOCK_BOOTTIME seconds.

    `renewal` is when this end asks for new keys at the latest; the other end may sooner.
    """

    peer: str
    connected: bool
    since: float
    generation: int = 0
    established: float | None = None
    group: str | None = None
    suite: Suite | None = None
    suite_reason: str | None = None
    keyings: int = 0
    failures: int = 0
    last_error: str | None = None
    renewal: float | None = None


@dataclass(frozen=True, slots=True)
class PeerReport:
    """What a peer's srd last said of itself over the keying channel; `received` is CLOCK_BOOTTIME seconds."""

    node: str
    received: float
    version: str
    initialized: bool
    role: Role
    healthy: bool
    offset: int | None = None
    drained: bool = False
    pause: Pause = NO_PAUSE
    replid: str = ""  # of the stream that `offset` is in


@dataclass(frozen=True, slots=True)
class ReplicaOf:
    """One replica as its primary sees it."""

    endpoint: Endpoint
    state: str
    offset: int
    lag_seconds: int


@dataclass(frozen=True, slots=True)
class Redis:
    """The local redis as it last answered; `answered` is CLOCK_BOOTTIME seconds of when it was asked."""

    answered: float
    version: str
    run_id: str
    role: Role
    loading: bool
    replid: str
    offset: int
    uptime_seconds: int
    dbsize: int
    min_replicas_to_write: int
    persistence: bool
    primary: Endpoint | None = None
    link_up: bool = False
    sync_in_progress: bool = False
    replicas: tuple[ReplicaOf, ...] = ()
    ping_seconds: float = 0.0
    priority: int = 100  # replica-priority: the lower, the sooner a sentinel promotes it; 0 never
    unsaved: str | None = None  # which of its files it could not write when it last tried
    rewriting: bool = False  # its append-only file is being written anew, or is about to
    rewrite_scheduled: bool = False  # it is about to
    rewritten: bool = True  # and the last time that succeeded
    rewrites: int = 0  # how often that was begun since it was started
    log_bytes: int | None = None  # how much it takes the append-only files to be; None if it has none
    promoted_at_offset: int | None = None  # up to where it has followed another primary, before it became one itself

    @property
    def online(self) -> int:
        """How many replicas get its stream as it comes."""
        return sum(1 for replica in self.replicas if replica.state == "online")

    @property
    def in_step(self) -> bool:
        """Whether it is a replica that has all that its primary has, or is about to."""
        return self.role is Role.REPLICA and self.link_up and not self.sync_in_progress


class DiskTrouble(enum.StrEnum):
    """Why a directory cannot be written to."""

    FULL = "full"
    NO_INODES = "no_inodes"
    READ_ONLY = "read_only"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class SentinelAnswer:
    """What one node's sentinel last said; `asked` is CLOCK_BOOTTIME seconds of when it was asked, not of the answer.

    `took` is for how many seconds it was waited for. `down_after`, `unanswered` and the vote are of the primary that it
    shows, which is the former one while a failover ends; `unanswered` is the latest that it can be, by at most `took`.
    `vote` is the id of the sentinel that it has last voted for as the leader of a failover, in `vote_epoch`, and
    `vote_seen` is since when that is known. `named_since` is since when it is known to name that primary and no other;
    `former_until`, when a lease of the one whom it named before can no longer rest on it (`lease.support_ends`).
    """

    node: str
    asked: float
    primary: Endpoint | None
    epoch: int
    tilt: bool
    known_sentinels: int
    known_replicas: int
    flags: frozenset[str] = frozenset()
    quorum: int = 0
    parallel_syncs: int = 0
    failover_timeout: float = 0.0
    down_after: float = 0.0  # seconds
    unanswered: float | None = None  # CLOCK_BOOTTIME seconds of the primary's first ping that has no reply, if any
    run_id: str = ""
    vote: str | None = None
    vote_epoch: int = 0
    vote_seen: float = 0.0
    took: float = 0.0
    named_since: float = 0.0
    former_until: float = math.inf  # CLOCK_BOOTTIME seconds
    set_back: float = 0.0  # seconds by which its wall clock has gone back since it last heard that primary


@dataclass(frozen=True, slots=True)
class Lease:
    """Whether a majority of all sentinels names this node primary, and until when (CLOCK_BOOTTIME seconds).

    `heir` is the node to which this one has given what is left of it, as long as that lasts. `settled`: nobody who was
    named before can have a lease still.
    """

    held: bool
    expires: float
    agree: int
    reachable: int
    primary: Endpoint | None
    epoch: int = 0
    unanimous: bool = False
    settled: bool = False
    heir: str | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the XFRM reconciler found. `xfrm_errors` are the counters of /proc/net/xfrm_stat that are not zero.

    `udp_ports` are those of ESP in UDP that some SA is for.
    """

    policies_installed: bool
    foreign_overrides: tuple[str, ...] = ()
    drift_mended: int = 0
    xfrm_errors: Mapping[str, int] = field(default_factory=dict)
    udp_ports: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Backstop:
    """The second net outside XFRM: what keeps its rules (None: nothing here can), how often they were put back."""

    keeper: str | None
    mended: int


@dataclass(frozen=True, slots=True)
class View:
    """One whole snapshot. A field belongs to the one writer that claimed it."""

    children: Mapping[Service, Child] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    channels: Mapping[str, Channel] = field(default_factory=dict)
    peers: Mapping[str, PeerReport] = field(default_factory=dict)
    keying_refusals: int = 0
    kernel: Kernel | None = None
    backstop: Backstop | None = None
    redis: Redis | None = None
    sentinels: Mapping[str, SentinelAnswer] = field(default_factory=dict)
    # By node, since when its sentinel answers nothing: when the first question was asked that had no answer.
    silent: Mapping[str, float] = field(default_factory=dict)
    fenced: bool = False
    lease: Lease | None = None
    history: tuple[RoleChange, ...] = ()
    sentinel_events: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    certificates: Mapping[str, float] = field(default_factory=dict)
    unread: tuple[str, ...] = ()  # files of the bundle that are others than srd has taken in
    disks: Mapping[str, DiskTrouble] = field(default_factory=dict)
    kept: str | None = None  # where the last copy of redis' files is, from before it followed another primary
    initialized: bool = False
    # Whether redis was in step with a primary when the srd before this one last looked; None until that is known.
    followed: bool | None = None
    # Taken out of service by a person: no balancer leads anybody new here, and nobody makes it primary.
    drained: bool = False
    pause: Pause = NO_PAUSE
    started: float = 0.0

    @property
    def named(self) -> Endpoint | None:
        """Whom a majority of the sentinels names primary."""
        return self.lease.primary if self.lease is not None else None


class Store:
    """Holds the current `View`; every key has exactly one writer."""

    def __init__(self, started: float) -> None:
        self._view = View(started=started)
        self._claimed: set[str] = {"started"}
        self._version = 0
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def view(self) -> View:
        """Return the snapshot of now; it never changes."""
        return self._view

    def writer(self, key: str) -> Callable[[Any], None]:
        """Claim a key of `View`; a second claim of the same key is a defect and raises `ValueError`."""
        if key in self._claimed or key not in {item.name for item in dataclasses.fields(View)}:
            msg = f"the key {key!r} has a writer already, or there is no such key"
            raise ValueError(msg)
        self._claimed.add(key)

        def write(value: Any) -> None:
            if getattr(self._view, key) == value:
                return
            if isinstance(value, dict):
                value = MappingProxyType(dict(value))
            self._view = dataclasses.replace(self._view, **{key: value})
            self._version += 1
            self._changed.set()
            self._changed = asyncio.Event()
            for listener in self._listeners:
                listener()

        return write

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change; it must only wake something."""
        self._listeners.append(listener)

    async def wait_for(self, predicate: Callable[[View], bool], seconds: float) -> View:
        """Return the first view for which `predicate` holds; `TimeoutError` after `seconds`."""
        async with asyncio.timeout(seconds):
            while not predicate(self._view):
                await self._changed.wait()
        return self._view


@dataclass(frozen=True, slots=True)
class Situation:
    """The inputs of every judgement: who we are, what was seen, and when that is asked (CLOCK_BOOTTIME seconds)."""

    config: Config
    node: Node
    view: View
    now: float
    wall_clock: float = field(default=0.0)

    @property
    def paused(self) -> bool:
        """Whether a person wants srd to do nothing by itself now."""
        return self.view.pause.holds(self.wall_clock)


def services_of(node: Node) -> tuple[Service, ...]:
    """Return the services that a node of this kind runs, in start order."""
    if node.kind is NodeKind.REDIS:
        return (Service.REDIS, Service.SENTINEL, Service.STUNNEL)
    if node.kind is NodeKind.SENTINEL:
        return (Service.SENTINEL,)
    return ()
