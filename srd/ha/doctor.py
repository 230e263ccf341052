"""What is wrong with what the sentinels keep: found from what each of them says, and from whom the primary sees. Pure.

Why anything is. A sentinel never forgets: whoever it has once listed as a sentinel counts for the majority that a
failover needs, and whoever it has once listed as a replica is watched, and followed up, for ever. So nodes that have
gone, addresses that have changed, and ids that a sentinel had before make failovers rarer or impossible. Such a ghost
is what an id that two had leaves behind; and, with sentinels that are older than 7.0.15, an id whose file was lost:
they list it at port 0 from then on (sentinelProcessHelloMessage), where 7.0.15 drops it, as measured.

What is not said, because it passes:
* While a failover is under way, the primary does not answer, a sentinel is in TILT or a majority is silent
  (`unsettled`): all that follows from who is primary.
* Whatever only one look shows: `lasting` takes two, some seconds apart. A sentinel that starts has heard of the others
  after a publish period (0.5 s at srd's pace) and of replicas after an info period (1 s).
* What follows from something else that is said: two sentinels with one id ignore each other's hellos (they hold them
  for their own, sentinelReceiveHelloMessages), and the others list them in turn at one address and the other.

A current epoch below another's configuration epoch cannot last where hellos arrive: each raises it, before anything
else is read in it. No reply shows it. What shows that hellos do not arrive is `unknown_sentinel` and `old_epoch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from srd.cluster import Config, Node
from srd.findings import Cure, Finding, Trouble
from srd.ha.lease import FAILOVER_FLAG, endpoint_of
from srd.ha.patient import Account, ListedSentinel, wanted_settings
from srd.model import Endpoint, Role
from srd.state import Redis

# A hello comes every 2 s at Sentinel's own pace, every 0.5 s at srd's, and by two ways.
HELLO_LIVES_SECONDS: Final = 6.0

# What a sentinel that was reset might not recover from: it would not find the others, or find the wrong primary.
DISORDER: Final = frozenset(
    {
        Trouble.DUPLICATE_ID,
        Trouble.OTHER_PRIMARY,
        Trouble.EPOCH_TIE,
        Trouble.OLD_EPOCH,
        Trouble.SEES_DOWN,
        Trouble.UNKNOWN_SENTINEL,
    }
)


@dataclass(frozen=True, slots=True)
class Look:
    """One look at everything: what each voter's sentinel says, why the others do not, and the primary's own redis.

    `redis` is that of the primary that a majority of all voters monitors; None if there is none or it does not answer.
    """

    accounts: Mapping[str, Account]
    silent: Mapping[str, str] = field(default_factory=dict)
    redis: Redis | None = None

    @property
    def followers(self) -> frozenset[str]:
        """Who follows the primary, by its own word."""
        return (
            frozenset(str(replica.endpoint) for replica in self.redis.replicas)
            if self.redis is not None
            else frozenset()
        )


def agreed_primary(config: Config, accounts: Mapping[str, Account]) -> Endpoint | None:
    """Return the redis node that a majority of all voters monitors, None if there is no such."""
    naming = Counter(account.primary for account in accounts.values())
    for node in config.redis_nodes:
        if naming[str(endpoint_of(config, node))] >= config.majority:
            return endpoint_of(config, node)
    return None


def unsettled(config: Config, look: Look) -> str | None:
    """Say what is under way that has to end before lists and epochs can be judged; None when nothing is."""
    if len(look.accounts) < config.majority:
        return f"{len(look.accounts)} of {len(config.voters)} sentinels answer, and {config.majority} are a majority"
    for account in look.accounts.values():
        if FAILOVER_FLAG in account.flags:
            return f"the sentinel of {account.node} is carrying out a failover"
        if "o_down" in account.flags:
            return f"the sentinel of {account.node} and others take the primary for down"
        if account.tilt:
            return f"the sentinel of {account.node} is in TILT: its clock or itself stood still, and it waits 30 s"
    primary = agreed_primary(config, look.accounts)
    if primary is not None and (look.redis is None or look.redis.role is not Role.PRIMARY):
        return f"redis at {primary} does not answer as primary"
    return None


def lasting(earlier: Iterable[Finding], later: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return what both looks have found, in the later one's words."""
    before = {key(finding) for finding in earlier}
    return tuple(finding for finding in later if key(finding) in before)


def key(finding: Finding) -> tuple[Trouble, str, str]:
    """Return what makes two findings the same: the words may differ."""
    return finding.trouble, finding.node, finding.subject


def diagnose(config: Config, look: Look) -> tuple[Finding, ...]:
    """Return everything that one look shows, voter by voter in the order of the file."""
    found = [*_silent(config, look), *_duplicates(config, look)]
    if unsettled(config, look) is None:
        primary = agreed_primary(config, look.accounts)
        for node in config.voters:
            account = look.accounts.get(node.name)
            if account is not None:
                found += _of_primary(config, look, account, primary)
                found += _of_settings(config, node, account)
                if primary is not None and account.primary == str(primary):
                    found += _of_sentinels(config, look, account)
                    found += _of_replicas(config, look, account)
    order = [node.name for node in config.voters]
    return tuple(sorted(found, key=lambda finding: order.index(finding.node)))


def not_listed(config: Config, look: Look, account: Account) -> list[str]:
    """Return whom a whole list would have: the voters that answer, and the redis nodes that follow the primary."""
    listed = {(entry.run_id, entry.at) for entry in account.sentinels}
    sentinels = [
        name
        for name, other in look.accounts.items()
        if name != account.node and (other.run_id, _sentinel_at(config, config.node(name))) not in listed
    ]
    nodes = {str(endpoint_of(config, node)): node.name for node in config.redis_nodes}
    replicas = [name for at, name in nodes.items() if at in look.followers and at not in account.replicas]
    return [*(f"the sentinel of {name}" for name in sentinels), *(f"the replica {name}" for name in replicas)]


def _sentinel_at(config: Config, node: Node) -> str:
    return str(Endpoint(node.address, config.sentinel.port))


def _silent(config: Config, look: Look) -> list[Finding]:
    remedy = "srd status there; srd list"
    return [
        Finding(Trouble.SILENT, node.name, node.name, f"it does not answer: {reason}", Cure.BY_HAND, remedy)
        for node in config.voters
        if (reason := look.silent.get(node.name)) is not None
    ]


def _duplicate_ids(look: Look) -> dict[str, list[str]]:
    holders: dict[str, list[str]] = {}
    for name, account in look.accounts.items():
        holders.setdefault(account.run_id, []).append(name)
    return {run_id: names for run_id, names in holders.items() if len(names) > 1}


def _duplicates(config: Config, look: Look) -> list[Finding]:
    order = [node.name for node in config.voters]
    found = []
    for run_id, holders in _duplicate_ids(look).items():
        names = sorted(holders, key=order.index)
        text = f"{' and '.join(names)} have the same id, so they count as one and do not hear each other"
        found += [Finding(Trouble.DUPLICATE_ID, name, run_id, text, Cure.REBUILD) for name in names]
    return found


def _of_primary(config: Config, look: Look, account: Account, primary: Endpoint | None) -> list[Finding]:
    master = config.sentinel.master
    whom = account.primary or f"nobody of the name {master}"
    if primary is None:
        text = f"it monitors {whom}, and no majority of the voters monitors the same redis node"
        remedy = "bring the silent voters up; srd doctor on the other nodes"
        return [Finding(Trouble.OTHER_PRIMARY, account.node, account.primary or master, text, Cure.BY_HAND, remedy)]
    if account.primary is None:
        return [Finding(Trouble.OTHER_PRIMARY, account.node, master, f"it monitors {whom}", Cure.REBUILD)]
    following = [other.epoch for other in look.accounts.values() if other.primary == str(primary)]
    epoch = max(following)
    if account.primary != str(primary):
        text = f"it monitors {account.primary} in epoch {account.epoch}, the majority {primary} in epoch {epoch}"
        tied = account.epoch == epoch
        trouble = Trouble.EPOCH_TIE if tied else Trouble.OTHER_PRIMARY
        text += "; of one epoch neither gives way" if tied else ""
        return [Finding(trouble, account.node, account.primary, text, Cure.REBUILD)]
    found = []
    if account.epoch < epoch:
        text = f"its configuration is of epoch {account.epoch}, another's of {epoch}: it hears nobody"
        remedy = "srd links; `srd restart sentinel` there"
        found.append(Finding(Trouble.OLD_EPOCH, account.node, master, text, Cure.BY_HAND, remedy))
    if account.flags & {"s_down", "disconnected"}:
        text = f"it does not reach redis at {primary}, which answers"
        remedy = "srd links; are the passwords in its sentinel.conf those of the bundle?"
        found.append(Finding(Trouble.SEES_DOWN, account.node, str(primary), text, Cure.BY_HAND, remedy))
    return found


def _of_settings(config: Config, node: Node, account: Account) -> list[Finding]:
    found = [
        Finding(
            Trouble.SETTING, node.name, name, f"{name} is {account.settings[name] or 'not set'}, not {value}", Cure.SET
        )
        for name, value in wanted_settings(config, node).items()
        if account.settings.get(name, value) != value
    ]
    for name in account.further_masters:
        text = f"it monitors {name} too, which is not this cluster's"
        remedy = f"if nobody needs that: SENTINEL REMOVE {name} there"
        found.append(Finding(Trouble.FURTHER_MASTER, node.name, name, text, Cure.BY_HAND, remedy))
    return found


def _of_sentinels(config: Config, look: Look, account: Account) -> list[Finding]:
    duplicates = _duplicate_ids(look)
    found = [
        finding
        for entry in account.sentinels
        if entry.run_id not in duplicates and (finding := _listed(config, look, account, entry)) is not None
    ]
    listed = {entry.run_id for entry in account.sentinels if entry.port}
    for name, other in look.accounts.items():
        alike = other.primary == account.primary and not {other.run_id, account.run_id} & duplicates.keys()
        if name != account.node and alike and other.run_id not in listed:
            text = f"it does not know the sentinel of {name}, which answers"
            remedy = f"srd links; `srd restart sentinel` on {name}"
            found.append(Finding(Trouble.UNKNOWN_SENTINEL, account.node, name, text, Cure.BY_HAND, remedy))
    return found


def _listed(config: Config, look: Look, account: Account, entry: ListedSentinel) -> Finding | None:
    """Judge one sentinel that another one lists."""
    owner = next((node for node in config.voters if _sentinel_at(config, node) == entry.at), None)
    holder = next((name for name, other in look.accounts.items() if other.run_id == entry.run_id), None)
    subject = f"{entry.run_id[:12]} at {entry.at}"
    trouble, cure, remedy = Trouble.STALE_SENTINEL, Cure.RESET, ""
    if owner is not None:
        told = look.accounts.get(owner.name)
        if told is None or told.run_id == entry.run_id:
            return None  # it is the one there, or nobody can say
        trouble = Trouble.GHOST_SENTINEL
        text = f"it counts the sentinel {subject}, an id that {owner.name} no longer has"
    elif entry.port == 0:
        trouble = Trouble.GHOST_SENTINEL
        text = f"it counts the sentinel {subject}: port 0, because another one has taken its address"
    elif holder is not None:
        text = f"it lists the sentinel of {holder} at {entry.at}, which is not its address in cluster.toml"
    elif entry.hello_age >= HELLO_LIVES_SECONDS:
        text = f"it counts the sentinel {subject}, which is no voter of cluster.toml and no longer speaks"
    else:
        trouble, cure = Trouble.STRANGE_SENTINEL, Cure.BY_HAND
        text = f"it counts the sentinel {subject}, which is no voter of cluster.toml and takes part"
        remedy = "stop that sentinel; then srd doctor --repair"
    return Finding(trouble, account.node, f"{entry.run_id}@{entry.at}", text, cure, remedy)


def _of_replicas(config: Config, look: Look, account: Account) -> list[Finding]:
    nodes = {str(endpoint_of(config, node)) for node in config.redis_nodes}
    found = []
    for at in account.replicas:
        if at in nodes and at != account.primary:
            continue
        if at in look.followers:
            text = f"it lists the replica {at}, which follows the primary and is no redis node of cluster.toml"
            remedy = "stop that replica: a failover could choose it; then srd doctor --repair"
            found.append(Finding(Trouble.STRANGE_REPLICA, account.node, at, text, Cure.BY_HAND, remedy))
        else:
            what = "is the primary itself" if at == account.primary else "is no redis node of cluster.toml"
            text = f"it lists the replica {at}, which {what} and follows nobody here"
            found.append(Finding(Trouble.STALE_REPLICA, account.node, at, text, Cure.RESET))
    return found
