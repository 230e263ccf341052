"""Every metric that srd exports: its name, type, labels and meaning. docs/metrics.md lists the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# On every sample, so that one Prometheus can hold many clusters.
CONSTANT_LABELS: Final = ("cluster", "node")

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric; `labels` come after the constant ones. A counter's name has its `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(name, "gauge", text, labels)


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(name, "counter", text, labels)


REQUEST_DURATION: Final = Family(
    "srd_http_request_duration_seconds", "histogram", "Time to make an answer, without sending it.", ("path",)
)

_DAEMON: Final = (
    _gauge("srd_build_info", "Always 1; the labels say which srd and which Python run.", "version", "python"),
    _gauge("srd_start_timestamp_seconds", "When this srd started, in Unix seconds."),
    _gauge("srd_loop_last_tick_timestamp_seconds", "When a control loop last finished a pass.", "loop"),
    _gauge("srd_loop_consecutive_failures", "How many passes of a control loop have failed in a row.", "loop"),
    _gauge("srd_condition", "How many subjects a condition holds for; absent when none.", "code", "severity"),
    _gauge("srd_health_status", "Whether a check of :8080 would answer 200.", "check"),
    _gauge("srd_drained", "Whether a person has taken this node out of service."),
    _gauge("srd_paused", "Whether a person has every srd of the cluster do nothing by itself."),
    _gauge("srd_paused_until_timestamp_seconds", "When the pause ends by itself; absent when there is none."),
)
_CHILDREN: Final = (
    _gauge("srd_child_up", "Whether a child is ready.", "service"),
    _gauge("srd_child_state", "Which state a child is in: 1 for that one, 0 for the others.", "service", "state"),
    _gauge("srd_child_start_timestamp_seconds", "When a child's process was started.", "service"),
    _gauge("srd_child_retry_timestamp_seconds", "When a child that waits after a failure is tried again.", "service"),
    _gauge("srd_child_adopted", "Whether a child was started by a former srd.", "service"),
    _counter("srd_child_restarts_total", "How often a child was started again.", "service"),
    _counter("srd_child_exits_total", "How often a child ended, by exit status or signal.", "service", "code"),
)
_ROLE: Final = (
    _gauge("srd_role", "Which role redis says it has: 1 for that one, 0 for the others.", "role"),
    _gauge("srd_primary", "Whether /primary would answer 200: at most one node of a cluster has 1."),
    _gauge("srd_primary_lease_held", "Whether a majority of the sentinels names this node, and its word still holds."),
    _gauge("srd_primary_lease_expires_timestamp_seconds", "Until when the lease that this node holds is good."),
)
_CHANGES: Final = (
    _counter("srd_primary_changes_total", "Changes of primary since srd started, half a minute after each.", "kind"),
    _gauge("srd_primary_last_change_timestamp_seconds", "When the primary last changed."),
    _gauge("srd_primary_last_change_duration_seconds", "How long the last change of primary took.", "kind"),
    _gauge("srd_primary_last_change_write_gap_seconds", "For how long nobody took a write at the last change.", "kind"),
    _gauge("srd_primary_last_change_lost_bytes", "How much was lost at the last change, at least.", "kind"),
)
_REDIS: Final = (
    _gauge("srd_redis_up", "Whether redis has answered within 2 s."),
    _gauge("srd_redis_info", "Always 1; the label says which redis runs.", "version"),
    _gauge("srd_redis_loading", "Whether redis is loading its data set."),
    _gauge("srd_redis_uptime_seconds", "How long redis has run."),
    _gauge("srd_redis_keys", "How many keys redis holds."),
    _gauge("srd_redis_replication_offset_bytes", "Position in the replication stream."),
    _gauge("srd_redis_replication_lag_bytes", "How far behind this primary a replica is.", "peer"),
    _gauge("srd_redis_replication_lag_seconds", "How long ago a replica last acknowledged to this primary.", "peer"),
    _gauge("srd_redis_replica_lag_bytes", "How far this replica is behind what its primary last reported."),
    _gauge("srd_redis_replica_link_up", "Whether this replica has a link to its primary."),
    _gauge("srd_redis_replica_sync_in_progress", "Whether this replica is in a full synchronisation."),
    _gauge("srd_redis_ping_seconds", "How long redis took to answer the last time."),
    _gauge("srd_redis_persistence_enabled", "Whether redis saves its data."),
    _gauge("srd_redis_min_replicas_to_write", "How many replicas must be in touch for a write to be taken."),
)
_SENTINEL: Final = (
    _gauge("srd_sentinel_known", "How many sentinels this node's sentinel knows."),
    _gauge("srd_sentinel_reachable", "How many sentinels answered when last asked."),
    _gauge("srd_sentinel_agree", "How many sentinels name the same primary."),
    _gauge("srd_sentinel_quorum", "How many sentinels must agree that the primary is down."),
    _gauge("srd_sentinel_majority", "How many sentinels are more than half of them."),
    _gauge("srd_sentinel_tilt", "Whether this node's sentinel is in TILT and acts on nothing."),
    _gauge("srd_sentinel_config_epoch", "The epoch of the newest failover that this node's sentinel knows."),
    _gauge("srd_sentinel_last_seen_timestamp_seconds", "When the sentinel that last answered was asked.", "peer"),
    _counter("srd_sentinel_events_total", "Events that this node's sentinel published.", "event"),
)
_IPSEC: Final = (
    _gauge("srd_ipsec_required", "Whether traffic between nodes must be inside ESP."),
    _gauge("srd_ipsec_protected", "Whether policies stand and a majority of the links carries ESP."),
    _gauge("srd_ipsec_peer_protected", "Whether the link with a peer has policies and keys.", "peer"),
    _gauge("srd_ipsec_policy_installed", "Whether every policy for a peer is installed.", "peer"),
    _gauge("srd_ipsec_policies_installed", "Whether every policy is installed."),
    _gauge("srd_ipsec_foreign_policies", "Policies that are not srd's and come before srd's."),
    _counter("srd_ipsec_policy_drift_total", "Policies and SAs that somebody else changed, and srd mended."),
    _gauge("srd_ipsec_sa", "How many SAs with a peer are in use.", "peer", "direction"),
    _counter("srd_ipsec_sa_bytes_total", "Bytes through the SAs in use; starts again at a rekey.", "peer", "direction"),
    _counter(
        "srd_ipsec_sa_packets_total", "Packets through the SAs in use; starts again at a rekey.", "peer", "direction"
    ),
    _counter("srd_ipsec_sa_replay_drops_total", "Packets dropped as replayed; starts again at a rekey.", "peer"),
    _counter(
        "srd_ipsec_sa_integrity_failures_total", "Packets that failed authentication; starts again at a rekey.", "peer"
    ),
    _gauge("srd_ipsec_cipher_info", "Always 1; the label is the AEAD in use with a peer.", "peer", "suite"),
    _gauge("srd_ipsec_key_exchange_info", "Always 1; the label is the key exchange used with a peer.", "peer", "group"),
    _gauge("srd_ipsec_channel_up", "Whether the keying channel with a peer is connected.", "peer"),
    _gauge("srd_ipsec_generation", "Which generation of keys is in use with a peer.", "peer"),
    _gauge("srd_ipsec_established_timestamp_seconds", "When the keys in use with a peer were agreed.", "peer"),
    _counter("srd_ipsec_keyings_total", "Keyings with a peer that succeeded.", "peer"),
    _counter("srd_ipsec_keying_failures_total", "Keyings with a peer that failed or were refused.", "peer"),
    _counter("srd_ipsec_keying_refused_total", "Keying connections from addresses of no peer that were not let in."),
    _gauge("srd_ipsec_second_net", "Whether netfilter drops what IPsec has not transformed."),
    _counter("srd_ipsec_second_net_mended_total", "How often the rules of the second net had to be put back."),
    _counter("srd_ipsec_xfrm_errors_total", "The kernel's error counters (/proc/net/xfrm_stat).", "counter"),
)
_REST: Final = (
    _gauge("srd_tls_certificate_not_after_timestamp_seconds", "When a certificate ends.", "certificate"),
    _counter("srd_http_requests_total", "Requests answered; `other` is every unknown path.", "path", "code"),
    _gauge("srd_http_connections", "Open connections to this server."),
    _counter("srd_http_rejected_connections_total", "Connections refused or cut, by reason.", "reason"),
    _counter(
        "srd_haproxy_agent_answers_total", "Answers to agent-checks; `unknown` is no question.", "question", "word"
    ),
)

# What the collector formats from a snapshot; the histogram is the one metric that keeps itself.
SAMPLED: Final = (*_DAEMON, *_CHILDREN, *_ROLE, *_CHANGES, *_REDIS, *_SENTINEL, *_IPSEC, *_REST)
FAMILIES: Final = (*SAMPLED, REQUEST_DURATION)
