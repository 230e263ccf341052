"""The observer and its clients against three real redis and three real sentinels on 127.0.1.1-3."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import signal
from collections.abc import AsyncIterator, Callable

import pytest
from support.patience import retrying
from support.sentinels import SECRETS, WRONG, Cluster, raw, redis_client, sentinel_client, until, whole

from srd.config import parse_config
from srd.ha.chronicle import Chronicle
from srd.ha.fleet import Fleet
from srd.ha.losses import Losses
from srd.ha.naming import make_epoch
from srd.ha.observe import Observer
from srd.ha.resp import (
    Credentials,
    LoadingError,
    RefusedError,
    RespError,
    UnexpectedReplyError,
    UnreachableError,
    Wire,
)
from srd.ha.sentinel import PACE, SUBSCRIBED, SentinelClient
from srd.ha.strays import DOWN_AFTER_SECONDS
from srd.model import Body, Endpoint, Role, SrdError
from srd.reconcile import boottime
from srd.state import Store, View


async def test_what_redis_and_sentinel_say_is_observed_as_it_is(cluster: Cluster) -> None:
    await whole(cluster)
    async with raw(cluster, "n1") as application:
        await application.mset({f"k{number}": "v" for number in range(7)})
        await application.wait(2, 5000)
    before = boottime()
    async with redis_client(cluster, "n1") as primary, redis_client(cluster, "n2") as replica:
        await primary.ping()
        led, followed = await primary.observe(), await replica.observe()
    assert before <= led.answered <= followed.answered <= boottime()
    assert (led.role, led.loading, led.primary, led.dbsize, led.min_replicas_to_write) == (
        Role.PRIMARY,
        False,
        None,
        7,
        1,
    )
    assert {line.endpoint for line in led.replicas} == {cluster.endpoint("n2"), cluster.endpoint("n3")}
    assert {line.state for line in led.replicas} == {"online"}
    assert (followed.role, followed.primary, followed.link_up) == (Role.REPLICA, cluster.endpoint("n1"), True)
    assert (followed.dbsize, followed.sync_in_progress, followed.replicas) == (7, False, ())
    assert (followed.replid, led.persistence) == (led.replid, False)
    assert led.run_id != followed.run_id
    assert led.offset > 0
    assert 0 < led.ping_seconds < 5
    async with sentinel_client(cluster, "n3") as sentinel:
        await sentinel.known()
        answer = await sentinel.ask()
    assert before <= answer.asked <= boottime()
    assert (answer.node, answer.primary, answer.epoch, answer.tilt) == ("n3", cluster.endpoint("n1"), 0, False)
    assert (answer.known_sentinels, answer.known_replicas, answer.flags) == (2, 2, frozenset({"master"}))


async def test_a_sentinel_that_is_not_there_is_passed_over_for_the_next_one(cluster: Cluster) -> None:
    await whole(cluster)
    async with sentinel_client(cluster, "n1") as gone, sentinel_client(cluster, "n2") as asked:

        async def is_gone() -> bool:
            with contextlib.suppress(RespError):
                await gone.ask()
                return False
            return True

        async def names_another() -> bool:
            return (await asked.ask()).primary != cluster.endpoint("n1")

        cluster.send("sentinel-n1", signal.SIGKILL)
        await until(is_gone)
        await make_epoch([gone, asked], cluster.endpoint("n1"))
        await until(names_another)


async def test_errors_say_what_is_wrong_and_no_password(cluster: Cluster) -> None:
    cluster.redis("n1")
    cluster.sentinel("n1")
    async with redis_client(cluster, "n1") as right, sentinel_client(cluster, "n1") as asked:
        await retrying(RespError, seconds=20)(right.ping)
        await retrying(RespError, seconds=20)(asked.known)
    async with redis_client(cluster, "n1", WRONG) as client, sentinel_client(cluster, "n1", WRONG) as sentinel:
        with pytest.raises(RefusedError, match=r"cannot ask redis at 127\.0\.1\.1:") as refused:
            await client.observe()
        assert "wrong" not in str(refused.value)
        with pytest.raises(RefusedError, match=r"cannot ask sentinel at 127\.0\.1\.1:"):
            await sentinel.ask()
    async with redis_client(cluster, "n2") as nobody:
        with pytest.raises(UnreachableError, match="connection refused"):
            await nobody.ping()
    other_name = parse_config('cluster="c"\n[[node]]\nname="n1"\naddresses=["10.0.0.1"]\n[sentinel]\nmaster="x"\n', "t")
    stranger = SentinelClient(cluster.config, cluster.config.node("n1"), SECRETS)
    stranger._master = other_name.sentinel.master
    assert (await stranger.ask()).primary is None
    with pytest.raises(UnexpectedReplyError, match="knows no primary"):
        await stranger.known()
    await stranger.close()


async def test_silence_ends_in_its_bound_and_the_next_question_is_answered_right(cluster: Cluster) -> None:
    cluster.redis("n1")
    async with redis_client(cluster, "n1") as client:
        await retrying(RespError, seconds=20)(client.ping)
        cluster.send("redis-n1", signal.SIGSTOP)
        asked = boottime()
        with pytest.raises(UnreachableError, match="no answer in time"):
            await client.observe(0.3)
        assert 0.3 <= boottime() - asked < 5
        cluster.send("redis-n1", signal.SIGCONT)
        assert (await client.observe()).role is Role.PRIMARY


async def test_a_kept_connection_outlives_a_restart_of_redis(cluster: Cluster) -> None:
    cluster.redis("n1")
    async with redis_client(cluster, "n1") as client, redis_client(cluster, "n1") as other:
        await retrying(RespError, seconds=20)(client.ping)
        first = await client.observe()
        wire = Wire("redis", cluster.endpoint("n1"), Credentials("srd", SECRETS.srd_password))
        await wire.ask(("PING",), seconds=1)
        cluster.kill("redis-n1")
        cluster.redis("n1")
        await retrying(RespError, seconds=20)(other.ping)
        second = await client.observe()
        assert await wire.tell(("PING",), seconds=1) == "PONG"
        await wire.close()
    assert first.run_id != second.run_id


@contextlib.asynccontextmanager
async def cut_after(word: bytes, target: Endpoint) -> AsyncIterator[Endpoint]:
    """A wire to a redis on which whatever has this word arrives, and no answer to it comes: the connection breaks."""

    async def pass_on(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, then: Callable[[bytes], bool]
    ) -> None:
        while (data := await reader.read(65536)) and not then(data):
            writer.write(data)
        writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(str(target.address), target.port)

        def cut(data: bytes) -> bool:
            if word in data:
                writer.transport.abort()
            return word in data

        async with asyncio.TaskGroup() as group:
            group.create_task(pass_on(reader, upstream_writer, cut))
            group.create_task(pass_on(upstream_reader, writer, lambda _: False))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield Endpoint(ipaddress.ip_address(host), port)


async def test_what_must_not_be_done_twice_is_told_once_even_if_its_connection_breaks(cluster: Cluster) -> None:
    cluster.redis("n1", extra="min-replicas-to-write 0\n")
    async with redis_client(cluster, "n1") as client:
        await retrying(RespError, seconds=20)(client.ping)
    async with cut_after(b"INCR", cluster.endpoint("n1")) as endpoint, raw(cluster, "n1") as application:
        wire = Wire("redis", endpoint, Credentials("srd", SECRETS.srd_password))
        await wire.ask(("PING",), seconds=1)
        with pytest.raises(UnreachableError):
            await wire.tell(("INCR", "told"), seconds=1)
        await wire.ask(("PING",), seconds=1)
        with pytest.raises(UnreachableError):
            await wire.ask(("INCR", "asked"), seconds=1)
        await wire.close()

        async def done() -> bool:
            return [await application.get(key) for key in ("told", "asked")] == [b"1", b"2"]

        await until(done)


async def test_a_redis_that_loads_is_observed_but_not_ready(cluster: Cluster) -> None:
    cluster.redis("n1")
    async with redis_client(cluster, "n1") as client:
        await retrying(RespError, seconds=20)(client.ping)
        async with raw(cluster, "n1") as application:
            await application.config_set("min-replicas-to-write", 0)
            await application.config_set("rdbcompression", "no")
            await application.mset({f"k{number}": "v" * 1100 for number in range(1000)})
            await application.save()
        cluster.kill("redis-n1")
        slowly = "key-load-delay 5000\nloading-process-events-interval-bytes 1024\n"
        cluster.redis("n1", extra=slowly)

        async def loads() -> bool:
            return (await client.observe()).loading

        await until(loads)
        with pytest.raises(LoadingError):
            await client.ping(5)


async def test_an_answer_that_is_no_redis_is_not_understood(cluster: Cluster) -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    endpoint = cluster.endpoint("n1")
    async with (
        await asyncio.start_server(web, str(endpoint.address), endpoint.port),
        redis_client(cluster, "n1") as client,
    ):
        with pytest.raises(RespError):
            await client.observe()


async def _nobody(peer: str, _topic: str, _body: Body, _seconds: float) -> Body:
    raise SrdError("ask", peer, "there are no other srds here")


class Watch:
    """An observer of one node with its store; notes if its lease is ever doubtful."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.store = Store(boottime())
        self.woken = 0
        chronicle = Chronicle(
            Fleet(cluster.config, SECRETS),
            cluster.config.node(name),
            self.store,
            losses=Losses(cluster.endpoint(name), view=self.store.view, clock=boottime),
            ask_peer=_nobody,
            wall_clock=lambda: 1_700_000_000.0,
        )
        self.observer = Observer(
            cluster.config,
            cluster.config.node(name),
            SECRETS,
            self.store,
            wake=(self._wake,),
            judged=chronicle.judged,
        )

    def _wake(self) -> None:
        self.woken += 1

    def holds(self) -> bool:
        lease = self.store.view().lease
        return lease is not None and lease.held and boottime() < lease.expires

    async def until(self, predicate: Callable[[View], bool], seconds: float = 40) -> View:
        return await self.store.wait_for(predicate, seconds)


@contextlib.asynccontextmanager
async def running(*watches: Watch) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watch.observer.run()) for watch in watches]
        yield
        for task in tasks:
            task.cancel()


def names(primary: Endpoint) -> Callable[[View], bool]:
    return lambda view: view.lease is not None and view.lease.primary == primary


async def test_a_sentinel_that_hangs_delays_nobody(cluster: Cluster) -> None:
    await whole(cluster)
    watch = Watch(cluster, "n1")
    async with running(watch):
        view = await watch.until(lambda view: len(view.sentinels) == 3 and view.redis is not None)
        cluster.send("sentinel-n3", signal.SIGSTOP)
        stopped = boottime()
        gone = await watch.until(lambda view: "n3" not in view.sentinels)
        doubts: list[View] = []
        watch.store.on_change(lambda: None if watch.holds() else doubts.append(watch.store.view()))
        for _ in range(6):
            asked = {name: gone.sentinels[name].asked for name in ("n1", "n2")}
            gone = await watch.until(lambda view, asked=asked: all(view.sentinels[n].asked > asked[n] for n in asked))  # type: ignore[misc]
            lease = gone.lease
            assert lease is not None
            assert (lease.held, lease.agree, lease.reachable) == (True, 2, 2)
        assert doubts == []
        assert view.sentinels["n3"].asked <= stopped
        cluster.send("sentinel-n3", signal.SIGCONT)
        await watch.until(lambda view: "n3" in view.sentinels)


async def test_the_quorum_and_the_pace_of_its_own_sentinel_are_kept_true(cluster: Cluster) -> None:
    await whole(cluster)
    watch = Watch(cluster, "n1")
    async with running(watch):
        await watch.until(lambda view: len(view.sentinels) == 3)
        await watch.observer.sentinels["n1"].keep_quorum(3)
        await watch.until(lambda view: view.sentinels["n1"].quorum == 3)
        await watch.until(lambda view: view.sentinels["n1"].quorum == cluster.config.quorum == 2)
        await watch.until(lambda view: view.sentinels["n1"].parallel_syncs == cluster.config.parallel_syncs == 2)
        assert await watch.observer.sentinels["n1"].pace() == PACE
        assert await watch.observer.sentinels["n2"].pace() != PACE, "another node's is its own srd's"


async def test_what_a_failover_left_behind_in_its_own_sentinel_is_set_back(cluster: Cluster) -> None:
    await whole(cluster)
    watch = Watch(cluster, "n1")
    configured = cluster.config.sentinel.down_after
    async with running(watch):
        await watch.until(lambda view: len(view.sentinels) == 3)
        for name in ("n1", "n2"):
            await watch.observer.sentinels[name].keep_down_after(configured - 1)
        await watch.until(lambda view: view.sentinels["n1"].down_after == configured - 1)
        await asyncio.sleep(DOWN_AFTER_SECONDS / 2)
        assert watch.store.view().sentinels["n1"].down_after == configured - 1, "a failover may need it"
        await watch.until(lambda view: view.sentinels["n1"].down_after == configured)
        assert watch.store.view().sentinels["n2"].down_after == configured - 1, "another node's is its own srd's"


async def test_a_changed_file_changes_whose_sentinels_are_asked(cluster: Cluster) -> None:
    await whole(cluster)
    watch = Watch(cluster, "n1")
    without = dataclasses.replace(cluster.config, nodes=cluster.config.nodes[:2])
    async with running(watch):
        await watch.until(lambda view: len(view.sentinels) == 3)
        watch.observer.adopt(without)
        await watch.until(lambda view: set(view.sentinels) == {"n1", "n2"})
        watch.observer.adopt(cluster.config)
        await watch.until(lambda view: len(view.sentinels) == 3 and watch.holds())


async def test_a_killed_primary_is_replaced_and_everyone_sees_it(cluster: Cluster) -> None:
    await whole(cluster)
    old, other = Watch(cluster, "n1"), Watch(cluster, "n2")
    third = Watch(cluster, "n3")
    watches = (old, other, third)
    together: list[str] = []

    def at_most_one() -> None:
        if sum(watch.holds() for watch in watches) > 1:
            together.append("two leases at one instant")

    first = cluster.endpoint("n1")
    async with running(*watches):
        for watch in watches:
            await watch.until(names(first))
            watch.store.on_change(at_most_one)
        await old.until(lambda view: view.lease is not None and view.lease.held and view.redis is not None)
        assert old.observer.last_role is Role.PRIMARY
        woken = old.woken
        cluster.kill("redis-n1")
        dead = await old.until(lambda view: view.redis is None)
        assert dead.lease is not None
        death = old.observer.death()
        assert (death.as_role, old.observer.last_role) == (Role.PRIMARY, Role.UNKNOWN)

        changed = await old.until(lambda view: view.lease is not None and view.lease.primary not in (None, first))
        assert changed.lease is not None
        winner = changed.lease.primary
        assert winner in (cluster.endpoint("n2"), cluster.endpoint("n3"))
        assert not changed.lease.held
        assert old.woken > woken
        elected = other if winner == cluster.endpoint("n2") else third
        led = await elected.until(lambda view: view.lease is not None and view.lease.held and len(view.history) == 2)
        assert [change.current for change in led.history] == [first, winner]
        assert (led.history[-1].previous, led.history[-1].epoch) == (first, 1)
        assert led.history[-1].at_timestamp == 1_700_000_000.0
        await elected.until(lambda view: view.redis is not None and view.redis.role is Role.PRIMARY)
        await elected.until(lambda view: view.sentinel_events.get("+switch-master") == 1)
        assert SUBSCRIBED not in elected.store.view().sentinel_events
    assert together == []


async def test_sentinels_without_any_redis_tell_one_another_who_is_primary(cluster: Cluster) -> None:
    """What makes rule 1 of srd/ha/restart.py a majority after a power cut of all nodes."""
    await whole(cluster)
    cluster.kill("sentinel-n1")
    cluster.kill("redis-n1")
    async with sentinel_client(cluster, "n2") as second, sentinel_client(cluster, "n1") as ignorant:

        async def elected() -> bool:
            answer = await second.ask()
            return answer.epoch == 1 and answer.primary != cluster.endpoint("n1")

        await until(elected)
        winner = (await second.ask()).primary
        cluster.kill_all()
        cluster.sentinel("n1")
        cluster.sentinel("n2")

        async def told() -> bool:
            answer = await ignorant.ask()
            return (answer.primary, answer.epoch) == (winner, 1)

        await until(told)


async def test_events_go_on_after_a_restart_of_the_sentinel(cluster: Cluster) -> None:
    cluster.redis("n1")
    cluster.sentinel("n1")
    async with sentinel_client(cluster, "n1") as client, contextlib.aclosing(client.events()) as events:
        assert (await anext(events)).name == SUBSCRIBED
        cluster.kill("sentinel-n1")
        cluster.sentinel("n1")
        assert (await anext(events)).name == SUBSCRIBED
        cluster.kill("redis-n1")
        seen = [await anext(events)]
        while seen[-1].name != "+sdown":
            seen.append(await anext(events))
        address = cluster.endpoint("n1").address
        assert seen[-1].payload == f"master master {address} {cluster.config.redis.port}"
        assert seen[-1].node == "n1"


async def test_asking_for_the_last_vote_gives_none_and_raises_no_epoch(cluster: Cluster) -> None:
    await whole(cluster)
    files = [cluster.root / f"sentinel-{name}" / "it.conf" for name in ("n1", "n2", "n3")]
    before = [file.read_text() for file in files]
    async with sentinel_client(cluster, "n2") as asked:
        for _ in range(5):
            said = await asked.ask()
            assert (said.vote, said.vote_epoch, said.epoch) == (None, 0, 0)
            assert f"sentinel myid {said.run_id}\n" in before[1]
    assert [file.read_text() for file in files] == before


async def test_a_vote_is_seen_while_the_failover_that_it_is_for_is_under_way(cluster: Cluster) -> None:
    await whole(cluster)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(sentinel_client(cluster, name)) for name in ("n1", "n2", "n3")]
        ids = {(await client.ask()).run_id for client in clients}
        assert len(ids) == 3
        cluster.kill("redis-n1")
        for client in clients:
            await client.keep_down_after(0.2)
        voters = clients.copy()

        async def voted() -> bool:
            answers = [await client.ask() for client in voters]
            leaders = [answer.vote for answer in answers if answer.vote_epoch > answer.epoch]
            return len(leaders) >= 2 and set(leaders) <= ids

        await until(voted)
