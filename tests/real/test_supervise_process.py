"""One child, run by the real table on real processes: shells that behave as a test needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from support.nodes import background, freeze
from support.unmanaged import no_store

from srd.model import Service, SrdError
from srd.reconcile import boottime
from srd.state import Child, ChildState, Symptom
from srd.supervise.files import Owner
from srd.supervise.process import Process
from srd.supervise.running import Former, Running, Timing
from srd.supervise.spawn import Command, spawn

FAST = Timing(start_timeout=0.3, probe_timeout=0.2, probe_interval=0.02, probe_failures=3, kill_timeout=5)
PATIENCE = 10.0
# The shell is deaf before it says that it is; `sleep` in the background so that a signal is handled at once.
RELUCTANT = "trap 'trap \"exit 7\" TERM; echo not yet' TERM; echo deaf; while :; do sleep 60 & wait; done"
DEAF = "trap '' TERM; echo deaf; while :; do sleep 60 & wait; done"


class Health:
    """A probe that answers as the test says."""

    def __init__(self) -> None:
        self.complaint: str | None = None
        self.asked = asyncio.Event()
        self.hang = False

    async def __call__(self) -> None:
        self.asked.set()
        if self.hang:
            await asyncio.Event().wait()
        if self.complaint is not None:
            raise SrdError("ask", "the child", self.complaint)


@dataclass
class World:
    root: Path
    script: str = "exec sleep 60"
    launches: int = 0
    refused_after: float | None = None
    gate: Callable[[], None] = field(default=lambda: None)

    def launch(self, former: Former) -> Running:
        self.launches += 1
        self.refused_after = former.refused_after
        owner = Owner("me", os.geteuid(), os.getegid(), switch=False)
        argv = ("sh", "-c", self.script)
        child = spawn(Command(Path("/bin/sh"), argv, owner, self.root, self.root / "log"))
        self.gate()
        return Running(child.pid, child.pidfd, started=boottime(), restarts=former.restarts, adopted=False)


class Observed:
    """A process under supervision, and every snapshot that it announced."""

    def __init__(self, world: World, timing: Timing = FAST, service: Service = Service.REDIS) -> None:
        self.world = world
        self.health = Health()
        self.history: list[Child] = []
        self._changed = asyncio.Event()
        self.deaths = 0
        self.deposed = self.paused = False
        self.process = Process(
            service,
            probe=self.health,
            changed=self._note,
            died=self._note_death,
            timing=timing,
            fds=no_store(),
            paused=lambda: self.paused,
            deposed=lambda: self.deposed,
        )

    def _note_death(self) -> None:
        assert self.process.snapshot().state is not ChildState.BACKOFF, "somebody heard of the end before this"
        self.deaths += 1

    def _note(self) -> None:
        self.history.append(self.process.snapshot())
        self._changed.set()

    async def until(self, predicate: Callable[[Child], bool]) -> Child:
        async with asyncio.timeout(PATIENCE):
            while not predicate(self.process.snapshot()):
                self._changed.clear()
                await self._changed.wait()
        return self.process.snapshot()

    async def in_state(self, state: ChildState) -> Child:
        return await self.until(lambda child: child.state is state)

    async def start(self) -> int:
        await self.process.start(self.world.launch)
        child = self.process.snapshot()
        assert child.pid is not None
        return child.pid

    async def start_deaf(self) -> None:
        """Start it, and wait until it has set its traps."""
        await self.start()
        self.health.complaint = "not deaf yet"
        await wait_for_log(self.world, "deaf")


@contextlib.asynccontextmanager
async def observed(world: World, timing: Timing = FAST, service: Service = Service.REDIS) -> AsyncIterator[Observed]:
    it = Observed(world, timing, service)
    try:
        async with background(it.process.watch):
            yield it
            await it.process.stop(0)
    finally:
        it.process.release()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_it_starts_is_ready_and_stops(world: World) -> None:
    async with observed(world) as it:
        pid = await it.start()
        child = await it.in_state(ChildState.READY)
        assert (child.pid, child.restarts, child.adopted) == (pid, 0, False)
        assert child.ready_since is not None
        await it.process.stop(5)
        child = it.process.snapshot()
        assert (child.state, child.pid, child.last_exit) == (ChildState.STOPPED, None, "killed by SIGTERM")
        assert [entry.state for entry in it.history if entry.state is not ChildState.STARTING] == [
            ChildState.READY,
            ChildState.STOPPING,
            ChildState.STOPPED,
        ]


async def test_starting_again_what_runs_does_nothing(world: World) -> None:
    async with observed(world) as it:
        pid = await it.start()
        assert await it.start() == pid
        await it.in_state(ChildState.READY)
        assert await it.start() == pid
        assert world.launches == 1


@pytest.mark.parametrize("shown", ["it is loading", "no answer within"])
async def test_a_child_that_never_answers_is_shown_and_not_killed(world: World, shown: str) -> None:
    async with observed(world) as it:
        it.health.complaint, it.health.hang = "it is loading", shown == "no answer within"
        pid = await it.start()
        child = await it.in_state(ChildState.DEGRADED)
        assert child.pid == pid
        assert child.complaint is not None
        assert shown in child.complaint
        it.health.complaint, it.health.hang = None, False
        child = await it.in_state(ChildState.READY)
        assert (child.pid, child.complaint) == (pid, None)


async def test_a_child_that_ends_of_what_it_is_told_is_not_waited_for(world: World) -> None:
    async with observed(world, replace(FAST, hang_up=2 * PATIENCE)) as it:
        await it.start()
        await it.in_state(ChildState.READY)
        it.health.complaint = "not yet"
        with pytest.raises(SrdError, match="it has ended meanwhile"):  # the shell has no handler for SIGHUP
            await asyncio.wait_for(it.process.hang_up(), PATIENCE)
        assert it.process.snapshot().last_exit == "killed by SIGHUP"


async def test_a_stop_that_meets_a_start_which_hangs_says_so(world: World) -> None:
    hanging, over = threading.Event(), threading.Event()

    def gate() -> None:
        hanging.set()
        over.wait(PATIENCE)

    world.gate = gate
    async with observed(world, replace(FAST, launch_timeout=0.1)) as it:
        starting = asyncio.create_task(it.process.start(world.launch))
        await asyncio.to_thread(hanging.wait, PATIENCE)
        with pytest.raises(SrdError, match="it is still being started"):
            await it.process.stop(0)
        over.set()
        await starting


async def test_a_ready_child_may_miss_some_probes_before_it_is_degraded(world: World) -> None:
    async with observed(world, replace(FAST, probe_failures=1000)) as it:
        await it.start()
        await it.in_state(ChildState.READY)
        it.health.complaint = "busy"
        for _ in range(5):
            it.health.asked.clear()
            await it.health.asked.wait()
        assert it.process.state is ChildState.READY


async def test_a_child_that_dies_may_start_at_once_and_then_has_to_wait(world: World) -> None:
    async with observed(world) as it:
        first = await it.start()
        await it.in_state(ChildState.READY)
        os.kill(first, signal.SIGKILL)
        child = await it.in_state(ChildState.STOPPED)
        assert (child.last_exit, dict(child.exits)) == ("killed by SIGKILL", {"SIGKILL": 1})
        second = await it.start()
        assert second != first
        os.kill(second, signal.SIGKILL)
        child = await it.in_state(ChildState.BACKOFF)
        assert child.retry_at is not None
        assert 0 < child.retry_at - boottime() <= 0.12
        await it.process.start(world.launch)  # it is not time yet
        assert world.launches == 2
        child = await it.in_state(ChildState.STOPPED)
        assert child.retry_at is None
        assert it.process.snapshot().restarts == 1
        await it.start()
        assert it.process.snapshot().restarts == 2
        assert it.deaths == 2


async def test_a_child_that_cannot_start_is_no_exception_but_a_pause(world: World) -> None:
    def launch(_former: Former) -> Running:
        raise SrdError("start", "it", "there is no disk")

    async with observed(world) as it:
        for _ in range(2):
            await it.in_state(ChildState.STOPPED)
            await it.process.start(launch)
        child = it.process.snapshot()
        assert child.state is ChildState.BACKOFF
        assert child.last_exit == "not started: cannot start it: there is no disk"
        assert dict(child.exits) == {"not started": 2}
        assert it.deaths == 0, "what never ran cannot die"


@pytest.mark.parametrize(("script", "refused"), [("exit 1", True), ("exit 2", False), ("kill -9 $$", False)])
async def test_how_long_a_child_ran_that_ended_with_status_1_before_it_was_ready_is_told_to_the_next_start(
    world: World, script: str, *, refused: bool
) -> None:
    async with observed(world) as it:
        it.health.complaint = "it is loading"
        world.script = script
        for _ in range(2):
            await it.process.start(world.launch)
            await it.in_state(ChildState.STOPPED)
        assert (world.refused_after is not None) is refused


async def test_a_child_that_was_ready_has_refused_nothing(world: World) -> None:
    async with observed(world) as it:
        world.script = "sleep 0.3; exit 1"
        for _ in range(2):
            await it.start()
            await it.in_state(ChildState.READY)
            await it.in_state(ChildState.STOPPED)
        assert world.refused_after is None


async def test_a_start_that_takes_long_is_given_up_by_a_stop_and_waited_for_once(world: World) -> None:
    given_up = threading.Event()

    def launch(former: Former) -> Running:
        assert former.given_up.wait(PATIENCE)
        given_up.set()
        raise SrdError("start", "it", "it is not wanted any more")

    async with observed(world, replace(FAST, launch_timeout=0.3)) as it:
        for longest in (PATIENCE, 0.2):
            begun = boottime()
            await it.process.start(launch)
            assert boottime() - begun < longest
        assert not given_up.is_set()
        await it.process.stop(0)
        assert given_up.is_set()
        assert it.process.state is ChildState.STOPPED


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(world: World) -> None:
    world.script = DEAF
    async with observed(world) as it:
        await it.start_deaf()
        begun = boottime()
        await it.process.stop(0.3)
        assert 0.3 <= boottime() - begun < 2
        assert it.process.snapshot().last_exit == "killed by SIGKILL"


async def test_a_child_that_refuses_to_end_just_now_is_asked_again(world: World) -> None:
    """As redis does between a full resync and its first append-only file."""
    world.script = RELUCTANT
    async with observed(world) as it:
        await it.start_deaf()
        begun = boottime()
        await it.process.stop(PATIENCE)
        assert boottime() - begun < PATIENCE / 2
        assert it.process.snapshot().last_exit == "exit status 7"


async def test_a_stopped_child_is_killed_after_its_grace(world: World) -> None:
    async with observed(world) as it:
        pid = await it.start()
        freeze(pid)
        await it.process.stop(0.2)
        assert it.process.snapshot().last_exit == "killed by SIGKILL"


async def test_a_stop_that_is_cancelled_can_be_taken_up_again(world: World) -> None:
    world.script = DEAF
    async with observed(world) as it:
        await it.start()
        await wait_for_log(world, "deaf")
        stop = asyncio.ensure_future(it.process.stop(60))
        await it.in_state(ChildState.STOPPING)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
        await it.process.stop(0)
        assert [entry.state for entry in it.history[-2:]] == [ChildState.STOPPING, ChildState.STOPPED]


async def test_an_expected_end_needs_no_pause_and_is_no_failure(world: World) -> None:
    async with observed(world) as it:
        for _ in range(4):
            await it.start()
            await it.process.stop(5)
            assert it.process.snapshot().retry_at is None


async def test_a_start_that_is_cancelled_does_not_lose_the_child(world: World) -> None:
    loop = asyncio.get_running_loop()
    spawned, proceed = asyncio.Event(), asyncio.Event()

    def gate() -> None:
        loop.call_soon_threadsafe(spawned.set)
        asyncio.run_coroutine_threadsafe(proceed.wait(), loop).result(PATIENCE)

    world.gate = gate
    async with observed(world) as it:
        start = asyncio.ensure_future(it.process.start(world.launch))
        await spawned.wait()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        proceed.set()
        child = await it.in_state(ChildState.READY)
        assert child.pid is not None
        assert world.launches == 1


async def test_a_stop_during_the_start_ends_what_was_started(world: World) -> None:
    loop = asyncio.get_running_loop()
    spawned, proceed = asyncio.Event(), asyncio.Event()

    def gate() -> None:
        loop.call_soon_threadsafe(spawned.set)
        asyncio.run_coroutine_threadsafe(proceed.wait(), loop).result(PATIENCE)

    world.gate = gate
    async with observed(world) as it, asyncio.TaskGroup() as group:
        group.create_task(it.process.start(world.launch))
        await spawned.wait()
        group.create_task(it.process.stop(5))
        proceed.set()
        child = await it.until(lambda child: child.last_exit is not None)
        assert (child.state, child.last_exit) == (ChildState.STOPPED, "killed by SIGTERM")


async def test_release_leaves_the_child_and_another_can_adopt_it(world: World) -> None:
    first = Observed(world)
    pid = await first.start()
    first.process.release()
    os.kill(pid, 0)
    async with observed(world) as it:
        it.process.adopt(Running(pid, os.pidfd_open(pid), started=1.5, restarts=7, adopted=True))
        child = await it.in_state(ChildState.READY)
        assert (child.pid, child.started, child.restarts, child.adopted) == (pid, 1.5, 7, True)
        await it.process.stop(5)
        assert it.process.state is ChildState.STOPPED


# The shell's own loop, so that its main thread is the one that runs.
BUSY = "while :; do :; done"
IMPATIENT = replace(FAST, hung_after=0.3, hung_grace=0.2)


async def test_a_child_that_hangs_is_ended_and_may_start_again(world: World) -> None:
    async with observed(world, IMPATIENT) as it:
        first = await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang = True
        child = await it.in_state(ChildState.STOPPED)
        assert child.last_exit == "srd ended it: it was hung (killed by SIGTERM)"
        assert (dict(child.exits), it.deaths) == ({"silent": 1}, 1)
        assert Symptom.HUNG in {entry.symptom for entry in it.history}
        it.health.hang = False
        assert await it.start() != first
        await it.in_state(ChildState.READY)


async def test_a_child_that_hangs_and_is_deaf_is_killed(world: World) -> None:
    world.script = DEAF
    async with observed(world, IMPATIENT) as it:
        await it.start()
        await wait_for_log(world, "deaf")
        await it.in_state(ChildState.READY)
        it.health.hang = True
        child = await it.in_state(ChildState.STOPPED)
        assert child.last_exit == "srd ended it: it was hung (killed by SIGKILL)"


async def test_a_child_that_was_never_ready_and_hangs_is_ended_for_that(world: World) -> None:
    async with observed(world, IMPATIENT) as it:
        it.health.hang = True
        await it.start()
        child = await it.in_state(ChildState.STOPPED)
        assert child.last_exit == "srd ended it: it was hung, and was never ready (killed by SIGTERM)"
        assert dict(child.exits) == {"not ready": 1}


async def test_a_child_that_answers_that_it_cannot_serve_does_not_hang(world: World) -> None:
    async with observed(world, IMPATIENT) as it:
        pid = await it.start()
        it.health.complaint = "it knows no primary"
        await it.in_state(ChildState.DEGRADED)
        for _ in range(40):  # 0.8 s and more
            it.health.asked.clear()
            await it.health.asked.wait()
        assert (it.process.pid, it.process.snapshot().symptom) == (pid, None)


async def test_redis_is_not_ended_for_being_slow(world: World) -> None:
    world.script = BUSY
    async with observed(world, replace(IMPATIENT, slow_limit=0.2)) as it:
        pid = await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang = True
        await it.until(lambda child: child.symptom is Symptom.SLOW)
        for _ in range(8):  # 1.6 s and more
            it.health.asked.clear()
            await it.health.asked.wait()
        child = it.process.snapshot()
        assert (child.pid, child.state, child.symptom) == (pid, ChildState.DEGRADED, Symptom.SLOW)
        it.health.hang = False
        child = await it.in_state(ChildState.READY)
        assert (child.pid, child.symptom) == (pid, None)


async def test_another_child_is_slow_for_so_long_only(world: World) -> None:
    world.script = BUSY
    async with observed(world, replace(IMPATIENT, hung_after=60, slow_limit=0.5), Service.SENTINEL) as it:
        await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang = True
        child = await it.in_state(ChildState.STOPPED)
        assert child.last_exit == "srd ended it: it was slow (killed by SIGTERM)"


async def test_a_child_that_was_stopped_is_continued(world: World) -> None:
    async with observed(world, replace(FAST, probe_failures=1000)) as it:
        pid = await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang = True
        freeze(pid)
        await it.until(lambda child: child.symptom is Symptom.STOPPED)
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WCONTINUED)
        it.health.hang = False
        await it.until(lambda child: child.symptom is None)
        assert it.process.pid == pid


async def test_during_a_pause_a_child_that_was_stopped_is_left_alone(world: World) -> None:
    async with observed(world, replace(FAST, probe_failures=1000)) as it:
        pid = await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang, it.paused = True, True
        freeze(pid)
        await it.until(lambda child: child.symptom is Symptom.STOPPED)
        for _ in range(3):
            it.health.asked.clear()
            async with asyncio.timeout(PATIENCE):
                await it.health.asked.wait()
        assert os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOHANG) is None  # noqa: ASYNC222 - it does not wait
        it.paused = False
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WCONTINUED)
        it.health.hang = False
        await it.until(lambda child: child.symptom is None)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_primary_that_was_stopped_and_replaced_never_runs_again(world: World, paused: bool) -> None:  # noqa: FBT001
    world.script = "trap 'echo it ran' CONT; while :; do sleep 60 & wait; done"
    async with observed(world) as it:
        pid = await it.start()
        await it.in_state(ChildState.READY)
        it.health.hang, it.deposed, it.paused = True, True, paused
        freeze(pid)
        child = await it.in_state(ChildState.STOPPED)
        assert child.last_exit == "srd ended it: it was stopped (killed by SIGKILL)"
        assert "it ran" not in (world.root / "log").read_text()


async def wait_for_log(world: World, word: str) -> None:
    """Wait until the child has said something; its log is a file, which sends no events."""
    async with asyncio.timeout(PATIENCE):
        while word not in (world.root / "log").read_text():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.005)
