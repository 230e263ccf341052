"""Watches redis and the sentinels and writes down what they say.

Of its own redis and sentinel it keeps true what may differ while they run: how many sentinels a verdict needs, which
follows from the number of nodes; the sentinel's pace; what a failover may have left behind (ha/strays.py); and redis'
append-only file after a full disk (ha/torn.py).

Every one of them is asked by a loop of its own, so that one that does not answer delays no other, and every answer is
published at once. A sentinel's last answer stays until it is too old to count. Events of the sentinels only wake the
loops of those whose answer may be another one by now (`to_be_asked`): they can be missed, arrive late or twice, and the
next answer is right in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import structlog

from srd.cluster import NEVER_PRIORITY, PREFERRED_PRIORITY, Config, Node
from srd.ha.custody import Custody
from srd.ha.lease import Tenure, assess, dated, endpoint_of, fresh
from srd.ha.redis import RedisClient
from srd.ha.resp import ANSWER_SECONDS, RespError
from srd.ha.restart import Death
from srd.ha.sentinel import PACE_SECONDS, SELECTED, SUBSCRIBED, Event, SentinelClient
from srd.ha.strays import DOWN_AFTER_SECONDS, PRIORITY_SECONDS, Stray
from srd.ha.torn import Torn
from srd.model import NodeKind, Role, Secrets
from srd.reconcile import Loop, boottime, until_first
from srd.state import Redis, SentinelAnswer, Store

log = structlog.get_logger(__name__)

REDIS_POLL_SECONDS: Final = 0.5
# A sentinel that answers at once is asked four times in a lease, a slow one twice.
QUESTIONS_PER_LEASE: Final = 4
SENTINEL_POLL_SECONDS: Final = 1.0
# A failover is announced in some thirty events. These tell that whoever says it may name somebody else or be content
# again, or that words of it were missed; that it is doubted (+sdown and what follows) the next question hears, and
# nothing here waits for it. That sentinel is asked, by each node: with all of them asked at all events a kill cost
# 1.02 s on the lab's one CPU, with all of them at these 0.90 s.
TELLING: Final = frozenset({
    SUBSCRIBED, "+switch-master", "-sdown", "-odown", "+tilt", "-tilt",
    "+failover-end", "+failover-end-for-timeout", "-failover-abort-not-elected", "-failover-abort-no-good-slave",
    "-failover-abort-slave-timeout",
})  # fmt: skip
# After these whoever is promoted waits for the word of all: by the first they have voted, and by the second it leads.
ELECTED: Final = frozenset({SELECTED, "+promoted-slave"})
# What a pass may take beyond its question: nothing in it waits for anyone else.
_PASS_SLACK_SECONDS: Final = 2.0


class Observer:
    """Keeps `redis`, `sentinels`, `silent`, `lease` and `sentinel_events` of the view true.

    The daemon runs `run`, which is made of `loop` (the local redis), `ask_sentinels` and `events`. `wake` holds what
    shall be woken with the observer itself, `heard` what gets each event, `judged` is called when the
    lease was judged. `custody` is what this node has given away of its lease, or was given of another's.
    """

    def __init__(
        self,
        config: Config,
        node: Node,
        secrets: Secrets,
        store: Store,
        *,
        clock: Callable[[], float] = boottime,
        wake: Sequence[Callable[[], None]] = (),
        heard: Sequence[Callable[[Event], None]] = (),
        judged: Callable[[], None] = lambda: None,
        custody: Custody | None = None,
    ) -> None:
        self._config = config
        self._node = node
        self._store = store
        self._clock = clock
        self._callbacks = tuple(wake)
        self._hearers = tuple(heard)
        self._judged = judged
        self._custody = custody if custody is not None else Custody()
        self._write_redis = store.writer("redis")
        self._write_sentinels = store.writer("sentinels")
        self._write_silent = store.writer("silent")
        self._write_lease = store.writer("lease")
        self._write_events = store.writer("sentinel_events")
        self.redis: RedisClient | None = None
        if node.kind is NodeKind.REDIS:
            self.redis = RedisClient(endpoint_of(config, node), secrets, clock=clock)
        self._answers: dict[str, SentinelAnswer] = {}
        self._known: dict[str, SentinelAnswer] = {}  # by node, its last answer, however old
        self._tenure = Tenure()
        self._silent: dict[str, float] = {}
        self._hasty, self._preferred = Stray(DOWN_AFTER_SECONDS), Stray(PRIORITY_SECONDS)
        self.torn = Torn()
        self._paced = float("-inf")
        self._events: dict[str, int] = {}
        self._last_role = Role.UNKNOWN
        self.last_replid = ""  # of the stream in which the present or last redis was
        self.redis_error: str | None = None
        self.loop = Loop(
            "observe redis",
            self.reconcile,
            resync=REDIS_POLL_SECONDS,
            timeout=ANSWER_SECONDS + _PASS_SLACK_SECONDS,
        )
        self._secrets = secrets
        self.sentinels: dict[str, SentinelClient] = {}
        self._former: list[SentinelClient] = []  # of nodes that are no voters any more; to be closed
        self._askers: dict[str, Loop] = {}
        self._changed = asyncio.Event()
        self._watch(config)

    def _watch(self, config: Config) -> None:
        """Have a client and a loop for each voter's sentinel; those that stay the same go on."""
        known = self.sentinels
        self.sentinels = {
            voter.name: known.get(voter.name) or SentinelClient(config, voter, self._secrets, clock=self._clock)
            for voter in config.voters
        }
        share = min(SENTINEL_POLL_SECONDS, config.primary_lease / QUESTIONS_PER_LEASE)
        self._question_seconds = share
        self._askers = {
            name: Loop(
                f"ask the sentinel of {name}",
                partial(self._ask, client),
                resync=share,
                timeout=share + _PASS_SLACK_SECONDS,
            )
            for name, client in self.sentinels.items()
        }

    def adopt(self, config: Config) -> None:
        """Watch the nodes of a changed file from now on."""
        former, self._config = self._config.voters, config
        if former == config.voters:
            return  # whoever came or left, nobody else is to be asked
        moved = {node.name for node in former if node not in config.voters}
        self._former += [client for name, client in self.sentinels.items() if name in moved]
        self.sentinels = {name: client for name, client in self.sentinels.items() if name not in moved}
        self._silent = {name: since for name, since in self._silent.items() if name not in moved}
        self._watch(config)
        self._changed.set()

    async def run(self) -> None:
        """Observe until cancelled, then close every connection."""
        try:
            while True:
                self._changed.clear()
                while self._former:
                    await self._former.pop().close()
                await until_first(self.loop.run, self.ask_sentinels, self.events, self._reconfigured)
        finally:
            await self.close()

    async def _reconfigured(self) -> None:
        await self._changed.wait()

    async def close(self) -> None:
        """Close every connection; each is opened again when it is needed."""
        for client in (self.redis, *self.sentinels.values(), *self._former):
            if client is not None:
                await client.close()

    def wake(self) -> None:
        """Ask redis and every sentinel again, soon."""
        self._ask_again(self._askers)

    def _ask_again(self, voters: Iterable[str]) -> None:
        self.loop.wake()
        for name in voters:
            self._askers[name].wake()

    def death(self) -> Death:
        """Return how redis ended, when it has just ended, and forget what it was: the next one must say so anew."""
        died = Death(self._clock(), self._last_role)
        self._last_role = Role.UNKNOWN
        return died

    @property
    def last_role(self) -> Role:
        """What the present or last redis said that it was; `unknown` when it never answered."""
        return self._last_role

    async def reconcile(self) -> None:
        """Ask the local redis, if this node has one, and judge everything again by the present time."""
        seen = await self._observe_redis(self.redis) if self.redis is not None else None
        if seen is None:
            self._write_redis(None)
            self.judge()
        elif self.take_in(seen) and self.redis is not None:
            if self.torn.is_due(seen, self._clock()):
                await self._have_log_rewritten(self.redis)
            await self._keep_priority(self.redis, seen)

    async def _have_log_rewritten(self, client: RedisClient) -> None:
        """Have redis write its append-only file anew; one that refuses is told again later."""
        try:
            await client.rewrite_log()
        except RespError as error:
            self.torn.refused(self._clock())
            log.warning("redis does not write its append-only file anew", reason=str(error))
        else:
            self.torn.told(self._clock())
            log.info("redis writes its append-only file anew", why="it may have a hole, after a full disk")

    def take_in(self, seen: Redis) -> bool:
        """Write down what the local redis has said, whoever has asked it; return False where later words are known."""
        known = self._store.view().redis
        if known is not None and seen.answered < known.answered:
            return False
        self._last_role, self.last_replid = seen.role, seen.replid
        if seen.role is Role.REPLICA:
            self._custody.lose(seen.answered)
        self._write_redis(seen)
        self.judge()
        return True

    async def _keep_priority(self, client: RedisClient, seen: Redis) -> None:
        """Keep true what redis says of itself to the sentinels: whether it may be promoted, and how soon."""
        drained = self._store.view().drained
        if seen.priority == NEVER_PRIORITY and not drained and seen.role is Role.REPLICA and not seen.in_step:
            return  # it was started as a replica, or was a primary, and what it has may be old
        # Of a primary no sentinel asks it; once it is replaced, what it has is not what its successor has taken.
        never = drained or seen.role is Role.PRIMARY or seen.sync_in_progress
        wanted = NEVER_PRIORITY if never else self._config.node(self._node.name).priority
        # One that a failover has set may be needed, of a node that may be chosen; any other is an old file's.
        tolerated = (wanted,) if never else (wanted, PREFERRED_PRIORITY)
        if self._preferred.is_due(differs=seen.priority != wanted, now=self._clock()) or (
            seen.priority not in tolerated
        ):
            await client.keep_priority(wanted)

    async def _observe_redis(self, client: RedisClient) -> Redis | None:
        # A redis that is down is an observation, not a failure of the observer. Said once per reason.
        try:
            seen = await client.observe()
        except RespError as error:
            if str(error) != self.redis_error:
                log.info("redis does not answer", error=str(error))
            self.redis_error = str(error)
            return None
        self.redis_error = None
        return seen

    async def ask_sentinels(self) -> None:
        """Ask every voter's sentinel again and again, each by itself, until cancelled."""
        await until_first(*(asker.run for asker in self._askers.values()))

    async def _ask(self, client: SentinelClient) -> None:
        asked = self._clock()
        try:
            answer = await client.ask(self._question_seconds)
        except RespError:
            self._silent.setdefault(client.node, asked)
            self._write_silent(dict(self._silent))
            self._paced = float("-inf") if client.node == self._node.name else self._paced
            raise
        self._silent.pop(client.node, None)
        self._write_silent(dict(self._silent))
        self._answers[client.node] = self._dated(answer)
        self.judge()
        if client.node == self._node.name:
            await self._keep(client, answer)

    def _dated(self, answer: SentinelAnswer) -> SentinelAnswer:
        """Say since when its vote is known, since when it names this primary, and what the one before had of it."""
        before = self._known.get(answer.node)
        self._known[answer.node] = answer = dated(self._config, before, answer, self._clock())
        return answer

    async def _keep(self, client: SentinelClient, answer: SentinelAnswer) -> None:
        """Keep true what this node's own sentinel should have set."""
        config, bound = self._config, self._question_seconds
        if self._clock() - self._paced >= PACE_SECONDS:
            await client.keep_pace(bound)
            self._paced = self._clock()
        if answer.primary is None:
            return
        if answer.quorum != config.quorum:
            await client.keep_quorum(config.quorum, bound)
        if answer.parallel_syncs != config.parallel_syncs:
            await client.keep_parallel_syncs(config.parallel_syncs, bound)
        if _differ(answer.failover_timeout, config.sentinel.failover_timeout):
            await client.keep_failover_timeout(config.sentinel.failover_timeout, bound)
        hasty = _differ(answer.down_after, config.sentinel.down_after)
        if self._hasty.is_due(differs=hasty, now=self._clock()):
            await client.keep_down_after(config.sentinel.down_after, bound)

    def judge(self) -> None:
        """Write what follows from the answers now, and from what this node has given away of its lease, or was given.

        Without a pause in between, so every snapshot is of one mind.
        """
        now = self._clock()
        self._answers = dict(fresh(self._config, self._answers, now))
        lease = assess(self._config, self._node, self._answers, now)
        named = self._config.node_at(lease.primary.address) if lease.primary is not None else None
        self._custody.named(named, self._node)
        own = self._tenure.expires(lease, now, given=self._custody.is_assured(now))
        expires = self._custody.held_until(own, now, lease.epoch)
        lease = dataclasses.replace(lease, held=now < expires, expires=expires, heir=self._custody.heir_at(now))
        self._write_sentinels(dict(self._answers))
        self._write_lease(lease)
        self._judged()

    async def events(self) -> None:
        """Listen to every sentinel until cancelled: wake at each event, and count those of this node's own."""
        await until_first(*(partial(self._listen, client) for client in self.sentinels.values()))

    async def _listen(self, client: SentinelClient) -> None:
        async with contextlib.aclosing(client.events()) as events:
            async for event in events:
                self._heard(event)

    def _heard(self, event: Event) -> None:
        if event.node == self._node.name and event.name != SUBSCRIBED:
            self._events[event.name] = self._events.get(event.name, 0) + 1
            self._write_events(dict(self._events))
        if event.name == SELECTED:
            self._hasty.end_now()
        for hearer in self._hearers:
            hearer(event)
        asked = to_be_asked(event, self._askers)
        if not asked:
            return
        self._ask_again(asked)
        for callback in self._callbacks:
            callback()


def to_be_asked(event: Event, voters: Iterable[str]) -> list[str]:
    """Return the voters whose sentinel may answer otherwise by now, as one has announced this."""
    return [name for name in voters if event.name in ELECTED or (event.name in TELLING and name == event.node)]


def _differ(one: float, other: float) -> bool:
    """Whether two times are not the same to a sentinel, which counts in milliseconds."""
    return round(one * 1000) != round(other * 1000)
