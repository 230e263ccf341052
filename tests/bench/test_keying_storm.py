"""A thousand peers that connect to one node at once, and a flood that is none of them."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from bench.leaders import SERVER, SERVER_ADDRESS, address_of, keying, make, quiet
from srd.cluster import KEYING_PORT
from srd.ipsec.keying import Keying
from srd.state import Store

PEERS, PROCESSES = 1000, 2
FLOOD = 1000


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    quiet()
    yield
    structlog.reset_defaults()


@contextlib.asynccontextmanager
async def serving(root: Path, numbers: range) -> AsyncIterator[tuple[Keying, Store]]:
    server, store = keying(root, SERVER, numbers)
    listeners = server.listen()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.run(listeners))
        yield server, store
        task.cancel()
    for listener in listeners:
        listener.close()


async def leaders(root: Path, first: int, last: int) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.leaders", str(root), str(first), str(last)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"READY\n"
    return process


async def keyed(process: asyncio.subprocess.Process, count: int) -> list[float]:
    """Let them all connect, and return after how many seconds each was keyed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    return [float(await process.stdout.readline()) for _ in range(count)]


async def end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    await process.wait()


@pytest.mark.timeout(600)
async def test_a_thousand_peers_at_once_are_all_keyed_within_ten_seconds(tmp_path: Path) -> None:
    make(tmp_path, range(PEERS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = PEERS // PROCESSES
    async with serving(tmp_path, range(PEERS)) as (_, store):
        processes = [await leaders(tmp_path, n * share, (n + 1) * share) for n in range(PROCESSES)]
        both = await asyncio.gather(*(keyed(process, share) for process in processes))
        times = sorted(seconds for each in both for seconds in each)
        assert sum(channel.connected for channel in store.view().channels.values()) == PEERS
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        await asyncio.gather(*(end(process) for process in processes))
    print(  # noqa: T201 - figures for people
        f"\n{PEERS} peers keyed: median {times[len(times) // 2]:.1f} s, last {times[-1]:.1f} s, {grown:.0f} MiB more"
    )
    assert times[-1] <= 10


@pytest.mark.timeout(600)
async def test_a_flood_of_connections_delays_a_peer_by_less_than_a_second(tmp_path: Path) -> None:
    make(tmp_path, range(2))
    delays = {}
    for flooded in (False, True):
        async with serving(tmp_path, range(2)):
            process = await leaders(tmp_path, 0, 1)
            over = threading.Event()
            flood = threading.Thread(target=pour, args=(over,), daemon=True)
            if flooded:
                flood.start()
                await asyncio.sleep(1)
            delays[flooded] = (await keyed(process, 1))[0]
            over.set()
            if flooded:
                await asyncio.to_thread(flood.join)
            await end(process)
    print(f"\na peer was keyed in {delays[False]:.3f} s, under a flood in {delays[True]:.3f} s")  # noqa: T201
    assert delays[True] - delays[False] < 1


def pour(over: threading.Event) -> None:
    """Keep as many connections open as the flood has: from outside, and from the address of a peer that leads."""
    held: list[socket.socket] = []
    number = 0
    while not over.is_set():
        number += 1
        stranger = socket.socket()
        stranger.settimeout(1)
        with contextlib.suppress(OSError):
            stranger.bind((address_of(1) if number % 2 else "127.9.9.9", 0))
            stranger.connect((SERVER_ADDRESS, KEYING_PORT))
            if number % 3:
                stranger.sendall(b"\x16\x03\x01\x02\x00" + bytes(40) if number % 3 == 1 else b"GET / HTTP/1.0\r\n\r\n")
        held.append(stranger)
        if len(held) > FLOOD:
            held.pop(0).close()
        time.sleep(0.0005)
    for stranger in held:
        stranger.close()
