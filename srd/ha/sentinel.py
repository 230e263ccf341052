"""What srd asks of a sentinel and tells it, and what the answers mean.

Sentinel's answer is made of three commands of one pipeline, GET-MASTER-ADDR-BY-NAME last. The leader of a failover
names the promoted replica there from +promoted-slave on (sentinel.c, sentinelGetCurrentMasterAddress), but goes on
showing the old primary in SENTINEL MASTER until its +switch-master, 1.0 s later by measurement. Where the two differ,
the flags are those of the primary that is being replaced, so they are not taken for flags of the one that is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from srd.cluster import Config, Node
from srd.ha.lease import PROMOTED_FLAG
from srd.ha.resp import ANSWER_SECONDS, Credentials, Fields, RespError, UnexpectedReplyError, Wire, checked, flag
from srd.model import Endpoint, Secrets
from srd.reconcile import backoff_seconds, boottime
from srd.state import SentinelAnswer

# A lost subscription delays nothing but wake-ups, so it may be sought often.
RESUBSCRIBE_CAP_SECONDS: Final = 1.0
SUBSCRIBED: Final = "subscribed"
SELECTED: Final = "+selected-slave"
HELLO_CHANNEL: Final = "__sentinel__:hello"  # the one to which a sentinel itself takes PUBLISH (sentinelPublishCommand)
# A sentinel forgets its pace when it is started anew, which its own silence or this many seconds show.
PACE_SECONDS: Final = 5.0

# requirepass in sentinel.conf is the password of its user `default`.
SENTINEL_USER: Final = "default"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a node's sentinel announced, as `+switch-master`; `subscribed` is this client's own word."""

    node: str
    name: str
    payload: str


# Milliseconds; sentinel.c has 10,000, 2,000 and 1,000. A sentinel learns of replicas by INFO only: at its own pace, a
# primary that dies in the first ten seconds of its replicas has nobody that could take over. It demotes a returned
# primary after four publish periods. The ping period stays: it also scales who may be promoted.
# In TILT, after a jump of its clock, a sentinel does nothing for 30,000 and no lease is held: by then it has long
# pinged everybody by the new time, which takes it 1,000.
PACE: Final = {"info-period": 1000, "publish-period": 500, "ask-period": 200, "tilt-period": 5000}
OFTEN_MILLISECONDS: Final = 100
# What sentinelSelectSlave takes for lately while the primary is down: five ping periods.
LOOKED_MILLISECONDS: Final = 5000
# Longer than any sentinel has run: it asks when its last answer is older than that.
NEVER_MILLISECONDS: Final = 10**12


NOBODY: Final = "*"
# What a leader shows of the replica that it has chosen, until its failover is over (sentinel.c, SRI_PROMOTED).
CHOSEN_FLAG: Final = "promoted"


def _vote_question(primary: Endpoint, epoch: int = 0, leader: str = "srd") -> tuple[str, ...]:
    """Return the request for a vote in an epoch, or the question for whom it has last voted to replace this primary.

    That is the request for a vote itself, in epoch 0, in which nobody can vote: no epoch is raised and no vote is given
    (sentinel.c, sentinelVoteLeader: both only for a greater epoch than it knows of), and the last vote is the reply.
    """
    return ("SENTINEL", "IS-MASTER-DOWN-BY-ADDR", str(primary.address), str(primary.port), str(epoch), leader)


def _is_looked_at(replica: Fields) -> bool:
    """Whether a sentinel has looked at a replica lately; its id is empty, and the look 0 ms old, until it first has."""
    return bool(replica.get("runid", str)) and replica.get("info-refresh", int) < LOOKED_MILLISECONDS


def _set_back(master: Fields) -> float:
    """Return by how many seconds its clock has gone back since it last heard the primary: how far ahead that seems."""
    heard = [master.get(name, int) for name in ("last-ping-reply", "info-refresh")]  # milliseconds ago
    return max(0.0, -min(heard) / 1000)


class SentinelClient:
    """Asks one node's sentinel."""

    def __init__(self, config: Config, node: Node, secrets: Secrets, *, clock: Callable[[], float] = boottime) -> None:
        self.node = node.name
        self._endpoint = Endpoint(node.address, config.sentinel.port)
        self._credentials = Credentials(SENTINEL_USER, secrets.sentinel_password)
        self._wire = self._new_wire()
        self._master = config.sentinel.master
        self._watched = Endpoint(config.redis_nodes[0].address, config.redis.port)  # until it says otherwise
        self._clock = clock

    def _new_wire(self) -> Wire:
        return Wire("sentinel", self._endpoint, self._credentials)

    async def ask(self, seconds: float = ANSWER_SECONDS) -> SentinelAnswer:
        """Return whom it names and what it knows; `primary` is None when it has never heard of the cluster."""
        asked = self._clock()
        subject = self._wire.subject
        while True:
            shown, about, own_id, voted, named = await self._wire.ask(
                ("SENTINEL", "MASTER", self._master),
                ("INFO", "sentinel"),
                ("SENTINEL", "MYID"),
                _vote_question(self._watched),
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._master),
                seconds=seconds,
            )
            tilt = Fields.of_info(subject, [about]).get("sentinel_tilt", flag)
            if named is None:
                return SentinelAnswer(self.node, asked, None, 0, tilt, 0, 0, run_id=checked(subject, own_id, str))
            master = Fields.of_list(subject, shown)
            former, self._watched = self._watched, master.endpoint("ip", "port")
            if self._watched == former:
                break  # a vote is about an address: about another one, it is asked for again
        host, port = checked(subject, named, list)
        primary = Fields(subject, {"host": host, "port": port}).endpoint("host", "port")
        flags = master.get("flags", lambda text: frozenset(text.split(",")))
        # It begins anew with each primary, with the sentinel, and with each change of role that the primary reports
        # (sentinel.c, sentinelResetMaster, sentinelRefreshInstanceInfo).
        named_for = master.get("role-reported-time", int) / 1000 if self._watched == primary else 0.0
        pending = master.get("last-ping-sent", int)  # milliseconds since the first ping without a reply; 0 if none
        _, leader, epoch = checked(subject, voted, list)
        answered = self._clock()
        return SentinelAnswer(
            node=self.node,
            asked=asked,
            primary=primary,
            epoch=master.get("config-epoch", int),
            tilt=tilt,
            known_sentinels=master.get("num-other-sentinels", int),
            known_replicas=master.get("num-slaves", int),
            quorum=master.get("quorum", int),
            parallel_syncs=master.get("parallel-syncs", int),
            failover_timeout=master.get("failover-timeout", int) / 1000,
            flags=flags if self._watched == primary else frozenset({PROMOTED_FLAG}),
            down_after=master.get("down-after-milliseconds", int) / 1000,
            # Counted from the answer, so at most later than it was: nobody is taken for silent too soon.
            unanswered=answered - pending / 1000 if pending else None,
            run_id=checked(subject, own_id, str),
            vote=None if leader == NOBODY else str(leader),
            vote_epoch=int(epoch),
            took=answered - asked,
            named_since=asked - named_for,
            set_back=_set_back(master),
        )

    async def keep_pace(self, seconds: float = ANSWER_SECONDS) -> None:
        """See to it that it looks and speaks as often as `PACE` says; it forgets that at each start.

        Changed only where it differs, for this one sentinel: `SENTINEL DEBUG` (redis 7.0) spreads to no other.
        """
        paced = await self.pace(seconds)
        wrong = [word for name, value in PACE.items() if paced[name] != value for word in (name, str(value))]
        if wrong:
            await self._wire.ask(("SENTINEL", "DEBUG", *wrong), seconds=seconds)

    async def pace(self, seconds: float = ANSWER_SECONDS) -> dict[str, int]:
        """Return how often it looks and speaks now, in the terms of `PACE`."""
        (listed,) = await self._wire.ask(("SENTINEL", "DEBUG"), seconds=seconds)
        shown = Fields.of_list(self._wire.subject, listed)
        return {name: shown.get(name, int) for name in PACE}

    async def keep_quorum(self, quorum: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it take so many sentinels for enough to call the primary down."""
        await self._set("quorum", quorum, seconds)

    async def keep_parallel_syncs(self, replicas: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it let so many replicas follow a new primary at a time."""
        await self._set("parallel-syncs", replicas, seconds)

    async def keep_failover_timeout(self, seconds: float, bound: float = ANSWER_SECONDS) -> None:
        """Have it give each step of a failover so many seconds."""
        await self._set("failover-timeout", round(seconds * 1000), bound)

    async def keep_down_after(self, seconds: float, bound: float = ANSWER_SECONDS) -> None:
        """Have it take the primary, its replicas and the other sentinels for down after so many seconds."""
        await self._set("down-after-milliseconds", round(seconds * 1000), bound)

    async def priorities(self, seconds: float = ANSWER_SECONDS) -> dict[Endpoint, int]:
        """Return the replicas that it has looked at lately and the priority of each, as it last saw it (by INFO).

        One that it has not looked at, is none that it would promote (sentinel.c, sentinelSelectSlave): it shows what it
        supposes of a replica of which it has just heard.
        """
        seen = [replica for replica in await self._replicas(seconds) if _is_looked_at(replica)]
        return {replica.endpoint("ip", "port"): replica.get("slave-priority", int) for replica in seen}

    async def promoting(self, seconds: float = ANSWER_SECONDS) -> Endpoint | None:
        """Return the replica that it promotes as the leader of a failover; None while it promotes nobody."""
        chosen = [each for each in await self._replicas(seconds) if CHOSEN_FLAG in each.get("flags", str).split(",")]
        return chosen[0].endpoint("ip", "port") if chosen else None

    async def _replicas(self, seconds: float) -> list[Fields]:
        (listed,) = await self._wire.ask(("SENTINEL", "REPLICAS", self._master), seconds=seconds)
        subject = self._wire.subject
        return [Fields.of_list(subject, entry) for entry in checked(subject, listed, list)]

    async def fail_over(self, seconds: float = ANSWER_SECONDS) -> None:
        """Have it promote the replica that it prefers, without a vote. Of one sentinel only: two make two primaries.

        `UnexpectedReplyError` when it refuses: another failover is under way, or it knows no good replica.
        """
        reply = await self._wire.tell(("SENTINEL", "FAILOVER", self._master), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def vote(self, primary: Endpoint, leader: str, epoch: int, seconds: float = ANSWER_SECONDS) -> bool:
        """Have it vote, in an epoch, for a sentinel, by its id, to be the one that replaces a primary; say if it does.

        It votes once in an epoch, and not in one that is older than any it knows of (sentinel.c, sentinelVoteLeader).
        """
        (reply,) = await self._wire.ask(_vote_question(primary, epoch, leader), seconds=seconds)
        _, voted, voted_in = checked(self._wire.subject, reply, list)
        return (voted, voted_in) == (leader, epoch)

    async def hear(
        self, speaker: Sequence[str], primary: Endpoint, epoch: int, seconds: float = ANSWER_SECONDS
    ) -> None:
        """Tell it, as if from another sentinel, of the configuration of an epoch: who is primary by it.

        `speaker` is that one's address, port, id and epoch, as a hello begins (sentinel.c, sentinelSendHello).
        """
        hello = ",".join((*speaker, self._master, str(primary.address), str(primary.port), str(epoch)))
        (reply,) = await self._wire.ask(("PUBLISH", HELLO_CHANNEL, hello), seconds=seconds)
        checked(self._wire.subject, reply, int)

    async def look_every(self, milliseconds: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it look at the replicas so often for a while; `keep_pace` ends that."""
        await self._wire.ask(("SENTINEL", "DEBUG", "info-period", str(milliseconds)), seconds=seconds)

    async def ask_others_every(self, milliseconds: int, seconds: float = ANSWER_SECONDS) -> None:
        """Have it ask the others so often whether the primary is down, which begins a vote; `keep_pace` ends that."""
        await self._wire.ask(("SENTINEL", "DEBUG", "ask-period", str(milliseconds)), seconds=seconds)

    async def _set(self, option: str, value: int, seconds: float) -> None:
        (reply,) = await self._wire.ask(("SENTINEL", "SET", self._master, option, str(value)), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def known(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return when it answers and knows the cluster's primary."""
        answer = await self.ask(seconds)
        if answer.primary is None:
            raise UnexpectedReplyError("use", self._wire.subject, f"it knows no primary named {self._master!r}")

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield its events for ever, over a connection of its own that is opened again whenever it is lost.

        `subscribed` comes first and after each loss: what was announced meanwhile was missed, so look at everything.
        """
        failures = 0
        while True:
            with contextlib.suppress(RespError):
                async with contextlib.aclosing(self._new_wire().subscribe("*")) as messages:
                    async for channel, payload in messages:
                        failures = 0
                        yield Event(self.node, channel or SUBSCRIBED, payload)
            failures += 1
            pause = backoff_seconds(failures, random.uniform(-1, 1))  # noqa: S311 - jitter
            await asyncio.sleep(min(pause, RESUBSCRIBE_CAP_SECONDS))

    async def close(self) -> None:
        """Close the connection for questions."""
        await self._wire.close()
