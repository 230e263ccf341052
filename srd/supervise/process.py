"""One child: runs the table of machine.py on a real process.

Signals go through the pidfd, so never to another process that got the same pid; the end of the child comes from it
too, 0.2 ms after the fact. Nothing here waits without a bound. When the tasks that run this are cancelled the child
lives on: only `stop` ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from srd.model import NoAnswerError, PermissionRefusedError, Service, SrdError
from srd.reconcile import boottime
from srd.state import Child, ChildState
from srd.supervise.backoff import Backoff
from srd.supervise.become import send_signal
from srd.supervise.care import Care
from srd.supervise.machine import RUNNING, Action, Event, transition
from srd.supervise.pulse import Remedy
from srd.supervise.running import Former, Running, Timing, pidfd_name
from srd.supervise.tally import NOT_STARTED, REFUSAL, UNSEEN, End, Tally, end_of, oom_kills
from srd.systemd import FdStore

log = structlog.get_logger(__name__)

_PROBE_PAUSE_FIRST: Final = 0.01
_PROBE_PAUSE_GROWTH: Final = 1.5
_PROBE_PAUSE_CAP: Final = 0.5


class Process:
    """One child of srd.

    `probe` raises `SrdError` while the child does not do its job. `changed` is called after each change of the
    snapshot; `died` at each end of the program, an unseen one included, before anything follows from it. `deposed` says
    whether it was primary and another is by now, `paused` whether nothing is to be done about a silent child.
    """

    def __init__(
        self,
        service: Service,
        *,
        probe: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
        died: Callable[[], None],
        timing: Timing,
        fds: FdStore,
        deposed: Callable[[], bool],
        paused: Callable[[], bool],
    ) -> None:
        self.service = service
        self.waiting_for: str | None = None
        self._launch: Callable[[Former], Running] | None = None
        self._probe = probe
        self._changed = changed
        self._died = died
        self._timing = timing
        self._fds = fds
        self._care = Care(service, timing, deposed, paused)
        self._state = ChildState.STOPPED
        self._running: Running | None = None
        self._launching: asyncio.Future[Running] | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._alive = asyncio.Event()
        self._ready_since: float | None = None
        self._backoff = Backoff(lambda: self._apply(Event.PAUSE_OVER))
        self._restarts = 0
        self._launched_before = False
        self._released = False
        self._tally = Tally()
        self._complaint: str | None = None
        self._doom: str | None = None  # why srd ends it, while it does
        self._kill_at: float | None = None
        self._oom_kills = 0
        self._refused_after: float | None = None
        self._give_up: Callable[[], None] = lambda: None  # what is being started

    @property
    def state(self) -> ChildState:
        """Where the child is in its life."""
        return self._state

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._running.pid if self._running else None

    def snapshot(self) -> Child:
        """Return what is known of the child now."""
        running = self._running
        return Child(
            state=self._state,
            pid=running.pid if running else None,
            started=running.started if running else None,
            ready_since=self._ready_since,
            adopted=running.adopted if running else False,
            restarts=self._restarts,
            exits=self._tally.causes,
            last_exit=self._tally.last,
            retry_at=self._backoff.until,
            waiting_for=self.waiting_for,
            complaint=self._complaint,
            outdated=running.outdated if running else False,
            symptom=self._care.symptom,
            lately=self._tally.lately,
        )

    def adopt(self, running: Running) -> None:
        """Take over a process that an earlier srd started."""
        self._take(running)
        self._apply(Event.ADOPT)
        log.info("child adopted", service=self.service, pid=running.pid)

    async def start(self, launch: Callable[[Former], Running]) -> None:
        """Start the child if it is stopped; does nothing in any other state, a pause after a failure included.

        `launch` starts the program; it runs in a thread and may block: after `Timing.launch_timeout` this returns
        while it is at it. Its failure is not raised here: it becomes the child's last end, and a pause.
        """
        self._launch = launch
        before = self._launching
        self._apply(Event.START)
        if self._launching is not None and self._launching is not before:
            await asyncio.wait({self._launching}, timeout=self._timing.launch_timeout)

    async def hang_up(self) -> None:
        """Have the child read its files again (SIGHUP); return when its probe is content with what it does then.

        `SrdError` says what it still complains of after `Timing.hang_up`, or that it has ended.
        """
        running = self._running
        self._signal(signal.SIGHUP)
        deadline = boottime() + self._timing.hang_up
        while (complaint := (await self._question())[0]) is not None:
            if self._running is not running:
                raise SrdError("reload", self.service, "it has ended meanwhile; it is started with the new files")
            if boottime() >= deadline:
                raise SrdError("reload", self.service, complaint, f"srd logs {self.service} may say why")
            await self._ended_within(_PROBE_PAUSE_FIRST)

    async def stop(self, grace: float) -> None:
        """End the child: SIGTERM, after `grace` seconds SIGKILL; `SrdError` when even that does not end it.

        SIGTERM again and again: redis refuses one while it writes its first append-only file after a full resync, and
        forgets it ("Writing initial AOF, can't exit", server.c, finishShutdown).
        """
        if self._launching is not None:
            self._give_up()
            await asyncio.wait({self._launching}, timeout=self._timing.launch_timeout)
        if self._launching is not None:
            raise SrdError("stop", self.service, "it is still being started; its disk may hang")
        self._apply(Event.STOP)
        deadline = boottime() + grace
        while (left := deadline - boottime()) > 0:
            if await self._ended_within(min(left, self._timing.stop_again)):
                return
            self._signal(signal.SIGTERM)
        self._apply(Event.GRACE_OVER)
        if await self._ended_within(self._timing.kill_timeout):
            return
        raise SrdError("stop", f"{self.service} (pid {self.pid})", "it outlives SIGKILL; its disk may hang")

    def retry(self) -> None:
        """End the pause after the last end, if there is one."""
        self._backoff.cut_short()

    def release(self) -> None:
        """Let go of the child without ending it: the last call, when srd ends and the child shall live on."""
        self._released = True
        self._give_up()
        self._backoff.cancel()
        if self._running is not None:
            asyncio.get_running_loop().remove_reader(self._running.pidfd)
            os.close(self._running.pidfd)
            self._running = None
            self._alive.clear()

    async def watch(self) -> None:
        """Ask the child again and again whether it does its job, until cancelled."""
        while True:
            await self._alive.wait()
            running = self._running
            if running is not None:
                await self._watch_one(running)

    async def _watch_one(self, running: Running) -> None:
        timing = self._timing
        deadline = boottime() + timing.start_timeout
        failures = 0
        pause = _PROBE_PAUSE_FIRST
        while self._running is running:
            complaint, silent = await self._question()
            if self._running is not running:
                return  # the answer is about a child that has ended meanwhile
            if complaint is None:
                failures = 0
                self._answered(running)
            else:
                failures += 1
                was_ready = self._state is ChildState.READY
                if failures >= timing.probe_failures if was_ready else boottime() >= deadline:
                    self._complain(complaint)
                    self._apply(Event.SILENT)
                self._treat(running, silent=silent and self._state is not ChildState.STARTING)
            if self._state is ChildState.STARTING:
                await self._ended_within(pause)
                pause = min(pause * _PROBE_PAUSE_GROWTH, _PROBE_PAUSE_CAP)
            else:
                await self._ended_within(timing.probe_interval)

    async def _question(self) -> tuple[str | None, bool]:
        """Return what the probe complains of, None if of nothing, and whether the child did not answer at all."""
        limit = asyncio.timeout(self._timing.probe_timeout)
        try:
            async with limit:
                await self._probe()
        except SrdError as error:
            return str(error), isinstance(error, NoAnswerError)
        except TimeoutError:
            if not limit.expired():
                raise
            return f"no answer within {self._timing.probe_timeout:g} s", True
        return None, False

    def _answered(self, running: Running) -> None:
        self._doom = self._kill_at = None
        self._oom_kills = oom_kills()
        self._treat(running, silent=False)
        self._complain(None)
        self._apply(Event.ANSWERED)

    def _treat(self, running: Running, *, silent: bool) -> None:
        """Find out why the child does not answer, and do what helps: a child that is only slow is left alone."""
        now, before, chosen = boottime(), self._care.symptom, Remedy.WAIT
        if silent:
            chosen = self._care.unheard(running.pid, now, slow_shows=self._state is not ChildState.READY)
        else:
            self._care.heard()
        if self._care.symptom is not before:
            if silent:
                log.warning("child is silent", service=self.service, pid=running.pid, symptom=self._care.symptom)
            self._changed()
        if chosen is Remedy.RESUME:
            log.warning("child was stopped: it is continued", service=self.service, pid=running.pid)
            self._signal(signal.SIGCONT)
        elif chosen is not Remedy.WAIT:
            self._end_silent(now, at_once=chosen is Remedy.KILL)

    def _end_silent(self, now: float, *, at_once: bool) -> None:
        """End a child that will not answer any more; its end is followed by a pause and a start, as any other."""
        if self._kill_at is None:
            symptom = self._care.symptom
            never = ", and was never ready" if self._ready_since is None else ""
            self._doom = f"srd ended it: it was {symptom}{never}"
            log.warning("child is ended", service=self.service, pid=self.pid, symptom=symptom)
            self._apply(Event.SILENT)  # whatever it was, it is degraded now
            self._kill_at = now if at_once else now + self._timing.hung_grace
            if not at_once:
                self._apply(Event.HUNG)
        if now >= self._kill_at:
            self._apply(Event.GRACE_OVER)

    async def _ended_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def _complain(self, complaint: str | None) -> None:
        if complaint == self._complaint:
            return
        if self._complaint is None:
            log.warning("child does not answer", service=self.service, pid=self.pid, reason=complaint)
        self._complaint = complaint
        self._changed()

    def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = transition(before, event)
        if self._state is not before:
            self._entered(self._state)
        for action in actions:
            self._act(action)
        if self._state is not before:
            self._changed()

    def _entered(self, state: ChildState) -> None:
        if state is ChildState.READY and self._ready_since is None:
            self._ready_since = boottime()
            log.info("child ready", service=self.service, pid=self.pid)
        elif state not in RUNNING:
            self._ready_since = None

    def _act(self, action: Action) -> None:
        if action is Action.SPAWN:
            self._spawn()
        elif action is Action.TERMINATE:
            self._signal(signal.SIGTERM)
        elif action is Action.KILL:
            log.warning("child is killed", service=self.service, pid=self.pid)
            self._signal(signal.SIGKILL)
        elif action is Action.PAUSE:
            self._backoff.begin()
        elif action is Action.END_PAUSE:
            self._backoff.cancel()

    def _spawn(self) -> None:
        if self._launch is None:
            return
        if self._launched_before:
            self._restarts += 1
        self._launched_before = True
        # The outcome arrives by callback: a pass that is cancelled while the thread runs must not lose the child.
        former = Former(self._restarts, self._refused_after)
        self._give_up = former.given_up.set
        self._launching = asyncio.get_running_loop().run_in_executor(None, self._launch, former)
        self._launching.add_done_callback(self._launched)

    def _launched(self, outcome: asyncio.Future[Running]) -> None:
        self._launching = None
        error = outcome.exception()
        if error is None:
            running = outcome.result()
            if self._released:
                os.close(running.pidfd)
                return
            self._take(running)
            log.info("child started", service=self.service, pid=running.pid)
            self._changed()
        else:
            if str(error) not in (self._tally.last or ""):
                log.warning("child not started", service=self.service, reason=str(error))
            self._note_end(End(f"not started: {error}", NOT_STARTED))
            self._apply(Event.REFUSED)
            if not isinstance(error, SrdError):
                raise error  # a defect: the loop's exception handler shows it

    def _take(self, running: Running) -> None:
        self._running = running
        self._restarts = running.restarts
        self._launched_before = True
        self._oom_kills = oom_kills()
        self._ended.clear()
        self._alive.set()
        # The manager's copy is this very process for whoever holds it next, whatever becomes of the state file.
        self._fds.keep(pidfd_name(self.service), running.pidfd)
        asyncio.get_running_loop().add_reader(running.pidfd, self._on_exit)

    def _on_exit(self) -> None:
        running = self._running
        if running is None:
            return
        asyncio.get_running_loop().remove_reader(running.pidfd)
        end = self._cause_of(end_of(running.pidfd))
        self._fds.forget(pidfd_name(self.service))
        os.close(running.pidfd)
        refused = self._ready_since is None and end.label == REFUSAL
        self._refused_after = boottime() - running.started if refused else None
        self._note_end(end, expected=self._state is ChildState.STOPPING)
        log.info("child ended", service=self.service, pid=running.pid, how=end.words)
        self._running = None
        self._complaint = self._doom = self._kill_at = None
        self._care.heard()
        self._alive.clear()
        self._ended.set()
        self._died()
        self._apply(Event.EXITED)

    def note_unseen_end(self) -> None:
        """Count an end that happened while no srd was there to see it."""
        self._note_end(UNSEEN)
        self._died()

    def _cause_of(self, end: End) -> End:
        """Put what is known of the cause to how a process ended."""
        if self._doom is not None:
            return end.because(self._doom, "not ready" if self._ready_since is None else "silent")
        if self._state is not ChildState.STOPPING and end.label in ("SIGKILL", "unknown"):
            before, self._oom_kills = self._oom_kills, oom_kills()
            if self._oom_kills > before:
                return end.because("the kernel was out of memory", "oom")
        return end

    def _note_end(self, end: End, *, expected: bool = False) -> None:
        now = boottime()
        self._tally.note(end, None if expected or end.label in (NOT_STARTED, UNSEEN.label) else now)
        ready = now - self._ready_since if self._ready_since is not None else None
        self._backoff.ended(ready, expected=expected)

    def _signal(self, number: signal.Signals) -> None:
        if self._running is None:
            return
        try:
            send_signal(self._running.pid, self._running.pidfd, number)
        except ProcessLookupError:
            return  # it has just ended; the descriptor says so
        except PermissionError as error:
            who = f"{self.service} (pid {self.pid})"
            raise PermissionRefusedError(
                "end", who, "srd may not become its user", "start srd by its systemd unit"
            ) from error
