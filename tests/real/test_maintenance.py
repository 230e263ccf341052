"""A node is taken out of service, and a cluster is paused, over real redises and real sentinels."""

from __future__ import annotations

import time

import pytest
from support.patience import retrying
from support.primacies import NAMES, Srd, leader, settled, told, watched, writes, writing
from support.sentinels import Cluster

from srd.cluster import DEFAULT_PRIORITY, NEVER_PRIORITY
from srd.model import Pause, RefusedError
from srd.state import View


async def test_a_drained_primary_moves_away_and_no_failover_chooses_the_node(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        async with writing(cluster, srds) as writers:
            done = await srds["n1"].primacy.moves.move_away()
            srds["n1"].write_drained(True)
        assert done is not None
        first = str(done["to"])
        assert [await writer.lost(first) for writer in writers] == [set()] * len(writers)
        await settled(cluster, cluster.endpoint(first))
        await told(cluster, srds["n1"], NEVER_PRIORITY)
        assert await srds["n1"].primacy.moves.move_away() is None, "asked again, there is nothing to be done"

        cluster.kill(f"redis-{first}")
        srds[first].redis_died()
        (other,) = {"n2", "n3"} - {first}
        assert (await leader(srds, ("n1", other))).name == other
        await settled(cluster, cluster.endpoint(other))
        await writes(cluster, other)  # with the drained node as its one replica

        srds["n1"].write_drained(False)
        await told(cluster, srds["n1"], DEFAULT_PRIORITY)


async def test_a_drained_node_is_no_target_of_a_switchover_and_a_last_one_cannot_be_drained(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    def drained(count: int, view: View) -> bool:
        return sum(report.drained for report in view.peers.values()) == count

    async with watched(srds, *NAMES):
        await srds["n1"].until(lambda view: view.peers.keys() >= {"n2", "n3"})
        srds["n2"].write_drained(True)
        await srds["n1"].until(lambda view: drained(1, view))
        with pytest.raises(RefusedError, match="cannot switch over to n2: n2 is drained"):
            await srds["n3"].primacy.moves.switch_over("n2", dry_run=False)
        assert await srds["n3"].primacy.moves.switch_over(None, dry_run=True) == {"from": "n1", "to": "n3"}
        srds["n3"].write_drained(True)
        await srds["n1"].until(lambda view: drained(2, view))
        with pytest.raises(RefusedError, match="n2 is drained; n3 is drained"):
            await srds["n1"].primacy.moves.move_away()
        assert srds["n1"].leads()
        await writes(cluster, "n1")


async def test_a_drained_node_is_not_preferred_by_what_a_failover_has_left(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        srds["n2"].write_drained(True)
        await told(cluster, srds["n2"], NEVER_PRIORITY)
        observed = srds["n2"].primacy.observer.redis
        assert observed is not None
        await observed.keep_priority(1)
        await told(cluster, srds["n2"], NEVER_PRIORITY)


async def test_during_a_pause_a_dead_primary_is_left_to_the_sentinels_who_do_replace_it(
    cluster: Cluster, srds: dict[str, Srd]
) -> None:
    async with watched(srds, *NAMES):
        for srd in srds.values():
            srd.write_pause(Pause(1, 60.0))
        began = time.monotonic()
        cluster.kill("redis-n1")
        srds["n1"].redis_died()
        successor = await leader(srds, ("n2", "n3"), 30)
        assert time.monotonic() - began > cluster.config.sentinel.down_after, "somebody was in a hurry"
        # What is to be done about who was chosen is done: its lease, its replicas.
        await writes(cluster, successor.name)
        await settled(cluster, cluster.endpoint(successor.name))
        (other,) = {"n2", "n3"} - {successor.name}
        # Each srd sees for itself that the failover has ended.
        back = await retrying(RefusedError, seconds=20)(srds["n2"].primacy.moves.switch_over, other, dry_run=False)
        assert (back["to"], back["named"]) == (other, True), "what is asked for by hand is done"
