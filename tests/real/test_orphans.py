"""What srd inherits as the first process of a container, and what it must leave to others."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from srd.supervise.files import Owner
from srd.supervise.orphans import collect_orphans
from srd.supervise.spawn import Command, spawn

PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 0.2
OWN = Owner("root", os.getuid(), os.getgid(), switch=False)


@pytest.fixture
async def heir() -> AsyncIterator[None]:
    """Make this process inherit orphans, as process 1 does, and collect them meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    collecting = asyncio.create_task(collect_orphans(GRACE_SECONDS))
    yield
    collecting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await collecting
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def ended_child() -> int:
    """Return a child that has ended, and that nobody has asked for its status."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def orphans(number: int, seconds: float) -> list[int]:
    """Start processes that lose their parent at once, and end after so many seconds."""
    script = f"for i in $(seq {number}); do sleep {seconds} >&- & echo $!; done"
    parent = await asyncio.create_subprocess_exec("sh", "-c", script, stdout=asyncio.subprocess.PIPE)
    said, _ = await parent.communicate()
    return [int(pid) for pid in said.split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_orphans_are_collected(heir: None) -> None:  # noqa: ARG001 - for what it does
    found = await orphans(20, seconds=0.5)
    assert {parent_of(pid) for pid in found} == {os.getpid()}
    await asyncio.to_thread(wait_until_gone, found)


async def test_one_that_ended_before_anybody_collected_is_collected() -> None:
    pid = ended_child()
    collecting = asyncio.create_task(collect_orphans(GRACE_SECONDS))
    try:
        await asyncio.to_thread(wait_until_gone, [pid])
    finally:
        collecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collecting


async def test_the_end_of_a_child_that_somebody_waits_for_is_left_to_them(heir: None) -> None:  # noqa: ARG001
    child = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
    await asyncio.to_thread(wait_until_gone, await orphans(1, seconds=0.1))
    assert await child.wait() == 7


async def test_a_child_that_is_watched_by_its_descriptor_is_left_to_who_watches_it(
    heir: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    """As every child of srd is, and it may end together with orphans."""
    started = await asyncio.to_thread(
        spawn, Command(Path("/bin/sh"), ("sh", "-c", "sleep 0.3; exit 9"), OWN, tmp_path, tmp_path / "log")
    )
    status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def ended() -> None:
        asyncio.get_running_loop().remove_reader(started.pidfd)
        result = os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED | os.WNOHANG)
        status.set_result(result.si_status if result is not None else -1)

    asyncio.get_running_loop().add_reader(started.pidfd, ended)
    await asyncio.to_thread(wait_until_gone, await orphans(20, seconds=0.3))
    assert await status == 9
    os.close(started.pidfd)
