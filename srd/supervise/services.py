"""Keeps a node's redis, sentinel and stunnel as desired.py wants them: what runs is found, compared, put right.

The end of a child only wakes the loop; the pass that follows starts it again, from configuration rendered for what is
true then. Cancelling anything here ends no child. Only `stop_all` and `restart` do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import structlog

from srd import desired
from srd.cluster import Config, Node
from srd.listening import Listeners
from srd.model import Endpoint, Paths, Role, Secrets, Service, SrdError
from srd.reconcile import to_its_end, until_first
from srd.state import Situation, Store, services_of
from srd.supervise.adopt import (
    FOLLOWS_NAME,
    MARKER_NAME,
    REGISTER_NAME,
    Found,
    Record,
    Register,
    Verdict,
    boot_id,
    look_up,
    pid_of,
    record_found,
)
from srd.supervise.files import TRAVERSABLE_DIRECTORY, make_own_directory, remove_own, write_private
from srd.supervise.launch import Launcher
from srd.supervise.machine import RUNNING
from srd.supervise.probe import probe_tls
from srd.supervise.process import Process
from srd.supervise.programs import listen_endpoints
from srd.supervise.running import Running, Timing, pidfd_name
from srd.systemd import FdStore

log = structlog.get_logger(__name__)

# What a busy balancer may have under way at once while stunnel is started; the kernel bounds it by net.core.somaxconn.
TLS_BACKLOG: Final = 4096
STUNNEL_GRACE_SECONDS: Final = 2.0
# For links within one file system. A disk that hangs keeps no replaced primary from following its successor.
KEEPING_SECONDS: Final = 2.0
SENTINEL_GRACE_SECONDS: Final = 5.0


class Services:
    """The children of a node. `reconcile` makes one pass, `run` keeps asking whether they do their jobs.

    `probes` asks redis and sentinel, whose language is not spoken here.
    """

    def __init__(
        self,
        *,
        config: Config,
        node: Node,
        paths: Paths,
        secrets: Secrets,
        store: Store,
        start: Callable[[], Awaitable[desired.Start]],
        probes: Mapping[Service, Callable[[], Awaitable[None]]],
        situation: Callable[[], Situation],
        joined: Callable[[], bool],
        died: Callable[[Service], None],
        wake: Callable[[], None],
        fds: FdStore,
        deposed: Callable[[], bool],
        timing: Timing | None = None,
    ) -> None:
        self._config = config
        self._node = node
        self._paths = paths
        self._start = start
        self._situation = situation
        self._joined = joined
        self._wake = wake
        self._write_children = store.writer("children")
        self._write_initialized = store.writer("initialized")
        self._write_followed = store.writer("followed")
        self._write_kept = store.writer("kept")
        self._register = Register(paths.run_dir / REGISTER_NAME)
        self._fds = fds
        self._tls_sockets = Listeners("tls", fds, backlog=TLS_BACKLOG)
        self._launcher = Launcher(
            config=config,
            node=node,
            paths=paths,
            secrets=secrets,
            register=self._register,
            tls_sockets=self._tls_sockets,
        )
        self._timing = timing if timing is not None else Timing()
        self._processes = {
            service: Process(
                service,
                probe=probes.get(service, self._probe_stunnel),
                changed=self._changed,
                died=partial(died, service),
                timing=self._timing,
                fds=fds,
                deposed=deposed if service is Service.REDIS else lambda: False,
                paused=lambda: situation().paused,
            )
            for service in services_of(node)
        }
        self._handed = {
            service: pidfd for service in self._processes if (pidfd := fds.take(pidfd_name(service))) is not None
        }
        self._undecided: dict[Service, Record] = {}  # recorded children that were not told alive or gone so far
        self._complained: set[Service] = set()
        self._kept_shown_for: int | None = 0  # the pid of the redis whose start was the last that may have made a copy
        self._keeping: asyncio.Future[None] | None = None
        self._looked = False
        self._adopted_stunnel = False  # and nobody has compared its certificate with the bundle's yet
        self._unwritten: set[str] = set()
        self._initialized = False
        self._follows = False  # as it is written down
        self._by_hand: set[Service] = set()  # ended by a person, to be started again
        self._ending = False
        self._one_pass = asyncio.Lock()

    async def adopt(self, config: Config) -> None:
        """Start children by a changed file from now on; those that run go on as they are.

        stunnel takes another certificate in without losing a connection, or one that is about to be made. `SrdError`
        when it does not serve the new one then.
        """
        self._config = config
        self._launcher.adopt(config)
        async with self._one_pass:
            await self._take_certificate_in()

    async def _take_certificate_in(self) -> None:
        stunnel = self._processes.get(Service.STUNNEL)
        if stunnel is None or stunnel.state not in RUNNING or not await asyncio.to_thread(self._launcher.tls_differs):
            return
        await asyncio.to_thread(self._launcher.write_tls)
        await stunnel.hang_up()
        log.info("stunnel has taken a new certificate in")

    async def _probe_stunnel(self) -> None:
        endpoints = listen_endpoints(self._config, self._node, Service.STUNNEL)
        await probe_tls(endpoints, await asyncio.to_thread(self._launcher.shown_tls))

    async def run(self) -> None:
        """Probe the children until cancelled; they live on."""
        if not self._processes:
            await asyncio.Event().wait()
        await until_first(*(process.watch for process in self._processes.values()))

    async def reconcile(self) -> None:
        """Find what runs, start what is wanted and may start, note the first time that it all worked."""
        async with self._one_pass:
            if self._ending:
                return
            await self._find_children()
            await self._review_adopted()
            start = await self._start()
            self._by_hand -= {service for service in self._by_hand if self._processes[service].state in RUNNING}
            wanted = desired.services(self._situation(), start, self._by_hand)
            for service, process in self._processes.items():
                want = wanted[service]
                process.waiting_for = self._undecided_reason(service) or want.waiting_for
                if service in self._undecided:
                    continue
                if want.run:
                    await process.start(partial(self._launcher.launch, service, start))
                elif process.state in RUNNING:
                    await process.stop(self.grace(service))
            await self._note_down()
            self._publish()
            redis = self._processes.get(Service.REDIS)
            if redis is not None and (pid := redis.snapshot().pid) != self._kept_shown_for:
                self._kept_shown_for = pid
                await self._show_kept()

    async def stop_all(self) -> None:
        """End the children in order: no new clients, no failover because of a stop, then the data on disk.

        Nothing is started after this. A child that cannot be ended does not keep the others alive; the first such
        error is raised at the end.
        """
        self._ending = True
        errors: list[SrdError] = []
        async with self._one_pass:
            await self._find_children()
            self._tls_sockets.close()  # who comes now is refused at once, instead of waiting for nobody
            for service, process in reversed(self._processes.items()):
                try:
                    await process.stop(self.grace(service))
                    if service not in self._undecided:
                        await asyncio.to_thread(self._register.remove, service)
                except SrdError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    async def restart(self, service: Service) -> None:
        """End one child; the next pass starts it again, at once."""
        async with self._one_pass:
            await self._processes[service].stop(self.grace(service))
            self._by_hand.add(service)
        self._wake()

    async def rebuild_sentinel(self, primary: Callable[[], Endpoint]) -> None:
        """Have sentinel begin anew with a primary and nothing else: what it kept is put aside. Done to its end.

        `primary` is asked when it is sentinel's turn; it returns whom, or raises what speaks against it.
        """

        async def step() -> None:
            async with self._one_pass:
                whom = primary()
                await self._processes[Service.SENTINEL].stop(self.grace(Service.SENTINEL))
                self._by_hand.add(Service.SENTINEL)
                await asyncio.to_thread(self._launcher.rebuild_sentinel, whom)

        try:
            await to_its_end(step())
        finally:
            self._wake()

    async def keep_data(self) -> None:
        """Keep a copy of redis' files, which are about to be replaced by another node's, if the disk is so quick."""
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.ensure_future(asyncio.to_thread(self._launcher.data.keep))
        await asyncio.wait((self._keeping,), timeout=KEEPING_SECONDS)
        if not self._keeping.done():
            log.warning("going on without a copy of redis' files", why=f"none within {KEEPING_SECONDS:g} s")
            return
        await self._show_kept()

    async def _show_kept(self) -> None:
        copy = await asyncio.to_thread(self._launcher.data.kept)
        self._write_kept(str(copy) if copy is not None else None)

    def retry(self) -> None:
        """Start now what waits after a failure, for what it failed of may be over."""
        for process in self._processes.values():
            process.retry()

    def release(self) -> None:
        """Let go of the children without ending them: the last call of a srd that ends and leaves them running."""
        for process in self._processes.values():
            process.release()
        for pidfd in self._handed.values():
            os.close(pidfd)
        self._handed.clear()
        self._tls_sockets.release()

    def grace(self, service: Service) -> float:
        """Return the seconds between SIGTERM and SIGKILL. redis may need 10 s for its replicas, and then saves."""
        if service is Service.REDIS:
            return self._config.redis.stop_grace
        return SENTINEL_GRACE_SECONDS if service is Service.SENTINEL else STUNNEL_GRACE_SECONDS

    @property
    def longest_stop(self) -> float:
        """How many seconds `stop_all` may take from when no pass is under way, if every child must be killed."""
        timing = self._timing
        return sum(self.grace(name) + timing.launch_timeout + timing.kill_timeout for name in self._processes)

    def _changed(self) -> None:
        self._publish()
        self._wake()

    def _publish(self) -> None:
        self._write_children({service: process.snapshot() for service, process in self._processes.items()})

    async def _find_children(self) -> None:
        """Adopt what an earlier srd left running; later, look again at what could not be decided."""
        if not self._looked:
            self._undecided = await asyncio.to_thread(self._first_look)
            self._looked = True
            self._write_initialized(self._initialized)
            self._write_followed(self._follows)
        await self._adopt_handed()  # again for those of which a pass before could not decide
        for record in list(self._undecided.values()):
            self._decide(record, await asyncio.to_thread(look_up, record))
        self._publish()

    async def _adopt_handed(self) -> None:
        """Adopt the children whose descriptors the service manager held: they are those, whatever the records say."""
        for service, pidfd in list(self._handed.items()):
            pid = await asyncio.to_thread(pid_of, pidfd)
            if pid is None:
                self._fds.forget(pidfd_name(service))
                os.close(self._handed.pop(service))
                continue
            record = self._undecided.pop(service, None)
            if record is None or record.pid != pid:
                record = await asyncio.to_thread(record_found, service, pid)
                await asyncio.to_thread(self._register.put, record)
            self._take_over(record, self._handed.pop(service))

    def _first_look(self) -> dict[Service, Record]:
        make_own_directory(self._paths.state_dir, TRAVERSABLE_DIRECTORY)
        self._initialized = (self._paths.state_dir / MARKER_NAME).exists()
        self._follows = (self._paths.state_dir / FOLLOWS_NAME).exists()
        try:
            records = self._register.load()
        except SrdError as error:
            log.warning("no child can be adopted", error=str(error))
            return {}
        for service in records.keys() - self._processes.keys():
            log.warning("a service may run that this node does not want", service=service, pid=records[service].pid)
        return {service: record for service, record in records.items() if service in self._processes}

    def _decide(self, record: Record, found: Found) -> None:
        process = self._processes[record.service]
        if found.verdict is Verdict.UNVERIFIABLE:
            if record.service not in self._complained:
                log.warning("a child cannot be verified", service=record.service, pid=record.pid, reason=found.reason)
            self._complained.add(record.service)
            return
        del self._undecided[record.service]
        if found.pidfd is None and record.boot_id == boot_id():
            process.note_unseen_end()
        elif found.pidfd is not None:
            self._take_over(record, found.pidfd)

    def _take_over(self, record: Record, pidfd: int) -> None:
        if record.argv_hash != self._launcher.argv_hash(record.service):
            log.info("a child runs with other arguments than it would get now", service=record.service)
        outdated = record.settings not in ("", self._launcher.settings(record.service))
        if outdated:
            log.warning("a child runs by a former cluster.toml", service=record.service)
        running = Running(record.pid, pidfd, record.started, record.restarts, adopted=True, outdated=outdated)
        self._processes[record.service].adopt(running)
        self._adopted_stunnel |= record.service is Service.STUNNEL

    async def _review_adopted(self) -> None:
        """Have a stunnel that an earlier srd started take in what has changed in the bundle since."""
        if not self._adopted_stunnel:
            return
        self._adopted_stunnel = False
        try:
            await self._take_certificate_in()
        except SrdError as error:
            log.warning("stunnel goes on with its former certificate", error=str(error))

    def _undecided_reason(self, service: Service) -> str | None:
        record = self._undecided.get(service)
        if record is None:
            return None
        return f"the end of pid {record.pid}, which may be the {service} of an earlier srd; nobody can tell, so end it"

    async def _note_down(self) -> None:
        """Write down what the next srd is to know. A disk that takes nothing is a condition, and stops nothing."""
        failed = set()
        for note in (self._note_joined, self._note_following):
            try:
                await note()
            except SrdError as error:
                failed.add(str(error))
        for reason in sorted(failed - self._unwritten):  # those of the pass before were said
            log.warning("not written down", error=reason)
        self._unwritten = failed

    async def _note_joined(self) -> None:
        """Write down, once, that this node is part of the cluster: from then on its sentinel starts first."""
        if self._initialized or not self._joined():
            return
        await asyncio.to_thread(write_private, self._paths.state_dir / MARKER_NAME, b"")
        self._initialized = True
        self._write_initialized(True)

    async def _note_following(self) -> None:
        """Write down whether redis has only what its primary has: started as a replica, it keeps no copy of that."""
        redis = self._situation().view.redis
        if redis is None or redis.loading:
            return
        follows = redis.in_step
        if follows == self._follows or not (follows or redis.role is Role.PRIMARY):
            return  # one that has lost its primary still has what it was sent
        file = self._paths.state_dir / FOLLOWS_NAME
        if follows:
            await asyncio.to_thread(write_private, file, b"")
        else:
            await asyncio.to_thread(remove_own, file)
        self._follows = follows
