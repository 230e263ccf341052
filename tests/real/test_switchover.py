"""The primary is moved on purpose, over real redises and real sentinels: what it costs, and what may go wrong."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

import pytest
from support.primacies import NAMES, Srd, leader, running, settled, show, watched, writes, writing
from support.sentinels import Cluster, raw, redis_client, until

from srd.cluster import DEFAULT_PRIORITY, NEVER_PRIORITY
from srd.ha.custody import ASSURANCE_SECONDS
from srd.ha.promotion import HEIR_TOPIC, SUCCEED_TOPIC
from srd.ha.redis import RedisClient
from srd.ha.resp import Fields
from srd.model import Body, Endpoint, NoAnswerError, RefusedError, Role, SrdError
from srd.reconcile import boottime
from srd.state import Redis

# Sentinels see to it only after failover-timeout, which is 4 s here.
SOON_SECONDS = 3.0


async def syncs(redis: RedisClient) -> tuple[int, int]:
    """Return how often others were sent everything, and how often only what they had missed."""
    (reply,) = await redis._wire.ask(("INFO", "stats"), seconds=1)
    stats = Fields.of_info("redis", [reply])
    return stats.get("sync_full", int), stats.get("sync_partial_ok", int)


def before_clients_end(
    redis: RedisClient, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Awaitable[None]]
) -> None:
    """Have something done at the moment when a redis' clients' connections are about to be ended."""
    really: Callable[[float], Awaitable[None]] = redis.end_clients

    async def after_that(seconds: float) -> None:
        await action()
        await really(seconds)

    monkeypatch.setattr(redis, "end_clients", after_that)


def followed_when_clients_end(redis: RedisClient, monkeypatch: pytest.MonkeyPatch) -> list[Endpoint | None]:
    """Return a list to which is added whom a redis follows at the moment when its clients' connections are ended."""
    found: list[Endpoint | None] = []

    async def look() -> None:
        found.append((await redis.observe()).primary)

    before_clients_end(redis, monkeypatch, look)
    return found


async def follows(redis: RedisClient, primary: Endpoint) -> None:
    """Wait until a redis follows this one and is in step: soon, by srd and not by Sentinel."""

    async def done() -> bool:
        seen = await redis.observe()
        return seen.in_step and seen.primary == primary

    await until(done, SOON_SECONDS)


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


async def test_a_former_primary_whose_redis_dies_while_it_hands_over_has_its_successor_replaced_by_nobody(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):
        told = [srd.primacy._fleet.sentinels for srd in srds.values()]
        hurried: list[str] = []

        async def die() -> None:
            cluster.kill("redis-n1")
            srds["n1"].primacy.observer._last_role = Role.PRIMARY  # it was not asked since it has stepped down
            srds["n1"].redis_died()

        for sentinels in told:
            for sentinel in sentinels.values():
                monkeypatch.setattr(sentinel, "ask_others_every", noting(hurried, sentinel.ask_others_every))
        before_clients_end(srds["n1"].primacy._fleet.redises["n1"], monkeypatch, die)
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        await settled(cluster, cluster.endpoint("n2"))
        assert srds["n2"].leads()
        await writes(cluster, "n2")
        assert hurried == []


async def test_a_primary_that_dies_with_a_successor_told_that_nobody_names_is_replaced_when_the_lease_has_ended(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        custody = srds["n1"].primacy._custody
        assert custody.give("n2", boottime()) > 0
        custody.tell(boottime())
        began = time.monotonic()
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        led = await leader(srds, ("n2", "n3"))
        await writes(cluster, led.name)
        show(without=time.monotonic() - began)
        assert time.monotonic() - began < srds["n1"].config.primary_lease + 2


def noting(noted: list[str], really: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def note(*arguments: object) -> None:
        noted.append(str(arguments))
        await really(*arguments)

    return note


async def test_clients_are_cut_off_when_the_successor_leads_and_not_before(
    srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):
        found = []

        async def look() -> None:
            lease = srds["n1"].lease
            found.append((srds["n2"].leads(), lease.heir if lease is not None else None))

        before_clients_end(srds["n1"].primacy._fleet.redises["n1"], monkeypatch, look)
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert found == [(True, "n2")]


async def test_a_former_primary_asks_its_successor_for_the_stream_once_when_its_clients_have_gone(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES), redis_client(cluster, "n2") as successor:
        old = srds["n1"].primacy._fleet.redises["n1"]
        found = followed_when_clients_end(old, monkeypatch)
        full, resumed = await syncs(successor)
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        await follows(old, cluster.endpoint("n2"))
        # n3 came before the move, and again when n2 became a primary; n1 once.
        assert await syncs(successor) == (full, resumed + 3)
        assert found == [None]


async def test_a_successor_without_enough_replicas_has_the_former_primary_before_clients_come(
    cluster: Cluster, srds: dict[str, Srd], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(srds, *NAMES):
        cluster.kill("redis-n3")
        srds["n3"].redis_died()
        await srds["n1"].until(lambda view: view.redis is not None and len(view.redis.replicas) == 1)
        old = srds["n1"].primacy._fleet.redises["n1"]
        found = followed_when_clients_end(old, monkeypatch)
        await srds["n1"].primacy.moves.switch_over("n2", dry_run=False)
        assert found == [cluster.endpoint("n2")]
        await writes(cluster, "n2")


async def test_a_redis_that_has_stepped_down_and_missed_whom_to_follow_follows_the_named_primary(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with running(srds["n3"]), redis_client(cluster, "n3") as replica:
        await srds["n3"].until(lambda view: view.named == cluster.endpoint("n1"))
        await replica.step_down()
        await follows(replica, cluster.endpoint("n1"))


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


@pytest.mark.parametrize(("hanging", "step"), [("n1", "step_down"), ("n2", "lead")])
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


async def test_a_successor_whose_predecessors_srd_has_died_sees_to_the_rest(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    heir = srds["n2"]
    async with running(heir), redis_client(cluster, "n1") as former:
        await heir.until(lambda view: view.named == cluster.endpoint("n1"))
        await heir.primacy.answer("n1", HEIR_TOPIC, {})
        await former.step_down()
        given: Body = {"seconds": heir.config.primary_lease - 0.1, "assured": ASSURANCE_SECONDS}
        assert (await heir.primacy.answer("n1", SUCCEED_TOPIC, given))["led"] is True
        await heir.until(lambda view: view.named == cluster.endpoint("n2") or not heir.leads())
        assert heir.leads(), "without a moment in which nobody does"
        await settled(cluster, cluster.endpoint("n2"))
        await follows(former, cluster.endpoint("n2"))


async def test_a_primary_that_has_stepped_down_for_a_successor_who_was_never_told_is_replaced_by_the_sentinels(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with running(srds["n2"], srds["n3"]), redis_client(cluster, "n1") as former:
        for name in ("n2", "n3"):
            await srds[name].until(lambda view: view.named == cluster.endpoint("n1"))
        await srds["n2"].primacy.answer("n1", HEIR_TOPIC, {})
        await former.step_down()
        led = await leader(srds, ("n2", "n3"))
        await writes(cluster, led.name)
        await follows(former, cluster.endpoint(led.name))


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
