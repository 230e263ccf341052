"""What three nodes write down of a change of primary, over real redises and sentinels: the same on each of them."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable

from support.primacies import NAMES, Srd, leader, running, settled, watched
from support.sentinels import Cluster, raw, sentinel_client, until

from srd.changes import ChangeKind, RoleChange
from srd.model import Service
from srd.state import Child, ChildState, View


async def the_same(
    srds: dict[str, Srd], among: tuple[str, ...], complete: Callable[[RoleChange], bool], entries: int = 2
) -> RoleChange:
    """Wait until these nodes have one history, whose last entry is complete; return that entry, read from the files."""

    def last(view: View) -> bool:
        return len(view.history) == entries and complete(view.history[-1])

    for name in among:
        await srds[name].until(last)
    first = srds[among[0]]
    for name in among:
        await srds[name].until(lambda view: view.history == first.store.view().history, 10)
    kept = [srds[name].annals for name in among]

    async def written() -> bool:
        return all(annals.load() == first.store.view().history for annals in kept)

    await until(written, 10)
    return kept[0].load()[-1]


def told(change: RoleChange) -> bool:
    return change.duration_seconds is not None and change.settling_seconds is not None


async def test_a_crash_is_told_by_the_srd_beside_it_and_completed_by_the_successors(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        client = raw(cluster, "n1")
        await client.set("k", "v" * 1000)
        await client.aclose()
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        successor = await leader(srds, ("n2", "n3"))
        change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.CRASH and told(each))
        await settled(cluster, cluster.endpoint(successor.name))
    assert (change.previous, change.current) == (cluster.endpoint("n1"), cluster.endpoint(successor.name))
    assert (change.cause, change.by, change.before) == ("redis has ended: killed by SIGKILL", ("n1",), False)
    assert change.epoch >= 1
    assert change.duration_seconds is not None
    assert change.write_gap_seconds is not None
    assert 0.2 < change.duration_seconds <= change.write_gap_seconds < 5
    assert change.known_offset is not None
    assert change.taken_offset is not None
    assert change.lost_bytes == max(0, change.known_offset - change.taken_offset)
    assert not change.complete


async def test_a_redis_that_was_ended_on_purpose_is_no_crash(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with watched(srds, *NAMES):
        cluster.kill("redis-n1")
        srds["n1"].redis_died(asked=True)
        change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.OPERATOR and told(each))
    assert change.by == ("n1",)


async def test_a_node_that_was_stopped_has_said_so_before(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
            await srds["n2"].until(lambda view: view.peers["n1"].offset is not None)
            await srds["n1"].primacy.farewell()
            cluster.kill("sentinel-n1")
            cluster.kill("redis-n1")
        del srds["n1"]
        change = await the_same(srds, ("n2", "n3"), lambda each: each.kind is ChangeKind.OPERATOR and told(each))
    assert (change.cause, change.by) == ("srd was stopped on n1", ("n1",))
    assert change.lost_bytes is not None


async def test_a_silent_node_is_told_by_those_that_had_it_replaced_and_hears_of_it_when_it_is_back(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, "n2", "n3"):
        async with running(srds["n1"]):
            await srds["n1"].until(lambda _: srds["n1"].leads())
            await srds["n2"].until(lambda view: view.peers["n1"].offset is not None)
        away = srds.pop("n1")
        for what in ("redis-n1", "sentinel-n1"):
            cluster.send(what, signal.SIGSTOP)
        successor = await leader(srds, ("n2", "n3"), 30)
        change = await the_same(srds, ("n2", "n3"), lambda each: each.kind is ChangeKind.SILENT and told(each))
        await settled(cluster, cluster.endpoint(successor.name), among=("n2", "n3"))
        for what in ("redis-n1", "sentinel-n1"):
            cluster.send(what, signal.SIGCONT)
        srds["n1"] = back = Srd(cluster, "n1", srds)
        assert [each.kind for each in away.store.view().history] == [ChangeKind.FIRST]
        async with running(back):
            now = await the_same(srds, NAMES, told)
            # It may say more exactly how far its redis had come; that redis was alone, so nothing else.
            known = {"known_offset": now.known_offset, "known_age_seconds": now.known_age_seconds}
            assert dataclasses.replace(change, **known) == now
            assert now.known_offset is not None
            assert now.known_offset >= (change.known_offset or 0)
    assert change.cause == "n1 is silent, and its fences have fallen"
    assert set(change.by) <= {"n2", "n3"}
    assert change.by
    assert change.duration_seconds is not None
    assert change.duration_seconds > 2
    assert change.lost_bytes is not None


async def test_a_switchover_is_told_with_who_asked_and_what_was_measured(srds: dict[str, Srd]) -> None:
    async with watched(srds, *NAMES):
        await srds["n3"].until(lambda view: view.lease is not None and view.lease.primary is not None)
        done = await srds["n3"].primacy.moves.switch_over("n2", dry_run=False, by="n3 (pid 4, uid 0)")
        change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.SWITCHOVER and told(each))
    assert (change.cause, change.by) == ("srd switchover --to n2", ("n3 (pid 4, uid 0)",))
    assert change.write_gap_seconds == done["gap_seconds"]
    assert change.duration_seconds is not None
    assert change.duration_seconds < float(str(done["seconds"]))
    assert (change.lost_bytes, change.complete) == (0, True)


async def test_a_failover_that_no_srd_asked_for_is_told_as_from_outside(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with running(*srds.values()):
        await srds["n1"].until(lambda _: srds["n1"].leads())
        async with sentinel_client(cluster, "n2") as asked:
            await asked.fail_over()
        change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.OUTSIDE and told(each))
        await settled(cluster, change.current)
    assert change.cause == "SENTINEL FAILOVER, asked of the sentinel of n2"
    assert change.write_gap_seconds is None


async def test_sentinels_own_failover_is_told_apart(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with watched(srds, *NAMES):
        cluster.kill("redis-n1")
        srds["n1"].write_children({Service.REDIS: Child(ChildState.BACKOFF)})
        change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.SENTINEL and told(each))
        await settled(cluster, change.current)
    assert change.duration_seconds is not None
    assert change.duration_seconds > 2


async def test_a_change_that_no_srd_was_there_to_see_is_entered_once(cluster: Cluster, srds: dict[str, Srd]) -> None:
    async with running(*srds.values()):
        await srds["n1"].until(lambda _: srds["n1"].leads())
        await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.FIRST, 1)
    async with sentinel_client(cluster, "n2") as asked:
        await asked.fail_over()

        async def replaced() -> bool:
            return (await asked.ask()).primary not in (None, cluster.endpoint("n1"))

        await until(replaced)
        successor = (await asked.ask()).primary
    assert successor is not None
    await settled(cluster, successor)
    for _ in range(2):
        srds.update({name: Srd(cluster, name, srds) for name in NAMES})
        async with running(*srds.values()):
            change = await the_same(srds, NAMES, lambda each: each.kind is ChangeKind.UNSEEN)
        assert (change.previous, change.before, change.duration_seconds) == (cluster.endpoint("n1"), True, None)
