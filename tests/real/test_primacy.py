"""Three nodes' say in who is primary, over real redises and real sentinels: how fast, how safe, and what it leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from functools import partial

import pytest
from support.primacies import NAMES, Srd, leader, running, settled, told, watched, writes, writing
from support.sentinels import Cluster, raw, redis_client, sentinel_client, until

from srd.cluster import DEFAULT_PRIORITY, NEVER_PRIORITY
from srd.ha.custody import ASSURANCE_SECONDS
from srd.ha.failover import ALIVE_SECONDS, OWN_FENCE_SECONDS, REPLACE_SECONDS
from srd.ha.promotion import HEIR_TOPIC, SUCCEED_TOPIC
from srd.ha.redis import FENCED
from srd.ha.sentinel import OFTEN_MILLISECONDS, SELDOM_MILLISECONDS, SentinelClient
from srd.model import Body, NoAnswerError, RefusedError, Role, Service, SrdError
from srd.reconcile import boottime
from srd.state import Child, ChildState, Redis


def show(**figures: float) -> None:
    print(json.dumps({name: round(seconds, 3) for name, seconds in figures.items()}))  # noqa: T201


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


async def test_a_primary_that_dies_before_its_promotion_is_over_leaves_the_sentinels_of_one_mind(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        srds["n3"].write_drained(True)
        await told(cluster, srds["n3"], NEVER_PRIORITY)
        for leading, other in (("n1", "n2"), ("n2", "n1")):
            cluster.kill(f"redis-{leading}")
            srds[leading].redis_died()
            assert await leader(srds, (other,), 30) is srds[other]
            cluster.redis(leading, other)
            srds[leading].alive()
            await srds[other].until(lambda view, other=other: view.named == cluster.endpoint(other))
        await settled(cluster, cluster.endpoint("n1"))


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
                await asked.look_every(SELDOM_MILLISECONDS)
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


async def test_a_switchover_loses_no_write_and_stops_them_for_milliseconds(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        leading = "n1"
        for target in ("n2", "n3", "n1"):
            async with writing(cluster, srds) as writers:
                await asyncio.sleep(0.5)
                # Asked of a node that is not the primary, as people do.
                done = await srds["n3" if leading != "n3" else "n1"].primacy.moves.switch_over(target, dry_run=False)
                await asyncio.sleep(0.5)
            show(gap=done["gap_seconds"], seen=max(writer.gap for writer in writers), all=done["seconds"])
            assert (done["from"], done["to"], done["named"]) == (leading, target, True)
            assert [await writer.lost(target) for writer in writers] == [set()] * len(writers)
            assert sum(len(writer.acknowledged) for writer in writers) > 100
            await settled(cluster, cluster.endpoint(target))
            assert srds[target].leads()
            leading = target
        for name, srd in srds.items():
            priority = NEVER_PRIORITY if name == leading else DEFAULT_PRIORITY
            await srd.until(lambda view, told=priority: view.redis is not None and view.redis.priority == told)


async def test_a_switchover_cuts_off_nobody_who_has_come_to_the_new_primary(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES), raw(cluster, "n2") as reader, raw(cluster, "n2") as application:
        early = await reader.client_id()
        switching = asyncio.create_task(srds["n1"].primacy.moves.switch_over("n2", dry_run=False))
        await srds["n2"].until(lambda _: srds["n2"].leads())
        late = await application.client_id()
        await switching
        await settled(cluster, cluster.endpoint("n2"))
        assert (await reader.client_id(), await application.client_id()) == (early, late)


async def test_a_primary_that_dies_just_after_a_switchover_is_replaced_as_soon(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        began = time.monotonic()
        cluster.kill("redis-n2")
        srds["n2"].redis_died()
        successor = await leader(srds, ("n1", "n3"))
        show(leads=time.monotonic() - began)
        assert time.monotonic() - began < 4, "no sentinel waits for the end of a failover"
        await writes(cluster, successor.name)


async def test_clients_are_cut_off_when_the_successor_leads_and_not_before(
    srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):
        old = srds["n1"].primacy._fleet.redises["n1"]
        really, found = old.end_clients, []

        async def looked_at(seconds: float) -> None:
            lease = srds["n1"].lease
            found.append((srds["n2"].leads(), lease.heir if lease is not None else None))
            await really(seconds)

        monkeypatch.setattr(old, "end_clients", looked_at)
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert found == [(True, "n2")]


async def test_a_switchover_whose_successor_cannot_catch_up_leaves_everything_as_it_was(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES), redis_client(cluster, "n2") as successor:
        # It stops reading the stream just when it is needed: its link is cut by a wrong password.
        old = srds["n1"].primacy._fleet.redises["n1"]

        async def cut(milliseconds: int, seconds: float) -> tuple[Role, int]:
            await successor._do(("CONFIG", "SET", "masterauth", "wrong"), seconds=1)
            await successor._do(("CLIENT", "KILL", "TYPE", "master"), seconds=1)
            await old._do(("PUBLISH", "news", "that it has not"), seconds=1)
            return await pause(milliseconds, seconds)

        pause = old.pause_writes
        monkeypatch.setattr(old, "pause_writes", cut)
        with pytest.raises(SrdError, match="cannot switch over to n2: it has not caught up"):
            await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert srds["n1"].leads()
        await writes(cluster, "n1")
        await successor._do(("CONFIG", "SET", "masterauth", "replication"), seconds=1)
        assert (await successor.observe()).priority == DEFAULT_PRIORITY


@pytest.mark.parametrize(("hanging", "step"), [("n1", "follow"), ("n2", "lead")])
async def test_a_redis_that_hangs_in_the_middle_of_a_switchover_costs_seconds_and_makes_no_second_primary(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch, hanging: str, step: str
) -> None:
    async with watched(srds, *NAMES):
        redis = srds[hanging].primacy._fleet.redises[hanging]
        really = getattr(redis, step)

        async def hang(*arguments: object) -> object:
            cluster.send(f"redis-{hanging}", signal.SIGSTOP)
            monkeypatch.setattr(redis, step, really)
            asyncio.get_running_loop().call_later(2.5, cluster.send, f"redis-{hanging}", signal.SIGCONT)
            return await really(*arguments)

        monkeypatch.setattr(redis, step, hang)
        began = time.monotonic()
        with pytest.raises(SrdError, match="no answer in time"):
            await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert await leader(srds, NAMES) is srds["n1"]
        await writes(cluster, "n1")
        show(without=time.monotonic() - began)
        assert time.monotonic() - began < 5
        # What n2 was told it does in the end; it is a replica again all the same.
        await settled(cluster, cluster.endpoint("n1"))
        await srds["n2"].until(lambda view: view.redis is not None and view.redis.link_up)
        assert srds["n1"].leads()


@pytest.mark.parametrize("done", [True, False], ids=["after it has", "before it has"])
async def test_a_successor_whose_srd_falls_silent_in_the_middle_of_a_switchover_leads_in_the_end(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch, *, done: bool
) -> None:
    async with watched(srds, *NAMES):
        answers = srds["n2"].primacy._answers
        really = answers[SUCCEED_TOPIC]

        async def silent(peer: str, body: Body) -> Body:
            if done:
                await really(peer, body)
            raise NoAnswerError("ask", "n2", "no answer within 1.5 s")

        monkeypatch.setitem(answers, SUCCEED_TOPIC, silent)
        switched = await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert (switched["to"], switched["named"]) == ("n2", True)
        assert await leader(srds, NAMES) is srds["n2"]
        await writes(cluster, "n2")
        await settled(cluster, cluster.endpoint("n2"))


async def test_a_successor_that_is_not_heard_at_all_in_the_middle_of_a_switchover_leaves_the_choice_to_the_sentinels(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):

        async def silent(_peer: str, _body: Body) -> Body:
            cluster.send("redis-n2", signal.SIGSTOP)
            asyncio.get_running_loop().call_later(8, cluster.send, "redis-n2", signal.SIGCONT)
            raise NoAnswerError("ask", "n2", "no answer within 1.5 s")

        monkeypatch.setitem(srds["n2"].primacy._answers, SUCCEED_TOPIC, silent)
        began = time.monotonic()
        with pytest.raises(SrdError, match=r"cannot promote n2: .*no answer in time"):
            await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        led = await leader(srds, NAMES)
        await writes(cluster, led.name)
        show(without=time.monotonic() - began)
        await settled(cluster, cluster.endpoint(led.name))
        for name in set(NAMES) - {led.name}:
            await srds[name].until(lambda view: view.redis is not None and view.redis.link_up)


async def test_a_switchover_whose_srd_is_stopped_in_the_middle_is_done_to_its_end(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):
        successor = srds["n2"].primacy._fleet.redises["n2"]
        really = successor.lead

        async def stopped(seconds: float) -> Redis:
            stopping.cancel()
            await asyncio.sleep(0.1)
            return await really(seconds)

        monkeypatch.setattr(successor, "lead", stopped)
        switchover = srds["n1"].primacy.moves._switchover
        assert switchover is not None
        stopping = asyncio.create_task(switchover.run("n2", cause="a test", by="n1"))
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert await leader(srds, NAMES) is srds["n2"]
        await settled(cluster, cluster.endpoint("n2"))


async def test_a_successor_whose_predecessors_srd_has_died_sees_to_it_that_it_is_named(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    heir = srds["n2"]
    async with running(heir), redis_client(cluster, "n1") as former:
        await heir.until(lambda view: view.named == cluster.endpoint("n1"))
        await heir.primacy.answer("n1", HEIR_TOPIC, {})
        await former.follow(cluster.endpoint("n2"))
        given: Body = {"seconds": heir.config.primary_lease - 0.1, "assured": ASSURANCE_SECONDS}
        assert (await heir.primacy.answer("n1", SUCCEED_TOPIC, given))["led"] is True
        await heir.until(lambda view: view.named == cluster.endpoint("n2") or not heir.leads())
        assert heir.leads(), "without a moment in which nobody does"
        await settled(cluster, cluster.endpoint("n2"))


async def test_the_lease_that_a_successor_is_given_counts_from_when_it_was_told_to_expect_it(
    srds: dict[str, Srd],
) -> None:
    heir, lease = srds["n2"], srds["n2"].config.primary_lease
    await heir.primacy.answer("n1", HEIR_TOPIC, {})
    expected = boottime()
    await asyncio.sleep(0.02)  # it was renewed: longer than a lease from then on, and no longer from now on
    given: Body = {"seconds": lease + 0.01, "assured": ASSURANCE_SECONDS}
    assert (await heir.primacy.answer("n1", SUCCEED_TOPIC, given))["led"] is True
    assert heir.leads(), "its redis was asked, and its lease judged, before it answered"
    custody = heir.primacy._custody
    assert 0 <= expected + lease + 0.01 - custody.granted_until < 0.5
    assert custody.is_assured(expected + ASSURANCE_SECONDS - 0.1)
    await heir.primacy.close()


async def test_a_node_that_stops_during_a_switchover_waits_for_its_end(srds: dict[str, Srd]) -> None:
    async with watched(srds, *NAMES):
        async with asyncio.TaskGroup() as group:
            switched = group.create_task(srds["n1"].primacy.moves.switch_over("n3", dry_run=False))
            await asyncio.sleep(0.05)
            await srds["n1"].primacy.leave()
            assert srds["n3"].leads(), "and moves nothing any more"
        assert switched.result()["to"] == "n3"


@pytest.mark.parametrize(
    ("to", "reason"),
    [("n1", "no other node that runs redis and is named n1"), ("n9", "named n9"), ("n3", "the srd of n3 is not heard")],
)
async def test_a_switchover_that_would_do_harm_is_refused(srds: dict[str, Srd], to: str, reason: str) -> None:
    async with watched(srds, "n1", "n2"):
        await srds["n2"].until(lambda view: view.lease is not None and view.lease.primary is not None)
        with pytest.raises(RefusedError, match=reason):
            await srds["n2"].primacy.moves.switch_over(to, dry_run=False)
        assert await srds["n2"].primacy.moves.switch_over(None, dry_run=True) == {"from": "n1", "to": "n2"}
        assert srds["n1"].leads()


async def test_a_node_that_is_about_to_stop_moves_the_primary_away_if_it_can(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        await srds["n2"].primacy.leave()
        assert srds["n1"].leads(), "a replica's node leaves the primary where it is"
        await srds["n1"].primacy.leave()
        successor = await leader(srds, ("n2", "n3"))
        await writes(cluster, successor.name)
    for name in set(NAMES) - {successor.name}:
        cluster.kill(f"redis-{name}")
    async with running(*srds.values()):
        await successor.until(lambda view: view.redis is not None and not view.redis.replicas)
        await successor.primacy.leave()
        assert successor.store.view().redis is not None, "where nobody can take over, it just stops"
