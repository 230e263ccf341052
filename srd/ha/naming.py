"""Has the sentinels name a new primary at once, in an epoch that a majority has voted for.

Of one that was made primary on purpose (`have_named`): what a sentinel's leader does after a failover, without the
failover. Two steps:

1. A vote for a new epoch (SENTINEL IS-MASTER-DOWN-BY-ADDR with an epoch and a leader's id), of all at once: a majority
   gives it to an id that is nobody else's, so nobody else can lead in that epoch (sentinel.c, sentinelVoteLeader).
2. The hello by which sentinels tell one another of a newer configuration (sentinel.c, sentinelProcessHelloMessage):
   they take it in at once, and spread it among themselves should one of them miss it. It comes to each as if from
   another one that it knows: of itself it would make a sentinel of its own.

SENTINEL FAILOVER would do as well, and is asked for where nobody votes. But it takes 0.5 to 1.5 s in which the
successor is not named, and the sentinel that was asked is busy with it; no majority has voted for its epoch; and it
ends the connections of the new primary's clients, which have just come (CLIENT KILL TYPE normal, sentinelSendSlaveOf).
Here each sentinel may begin a failover at once: whoever takes a configuration in forgets when it has tried or voted
last (sentinelResetMaster). With `apart` they are told one after the other: whoever takes it in opens its two
connections to each redis anew, and each srd asks what it says now.

Of one that a leader has chosen (`have_choice_known`) the first step is done: a majority has voted for that leader in
that epoch, and it has said whom it promotes. It learns that this has happened by its next INFO, up to a second later,
and only then tells the others; until then they name the former one, and should the new primary be gone again by then,
the leader finds out after failover-timeout only. The second step is the same, of all at once. The leader takes it in as
well, and with that its failover is over: it tells no replica any more whom to follow (ha/promotion.py does).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from srd.cluster import Config
from srd.ha.failover import unfit
from srd.ha.fleet import on_all
from srd.ha.lease import FAILOVER_FLAG
from srd.ha.resp import NobodyThereError, RespError, UnexpectedReplyError
from srd.ha.sentinel import SentinelClient
from srd.model import Endpoint
from srd.state import SentinelAnswer

log = structlog.get_logger(__name__)

STEP_SECONDS: Final = 0.5
# The next sentinel is told only what this one has refused, so this one is given longer.
FAILOVER_STEP_SECONDS: Final = 1.0
# One that does not answer may have taken it in; it does no harm twice.
ATTEMPTS: Final = 3
_SPEAKERS: Final = 2


async def have_named(
    config: Config,
    sentinels: Mapping[str, SentinelClient],
    former: Endpoint,
    successor: Endpoint,
    *,
    apart: float = 0.0,
) -> bool:
    """Have the sentinels, by node, name the successor of a former primary; False when none of them was told anything.

    They are told so many seconds `apart`.

    Once one was told, it is spread; whoever asked for a failover then would have the successor replaced.
    """
    answers = await on_all(sentinels, lambda one: one.ask(STEP_SECONDS))
    if is_named(config, answers, successor):
        return True
    naming = {name: answer for name, answer in answers.items() if answer.primary == former and not answer.tilt}
    if reason := unfit(config, answers, former) or (len(naming) < _SPEAKERS and "one has nobody to hear it from"):
        log.warning("the sentinels are not told whom to name", why=reason)
        return False
    epoch = 1 + max(max(answer.epoch, answer.vote_epoch) for answer in answers.values())
    leader = secrets.token_hex(20)  # as long as a sentinel's id, and no sentinel's: it leads in no other failover
    asked = {name: sentinels[name] for name in naming}
    votes = await on_all(asked, lambda one: one.vote(former, leader, epoch, STEP_SECONDS))
    if sum(votes.values()) < config.majority:
        log.warning("no majority of the sentinels votes", epoch=epoch, votes=votes)
        return False
    await _tell(config, asked, naming, successor, epoch, apart=apart)
    return True


async def have_choice_known(
    config: Config, sentinels: Mapping[str, SentinelClient], leader: str, former: Endpoint, chosen: Endpoint
) -> bool:
    """Have the sentinels, by node, name whom the one of the node `leader` has chosen, and who is primary by now.

    False when none of them was told anything: that leader is done or silent, promotes another one, or no majority has
    voted for it.
    """
    if leader not in sentinels:
        return False
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(on_all(sentinels, lambda one: one.ask(STEP_SECONDS)))
        promoting = group.create_task(on_all({leader: sentinels[leader]}, lambda one: one.promoting(STEP_SECONDS)))
    answers = asked.result()
    led = answers.get(leader)
    if led is None or led.primary != former or FAILOVER_FLAG not in led.flags:
        return False
    if promoting.result().get(leader) != chosen:
        return False  # it has given up that failover since, and leads another
    epoch = led.vote_epoch
    votes = sum((answer.vote, answer.vote_epoch) == (led.run_id, epoch) for answer in answers.values())
    naming = {name: a for name, a in answers.items() if a.primary == former and a.epoch < epoch and not a.tilt}
    if votes < config.majority or len(naming) < _SPEAKERS:
        log.info("the leader tells the sentinels itself", leader=leader, epoch=epoch, votes=votes)
        return False
    await _tell(config, {name: sentinels[name] for name in naming}, naming, chosen, epoch)
    return True


async def _tell(
    config: Config,
    asked: Mapping[str, SentinelClient],
    naming: Mapping[str, SentinelAnswer],
    primary: Endpoint,
    epoch: int,
    *,
    apart: float = 0.0,
) -> None:
    """Tell those sentinels of a configuration, so many seconds apart, again until a majority has heard it."""
    pauses = {name: number * apart for number, name in enumerate(asked)}

    async def tell(one: SentinelClient) -> None:
        await asyncio.sleep(pauses[one.node])
        await one.hear(_another(config, one.node, naming, epoch), primary, epoch, STEP_SECONDS)

    for _ in range(ATTEMPTS):
        told = await on_all(asked, tell)
        if len(told) >= config.majority:
            return


async def make_epoch(sentinels: Sequence[SentinelClient], former: Endpoint) -> None:
    """Have one sentinel that names the former primary still make the epoch in which the successor is named.

    One that names the successor by now would have it replaced.
    """
    for one in sentinels:
        try:
            named = (await one.ask(FAILOVER_STEP_SECONDS)).primary
        except RespError as error:
            log.warning("a sentinel is silent", sentinel=one.node, error=str(error))
            continue
        if named != former:
            return
        try:
            await one.fail_over(FAILOVER_STEP_SECONDS)
        except RespError as error:
            log.warning("a sentinel refuses", sentinel=one.node, error=str(error))
            # One that did not answer may have begun, and one that says so has: two that do it make one epoch twice.
            if not isinstance(error, (UnexpectedReplyError, NobodyThereError)) or "INPROG" in str(error):
                return
        else:
            return


def is_named(config: Config, answers: Mapping[str, SentinelAnswer], primary: Endpoint) -> bool:
    """Whether a majority of the sentinels names this primary, by these answers, one per node."""
    return sum(answer.primary == primary for answer in answers.values()) >= config.majority


def _another(config: Config, node: str, naming: Mapping[str, SentinelAnswer], epoch: int) -> tuple[str, ...]:
    """Return how another sentinel than a node's begins its hello: where it is, who it is, the epoch it knows of."""
    speaker = next(answer for name, answer in naming.items() if name != node)
    return str(config.node(speaker.node).address), str(config.sentinel.port), speaker.run_id, str(epoch)
