"""Prometheus metrics, formatted from one snapshot at each scrape. What is not known has no sample, never a zero."""

from __future__ import annotations

import bisect
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from srd.changes import ChangeKind
from srd.cluster import Node
from srd.conditions import conditions
from srd.model import IpsecMode, NodeKind, Role
from srd.reconcile import Loop
from srd.state import ChildState, Link, Situation, services_of
from srd.web import health
from srd.web.catalogue import CONSTANT_LABELS, REQUEST_DURATION, SAMPLED, Family

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# An answer takes well under a millisecond; what takes longer is the event loop being busy with something else.
DURATION_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.01, 0.1)
# A scrape takes some milliseconds of the event loop: anybody may ask often, it is made once a second.
CACHE_SECONDS: Final = 1.0
# Until all that is known of a change of primary has been told; a node that was away may know more later.
TELLING_SECONDS: Final = 30.0

Sample = tuple[str, tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class HttpCounts:
    """What the HTTP server counts: requests by path and status, connections, refusals by reason."""

    requests: Mapping[tuple[str, int], int]
    connections: int
    refused: Mapping[str, int]


@dataclass(slots=True)
class _Durations:
    """One histogram: counts by bucket, the last one without a bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        bounds = [*(str(bound) for bound in DURATION_BUCKETS), "+Inf"]
        return [(bound, float(sum(self.counts[: index + 1]))) for index, bound in enumerate(bounds)]


class Metrics(Collector):
    """Renders what `situation`, `loops` and the HTTP server know, in a registry of its own."""

    def __init__(
        self,
        situation: Callable[[], Situation],
        http_counts: Callable[[], HttpCounts],
        loops: Callable[[], tuple[Loop, ...]],
        version: str,
        *,
        agent_answers: Mapping[tuple[str, str], int],
        cache_seconds: float = CACHE_SECONDS,
    ) -> None:
        self._situation = situation
        self._http_counts = http_counts
        self._loops = loops
        self._agent_answers = agent_answers
        self._version = version
        self._cache_seconds = cache_seconds
        self._cached: tuple[float, bytes] | None = None
        self._durations: dict[str, _Durations] = {}
        self._stamps = _Stamps()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe_request(self, path: str, seconds: float) -> None:
        """Count one answer; the caller keeps the number of paths bounded."""
        self._durations.setdefault(path, _Durations()).observe(seconds)

    def render(self) -> bytes:
        """Return the text of /metrics, at most `cache_seconds` old."""
        now = self._situation().now
        if self._cached is None or not 0 <= now - self._cached[0] < self._cache_seconds:
            self._cached = (now, generate_latest(self._registry))
        return self._cached[1]

    def describe(self) -> list[Metric]:
        """Nothing to promise: a family without a known value is absent."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every family that has a sample now."""
        s = self._situation()
        constant = (s.config.cluster, s.node.name)
        found: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for name, labels, value in self._samples(s):
            found.setdefault(name, []).append((labels, value))
        for family in SAMPLED:
            if samples := found.pop(family.name, None):
                yield _metric(family, constant, samples)
        if found:
            msg = f"metrics that the catalogue does not know: {sorted(found)}"
            raise ValueError(msg)
        if self._durations:
            histogram = HistogramMetricFamily(
                REQUEST_DURATION.name, REQUEST_DURATION.help, labels=[*CONSTANT_LABELS, *REQUEST_DURATION.labels]
            )
            for path, durations in sorted(self._durations.items()):
                histogram.add_metric([*constant, path], durations.buckets(), durations.total)
            yield histogram

    def _samples(self, s: Situation) -> Iterator[Sample]:
        yield "srd_build_info", (self._version, platform.python_version()), 1
        yield "srd_start_timestamp_seconds", (), self._stamps.fixed("srd", s.view.started, s)
        for loop in self._loops():
            yield "srd_loop_last_tick_timestamp_seconds", (loop.name,), _wall(s, loop.last_tick)
            yield "srd_loop_consecutive_failures", (loop.name,), loop.failures
        yield from _condition_samples(s)
        for path in sorted(health.CHECK_PATHS - health.ALIASES):
            yield "srd_health_status", (path.removeprefix("/"),), health.judge(path, {}, s).ok
        yield "srd_drained", (), s.view.drained
        yield "srd_paused", (), s.paused
        if s.paused:
            yield "srd_paused_until_timestamp_seconds", (), s.view.pause.until
        yield from _child_samples(s, self._stamps)
        if s.node.kind is NodeKind.REDIS:
            yield from _role_samples(s)
            yield from _redis_samples(s)
        if services_of(s.node):
            yield from _change_samples(s)
        yield from _sentinel_samples(s)
        yield from _ipsec_samples(s)
        for name, not_after in s.view.certificates.items():
            yield "srd_tls_certificate_not_after_timestamp_seconds", (name,), not_after
        counts = self._http_counts()
        for (path, code), number in sorted(counts.requests.items()):
            yield "srd_http_requests_total", (path, str(code)), number
        yield "srd_http_connections", (), counts.connections
        for reason, number in sorted(counts.refused.items()):
            yield "srd_http_rejected_connections_total", (reason,), number
        for (question, word), number in sorted(self._agent_answers.items()):
            yield "srd_haproxy_agent_answers_total", (question, word), number


class _Stamps:
    """Turns instants on CLOCK_BOOTTIME that do not change into Unix seconds that do not change either."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}

    def fixed(self, subject: str, instant: float, s: Situation) -> float:
        known = self._known.get(subject)
        if known is None or known[0] != instant:
            known = self._known[subject] = (instant, _wall(s, instant))
        return known[1]


def _wall(s: Situation, instant: float) -> float:
    return round(s.wall_clock - (s.now - instant), 3)


def _metric(
    family: Family, constant: tuple[str, ...], samples: list[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily | CounterMetricFamily:
    names = [*CONSTANT_LABELS, *family.labels]
    metric: GaugeMetricFamily | CounterMetricFamily
    if family.kind == "counter":
        metric = CounterMetricFamily(family.name, family.help, labels=names)
    else:
        metric = GaugeMetricFamily(family.name, family.help, labels=names)
    for labels, value in samples:
        metric.add_metric([*constant, *labels], float(value))
    return metric


def _condition_samples(s: Situation) -> Iterator[Sample]:
    counts = Counter((item.code, item.severity) for item in conditions(s))
    for (code, severity), number in sorted(counts.items()):
        yield "srd_condition", (code, severity.name.lower()), number


def _child_samples(s: Situation, stamps: _Stamps) -> Iterator[Sample]:
    for service, child in s.view.children.items():
        yield "srd_child_up", (service,), child.state is ChildState.READY
        for state in ChildState:
            yield "srd_child_state", (service, state), child.state is state
        if child.started is not None:
            yield "srd_child_start_timestamp_seconds", (service,), stamps.fixed(service, child.started, s)
        if child.retry_at is not None:
            yield "srd_child_retry_timestamp_seconds", (service,), _wall(s, child.retry_at)
        yield "srd_child_adopted", (service,), child.adopted
        yield "srd_child_restarts_total", (service,), child.restarts
        for code, number in sorted(child.exits.items()):
            yield "srd_child_exits_total", (service, code), number


def _role_samples(s: Situation) -> Iterator[Sample]:
    reported = s.view.redis.role if s.view.redis is not None else Role.UNKNOWN
    for role in Role:
        yield "srd_role", (role,), reported is role
    yield "srd_primary", (), health.primary(s).ok
    held = health.leader(s).ok
    yield "srd_primary_lease_held", (), held
    if held and s.view.lease is not None:
        yield "srd_primary_lease_expires_timestamp_seconds", (), _wall(s, s.view.lease.expires)


def _change_samples(s: Situation) -> Iterator[Sample]:
    # Counted once the nodes have told one another what they know: a count by kind must not move to another kind.
    started, settled = _wall(s, s.view.started), s.wall_clock - TELLING_SECONDS
    counts = Counter(change.kind for change in s.view.history if started <= change.at_timestamp <= settled)
    for kind in ChangeKind:
        yield "srd_primary_changes_total", (kind,), counts[kind]
    last = s.view.history[-1] if s.view.history else None
    if last is None or last.previous is None:
        return
    yield "srd_primary_last_change_timestamp_seconds", (), last.at_timestamp
    for name, value in (
        ("srd_primary_last_change_duration_seconds", last.duration_seconds),
        ("srd_primary_last_change_write_gap_seconds", last.write_gap_seconds),
        ("srd_primary_last_change_lost_bytes", last.lost_bytes),
    ):
        if value is not None:
            yield name, (last.kind,), value


def _redis_samples(s: Situation) -> Iterator[Sample]:
    redis = s.view.redis
    fresh = redis is not None and health.answers(s)
    yield "srd_redis_up", (), fresh
    if redis is None or not fresh:
        return
    yield "srd_redis_info", (redis.version,), 1
    yield "srd_redis_loading", (), redis.loading
    yield "srd_redis_uptime_seconds", (), redis.uptime_seconds
    yield "srd_redis_keys", (), redis.dbsize
    yield "srd_redis_replication_offset_bytes", (), redis.offset
    yield "srd_redis_ping_seconds", (), redis.ping_seconds
    yield "srd_redis_persistence_enabled", (), redis.persistence
    yield "srd_redis_min_replicas_to_write", (), redis.min_replicas_to_write
    if redis.role is Role.REPLICA:
        yield "srd_redis_replica_link_up", (), redis.link_up
        yield "srd_redis_replica_sync_in_progress", (), redis.sync_in_progress
        lag = health.lag_bytes(s)
        if lag is not None:
            yield "srd_redis_replica_lag_bytes", (), lag
    by_name = {node.name: item for item in redis.replicas if (node := s.config.node_at(item.endpoint.address))}
    for name, item in sorted(by_name.items()):
        yield "srd_redis_replication_lag_bytes", (name,), max(0, redis.offset - item.offset)
        yield "srd_redis_replication_lag_seconds", (name,), item.lag_seconds


def _sentinel_samples(s: Situation) -> Iterator[Sample]:
    yield "srd_sentinel_quorum", (), s.config.quorum
    yield "srd_sentinel_majority", (), s.config.majority
    if s.view.lease is not None:
        yield "srd_sentinel_reachable", (), s.view.lease.reachable
        yield "srd_sentinel_agree", (), s.view.lease.agree
    own = s.view.sentinels.get(s.node.name)
    if own is not None:
        yield "srd_sentinel_known", (), own.known_sentinels
        yield "srd_sentinel_tilt", (), own.tilt
        yield "srd_sentinel_config_epoch", (), own.epoch
    for name, answer in sorted(s.view.sentinels.items()):
        yield "srd_sentinel_last_seen_timestamp_seconds", (name,), _wall(s, answer.asked)
    for event, number in sorted(s.view.sentinel_events.items()):
        yield "srd_sentinel_events_total", (event,), number


def _ipsec_samples(s: Situation) -> Iterator[Sample]:
    required = s.config.ipsec.mode is IpsecMode.ESP
    yield "srd_ipsec_required", (), required
    yield "srd_ipsec_keying_refused_total", (), s.view.keying_refusals
    yield "srd_ipsec_protected", (), health.protected(s)
    if not required:
        return
    if s.view.backstop is not None:
        yield "srd_ipsec_second_net", (), s.view.backstop.keeper is not None
        yield "srd_ipsec_second_net_mended_total", (), s.view.backstop.mended
    kernel = s.view.kernel
    if kernel is not None:
        yield "srd_ipsec_policies_installed", (), kernel.policies_installed
        yield "srd_ipsec_foreign_policies", (), len(kernel.foreign_overrides)
        yield "srd_ipsec_policy_drift_total", (), kernel.drift_mended
        for counter, number in sorted(kernel.xfrm_errors.items()):
            yield "srd_ipsec_xfrm_errors_total", (counter,), number
    for peer in s.config.peers_of(s.node.name):
        link = s.view.links.get(peer.name)
        if link is not None:
            yield from _link_samples(link)
        yield from _channel_samples(s, peer)


def _link_samples(link: Link) -> Iterator[Sample]:
    peer, legs = link.peer, link.legs
    yield "srd_ipsec_peer_protected", (peer,), link.protected
    if not legs:
        return
    yield "srd_ipsec_policy_installed", (peer,), all(leg.policies for leg in legs)
    yield "srd_ipsec_sa", (peer, "in"), sum(1 for leg in legs if leg.spi_in)
    yield "srd_ipsec_sa", (peer, "out"), sum(1 for leg in legs if leg.spi_out)
    yield "srd_ipsec_sa_bytes_total", (peer, "in"), sum(leg.bytes_in for leg in legs)
    yield "srd_ipsec_sa_bytes_total", (peer, "out"), sum(leg.bytes_out for leg in legs)
    yield "srd_ipsec_sa_packets_total", (peer, "in"), sum(leg.packets_in for leg in legs)
    yield "srd_ipsec_sa_packets_total", (peer, "out"), sum(leg.packets_out for leg in legs)
    yield "srd_ipsec_sa_replay_drops_total", (peer,), sum(leg.replay_drops for leg in legs)
    yield "srd_ipsec_sa_integrity_failures_total", (peer,), sum(leg.integrity_failures for leg in legs)
    if link.suite is not None:
        yield "srd_ipsec_cipher_info", (peer, link.suite), 1


def _channel_samples(s: Situation, peer: Node) -> Iterator[Sample]:
    channel = s.view.channels.get(peer.name)
    if channel is None:
        return
    yield "srd_ipsec_channel_up", (peer.name,), channel.connected
    yield "srd_ipsec_generation", (peer.name,), channel.generation
    yield "srd_ipsec_keyings_total", (peer.name,), channel.keyings
    yield "srd_ipsec_keying_failures_total", (peer.name,), channel.failures
    if channel.group is not None:
        yield "srd_ipsec_key_exchange_info", (peer.name, channel.group), 1
    if channel.established is not None:
        yield "srd_ipsec_established_timestamp_seconds", (peer.name,), _wall(s, channel.established)
