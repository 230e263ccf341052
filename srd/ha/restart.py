"""May this node's redis start, and as what? Pure.

Words. A node has **joined** (`View.initialized`, kept on disk) once its redis has been primary, or has been linked to
one, or its sentinel knows of a failover: `has_joined` below. Merely having been started makes nobody joined, because a
replica of a primary that has not come yet has nothing that could be lost. A **newcomer** has not joined. A joined
node's sentinel starts first, a newcomer's waits until its redis is up (desired.services). P is the first redis node of
cluster.toml, the one that the sentinels of a new cluster are told to watch.

The rules.
1. Know. The sentinels that answered, and the connected newcomers whose sentinels are silent because they have never
   run, must be a majority of all voters. Then the greatest epoch among the answers names the primary, or P if nobody
   answered. Until then, and if that epoch names two, wait.
2. It names another node: replica of it.
3. It names me, and redis ended in this boot: wait, the sentinels are to replace it. A restart within `down_after` would
   hide the end from them, and with it whatever was lost. After `down_after + 2 * failover_timeout` + 10 s nobody else
   can be promoted (a sentinel that voted waits 2 * failover_timeout before it tries itself: 10.5 s measured with 5 s).
   A failover that is under way is waited for, too. If nobody else can be promoted to begin with, none is waited for.
4. It names me: primary, if no other redis node has more (ha/coldstart.py compares them), and the data directory holds
   data. If it does not, only if nobody else can have any. Whoever has more is elected first.

Why never two primaries. A redis starts as primary by rule 4 only; any other becomes one by an election. An election
needs the votes of a majority of all voters (config.quorum is no less). Any two majorities share a voter: one of those
in rule 1 took part in the last election. It is no newcomer then, so it answered, and names the winner with the greatest
epoch. Without any election, everybody derives the same P. (An election that ends while redis is being started is
Sentinel's own race: it demotes the one with the lower epoch, and the lease keeps /primary at 503 meanwhile.) That is
the read quorum of Paxos; a majority that names the same node would be more than is needed, and can be too late: while
the winner's name spreads, a majority may still name the loser. Rule 4 only puts a start off.

Why no replica is emptied. A replica's data is replaced by its primary's only, and a redis becomes primary by rule 4,
after it was compared, or by an election. Whom the sentinels can elect was in step with a primary since it was started,
or was found to have most: any other says replica-priority 0, from its first moment on.

Why no deadlock. The sentinels of joined nodes start without redis, newcomers are counted without a sentinel, so a
majority of nodes that are up and connected fulfils rule 1. For the first boot of three nodes, where P is node 1:
* All at once: each soon sees another newcomer. 1 is primary, 2 and 3 are replicas of it. If 2 and 3 are quicker, they
  follow a P that is not there, and their sentinels name it; 1 starts although it is empty, as nobody has joined. If 1
  is quicker, its sentinel's answer and a newcomer are a majority.
* Node 1 late: 2 and 3 wait as replicas of it. Their sentinels cannot elect anyone, as they learn of replicas from a
  primary only. A cluster whose first node never comes does not begin, until its place in the file is another's.
* Node 3 an hour late: the answers of 1 and 2 are a majority, or that of either and node 3 itself.
* Power cut in the middle: who had joined answers by its sentinel, who had not is a newcomer. If none had joined, it is
  a first boot again, and 1 keeps the data that it finds.
* Sentinels that never met name different primaries, each by what it knows: rule 1 takes the greatest epoch. The
  replica that starts by rule 2 gives the sentinels the place where they meet (their hellos go through redis).

What is assumed, as in any consensus: a voter does not forget. A node whose disk was lost is a newcomer again; put it
back while a majority of the others is up, for it can help those who know less than the ones that are down.
What waits for a person: a first node that never came; a primary's lost data while no node with a copy is up; a node
that has more than the named one, is heard, and does not get its redis up (after 12 s without its srd, it is no more
waited for).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from srd.cluster import Config, Node
from srd.desired import Start
from srd.ha.lease import FAILOVER_FLAG, endpoint_of, fresh, is_doubted
from srd.model import Endpoint, NodeKind, Role
from srd.state import SentinelAnswer, Situation, View

PATIENCE_SLACK_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Death:
    """How the redis of this boot ended: when (CLOCK_BOOTTIME seconds), and what it had been when it last answered."""

    at: float
    as_role: Role


@dataclass(frozen=True, slots=True)
class Census:
    """What came of comparing this node with the other redis nodes (ha/coldstart.py).

    `ahead` has more, and is to be elected; `awaited` have not been heard yet; `empty`: all were, and none has anything;
    `alone`: all were, and no sentinel can elect one of them.
    """

    ahead: str | None = None
    awaited: tuple[str, ...] = ()
    empty: bool = False
    alone: bool = False


def patience_seconds(config: Config) -> float:
    """Return how long a redis that ended leaves the sentinels to replace it."""
    return config.sentinel.down_after + 2 * config.sentinel.failover_timeout + PATIENCE_SLACK_SECONDS


def has_joined(node: Node, view: View) -> bool:
    """Return whether this node is part of the cluster from now on; the daemon keeps that in `View.initialized`."""
    redis, own = view.redis, view.sentinels.get(node.name)
    linked = redis is not None and redis.in_step
    leading = redis is not None and redis.role is Role.PRIMARY and not redis.loading
    return linked or leading or (own is not None and own.epoch > 0)


def known_primary(situation: Situation) -> Endpoint | None:
    """Return the node that is primary by rule 1, None while that is not known."""
    heard = fresh(situation.config, situation.view.sentinels, situation.now)
    return _greatest(situation.config, heard) if _missing_knowledge(situation, heard) is None else None


def is_first_boot(situation: Situation) -> bool:
    """Whether nobody in the cluster can have any data: a majority are newcomers."""
    return _nobody_has_data(situation, fresh(situation.config, situation.view.sentinels, situation.now))


def start(situation: Situation, death: Death | None, *, holds_data: bool, census: Census | None = None) -> Start:
    """Decide how redis may start now, by the rules above.

    `holds_data`: redis would load something from its data directory, be it a data set without keys. `census` is None
    while the nodes have not been compared.
    """
    config, view = situation.config, situation.view
    heard = fresh(config, view.sentinels, situation.now)
    missing = _missing_knowledge(situation, heard)
    if missing is not None:
        return Start(hold=missing)
    named = _greatest(config, heard)
    if named is None:
        return Start(hold="the sentinels to agree: they name different primaries in one epoch")
    doubted = any(is_doubted(answer) for answer in heard.values() if answer.primary == named)
    if named != endpoint_of(config, situation.node):
        return Start(primary=named, named=named, doubted=doubted)
    awaited = _replacement(situation, None if census is not None and census.alone else death, heard)
    if awaited is not None:
        return Start(hold=awaited, named=named, doubted=doubted)
    if len(config.redis_nodes) == 1 or _nobody_has_data(situation, heard):
        return Start(named=named, doubted=doubted)
    return Start(hold=_objection(census, holds_data=holds_data), named=named, doubted=doubted)


def _objection(census: Census | None, *, holds_data: bool) -> str | None:
    """Say why this node, which the sentinels name, is not to lead with what it has; None if it is."""
    if census is None:
        return "what the other nodes have, to be compared with what this one has"
    if census.awaited:
        return f"{' and '.join(census.awaited)}, which may have more data than this node"
    if census.ahead is not None:
        return f"the sentinels to name {census.ahead}, which has more data than this node"
    if holds_data or census.empty:
        return None
    return "the sentinels to name a node that has the data: this data directory is empty"


def _missing_knowledge(situation: Situation, heard: Mapping[str, SentinelAnswer]) -> str | None:
    """Say whom else to hear of before anything is known, None if these are a majority. TILT is not knowledge."""
    config, view, node = situation.config, situation.view, situation.node
    answers = sum(1 for answer in heard.values() if answer.primary is not None and not answer.tilt)
    silent = [voter for voter in config.voters if voter.name not in heard]
    newcomers = sum(
        1 for voter in silent if (not view.initialized if voter == node else _is_newcomer(voter, view, heard))
    )
    if answers + newcomers >= config.majority:
        return None
    if view.initialized:
        return f"a majority of sentinels ({answers} of {config.majority})"
    return f"a majority of the nodes ({answers + newcomers} of {config.majority}, this one included)"


def _is_newcomer(peer: Node, view: View, heard: Mapping[str, SentinelAnswer]) -> bool:
    """Whether a peer is known never to have been part of the cluster.

    A node without redis has only its sentinel's word: that has never seen a primary in company if it knows of nobody.
    """
    if peer.kind is NodeKind.SENTINEL:
        answer = heard.get(peer.name)
        return answer is not None and (answer.epoch, answer.known_sentinels, answer.known_replicas) == (0, 0, 0)
    channel, report = view.channels.get(peer.name), view.peers.get(peer.name)
    return channel is not None and channel.connected and report is not None and not report.initialized


def _greatest(config: Config, heard: Mapping[str, SentinelAnswer]) -> Endpoint | None:
    """Return whom the greatest epoch names, the first redis node if there is no answer, None if that is undecided.

    Two configurations with the same epoch never converge by themselves; then a majority decides.
    """
    naming = [answer for answer in heard.values() if answer.primary is not None]
    if not naming:
        return endpoint_of(config, config.redis_nodes[0])
    epoch = max(answer.epoch for answer in naming)
    named = Counter(answer.primary for answer in naming if answer.epoch == epoch)
    primary, count = named.most_common(1)[0]
    return primary if len(named) == 1 or count >= config.majority else None


def _replacement(situation: Situation, death: Death | None, heard: Mapping[str, SentinelAnswer]) -> str | None:
    """Say why the sentinels, which name this node, should be left to name another one first.

    A newcomer's redis has not been primary for anyone yet, and one that is alone cannot be replaced.
    """
    config, view = situation.config, situation.view
    if len(config.redis_nodes) == 1 or not view.initialized:
        return None
    if any(FAILOVER_FLAG in answer.flags for answer in heard.values()):
        return "the end of the failover that is under way"
    if death is not None and situation.now < death.at + patience_seconds(config):
        return f"the sentinels to replace it (its redis ended as {death.as_role})"
    return None


def _nobody_has_data(situation: Situation, heard: Mapping[str, SentinelAnswer]) -> bool:
    """Whether the others are known to have none: a majority are newcomers, or all are if this node had data before."""
    config, node, view = situation.config, situation.node, situation.view
    peers = [peer for peer in config.peers_of(node.name) if peer.votes]
    holders = [peer for peer in peers if peer.kind is NodeKind.REDIS]
    if any((report := view.peers.get(peer.name)) is not None and report.initialized for peer in holders):
        return False
    if view.initialized:
        return all(_is_newcomer(peer, view, heard) for peer in holders)
    newcomers = sum(1 for peer in peers if _is_newcomer(peer, view, heard))
    return not holders or 1 + newcomers >= config.majority
