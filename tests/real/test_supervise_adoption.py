"""A supervisor that is killed takes nothing with it: the next one finds the same processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.nodes import PATIENCE, Member, eventually, world

from srd.model import Service, SrdError
from srd.reconcile import boottime
from srd.state import ChildState
from srd.supervise.adopt import REGISTER_NAME, Record, record_found

# What the daemon does, in a process of its own: it says READY when all children are.
SUPERVISOR = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support.nodes import member_at

async def main():
    member = member_at(Path(sys.argv[2]), sys.argv[3])
    async with member.supervised() as node:
        await node.all_ready()
        print("READY", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
TESTS = Path(__file__).parent.parent


@contextlib.contextmanager
def killed_supervisor(member: Member) -> Iterator[dict[Service, int]]:
    """Let a supervisor bring the node up, kill it with SIGKILL, and give the children that it left."""
    root = member.paths.state_dir.parent.parent
    command = [sys.executable, "-c", SUPERVISOR, str(TESTS), str(root), member.node.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as supervisor:
        assert supervisor.stdout is not None
        said = []
        for line in supervisor.stdout:
            said.append(line)
            if line == "READY\n":
                break
        supervisor.kill()
    assert said[-1:] == ["READY\n"], "".join(said)
    assert supervisor.returncode == -signal.SIGKILL
    records = json.loads((member.paths.run_dir / REGISTER_NAME).read_text())["children"]
    yield {Service(record["service"]): record["pid"] for record in records}


async def test_the_next_supervisor_adopts_the_same_processes_and_can_stop_them() -> None:
    with world() as (member,), killed_supervisor(member) as left:
        assert set(left) == set(Service)
        await asyncio.wait_for(member.ask("SET", "written", "while nobody supervised"), PATIENCE)
        async with member.supervised() as node:
            view = await node.all_ready()
            assert node.pids() == left
            assert all(child.adopted for child in view.children.values())
            assert {child.restarts for child in view.children.values()} == {0}
            assert view.initialized
            await node.services.stop_all()
            assert {child.state for child in node.store.view().children.values()} == {ChildState.STOPPED}
            for pid in left.values():
                await eventually(partial(is_over, pid), f"the end of {pid}")


@pytest.mark.parametrize("service", list(Service))
async def test_an_adopted_child_that_dies_is_back(service: Service) -> None:
    with world() as (member,), killed_supervisor(member) as left:
        async with member.supervised() as node:
            await node.all_ready()
            os.kill(left[service], signal.SIGKILL)
            await node.until(lambda view: view.children[service].pid not in (left[service], None))
            child = (await node.all_ready()).children[service]
            assert (child.adopted, child.restarts) == (False, 1)
            assert child.last_exit == "unknown, it was adopted"


async def test_a_child_that_died_while_nobody_supervised_is_started_anew() -> None:
    with world() as (member,), killed_supervisor(member) as left:
        os.kill(left[Service.REDIS], signal.SIGKILL)
        await eventually(lambda: is_over(left[Service.REDIS]), "the end of redis")
        async with member.supervised() as node:
            await node.all_ready()
            pids = node.pids()
            assert pids[Service.REDIS] != left[Service.REDIS]
            assert [pids[other] == left[other] for other in (Service.SENTINEL, Service.STUNNEL)] == [True, True]
            assert node.store.view().children[Service.REDIS].exits == {"unseen": 1}
            assert member.deaths == [Service.REDIS]
        assert member.deaths == [Service.REDIS, *reversed(Service)], "a stop ends each, last started first"


async def test_a_frozen_adopted_child_is_killed_after_its_grace() -> None:
    with world() as (member,), killed_supervisor(member) as left:
        async with member.supervised() as node:
            await node.all_ready()
            os.kill(left[Service.STUNNEL], signal.SIGSTOP)
            await eventually(lambda: is_in(left[Service.STUNNEL], "T"), "stunnel to be frozen")
            await node.services.stop_all()
            assert await is_over(left[Service.STUNNEL])


async def test_a_damaged_register_adopts_nothing_and_ends_nothing() -> None:
    with world() as (member,), killed_supervisor(member) as left:
        register = member.paths.run_dir / REGISTER_NAME
        whole = register.read_bytes()
        register.write_bytes(whole[:50])
        try:
            async with member.supervised(leave=True) as node:
                view = await node.until(
                    lambda view: (child := view.children.get(Service.REDIS)) is not None and child.last_exit is not None
                )
                assert f"pid {left[Service.REDIS]} (" in (view.children[Service.REDIS].last_exit or "")
            assert [await is_over(pid) for pid in left.values()] == [False] * 3
        finally:
            register.write_bytes(whole)


@pytest.mark.parametrize("damage", ["truncated", "gone", "another process"])
async def test_what_the_service_manager_holds_is_adopted_whatever_the_register_says(damage: str) -> None:
    with world() as (member,), killed_supervisor(member) as left:
        register = member.paths.run_dir / REGISTER_NAME
        if damage == "truncated":
            register.write_bytes(register.read_bytes()[:50])
        elif damage == "gone":
            register.unlink()
        else:
            register.write_text(register.read_text().replace(str(left[Service.REDIS]), str(os.getpid())))
        handed = [(f"child-{service}", os.pidfd_open(pid)) for service, pid in left.items()]
        async with member.supervised(handed=handed) as node:
            view = await node.all_ready()
            assert node.pids() == left
            assert all(child.adopted for child in view.children.values())
            started = [view.children[service].started or 0.0 for service in Service]
            assert started == sorted(started)
            assert boottime() - 60 < started[0] < boottime()
        assert {Service(record["service"]) for record in json.loads(register.read_text())["children"]} == set()


async def test_a_held_descriptor_of_a_dead_child_is_an_unseen_end() -> None:
    with world() as (member,), killed_supervisor(member) as left:
        handed = [(f"child-{service}", os.pidfd_open(pid)) for service, pid in left.items()]
        os.kill(left[Service.SENTINEL], signal.SIGKILL)
        # Its main thread may be a zombie while others end: the descriptor is readable when all have.
        await asyncio.to_thread(select.select, [dict(handed)[f"child-{Service.SENTINEL}"]], [], [], PATIENCE)
        async with member.supervised(handed=handed) as node:
            view = await node.all_ready()
            assert view.children[Service.SENTINEL].exits == {"unseen": 1}
            assert [node.pid(service) == left[service] for service in Service] == [True, False, True]


async def test_a_first_look_that_fails_halfway_is_taken_up_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [SrdError("identify", Service.SENTINEL, "it cannot be read")]

    def found(service: Service, pid: int) -> Record:
        if service is Service.SENTINEL and failures:
            raise failures.pop()
        return record_found(service, pid)

    monkeypatch.setattr("srd.supervise.services.record_found", found)
    with world() as (member,), killed_supervisor(member) as left:
        (member.paths.run_dir / REGISTER_NAME).unlink()
        handed = [(f"child-{service}", os.pidfd_open(pid)) for service, pid in left.items()]
        async with member.supervised(handed=handed) as node:
            await node.all_ready()
            assert failures == []
            assert node.pids() == left
            assert sorted(bound_pids()) == sorted(left.values()), "one descriptor for each"


def bound_pids() -> list[int]:
    """Return the pids of the live processes that this one has descriptors of, each as often as it has."""
    found = []
    for entry in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            found += [int(line.split()[1]) for line in entry.read_text().splitlines() if line.startswith("Pid:")]
    return [pid for pid in found if pid > 0]


async def is_over(pid: int) -> bool:
    return await is_in(pid, "ZX")


async def is_in(pid: int, letters: str) -> bool:
    try:
        stat = await asyncio.to_thread(Path(f"/proc/{pid}/stat").read_text)
    except (FileNotFoundError, ProcessLookupError):
        return "X" in letters
    return stat.rpartition(")")[2].split()[0] in letters
