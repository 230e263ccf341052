"""What is done to a cluster, whoever looks after it, under a writer that is running already."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.primacy.managed import Arrangement
from bench.primacy.places import BALANCER, CLIENT, InLab, Place

PAUSE_SECONDS: Final = 0.02
# A primary that is replaced by hand goes on taking writes until a sentinel demotes it, 11.2 s later (facts).
DEPOSED_SECONDS: Final = 14.0
AFTERWARDS_SECONDS: Final = 1.5
KEYS: Final = 1000
# Jepsen's partition: so many writes over so long a time.
WRITES, PARTITION_SECONDS = 2000, 20.0


@dataclass(frozen=True)
class Moved:
    """A primary was moved on purpose."""

    gap: float
    acknowledged: int
    lost: int


def kill(place: Place, cluster: Arrangement, number: int) -> float:
    """Kill the primary's redis; return for how long no write was acknowledged."""
    cluster.wait_whole()
    victim = cluster.primary()
    with place.writer(cluster.password, f"kill:{number}:", pause=PAUSE_SECONDS) as writing:
        cluster.kill(victim)
        writing.wait_back()
        time.sleep(AFTERWARDS_SECONDS)
        gap = writing.end().gap()
    cluster.changed()
    cluster.revive(victim)
    return gap


def silence(place: InLab, cluster: Arrangement, number: int) -> float:
    """Pull the cable of the primary's node; return for how long no write was acknowledged."""
    cluster.wait_whole()
    victim = cluster.primary()
    writer = place.writer(cluster.password, f"silence:{number}:", pause=PAUSE_SECONDS)
    with writer as writing, place.silent(victim):
        writing.wait_back()
        time.sleep(AFTERWARDS_SECONDS)
        gap = writing.end().gap()
    cluster.changed()
    return gap


def move(place: Place, cluster: Arrangement, number: int, lasting: float) -> Moved:
    """Move the primary under a writer that does not pause; look for every write so long afterwards."""
    cluster.wait_whole()
    with place.writer(cluster.password, f"move:{number}:") as writing:
        cluster.switch_over()
        time.sleep(lasting)
        written = writing.end()
        cluster.changed()
        cluster.wait_whole()
        return Moved(written.gap(), len(written.acknowledged), len(writing.missing()))


def reconnect(place: Place, cluster: Arrangement, times: int) -> list[float]:
    """Have a writer that does not pause go on over a new connection; return for how long no write was acknowledged.

    That is what a move of the primary costs a client at least: its connection to the former one ends.
    """
    cluster.wait_whole()
    with place.writer(cluster.password, "reconnect:") as writing:
        moments = []
        for _ in range(times):
            moments.append(writing.cut())
            time.sleep(PAUSE_SECONDS * 10)
        written = writing.end()
    return [written.gap_at(moment) for moment in moments]


def restart(place: Place, cluster: Arrangement, lasting: float) -> int:
    """Kill a primary that keeps nothing on disk, and have it started again; count what is lost so much later."""
    cluster.wait_whole()
    victim = cluster.primary()
    with place.writer(cluster.password, "restart:", wait=1, count=KEYS) as writing:
        while writing.tried() < KEYS:
            time.sleep(PAUSE_SECONDS)
        writing.end()
        cluster.kill(victim)
        cluster.revive(victim)
        time.sleep(lasting)
        cluster.wait_whole()
        return len(writing.missing())


@dataclass(frozen=True)
class Parted:
    """What became of a writer's writes in a partition of `seconds`; the `last` lost one, so long after the cut.

    `acknowledged` are those since nft was started to make the cut.
    """

    confirmations: int
    tried: int
    acknowledged: int
    lost: int
    last: float
    seconds: float


def part(
    place: InLab,
    cluster: Arrangement,
    confirmations: Sequence[int],
    *,
    alone: bool = False,
    writes: int = WRITES,
    seconds: float = PARTITION_SECONDS,
    lasting: float = 0.0,
) -> list[Parted]:
    """Cut the primary off with the balancer, the writers, one for each of `confirmations`, and what else is a minority.

    `alone`: without any other node.

    It holds for so many `writes` of the first writer, over so many `seconds` or more. What is missing is counted when
    the cluster is whole again, and that is looked at after it has been `lasting` for so many seconds.
    """
    cluster.wait_whole()
    primary = cluster.primary()
    others = [node for node in place.nodes if node != primary]
    companions = [] if alone else others[: (len(place.nodes) - 1) // 2 - 1]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(place.writer(cluster.password, f"part:{number}:", pause=seconds / writes, wait=number))
            for number in confirmations
        ]
        before = [writer.tried() for writer in writers]
        began = time.monotonic()
        with place.partitioned((primary, *companions, BALANCER, CLIENT)) as cut:
            while writers[0].tried() < before[0] + writes:
                time.sleep(PAUSE_SECONDS)
            written = [writer.end() for writer in writers]
        healed = time.monotonic()
        cluster.changed()
        time.sleep(lasting)
        cluster.wait_whole()
        found = []
        for number, done, tried, writer in zip(confirmations, written, before, writers, strict=True):
            moments = [done.acknowledged[lost] - cut for lost in writer.missing()]
            since = sum(moment > began for moment in done.acknowledged.values())
            last = max(moments, default=0.0)
            found.append(Parted(number, done.tried - tried, since, len(moments), last, healed - cut))
    return found
