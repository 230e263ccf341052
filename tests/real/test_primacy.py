"""Three nodes' say in who is primary, over real redises and real sentinels: how fast, how safe, and what it leaves."""

from __future__ import annotations

import signal
import time
from functools import partial
from typing import Any

import pytest
from support.primacies import NAMES, Srd, leader, running, settled, show, told, watched, writes
from support.sentinels import Cluster, raw, redis_client, sentinel_client, until

from srd.cluster import DEFAULT_PRIORITY, NEVER_PRIORITY
from srd.ha.failover import ALIVE_SECONDS, OWN_FENCE_SECONDS, REPLACE_SECONDS
from srd.ha.lease import FAILOVER_FLAG, PROMOTED_FLAG
from srd.ha.naming import have_choice_known
from srd.ha.redis import FENCED
from srd.ha.sentinel import OFTEN_MILLISECONDS, SentinelClient
from srd.model import Role, Service
from srd.reconcile import boottime
from srd.state import Child, ChildState


async def test_a_primary_whose_redis_dies_is_replaced_by_a_vote_within_a_second(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        began = time.monotonic()
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        successor = await leader(srds, ("n2", "n3"))
        led = time.monotonic() - began
        await writes(cluster, successor.name)
        show(says_yes=led, takes_a_write=time.monotonic() - began)
        await settled(cluster, cluster.endpoint(successor.name))
        assert successor.leads()
        assert led < 2.0


async def test_the_other_replica_follows_within_a_second_of_the_promotion(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        successor = await leader(srds, ("n2", "n3"))
        led = time.monotonic()
        (other,) = {"n2", "n3"} - {successor.name}
        async with redis_client(cluster, other) as replica:

            async def follows() -> bool:
                seen = await replica.observe()
                return seen.primary == cluster.endpoint(successor.name) and seen.link_up

            await until(follows)
        show(follows=time.monotonic() - led)
        assert time.monotonic() - led < 1.0


async def test_what_a_failover_has_set_for_a_moment_does_not_stay_where_its_srd_dies_meanwhile(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    configured = cluster.config.sentinel.down_after

    async def hasty(name: str) -> bool:
        async with sentinel_client(cluster, name) as asked:
            return (await asked.ask()).down_after < configured

    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
            cluster.kill("redis-n1")
            srds["n1"].redis_died()
            await until(partial(hasty, "n1"))
            sentinels = srds["n1"].primacy._fleet.sentinels
            dead = [*sentinels.values()]
            sentinels.clear()  # as kill -9 does: it takes nothing back
        for client in dead:
            await client.close()
        successor = await leader(srds, ("n2", "n3"), 30)
        await settled(cluster, cluster.endpoint(successor.name), among=("n2", "n3"))
        assert await hasty("n1"), "nobody but its own srd sets that back"
        again = Srd(cluster, "n1", srds)
        async with running(again):
            await settled(cluster, cluster.endpoint(successor.name), among=("n1",))


async def test_a_primary_that_was_replaced_and_leads_again_is_replaced_as_fast(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        srds["n3"].write_drained(True)
        await told(cluster, srds["n3"], NEVER_PRIORITY)
        for leading, other in (("n1", "n2"), ("n2", "n1"), ("n1", "n2")):
            await idle(cluster)
            began = time.monotonic()
            cluster.kill(f"redis-{leading}")
            srds[leading].redis_died()
            assert await leader(srds, (other,)) is srds[other]
            show(says_yes=time.monotonic() - began)
            assert time.monotonic() - began < REPLACE_SECONDS, "it was not taken for a silent one"
            cluster.redis(leading, other)
            srds[leading].alive()
            await srds[leading].until(lambda view: view.redis is not None and view.redis.link_up)
            await settled(cluster, cluster.endpoint(other))


@pytest.mark.parametrize("known_at_once", [True, False], ids=["known at once", "left to the leader"])
async def test_a_primary_that_dies_as_soon_as_it_is_named_leaves_the_sentinels_of_one_mind(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch, *, known_at_once: bool
) -> None:
    """Where nobody has the sentinels name it, their leader does, up to a second later."""
    told_at_once: list[bool] = []

    async def have_it_known(*question: Any) -> bool:
        told_at_once.append(known_at_once and await have_choice_known(*question))
        return told_at_once[-1]

    monkeypatch.setattr("srd.ha.promotion.have_choice_known", have_it_known)
    async with watched(srds, *NAMES):
        srds["n3"].write_drained(True)
        await told(cluster, srds["n3"], NEVER_PRIORITY)
        prompt = known_at_once
        for leading, other in (("n1", "n2"), ("n2", "n1")):
            told_at_once.clear()
            began = time.monotonic()
            cluster.kill(f"redis-{leading}")
            srds[leading].redis_died()
            assert await leader(srds, (other,), 30) is srds[other]
            took = time.monotonic() - began
            cluster.redis(leading, other)
            srds[leading].alive()
            await srds[other].until(lambda view, other=other: view.named == cluster.endpoint(other))
            if prompt:
                assert took < REPLACE_SECONDS
            prompt = any(told_at_once)  # otherwise its leader has seen the promotion just before
            if prompt:
                assert await busy_with(cluster, other) == set(), "no leader is to be waited for"
        await settled(cluster, cluster.endpoint("n1"))


async def busy_with(cluster: Cluster, primary: str) -> set[str]:
    """Return whose sentinels name this primary, and are not done with its promotion."""
    found = set()
    for name in NAMES:
        async with sentinel_client(cluster, name) as asked:
            answer = await asked.ask()
            if answer.primary == cluster.endpoint(primary) and answer.flags & {FAILOVER_FLAG, PROMOTED_FLAG}:
                found.add(name)
    return found


async def test_a_primary_that_dies_when_its_replicas_have_just_come_in_step_is_replaced_at_once(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its next INFO no sentinel knows that they may be promoted."""

    async def keep_no_pace(_: SentinelClient, __: float = 0.0) -> None: ...

    async with watched(srds, *NAMES):
        for name in ("n2", "n3"):
            srds[name].write_drained(True)
        monkeypatch.setattr(SentinelClient, "keep_pace", keep_no_pace)
        for name in NAMES:
            async with sentinel_client(cluster, name) as asked:
                await asked.look_every(OFTEN_MILLISECONDS)
        for name in ("n2", "n3"):
            await told(cluster, srds[name], NEVER_PRIORITY)
        for name in NAMES:  # a look that is less than a second old is not taken again when the primary is found down
            async with sentinel_client(cluster, name) as asked:
                await asked.look_every(10_000)
        for name in ("n2", "n3"):
            srds[name].write_drained(False)
            async with redis_client(cluster, name) as client:
                await client.keep_priority(DEFAULT_PRIORITY)
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        await leader(srds, ("n2", "n3"), 4)


async def idle(cluster: Cluster) -> None:
    """Wait until no sentinel is busy with a failover."""
    for name in NAMES:
        async with sentinel_client(cluster, name) as asked:

            async def done(asked: SentinelClient = asked) -> bool:
                answer = await asked.ask()
                return answer.flags == frozenset({"master"}) and answer.known_replicas == 2

            await until(done)


@pytest.mark.parametrize("sentinel_gone", [False, True])
async def test_the_replica_that_has_most_is_promoted_even_if_the_sentinels_saw_that_late(
    cluster: Cluster, srds: dict[str, Srd], *, sentinel_gone: bool
) -> None:
    async with watched(srds, *NAMES):
        # n2 comes first wherever the sentinels see no difference, or n3 does: so each in turn is the one that lags.
        lagging, ahead = "n2", "n3"
        async with redis_client(cluster, lagging) as client:
            await client._do(("CONFIG", "SET", "masterauth", "wrong"), seconds=1)
            await client._do(("CLIENT", "KILL", "TYPE", "master"), seconds=1)
        primary = raw(cluster, "n1")
        await primary.set("k", "v" * 1000)
        await primary.aclose()
        if sentinel_gone:
            cluster.send(f"sentinel-{ahead}", signal.SIGSTOP)
            await srds["n1"].until(lambda view: ahead in view.silent)
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        successor = await leader(srds, ("n2", "n3"))
        assert successor.name == ahead
        async with redis_client(cluster, lagging) as client:
            await client._do(("CONFIG", "SET", "masterauth", "replication"), seconds=1)
        await writes(cluster, ahead)


async def test_a_primary_whose_srd_was_gone_before_it_is_replaced_once_its_own_fence_has_fallen(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
        await silent_for(srds["n2"], "n1", 2 * ALIVE_SECONDS)
        began = time.monotonic()
        cluster.kill("redis-n1")
        successor = await leader(srds, ("n2", "n3"), 30)
        led = time.monotonic() - began
        show(says_yes=led)
        assert OWN_FENCE_SECONDS < led < OWN_FENCE_SECONDS + 3.0, "at the first attempt"
        await writes(cluster, successor.name)


async def silent_for(srd: Srd, peer: str, seconds: float) -> None:
    """Wait until a peer's srd has said nothing for so long."""

    async def silent() -> bool:
        return boottime() - srd.store.view().peers[peer].received > seconds

    await until(silent)


async def test_a_primary_that_was_replaced_is_not_promoted_before_it_has_what_its_successor_has(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES), redis_client(cluster, "n1") as former:
        await former._do(("CONFIG", "SET", "masterauth", "wrong"), seconds=1)
        async with sentinel_client(cluster, "n2") as told:
            await told.fail_over()
        await leader(srds, ("n2", "n3"))
        view = await srds["n1"].until(lambda view: view.redis is not None and view.redis.role is Role.REPLICA)
        assert view.redis is not None
        assert (view.redis.link_up, view.redis.priority) == (False, NEVER_PRIORITY)
        await former._do(("CONFIG", "SET", "masterauth", "replication"), seconds=1)
        await srds["n1"].until(lambda view: view.redis is not None and view.redis.priority == DEFAULT_PRIORITY)


async def test_who_is_promoted_beside_a_primary_that_is_well_waits_until_that_ones_lease_must_have_ended(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    """SENTINEL FAILOVER asks nobody; the former primary, cut off just then, would rely on its last answers."""
    async with watched(srds, *NAMES):
        async with sentinel_client(cluster, "n2") as told:
            began = time.monotonic()
            await told.fail_over()
        successor = await leader(srds, ("n2", "n3"))
        assert time.monotonic() - began >= cluster.config.primary_lease
        await writes(cluster, successor.name)


async def test_a_primary_that_was_replaced_while_its_srd_was_gone_follows_with_a_copy_kept(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
        for what in ("redis-n1", "sentinel-n1"):
            cluster.send(what, signal.SIGSTOP)
        successor = await leader(srds, ("n2", "n3"), 30)
        following = Srd(cluster, "n1", srds)
        following.write_followed(False)
        async with running(following):
            await following.until(lambda view: view.named == cluster.endpoint(successor.name))
            assert following.primacy.deposed
            cluster.send("redis-n1", signal.SIGCONT)
            await following.until(lambda view: view.redis is not None and view.redis.role is Role.REPLICA)
            assert following.kept == 1


async def test_without_the_srd_of_the_dead_primary_it_is_sentinels_own_failover(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        cluster.kill("redis-n1")
        srds["n1"].write_children({Service.REDIS: Child(ChildState.BACKOFF)})
        successor = await leader(srds, ("n2", "n3"), 30)
        await writes(cluster, successor.name)
        await settled(cluster, cluster.endpoint(successor.name))


async def test_a_silent_node_is_replaced_after_its_fences_have_fallen(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
        began = time.monotonic()
        for what in ("redis-n1", "sentinel-n1"):
            cluster.send(what, signal.SIGSTOP)
        successor = await leader(srds, ("n2", "n3"), 30)
        led = time.monotonic() - began
        await writes(cluster, successor.name)
        show(says_yes=led, takes_a_write=time.monotonic() - began)
        assert led > REPLACE_SECONDS
        await settled(cluster, cluster.endpoint(successor.name), among=("n2", "n3"))


async def test_a_primary_without_a_majority_is_fenced_until_one_names_it_again(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, "n1"):
        began = time.monotonic()
        for name in ("n2", "n3"):
            cluster.kill(f"sentinel-{name}")
        await srds["n1"].until(lambda view: view.fenced)
        show(fenced=time.monotonic() - began)
        assert not srds["n1"].leads()
        async with redis_client(cluster, "n1") as client:

            async def shut() -> bool:
                return (await client.observe()).min_replicas_to_write == FENCED

            await until(shut)
        for name in ("n2", "n3"):
            cluster.sentinel(name)
        await srds["n1"].until(lambda view: not view.fenced and srds["n1"].leads())
        await writes(cluster, "n1")


async def test_a_fence_outlives_srd_and_the_next_one_knows_it(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with redis_client(cluster, "n1") as client:
        await client.shut()
    for name in ("n2", "n3"):
        cluster.kill(f"sentinel-{name}")
    async with running(srds["n1"]):
        await srds["n1"].until(lambda view: view.fenced)
        for name in ("n2", "n3"):
            cluster.sentinel(name)
        await srds["n1"].until(lambda view: not view.fenced)
        await writes(cluster, "n1")


async def test_a_primary_that_is_replaced_by_hand_follows_its_successor_at_once(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with running(*srds.values()):
        await srds["n1"].until(lambda _: srds["n1"].leads())
        async with sentinel_client(cluster, "n2") as asked:
            await asked._wire.ask(("SENTINEL", "FAILOVER", "master"), seconds=1)
        successor = await leader(srds, ("n2", "n3"))
        began = time.monotonic()
        await srds["n1"].until(lambda view: view.redis is not None and view.redis.role is Role.REPLICA)
        show(follows=time.monotonic() - began)
        assert srds["n1"].kept == 1, "what it had taken alone is kept"
        await settled(cluster, cluster.endpoint(successor.name))
        await writes(cluster, successor.name)


async def test_what_redis_demands_of_a_write_is_kept_true(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with running(*srds.values()), redis_client(cluster, "n1") as client:
        for demanded in (7, 0):
            await client.keep_fence(demanded)

            async def kept() -> bool:
                return (await client.observe()).min_replicas_to_write == 1

            await until(kept)
