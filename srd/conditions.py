"""The catalogue of conditions: what is not as it should be, derived from what is observed. Pure."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Final

from srd.cluster import MIN_REPLICAS_MAX_LAG, Node
from srd.model import IpsecMode, NodeKind, Role
from srd.state import ChildState, DiskTrouble, Situation, Symptom, services_of

# A link that is being keyed for the first time takes about a second in production and some in a slow lab.
CHANNEL_HOLD_SECONDS: Final = 5.0
# Five ends in two minutes are no accident: the back-off allows thirteen in that time, of what ends at once.
FLAPPING_ENDS: Final = 5
FLAPPING_SECONDS: Final = 120.0
CERTIFICATE_WARNING_SECONDS: Final = 14 * 86400.0


class Severity(enum.IntEnum):
    """How bad a condition is: a warning leaves the node doing its job, a critical one does not."""

    WARNING = 1
    CRITICAL = 2


class Code(enum.StrEnum):
    """The closed catalogue of conditions; docs/conditions.md explains each."""

    IPSEC_OFF = "ipsec_off"
    POLICIES_MISSING = "policies_missing"
    FOREIGN_POLICY = "foreign_policy"
    NO_SECOND_NET = "no_second_net"
    LINK_UNPROTECTED = "link_unprotected"
    CHANNEL_DOWN = "channel_down"
    REKEY_FAILING = "rekey_failing"
    CHILD_DOWN = "child_down"
    CHILD_SILENT = "child_silent"
    CHILD_FLAPPING = "child_flapping"
    CHILD_WAITING = "child_waiting"
    CHILD_OUTDATED = "child_outdated"
    DISK_TROUBLE = "disk_trouble"
    SAVING_FAILS = "saving_fails"
    NO_PERSISTENCE = "no_persistence"
    NO_MAJORITY = "no_majority"
    NO_SUCCESSOR = "no_successor"
    SENTINEL_TROUBLE = "sentinel_trouble"
    WRITES_REFUSED = "writes_refused"
    REPLICA_LINK_DOWN = "replica_link_down"
    CERTIFICATE_EXPIRING = "certificate_expiring"
    BUNDLE_CHANGED = "bundle_changed"
    DRAINED = "drained"
    PAUSED = "paused"


# What is the matter, and what srd does about it.
_SYMPTOMS: Final = {
    Symptom.SLOW: ("it is slow, on the CPU or waiting for a disk", "srd waits"),
    Symptom.HUNG: ("it hangs", "srd ends it and starts it again"),
    Symptom.STOPPED: ("it was stopped by a signal", "srd continues it"),
    Symptom.TRACED: ("a debugger holds it", "srd waits"),
}


_DISKS: Final = {
    DiskTrouble.FULL: "its file system is full: less than 16 MiB are left; make room",
    DiskTrouble.NO_INODES: "its file system can hold no more files; make room",
    DiskTrouble.READ_ONLY: "its file system is read-only: see the kernel's log; srd, if started on it, needs a restart",
    DiskTrouble.GONE: "it cannot be looked into; is its file system mounted?",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that is not as it should be: on what, how bad, and what it means in one sentence."""

    code: Code
    severity: Severity
    subject: str
    text: str


def conditions(situation: Situation) -> tuple[Condition, ...]:
    """Derive every condition that holds now, the worst first. Pure: a condition ends when its cause is gone."""
    found = [
        *_ipsec_conditions(situation),
        *_service_conditions(situation),
        *_cluster_conditions(situation),
        *_maintenance_conditions(situation),
    ]
    return tuple(sorted(found, key=lambda condition: (-condition.severity, condition.code, condition.subject)))


def _ipsec_conditions(s: Situation) -> list[Condition]:
    if s.config.ipsec.mode is IpsecMode.OFF:
        text = "ipsec.mode is off: everything between the nodes is in plaintext"
        return [Condition(Code.IPSEC_OFF, Severity.WARNING, s.config.cluster, text)]
    found = []
    kernel = s.view.kernel
    if kernel is None or not kernel.policies_installed:
        text = "not every policy is installed; the services wait for them"
        found.append(Condition(Code.POLICIES_MISSING, Severity.CRITICAL, s.node.name, text))
    if kernel is not None:
        found += [
            Condition(Code.FOREIGN_POLICY, Severity.CRITICAL, what, "a policy that is not srd's comes before srd's")
            for what in kernel.foreign_overrides
        ]
    if s.view.backstop is not None and s.view.backstop.keeper is None:
        text = "neither nft nor iptables can drop what IPsec has not transformed: install nftables"
        found.append(Condition(Code.NO_SECOND_NET, Severity.WARNING, s.node.name, text))
    for peer in _awaited(s):
        link = s.view.links.get(peer.name)
        if link is None or not link.protected:
            text = "no keys yet: traffic with this peer is blocked, never in plaintext"
            found.append(Condition(Code.LINK_UNPROTECTED, Severity.WARNING, peer.name, text))
    return found


def _service_conditions(s: Situation) -> list[Condition]:
    found = [
        Condition(Code.DISK_TROUBLE, Severity.CRITICAL, path, _DISKS[trouble]) for path, trouble in s.view.disks.items()
    ]
    if s.view.redis is not None and s.view.redis.unsaved is not None:
        text = f"redis could not write its {s.view.redis.unsaved}, so it takes no writes as primary: see srd logs redis"
        found.append(Condition(Code.SAVING_FAILS, Severity.CRITICAL, s.node.name, text))
    if s.view.redis is not None and not s.view.redis.persistence:
        text = "redis saves nothing: when all nodes are without power at a time, all data is lost (redis.settings)"
        found.append(Condition(Code.NO_PERSISTENCE, Severity.WARNING, s.node.name, text))
    for service in services_of(s.node):
        child = s.view.children.get(service)
        if child is not None:
            ends = sum(1 for moment in child.lately if s.now - moment < FLAPPING_SECONDS)
            if ends >= FLAPPING_ENDS:
                text = f"it ended {ends} times in {FLAPPING_SECONDS:.0f} s, at last: {child.last_exit}"
                found.append(Condition(Code.CHILD_FLAPPING, Severity.WARNING, service, text))
        if child is not None and child.outdated:
            text = f"it runs by a former cluster.toml; srd restart {service} has it start by the present one"
            found.append(Condition(Code.CHILD_OUTDATED, Severity.WARNING, service, text))
        if child is not None and child.state is ChildState.READY:
            continue
        if child is not None and child.symptom is not None:
            matter, remedy = _SYMPTOMS[child.symptom]
            text = f"no answer: {matter}; {'srd is paused, and waits' if s.paused else remedy}"
            found.append(Condition(Code.CHILD_SILENT, Severity.CRITICAL, service, text))
        elif child is not None and child.waiting_for:
            found.append(Condition(Code.CHILD_WAITING, Severity.CRITICAL, service, f"waits: {child.waiting_for}"))
        else:
            state = child.in_words if child is not None else ChildState.STOPPED
            last = f", last end: {child.last_exit}" if child is not None and child.last_exit else ""
            found.append(Condition(Code.CHILD_DOWN, Severity.CRITICAL, service, f"it is {state}{last}"))
    return found


def _cluster_conditions(s: Situation) -> list[Condition]:
    found = []
    for peer in s.config.peers_of(s.node.name):
        channel = s.view.channels.get(peer.name)
        if channel is None:
            continue
        text = channel.last_error or "it does not answer"
        if channel.connected and channel.last_error is not None:
            text = f"its keys are not renewed, and end after 8 hours: {text}"
            found.append(Condition(Code.REKEY_FAILING, Severity.WARNING, peer.name, text))
        elif peer in _awaited(s) and not channel.connected and s.now - channel.since >= CHANNEL_HOLD_SECONDS:
            found.append(Condition(Code.CHANNEL_DOWN, Severity.WARNING, peer.name, f"keying channel down: {text}"))
    if s.node.kind is not NodeKind.CLIENT:
        found += _sentinel_conditions(s)
    found += _replication_conditions(s)
    for name, not_after in s.view.certificates.items():
        left = not_after - s.wall_clock
        if left < CERTIFICATE_WARNING_SECONDS:
            severity = Severity.CRITICAL if left <= 0 else Severity.WARNING
            text = f"{max(left, 0) / 86400:.0f} days left" if left > 0 else "it has expired"
            found.append(Condition(Code.CERTIFICATE_EXPIRING, severity, name, text))
    return found


def _awaited(s: Situation) -> tuple[Node, ...]:
    """Return the peers that should be there. Clients come and go as they like."""
    return tuple(peer for peer in s.config.peers_of(s.node.name) if peer.kind is not NodeKind.CLIENT)


def _sentinel_conditions(s: Situation) -> list[Condition]:
    found = []
    lease = s.view.lease
    if lease is None or lease.reachable < s.config.majority:
        reachable = lease.reachable if lease is not None else 0
        text = f"{reachable} of {len(s.config.voters)} sentinels answer; {s.config.majority} are a majority"
        found.append(Condition(Code.NO_MAJORITY, Severity.WARNING, s.config.sentinel.master, text))
    elif len(s.config.redis_nodes) > 1:
        informed = sum(1 for answer in s.view.sentinels.values() if answer.known_replicas)
        if informed < s.config.majority:
            text = f"{informed} of {len(s.config.voters)} sentinels know of a replica: nobody could take over now"
            found.append(Condition(Code.NO_SUCCESSOR, Severity.WARNING, s.config.sentinel.master, text))
    for node in s.config.voters:
        texts = [finding.text for finding in s.view.findings if finding.node == node.name]
        if texts:
            more = f"; and {len(texts) - 1} more" if len(texts) > 1 else ""
            text = f"its sentinel: {texts[0]}{more}; see srd doctor"
            found.append(Condition(Code.SENTINEL_TROUBLE, Severity.WARNING, node.name, text))
    return found


def _replication_conditions(s: Situation) -> list[Condition]:
    found = []
    redis = s.view.redis
    if redis is not None and redis.role is Role.PRIMARY:
        good = sum(1 for r in redis.replicas if r.state == "online" and r.lag_seconds <= MIN_REPLICAS_MAX_LAG)
        if good < redis.min_replicas_to_write:
            text = f"it takes no writes: {good} replicas keep up, and it demands {redis.min_replicas_to_write}"
            found.append(Condition(Code.WRITES_REFUSED, Severity.CRITICAL, s.node.name, text))
    if redis is not None and redis.role is Role.REPLICA and not redis.link_up:
        text = f"no link to the primary {redis.primary}" if redis.primary else "it follows nobody"
        found.append(Condition(Code.REPLICA_LINK_DOWN, Severity.WARNING, s.node.name, text))
    return found


def _maintenance_conditions(s: Situation) -> list[Condition]:
    found = []
    if s.view.unread:
        text = f"{', '.join(s.view.unread)}: not what srd runs by; srd reload takes it in, or says why not"
        found.append(Condition(Code.BUNDLE_CHANGED, Severity.WARNING, s.node.name, text))
    if s.view.drained:
        text = "no balancer leads anybody new to it, and it is not chosen as primary; srd undrain ends that"
        if s.view.redis is not None and s.view.redis.role is Role.PRIMARY:
            text = "it is drained, and primary all the same: nobody new can write; srd switchover moves it away"
        found.append(Condition(Code.DRAINED, Severity.WARNING, s.node.name, text))
    if s.paused:
        until = f"{dt.datetime.fromtimestamp(s.view.pause.until, dt.UTC):%Y-%m-%d %H:%M} UTC"
        text = f"until {until} srd hurries no failover and starts nothing again; srd resume ends that"
        found.append(Condition(Code.PAUSED, Severity.WARNING, s.config.cluster, text))
    return found
