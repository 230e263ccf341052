"""Real sentinels are told who is primary in an epoch that they have voted for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from support.sentinels import SECRETS, Cluster, raw, redis_client, sentinel_client, until, whole

from srd.ha.fleet import Fleet
from srd.ha.lease import FAILOVER_FLAG
from srd.ha.naming import have_choice_known, have_named, make_epoch
from srd.ha.promotion import selection
from srd.ha.sentinel import NEVER_MILLISECONDS, SELECTED, SUBSCRIBED, SentinelClient
from srd.model import Endpoint, Role
from srd.reconcile import boottime
from srd.state import SentinelAnswer

NEVER_SECONDS = 600.0


@contextlib.asynccontextmanager
async def fleet(cluster: Cluster) -> AsyncIterator[Fleet]:
    made = Fleet(cluster.config, SECRETS)
    try:
        yield made
    finally:
        await made.close()


async def switch(cluster: Cluster, to: str) -> None:
    """Make n2 or n3 the primary, without a word to the sentinels."""
    async with redis_client(cluster, to) as new, redis_client(cluster, "n1") as old:
        await new.lead()
        await old.follow(cluster.endpoint(to))


async def said_by(cluster: Cluster, name: str) -> SentinelAnswer:
    async with sentinel_client(cluster, name) as asked:
        return await asked.ask()


async def names(cluster: Cluster, name: str, primary: str) -> bool:
    return (await said_by(cluster, name)).primary == cluster.endpoint(primary)


async def knows_all(cluster: Cluster, name: str) -> bool:
    said = await said_by(cluster, name)
    return (said.known_sentinels, said.known_replicas) == (2, 2)


async def choice(leader: SentinelClient, begin: Callable[[], Awaitable[None]]) -> Endpoint:
    """Return whom a sentinel chooses once a failover has begun."""
    async with asyncio.timeout(20), contextlib.aclosing(leader.events()) as events:
        async for event in events:
            if event.name == SUBSCRIBED:
                await begin()
            elif event.name == SELECTED:
                chosen, _ = selection(event)
                assert chosen is not None
                return chosen
    raise AssertionError("it has chosen nobody")


async def test_whom_a_leader_has_chosen_all_name_before_it_knows_of_the_promotion(cluster: Cluster) -> None:
    await whole(cluster)
    async with fleet(cluster) as acting:
        leader = acting.sentinels["n3"]

        async def lose_the_primary() -> None:
            cluster.kill("redis-n1")
            for name, one in acting.sentinels.items():
                await one.ask_others_every(10 if name == "n3" else NEVER_MILLISECONDS, 1)
                await one.keep_down_after(0.5)

        chosen = await choice(leader, lose_the_primary)
        name = cluster.config.node_at(chosen.address).name  # type: ignore[union-attr]
        async with asyncio.timeout(10), redis_client(cluster, name) as asked:
            # At once: the leader sends INFO again a second after it had found the primary down.
            while await asked.role(1) is not Role.PRIMARY:  # noqa: ASYNC110 - redis tells nobody
                await asyncio.sleep(0.01)
        assert await have_choice_known(cluster.config, acting.sentinels, "n3", cluster.endpoint("n1"), chosen)
        said = {name: await said_by(cluster, name) for name in acting.sentinels}
        assert {(answer.primary, answer.epoch, answer.vote_epoch) for answer in said.values()} == {(chosen, 1, 1)}
        assert all(FAILOVER_FLAG not in answer.flags for answer in said.values()), "the leader is done, too"
        told = await have_choice_known(cluster.config, acting.sentinels, "n3", cluster.endpoint("n1"), chosen)
        assert not told, "there is no such failover any more"


async def test_a_choice_for_which_nobody_has_voted_is_left_to_its_leader(cluster: Cluster) -> None:
    await whole(cluster)
    async with fleet(cluster) as acting:
        leader = acting.sentinels["n3"]
        chosen = await choice(leader, leader.fail_over)
        assert not await have_choice_known(cluster.config, acting.sentinels, "n3", cluster.endpoint("n1"), chosen)
        assert await names(cluster, "n1", "n1")
        assert await names(cluster, "n2", "n1")


async def test_they_name_it_at_once_in_an_epoch_with_one_leader(cluster: Cluster) -> None:
    await whole(cluster)
    former, successor = cluster.endpoint("n1"), cluster.endpoint("n2")
    async with fleet(cluster) as acting, raw(cluster, "n2") as application:
        connection = await application.client_id()
        await switch(cluster, "n2")
        began = boottime()
        assert await have_named(cluster.config, acting.sentinels, former, successor)
        said = [await said_by(cluster, name) for name in ("n1", "n2", "n3")]
        assert {answer.primary for answer in said} == {successor}
        assert {(answer.epoch, answer.vote_epoch) for answer in said} == {(1, 1)}
        assert boottime() - began < 5, "nobody waits for a look of the sentinels"
        rivals = [await one.vote(successor, "a" * 40, 1) for one in acting.sentinels.values()]
        assert rivals == [False] * 3, "nobody else can lead in that epoch"
        for name in ("n1", "n2", "n3"):
            await until(partial(knows_all, cluster, name))
        assert await application.client_id() == connection, "no client of the new primary was cut off"
        await make_epoch([*acting.sentinels.values()], former)
        said = [await said_by(cluster, name) for name in ("n1", "n2", "n3")]
        assert all("failover_in_progress" not in answer.flags for answer in said), "nobody has it replaced"
        # And on: what was made by hand is the configuration from which the next epoch is counted.
        assert await have_named(cluster.config, acting.sentinels, successor, cluster.endpoint("n3"))
        assert {(await said_by(cluster, name)).epoch for name in ("n1", "n2", "n3")} == {2}


async def test_they_are_told_so_far_apart(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await whole(cluster)
    heard: list[float] = []
    really = SentinelClient.hear

    async def noted(*words: Any) -> None:
        heard.append(boottime())
        await really(*words)

    async with fleet(cluster) as acting:
        await switch(cluster, "n2")
        monkeypatch.setattr(SentinelClient, "hear", noted)
        former, successor = cluster.endpoint("n1"), cluster.endpoint("n2")
        assert await have_named(cluster.config, acting.sentinels, former, successor, apart=0.3)
    assert len(heard) == len(acting.sentinels)
    assert all(later - earlier > 0.2 for earlier, later in itertools.pairwise(heard))


async def test_where_only_one_was_told_the_others_hear_of_it_from_that_one(cluster: Cluster) -> None:
    await whole(cluster)
    async with fleet(cluster) as acting:
        await switch(cluster, "n2")
        former, successor = cluster.endpoint("n1"), cluster.endpoint("n2")
        telling = asyncio.create_task(
            have_named(cluster.config, acting.sentinels, former, successor, apart=NEVER_SECONDS)
        )
        await until(partial(names, cluster, "n1", "n2"))
        telling.cancel()  # as when srd is killed
        await asyncio.wait({telling})
        for name in ("n2", "n3"):
            await until(partial(names, cluster, name, "n2"))
            await until(partial(knows_all, cluster, name))
        assert {(await said_by(cluster, name)).epoch for name in ("n1", "n2", "n3")} == {1}


async def test_one_that_was_silent_hears_of_it_from_the_others(cluster: Cluster) -> None:
    await whole(cluster)
    async with fleet(cluster) as acting:
        await switch(cluster, "n2")
        cluster.send("sentinel-n3", signal.SIGSTOP)
        told = await have_named(cluster.config, acting.sentinels, cluster.endpoint("n1"), cluster.endpoint("n2"))
        assert told
        cluster.send("sentinel-n3", signal.SIGCONT)
        await until(partial(names, cluster, "n3", "n2"))
        await until(partial(knows_all, cluster, "n3"))


async def test_without_a_majority_nobody_is_named(cluster: Cluster) -> None:
    await whole(cluster)
    async with fleet(cluster) as acting:
        for name in ("n2", "n3"):
            cluster.send(f"sentinel-{name}", signal.SIGSTOP)
        assert not await have_named(cluster.config, acting.sentinels, cluster.endpoint("n1"), cluster.endpoint("n2"))
        for name in ("n2", "n3"):
            cluster.send(f"sentinel-{name}", signal.SIGCONT)
        assert await names(cluster, "n1", "n1")
        assert await names(cluster, "n2", "n1")


async def test_an_epoch_that_another_leader_has_is_not_used(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await whole(cluster)
    former, rival = cluster.endpoint("n1"), "a" * 40
    async with fleet(cluster) as acting:
        for name in ("n1", "n2"):
            really = acting.sentinels[name].vote

            async def too_late(*question: Any, really: Any = really) -> bool:
                """Vote for another one first, who has asked in the same epoch."""
                primary, _, epoch, seconds = question
                assert await really(primary, rival, epoch, seconds)
                voted: bool = await really(*question)
                return voted

            monkeypatch.setattr(acting.sentinels[name], "vote", too_late)
        assert not await have_named(cluster.config, acting.sentinels, former, cluster.endpoint("n2"))
        said = [await said_by(cluster, name) for name in ("n1", "n2", "n3")]
        assert {answer.primary for answer in said} == {former}
        monkeypatch.undo()
        # Two have voted, for nobody who acts: the next epoch is above it.
        assert await have_named(cluster.config, acting.sentinels, former, cluster.endpoint("n2"))
        assert [(await said_by(cluster, name)).epoch for name in ("n1", "n2", "n3")] == [2, 2, 2]
