"""Has the sentinels replace a primary that is gone, sooner than they would by themselves. They elect and promote.

Two ways to know that it is gone.
* Its redis has ended: the srd beside it knows that in a millisecond, by the pidfd. Nobody has to wait for anything.
* Its node is silent: neither the srd there is heard nor does redis answer the sentinels' pings, by the word of a
  majority of them. Then its own fences must have fallen first (ha/fence.py): `silent_since` and `replaceable_at` below.
  A srd that is silent beside a redis that answers is no reason: it is somebody's upgrade.

What is done is the same. The sentinels are told a `down-after-milliseconds` of `HASTE_SECONDS`, and take the primary
for down at their next tick; the vote, its epoch and its choice are their own. Measured with 3 nodes: the next primary
says ROLE master after 0.49 to 0.60 s instead of 5.3 s. Not less than 0.2 s: with 0.05 s, 2 of 6 attempts found no
good replica (a replica's link may be down for 10 times as long, in whole seconds), and the next attempt came 10.5 s
later. For the same reason it is more where the loss is longer ago (`haste`): told 0.2 s 4 s after it, they found nobody
in three of three attempts. Told back as soon as the choice is announced (+selected-slave); later, they judge the new
primary by it: 7 of 7 runs had a second failover. Whoever does this may die meanwhile: every srd sets its own sentinel
back (ha/strays.py).

One of them stands for election, the others only vote: where all are hurried at once, all may find one another in
agreement at the same tick, and each vote for itself; the next attempt came 10 to 12 s later (2 of 20 in the lab, whose
nodes share a CPU). So all but one are told not to ask the others, and are told back with the rest. Should that stay
with one for want of a srd beside it, it votes as ever; the one that stands goes on asking at each of its ticks.

Which replica: srd sees to it that they know who has most (ha/preference.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from srd.cluster import MIN_REPLICAS_MAX_LAG, Config, Node
from srd.ha.fleet import Fleet, answering, on_all
from srd.ha.lease import FAILOVER_FLAG, PROMOTED_FLAG, endpoint_of, fresh
from srd.ha.preference import STEP_SECONDS, Preference
from srd.ha.sentinel import NEVER_MILLISECONDS, SELECTED, Event, SentinelClient
from srd.model import Endpoint
from srd.reconcile import boottime
from srd.state import SentinelAnswer, Situation

log = structlog.get_logger(__name__)

HASTE_SECONDS: Final = 0.2
# Of the time since the loss: a replica's link may be down for ten times that, 2.5 times as long as it can have been.
HASTE_SHARE: Final = 0.25
# Less than a lease takes for haste (ha/lease.py), and with a vote it is still within CHOICE_SECONDS.
LONGEST_HASTE_SECONDS: Final = 1.5
# For the choice; a vote takes 0.35 s.
CHOICE_SECONDS: Final = 3.0
# Where no srd has it known at once (ha/naming.py), a leader is done with a promotion 1.0 to 1.1 s after it, when the
# replicas follow. Where the new primary is gone by then it is after failover-timeout, and takes its former choice for
# that of the epoch in which the others have elected another one meanwhile: two primaries in one epoch, and neither
# gives way. That is too long to wait for: replicas whose link has been down for 2 s are no good to sentinels in haste.
SETTLING_SECONDS: Final = 1.2
# The candidate asks at each of its ticks: one that has not found it down yet would be asked again 0.2 s later.
ASKING_MILLISECONDS: Final = 10
# From an answer without FAILOVER_FLAG to a choice a sentinel needs two of its ticks, 0.05 to 0.1 s each (sentinel.c,
# sentinelTimer), after a vote or without one.
FRESH_SECONDS: Final = 0.05
# Sentinels that were not of one mind may be so soon: one was just starting, or had an older name still.
UNFIT_SECONDS: Final = 1.0

# From the first ping without a reply to the moment when the sentinels are hurried. The node's lease ends 2.0 s after
# the cut at the latest (cluster.LEASE_SECONDS), srd's own fence falls by 2.1 s after it (a question every 0.5 s,
# FENCE_SECONDS of 1.5 s, a look every 0.1 s), and nobody is promoted before the vote has taken 0.3 s more.
REPLACE_SECONDS: Final = 2.0
# redis' own fence, for a srd that had been silent before its redis: the lag is in whole seconds and counted once a
# second, so it is at most two more.
OWN_FENCE_SECONDS: Final = MIN_REPLICAS_MAX_LAG + 2.0
# A srd says something each second: it is well if it was heard so long after the first ping without a reply.
ALIVE_SECONDS: Final = 1.5
# It was well at the cut if it was heard so long before that ping: a second until its next word, one until the next ping
# (SENTINEL_PING_PERIOD), and a sentinel's tick. With 1.5 s two losses of 24 in the lab took the two seconds more that
# redis' own fence needs. Of one that dies the connection ends at once, so it is only one that hangs that this is about.
LAST_WORD_SECONDS: Final = 2.5
# Sentinels ping once a second: so far apart may the first pings be that one cut has left without a reply.
ONE_CUT_SECONDS: Final = 1.5


def silent_since(config: Config, answers: Mapping[str, SentinelAnswer], primary: Endpoint, now: float) -> float | None:
    """Return since when the primary answers no sentinel of a majority, None while it may still answer one.

    The moment is that of the first ping without a reply, the earliest of all: the cut was no later than that. But that
    of a sentinel whose ping is older than one cut explains is not of this cut: it was cut off before, and has not
    pinged again since.
    """
    heard = fresh(config, answers, now)
    waiting = [a.unanswered for a in heard.values() if a.primary == primary and not a.tilt and a.unanswered is not None]
    settled = sorted(since for since in waiting if now - since >= ALIVE_SECONDS)
    if len(settled) < config.majority:
        return None
    lost = settled[config.majority - 1]  # from then on no majority was answered
    return next(since for since in settled if since >= lost - ONE_CUT_SECONDS)


def haste(lost_for: float) -> float:
    """Return for how long the primary must have been silent to be taken for down, so long after its loss. Pure."""
    return min(max(HASTE_SECONDS, lost_for * HASTE_SHARE), LONGEST_HASTE_SECONDS)


def replaceable_at(s: Situation, primary: Node) -> float | None:
    """Return when a silent primary's fences will have fallen, so that another may be promoted. None while it is not.

    Pure; CLOCK_BOOTTIME seconds.
    """
    config = s.config
    since = silent_since(config, s.view.sentinels, endpoint_of(config, primary), s.now)
    if since is None:
        return None
    report = s.view.peers.get(primary.name)
    if report is not None and report.received > since + ALIVE_SECONDS:
        return None  # srd there is alive and well, and knows better what its redis does
    channel = s.view.channels.get(primary.name)
    ended = channel is not None and not channel.connected  # that of a node which is cut off ends seconds later
    alive = report is not None and report.received > since - LAST_WORD_SECONDS and not ended
    return since + (REPLACE_SECONDS if alive else OWN_FENCE_SECONDS)


class Failover:
    """Hurries the sentinels, once for each primary that is gone; `hurrying` is told whose place is taken, and why.

    `own_stream` returns the replication id that this node's redis last had.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        situation: Callable[[], Situation],
        wake: Callable[[], None],
        hurrying: Callable[[Node, str], None],
        own_stream: Callable[[], str],
    ) -> None:
        self._fleet = fleet
        self._situation = situation
        self._wake = wake
        self._hurrying = hurrying
        self._preference = Preference(fleet, situation=situation, own_stream=own_stream)
        self._busy = asyncio.Lock()
        self._chosen = asyncio.Event()
        # Whose place was taken, named in which configuration epoch (it may lead anew since), and until when not again.
        self._tried: tuple[Endpoint, int] | None = None
        self._tried_until = 0.0
        # By whom was preferred: a comparison knows somebody where the watch, which looks more often, finds nobody.
        self._refused: dict[str | None, tuple[Endpoint, float]] = {}
        self._said: tuple[Endpoint, str] | None = None

    def heard(self, event: Event) -> None:
        """Take note of what a sentinel has announced."""
        if event.name == SELECTED:
            self._chosen.set()

    async def watch(self) -> None:
        """One pass: have a primary replaced that is silent, if it is time."""
        s = self._situation()
        if s.paused:
            return
        named = s.view.named
        node = s.config.node_at(named.address) if named is not None else None
        if node is None or node == s.node or named != endpoint_of(s.config, node):
            return
        moment = replaceable_at(s, node)
        if moment is not None and s.now >= moment:
            since = silent_since(s.config, s.view.sentinels, named, s.now)
            await self.replace(node, f"{node.name} is silent, and its fences have fallen", since=since)

    async def replace(self, primary: Node, why: str, *, since: float | None, prefer: str | None = None) -> None:
        """Have the sentinels elect another primary now; return when they have chosen one, or when they do not.

        `since` is when it was lost, in CLOCK_BOOTTIME seconds, None if that is not known. `prefer` is the node that
        they are to elect, where that is known; otherwise it is the replica with most. During a pause it is left to
        them, who know of no pause.
        """
        config = self._fleet.config
        endpoint = endpoint_of(config, primary)
        if self._situation().paused:
            self._say_once("leaving it to the sentinels", endpoint, "srd is paused")
            return
        now = boottime()
        attempt = endpoint, self._epoch(endpoint)
        refused, until = self._refused.get(prefer, (None, 0.0))
        tried = attempt == self._tried and now < self._tried_until
        if self._busy.locked() or tried or (refused == endpoint and now < until):
            return
        async with self._busy:
            self._refused[prefer] = endpoint, now + UNFIT_SECONDS
            self._chosen.clear()
            async with asyncio.TaskGroup() as group:
                settling = group.create_task(self._settled(endpoint))
                looking = group.create_task(self._preference.look(primary, prefer))
            answers, look = settling.result(), looking.result()
            reason = unfit(config, answers, endpoint)
            if reason is not None:
                self._say_once("leaving it to the sentinels", endpoint, reason)
                return
            naming = [name for name, answer in answers.items() if _names(answer, endpoint)]
            if boottime() - now > SETTLING_SECONDS / 2:  # a promotion had to end: the replicas are others by now
                look = await self._preference.look(primary, prefer)
            knowing = await self._preference.settle(primary, prefer, look)
            candidate = next((name for name in knowing if name in naming), None)
            # Hurried after a choice, they would judge the one that they have chosen by that.
            if boottime() - min(answer.asked for answer in answers.values()) > FRESH_SECONDS:
                answers = await self._ask()
            late = "none knows whom to choose" if candidate is None else unfit(config, answers, endpoint)
            if candidate is None or late is not None:
                self._say_once("not hurrying the sentinels", endpoint, str(late))
                return
            self._said = None
            # Sentinels that voted without a result try again after twice the failover-timeout, and not before.
            self._tried, self._tried_until = attempt, now + 2 * config.sentinel.failover_timeout
            log.warning("hurrying the sentinels", primary=primary.name, why=why)
            self._hurrying(primary, why)
            await self._hurry(endpoint, candidate, float("-inf") if since is None else since)

    def _epoch(self, primary: Endpoint) -> int:
        """Return the configuration epoch in which a majority names this primary, 0 while none does."""
        lease = self._situation().view.lease
        return lease.epoch if lease is not None and lease.primary == primary else 0

    def _say_once(self, event: str, primary: Endpoint, why: str) -> None:
        """Log why a primary is not replaced from here, unless that was said last: it is looked at each second."""
        if self._said != (primary, why):
            self._said = primary, why
            log.warning(event, primary=str(primary), why=why)

    def _sentinels(self) -> dict[str, SentinelClient]:
        return answering(self._fleet.sentinels, self._situation().view)

    async def _ask(self) -> Mapping[str, SentinelAnswer]:
        return await on_all(self._sentinels(), lambda sentinel: sentinel.ask(STEP_SECONDS))

    async def _settled(self, primary: Endpoint) -> Mapping[str, SentinelAnswer]:
        """Return what the sentinels say once they can be hurried, or after a while: one answer may be late."""
        deadline = boottime() + SETTLING_SECONDS
        while True:
            answers = await self._ask()
            replacing = any(FAILOVER_FLAG in answer.flags and _names(answer, primary) for answer in answers.values())
            if replacing or boottime() > deadline or unfit(self._fleet.config, answers, primary) is None:
                return answers
            await asyncio.sleep(HASTE_SECONDS / 4)

    async def _hurry(self, primary: Endpoint, candidate: str, since: float) -> None:
        async def hasten(sentinel: SentinelClient) -> None:
            period = ASKING_MILLISECONDS if sentinel.node == candidate else NEVER_MILLISECONDS
            await sentinel.ask_others_every(period, STEP_SECONDS)
            await sentinel.keep_down_after(haste(boottime() - since), STEP_SECONDS)

        configured = self._fleet.config.sentinel.down_after
        began = boottime()
        if self._chosen.is_set():
            return  # somebody else was quicker
        try:
            await on_all(self._sentinels(), hasten)
            async with asyncio.timeout(CHOICE_SECONDS):
                await self._chosen.wait()
            log.info("the sentinels have chosen", instead_of=str(primary), seconds=round(boottime() - began, 3))
        except TimeoutError:
            log.warning("the sentinels have not chosen", seconds=CHOICE_SECONDS)
        finally:
            await on_all(self._fleet.sentinels, lambda sentinel: sentinel.keep_down_after(configured, STEP_SECONDS))
            await on_all(self._sentinels(), lambda sentinel: sentinel.keep_pace(STEP_SECONDS))
            self._wake()


def unfit(config: Config, answers: Mapping[str, SentinelAnswer], primary: Endpoint) -> str | None:
    """Say why the sentinels are not to be hurried; None when a majority is there and of one mind. Pure."""
    naming = [answer for answer in answers.values() if _names(answer, primary)]
    if len(naming) < config.majority:
        return f"{len(naming)} of {len(config.voters)} sentinels name it, {config.majority} are a majority"
    if any(FAILOVER_FLAG in answer.flags for answer in answers.values()):
        return "they are replacing it already"
    if any(PROMOTED_FLAG in answer.flags for answer in answers.values()):
        return "one of them is not done with its promotion"
    return None


def _names(answer: SentinelAnswer, primary: Endpoint) -> bool:
    return answer.primary == primary and not answer.tilt
