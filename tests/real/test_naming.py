"""Real sentinels are told who is primary in an epoch that they have voted for."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from support.sentinels import SECRETS, Cluster, raw, redis_client, sentinel_client, until, whole

from srd.ha.fleet import Fleet
from srd.ha.naming import have_named, make_epoch
from srd.reconcile import boottime
from srd.state import SentinelAnswer


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
