"""Whom a majority of the sentinels names primary, and until when this node may rely on being named. Pure.

Why two nodes never hold the lease at one instant. A lease needs a majority of all configured sentinels, two majorities
share a sentinel, and a sentinel names one primary at a time; so two leases need a sentinel that named one node and
then, within `primary_lease`, another. Take a primary that is cut off at the instant t:

* No answer to it was asked for later than t. An answer counts from when it was asked for, not from when it came, so
  its lease ends at t + primary_lease at the latest, without anything having to reach it.
* A sentinel pings once a second (SENTINEL_PING_PERIOD) and takes the primary for down `down_after` after the first ping
  that stayed without a reply (sentinel.c, sentinelCheckSubjectivelyDown). That ping left at t - round trip or later,
  so nobody else is promoted before t + down_after, less a round trip. srd hurries them (ha/failover.py), but not before
  2 s after that ping, and a vote takes 0.3 s more.
* primary_lease is 2 s, so the old lease ended before.

Not every cut is so clean. 1. A primary that the sentinels do not reach may still ask them. So an answer counts no
later than from the first ping that its sentinel has no reply to: that sentinel knows no more of the primary since. 2.
One that was cut off, or hung, may be back while it is being replaced. A sentinel that sees it down does not count,
nor does one in TILT, which has seen its own clock or itself stand still (sentinelCheckTiltCondition), nor one that is
hurried (ha/failover.py), nor one that has voted in a newer epoch than its configuration's: its leader promotes
somebody in the next seconds. It counts again when that leader was asked since, is not replacing anybody and names this
node still, or when every step of a failover has timed out. 3. One that is back may be asked about before that vote: a
leader that found enough of the others in agreement has up to a second (five SENTINEL_ASK_PERIODs,
sentinelCheckObjectivelyDown) to ask for votes from those that see the primary again. So a lease that has lapsed is not
taken up again (`Tenure`) before a majority has been content with this node for `PROBATION_SECONDS`: a vote shows by
then. Unless all sentinels are, for then nobody can be replacing anybody. A lease that did not lapse needs none of this:
a majority that sees the primary down, and one that does not, share a sentinel, which was without a reply for longer
than a lease.

A primary whose redis has died is replaced sooner than that. It says no to /primary by itself then, and gives what is
left of its lease to the one that was elected, to nobody else and once (ha/custody.py).

A promotion without a failure, which somebody else asks for (SENTINEL FAILOVER), waits for nothing, so whoever is named
by it waits (`Lease.settled`): until a majority has named it for as long as a lease, unless it was given the former one.
One after a failure shows by two things: a majority of the sentinels has voted in its epoch, and nothing that these gave
the former primary can still hold (`support_ends`). Votes alone say little: a sentinel that is asked to fail over asks
the others for theirs if it sees the primary down itself, and they give them without looking (sentinel.c,
sentinelAskMasterStateToOtherSentinels, sentinelVoteLeader).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

from srd.cluster import LEASE_MARGIN_SECONDS, LEASE_SECONDS, Config, Node
from srd.model import Endpoint
from srd.state import Lease, SentinelAnswer

# sentinel.c, addReplySentinelRedisInstance: what a sentinel shows of a primary that it takes for down or is replacing.
DOWN_FLAGS: Final = frozenset({"s_down", "o_down"})
FAILOVER_FLAG: Final = "failover_in_progress"
# This node's own word for what a leader shows between the promotion and its +switch-master (ha/sentinel.py).
PROMOTED_FLAG: Final = "promoted"
NEVER: Final = 0.0
# Each step of a failover is given up after failover-timeout: the election, SLAVEOF NO ONE, the promotion (sentinel.c).
FAILOVER_STEPS: Final = 3
# As long as a lease, so that whatever was held before has ended; and longer than a vote takes to show: five
# SENTINEL_ASK_PERIODs of 0.2 s (ha/sentinel.py, PACE), a few ticks of 0.1 s, and a question every 0.5 s.
PROBATION_SECONDS: Final = LEASE_SECONDS


def endpoint_of(config: Config, node: Node) -> Endpoint:
    """Return how the sentinels name a node's redis."""
    return Endpoint(node.address, config.redis.port)


def fresh(config: Config, answers: Mapping[str, SentinelAnswer], now: float) -> Mapping[str, SentinelAnswer]:
    """Return the configured voters' answers that were asked for within the last `primary_lease`, TILT included."""
    voters = (node.name for node in config.voters)
    return {
        name: answer
        for name in voters
        if (answer := answers.get(name)) is not None and 0 <= now - answer.asked < config.primary_lease
    }


def assess(config: Config, node: Node, answers: Mapping[str, SentinelAnswer], now: float) -> Lease:
    """Judge the sentinels' last answers, one per node.

    `reachable` counts fresh answers, `agree` the most that name one endpoint: `primary`, if they are a majority, in the
    configuration `epoch`. `expires` is when the lease of this node ends or ended, 0 if these answers never gave it one;
    `unanimous`, whether all sentinels are for it; `settled`, whether nobody named before can have one still.
    """
    heard = fresh(config, answers, now)
    naming = Counter(answer.primary for answer in heard.values() if answer.primary is not None and not answer.tilt)
    named, agree = naming.most_common(1)[0] if naming else (None, 0)
    counted = _counted(config, endpoint_of(config, node), answers, now)
    enough = len(counted) >= config.majority
    epoch = max((answer.epoch for answer in heard.values() if answer.primary == named), default=0)
    expires = counted[config.majority - 1] + config.primary_lease if enough else NEVER
    return Lease(
        held=now < expires,
        expires=expires,
        agree=agree,
        reachable=len(heard),
        primary=named if agree >= config.majority else None,
        epoch=epoch,
        unanimous=len(counted) == len(config.voters) and now < counted[-1] + config.primary_lease,
        settled=epoch == 0 or _settled(config, heard.values(), named, epoch, now),
    )


def _settled(config: Config, heard: Collection[SentinelAnswer], named: Endpoint | None, epoch: int, now: float) -> bool:
    """Whether a majority has voted in that epoch after a loss, or has named that endpoint for a whole lease."""
    voted = sum(
        1 for answer in heard if answer.vote_epoch >= epoch and _support_has_ended(config, answer, named, epoch, now)
    )
    lasting = sum(1 for a in heard if a.primary == named and not a.tilt and a.asked - a.named_since >= LEASE_SECONDS)
    return max(voted, lasting) >= config.majority


def _support_has_ended(config: Config, answer: SentinelAnswer, named: Endpoint | None, epoch: int, now: float) -> bool:
    """Whether nothing that a sentinel gave the former primary, whom it named before or names still, holds any more."""
    if answer.primary != named:
        return support_ends(config, answer, epoch) <= now
    return answer.former_until <= now or (PROMOTED_FLAG in answer.flags and has_lost(config, answer))


def support_ends(config: Config, last: SentinelAnswer, epoch: int) -> float:
    """Return when what a sentinel gave whom it named before has ended, now that it names another in this epoch.

    `last` is its last answer about that one; infinity if that does not tell.

    At once if it had found that one lost. Otherwise a lease after the first ping without a reply, if it had voted by
    then for who leads in that epoch. What it said before the vote counts from that ping at the latest, and what it says
    after it counts for nobody (`_elects`): an epoch has one leader, which is replacing the former primary from before
    the first vote until it names the new one, so in this epoch it cannot have given up.
    """
    if last.tilt or PROMOTED_FLAG in last.flags:
        return math.inf  # its times are in doubt, or of the one before
    if has_lost(config, last):
        return last.asked
    voted = last.vote is not None and last.vote_epoch == epoch > last.epoch
    return last.unanswered + LEASE_SECONDS if voted and last.unanswered is not None else math.inf


def dated(config: Config, before: SentinelAnswer | None, answer: SentinelAnswer, now: float) -> SentinelAnswer:
    """Return a sentinel's answer with what follows from the one before it.

    That is since when its vote is known, since when it names this primary, and until when what it gave the one before
    may hold. A vote that it has forgotten stands: a restart and a change of the primary keep the epoch of the last vote
    and not for whom it was (sentinel.c, sentinelResetMaster, rewriteConfigSentinelOption).
    """
    if before is not None and answer.vote in (None, before.vote) and answer.vote_epoch == before.vote_epoch:
        answer = dataclasses.replace(answer, vote=before.vote, vote_seen=before.vote_seen)
    else:
        answer = dataclasses.replace(answer, vote_seen=now)
    if before is None or answer.asked - before.asked >= config.primary_lease:
        return answer
    if answer.primary == before.primary:
        return dataclasses.replace(answer, named_since=before.named_since, former_until=before.former_until)
    # Of two changes within a lease, what the former one of both was given counts, too.
    earlier = min(before.former_until, before.named_since + LEASE_SECONDS)
    ends = max(earlier, support_ends(config, before, answer.epoch))
    return dataclasses.replace(answer, named_since=answer.asked, former_until=ends)


def has_lost(config: Config, answer: SentinelAnswer) -> bool:
    """Whether a sentinel has found the primary lost that it shows: for so long that a lease by its word has ended."""
    silent = answer.unanswered is not None and answer.asked - answer.unanswered >= LEASE_SECONDS
    return silent or bool(answer.flags & DOWN_FLAGS) or _is_hurried(config, answer)


def _counted(config: Config, endpoint: Endpoint, answers: Mapping[str, SentinelAnswer], now: float) -> list[float]:
    """Return from when the answers of those sentinels count that are for this endpoint, the latest first."""
    voters = {node.name for node in config.voters}
    return sorted(
        (
            _counts_from(answer)
            for name, answer in answers.items()
            if name in voters and answer.asked <= now and _supports(config, answer, endpoint, answers, now)
        ),
        reverse=True,
    )


def _counts_from(answer: SentinelAnswer) -> float:
    """Return the last moment of which the answer says something; what a leader shows is of the former primary."""
    if answer.unanswered is None or PROMOTED_FLAG in answer.flags:
        return answer.asked
    # When that ping left is known up to the time that the answer took: here the earliest is safe.
    return min(answer.asked, answer.unanswered - answer.took)


def is_doubted(answer: SentinelAnswer) -> bool:
    """Whether a sentinel takes the primary that it names for down, or replaces it."""
    return bool(answer.flags & DOWN_FLAGS) or FAILOVER_FLAG in answer.flags


def _supports(
    config: Config, answer: SentinelAnswer, endpoint: Endpoint, answers: Mapping[str, SentinelAnswer], now: float
) -> bool:
    if answer.primary != endpoint or answer.tilt or is_doubted(answer) or _is_hurried(config, answer):
        return False
    return not _elects(config, answer, answers, now)


def _is_hurried(config: Config, answer: SentinelAnswer) -> bool:
    """Whether srd has it replace a primary that is gone; not by a file of which some have taken another time in."""
    return 0 < answer.down_after < config.primary_lease + LEASE_MARGIN_SECONDS


def _elects(config: Config, answer: SentinelAnswer, answers: Mapping[str, SentinelAnswer], now: float) -> bool:
    """Whether this sentinel has voted for a leader that may still be about to promote somebody, or has done so."""
    if answer.vote is None or answer.vote_epoch <= answer.epoch:
        return False
    if now - answer.vote_seen >= FAILOVER_STEPS * config.sentinel.failover_timeout:
        return False
    leader = next((other for other in answers.values() if other.run_id == answer.vote), None)
    if leader is None or leader.asked <= answer.vote_seen:
        return True
    replacing = FAILOVER_FLAG in leader.flags or PROMOTED_FLAG in leader.flags
    return replacing or leader.primary != answer.primary  # it has replaced that one, and this sentinel will hear of it


class Tenure:
    """Whether this node may take up the lease that the sentinels' answers give it: not at once after it has lapsed."""

    def __init__(self) -> None:
        self._holds: int | None = None  # in which epoch
        self._epoch: int | None = None  # of the last primary that a majority named, whoever it was
        self._spent = False  # that its predecessor gave its own up: this one has lapsed since
        self._promoted = False  # that one's promotion was seen to happen, and its lease has not lapsed since
        self._content_since: float | None = None

    def expires(self, lease: Lease, now: float, *, given: bool = False) -> float:
        """Return when this node's lease ends, 0 while it may not be taken up; to be asked at each judgement.

        `given` says whether its predecessor has given up its own for it (ha/custody.py), so that nobody else has one.
        """
        if lease.primary is not None:
            # A promotion is no return: nobody is replacing one who is named in an epoch that has just begun.
            self._promoted |= self._epoch is not None and lease.epoch > self._epoch
            self._epoch = max(self._epoch or 0, lease.epoch)
        lapsed = not lease.held and self._holds is not None
        self._spent = given and (self._spent or lapsed)
        if not lease.held:
            self._promoted &= not lapsed
            self._holds = self._content_since = None
            return NEVER
        if self._holds is not None and lease.epoch > self._holds:
            self._holds = self._content_since = None  # another one may have been named in between
        if self._content_since is None:
            self._content_since = now
        served = now - self._content_since >= PROBATION_SECONDS
        at_once = lease.settled and (lease.unanimous or self._promoted)
        if self._holds is None and ((given and not self._spent) or at_once or served):
            self._holds = lease.epoch
        return lease.expires if self._holds is not None else NEVER
