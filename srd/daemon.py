"""The composition root: builds every part, hands each what it needs of the others, starts and stops them in order.

Start: everything is checked before anything is changed; then policies, HTTP (503 `starting`), keys, and the services
in the order of desired.py. Stop (SIGTERM, SIGINT): the primary moves away if it can; then stunnel, sentinel, redis,
each with its grace; SAs and policies stay. When srd dies without a stop, or is restarted by the service manager, all
of it stays: the next srd adopts the children and reads the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import structlog

from srd import closing
from srd.actions import DutyActions, seconds_of
from srd.cluster import Config
from srd.control import documents
from srd.control.server import ControlServer
from srd.desired import differences
from srd.duties import Duties
from srd.ipsec import xfrm
from srd.ipsec.encap import try_sockets
from srd.ipsec.exchange import Installer, Unprotected
from srd.ipsec.keying import Keying
from srd.ipsec.policies import KEYING_MARK
from srd.ipsec.serials import FILE_NAME, SerialsFile
from srd.listening import Listeners, kept_endpoints
from srd.members import own_report
from srd.model import Body, Credentials, Identity, IpsecMode, Paths, RefusedError
from srd.preflight import Cleared, check_change, clear
from srd.protection import PASS_SECONDS, Protection
from srd.reconcile import Loop, boottime, contained, until_first
from srd.roster import Roster
from srd.state import Situation, Store
from srd.supervise.files import TRAVERSABLE_DIRECTORY, make_own_directory
from srd.supervise.orphans import collect_orphans
from srd.systemd import FdStore, Notifier, handed_over, own_unit, starting_again
from srd.trust.authority import identify
from srd.trust.bundle import FILES, digests, load_bundle
from srd.web import agent, health
from srd.web.agent import AgentServer
from srd.web.app import BACKLOG, LIVENESS_SECONDS, WebServer

log = structlog.get_logger(__name__)

VERSION: Final = version("srd")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

STATUS_SECONDS: Final = 2.0
# For how long a balancer's check waits for an srd that has taken over to know its node. A no that it hears twice cuts
# the clients' connections, and 0.1 s of `starting` (1 s on a slow machine) is enough for that.
# Longer than a lease that lapsed takes to be taken up again (ha/lease.py, PROBATION_SECONDS), as when a node is away.
KNOWING_SECONDS: Final = 4.0
KNOWING_LIMIT_SECONDS: Final = 6.0  # with the first look at the children before that
CLIENTS_RESYNC_SECONDS: Final = 60.0
BUNDLE_RESYNC_SECONDS: Final = 60.0  # longer than it takes to copy files and to reload them
# Between the wish to keep the children and the stop that follows; a stop at any other time is not meant by it.
KEEP_SECONDS: Final = 15.0
ANSWERED_SECONDS: Final = 0.2  # until whoever asked for a new srd has been told that there will be one


async def run(paths: Paths, early_stop: threading.Event) -> None:
    """Run a node until SIGTERM or SIGINT; `SrdError` when it may not start.

    `early_stop` is set when a SIGTERM has come before the signals are taken over here.
    """
    notifier = Notifier.from_environment()
    fds = FdStore(notifier, handed_over())
    notifier.send("STATUS=checking the configuration, the kernel and the programs")
    cleared = await clear(paths, kept_endpoints(fds))
    for directory in (paths.state_dir, paths.run_dir, paths.log_dir):
        await asyncio.to_thread(make_own_directory, directory, TRAVERSABLE_DIRECTORY)
    if not cleared.bundle.last_good:
        await asyncio.to_thread(closing.remember, paths)
    await Daemon(cleared, paths, notifier, fds, early_stop).run()


class Daemon:
    """One node's parts and the wires between them."""

    def __init__(
        self, cleared: Cleared, paths: Paths, notifier: Notifier, fds: FdStore, early_stop: threading.Event
    ) -> None:
        bundle = cleared.bundle
        self._grades = cleared.grades
        self._bundle, self._node = bundle, bundle.node
        self._roster = Roster(paths)
        # The file's cluster, and the clients that their certificates have brought in.
        self._config = self._roster.extend(bundle.config, time.time())
        self._paths = paths
        self._notifier = notifier
        self._sockets = Listeners("http", fds, backlog=BACKLOG)  # while srd is away a check waits in them
        self._agent_sockets = Listeners("agent", fds, backlog=agent.BACKLOG)
        self._early_stop = early_stop
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._known = asyncio.Event()
        self._keep_until = 0.0  # a stop before this moment leaves the children running
        self._changing = asyncio.Lock()  # held by whatever changes who is in the cluster
        self._admitting = asyncio.Lock()
        self._protection: Protection | None = None
        self._store = Store(boottime())
        self._write_certificates = self._store.writer("certificates")
        self._write_certificates(bundle.not_after)
        self._write_unread = self._store.writer("unread")
        self._duties: Duties | None = None
        if bundle.secrets is not None:
            self._duties = Duties(
                config=self._config,
                node=self._node,
                paths=paths,
                secrets=bundle.secrets,
                store=self._store,
                situation=self.situation,
                fds=fds,
                ask_peer=self._ask_peer,
                begin_anew=self._begin_anew,
            )
        self._keying: Keying | None = None
        fds.drop_rest()

    def situation(self) -> Situation:
        """Return the one snapshot that every judgement and every answer is made from."""
        return Situation(self._config, self._node, self._store.view(), boottime(), time.time())

    async def run(self) -> None:
        """Bring the node up and keep it true until a signal; then stop its services and return."""
        async with contextlib.AsyncExitStack() as stack:
            bodies: list[Callable[[], Coroutine[Any, Any, None]]] = []
            installer: Installer = Unprotected()
            if self._config.ipsec.mode is IpsecMode.ESP:
                kernel = await stack.enter_async_context(xfrm.XfrmSocket())
                self._protection = Protection(
                    config=self._config,
                    node=self._node,
                    store=self._store,
                    kernel=kernel,
                    run_dir=self._paths.run_dir,
                )
                stack.callback(self._protection.release)
                await self._protection.stand()
                installer = self._protection.mesh
                bodies += self._protection.bodies
            checks = AgentServer(self.situation, known=self._known)
            self._store.on_change(checks.wake)
            web = WebServer(
                self.situation, version=VERSION, loops=self._loops, known=self._known, agent_answers=checks.answers
            )
            if self._duties is None or not self._sockets.endpoints:
                self._known.set()  # nobody was here before, whose word would be taken back
            stack.callback(self._sockets.release)
            await web.start(self._sockets)
            stack.push_async_callback(web.stop)
            stack.callback(self._agent_sockets.release)
            await checks.start(self._agent_sockets)
            stack.push_async_callback(checks.stop)
            # Whatever the first look at the children takes: a check is not left without an answer.
            stack.callback(asyncio.get_running_loop().call_later(KNOWING_LIMIT_SECONDS, self._known.set).cancel)
            if self._duties is not None:
                stack.callback(self._duties.release)
                stack.push_async_callback(self._duties.close)
                bodies += self._duties.bodies
            keying: Keying = self._make_keying(installer, lambda identity: self._join(keying, identity))
            self._keying = keying
            await self._forget(keying.distrusted())
            listeners = keying.listen()
            stack.callback(_close, listeners)
            duty_actions = DutyActions(self._node, self._duties)
            control = ControlServer(
                self._paths.control_socket,
                self.situation,
                version=VERSION,
                actions={
                    "/v1/rekey": partial(self._rekey, keying),
                    "/v1/reload": lambda _: self._reload(keying),
                    "/v1/stop": self._end,
                    **duty_actions.by_path(),
                },
                questions=duty_actions.questions(),
            )
            await control.start()
            stack.push_async_callback(control.stop)
            bodies += [
                partial(keying.run, listeners),
                self._tell_the_manager,
                self._until_stopped,
                partial(self._reload_on_hangup, keying),
                self._clients_loop(keying).run,
                Loop("bundle", self._compare_bundle, resync=BUNDLE_RESYNC_SECONDS, timeout=PASS_SECONDS).run,
            ]
            if os.getpid() == 1:
                bodies.append(collect_orphans)
            with self._signals():
                await until_first(*bodies)

    def _make_keying(self, installer: Installer, join: Callable[[Identity], Awaitable[None]]) -> Keying:
        return Keying(
            config=self._config,
            node=self._node,
            credentials=self._bundle.credentials,
            identify=identify,
            boot_id=BOOT_ID.read_text(encoding="ascii").strip(),
            grades=self._grades,
            installer=installer,
            store=self._store,
            report=lambda: own_report(self.situation(), VERSION),
            wants_keys=self._wants_keys,
            mark=KEYING_MARK if self._config.ipsec.mode is IpsecMode.ESP else None,
            serials=SerialsFile(self._paths.run_dir / FILE_NAME),
            join=join,
            answer=self._answer_peer,
        )

    async def _ask_peer(self, peer: str, topic: str, body: Body, seconds: float) -> Body:
        if self._keying is None:
            raise RefusedError("ask", peer, "this srd is not connected yet")
        return await self._keying.ask(peer, topic, body, seconds)

    async def _answer_peer(self, peer: str, topic: str, body: Body) -> Body:
        if self._duties is None:
            raise RefusedError("answer", topic, f"{self._node.name} runs no services")
        return await self._duties.answer(peer, topic, body)

    def _wants_keys(self, peer: str) -> bool:
        """Whether a link lacks keys (somebody deleted them) or those that it has are worn."""
        if self._config.ipsec.mode is IpsecMode.OFF:
            return False
        link = self._store.view().links.get(peer)
        return link is None or not link.keyed or link.worn

    def _clients_loop(self, keying: Keying) -> Loop:
        """Return the loop that notices that a certificate has ended; whoever joins is taken in at once."""
        review = partial(self._review_clients, keying)
        return Loop("clients", review, resync=CLIENTS_RESYNC_SECONDS, timeout=PASS_SECONDS)

    async def _rekey(self, keying: Keying, asked: Mapping[str, str]) -> dict[str, Any]:
        """Answer `srd rekey`: the query names one `peer`, or none for all, and for how many seconds to `wait`."""
        every = [peer.name for peer in self._config.peers_of(self._node.name)]
        peers = [asked["peer"]] if "peer" in asked else every
        await keying.renew(peers, seconds_of(asked.get("wait", "0")))
        channels = self._store.view().channels
        return {"peers": {name: {"generation": channels[name].generation} for name in peers}}

    async def _end(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """Answer `srd stop`: `keep` leaves the children to the next srd.

        Where a unit is named, whoever asks has to have it stopped: the manager would start anew what ends by itself.
        """
        if asked.get("keep") == "1":
            if os.getpid() == 1:
                raise RefusedError("leave the children to", "the next srd", "srd is PID 1: nothing here outlives it")
            self._keep_until = boottime() + KEEP_SECONDS
        unit = own_unit()
        if unit is None:
            self._stop.set()
        return {"unit": unit}

    def _begin_anew(self) -> None:
        """Have the service manager start the next srd in this one's place, soon; the children are left to it.

        As after a signal that somebody sends by hand: the manager starts again what has ended unasked.
        """
        if own_unit() is None:
            raise RefusedError("restart", "srd", "no service manager would start it again", "start it again by hand")
        self._keep_until = boottime() + KEEP_SECONDS
        asyncio.get_running_loop().call_later(ANSWERED_SECONDS, self._stop.set)

    async def _reload_on_hangup(self, keying: Keying) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            await contained("reload", partial(self._reload, keying))

    async def _reload(self, keying: Keying) -> dict[str, Any]:
        """Take a changed bundle in: all of it, or none and `SrdError` says why.

        But that stunnel does not serve a new certificate is only known after it was given it.
        """
        async with self._changing:
            bundle = await asyncio.to_thread(load_bundle, self._paths, dt.datetime.now(dt.UTC))
            check_change(self._bundle, bundle, self._node, self._paths)
            old, new = self._config, self._roster.extend(bundle.config, time.time())
            await asyncio.to_thread(try_sockets, new, self._node)  # what may be refused, before anything is changed
            distrusted = await self._forget(await self._adopt(keying, new, bundle.credentials))
            ends, self._bundle = self._bundle.not_after, bundle
            self._write_certificates(bundle.not_after)
            await asyncio.to_thread(closing.remember, self._paths)
            await self._compare_bundle()
            if self._duties is not None:
                await self._duties.adopt(new)
            renewed = sorted(name for name, end in bundle.not_after.items() if ends.get(name) != end)
            done = {**differences(old, new), "revoked": distrusted, "renewed": renewed}
            log.info("reloaded", **done)
            return done

    async def _compare_bundle(self) -> None:
        """See whether the bundle on disk is still the one that this srd runs by."""
        now, read = await asyncio.to_thread(digests, self._paths), self._bundle.digests
        self._write_unread(tuple(name for name in FILES if now.get(name) != read.get(name)))

    async def _join(self, keying: Keying, identity: Identity) -> None:
        """Let a client in whose certificate is proven; its policies stand when this returns.

        Those that come while others are let in are written down meanwhile, and taken in by one pass.
        """
        async with self._admitting:
            file = self._bundle.config
            if any(node.name == identity.node for node in file.nodes):
                return  # a client that the file has is judged by the file
            await asyncio.to_thread(self._roster.admit, identity, file, time.time())
        await self._review_clients(keying)

    async def _review_clients(self, keying: Keying) -> None:
        """Take in who has been let in, and put out whose certificate has ended."""
        async with self._changing:
            config = self._roster.extend(self._bundle.config, time.time())
            if config == self._config:
                return
            before, after = ({node.name for node in each.nodes} for each in (self._config, config))
            await self._adopt(keying, config, self._bundle.credentials)
            log.info("clients", joined=sorted(after - before), put_out=sorted(before - after))

    async def _adopt(self, keying: Keying, config: Config, credentials: Credentials) -> frozenset[str]:
        """Protect the links of another cluster; return the peers whose keys are not to be trusted any more.

        Former peers are let go by keying first, policies of new ones stand before a word is said to them.
        """
        keying.let_go(config)
        if self._protection is not None:
            await self._protection.adopt(config)
        self._config = config
        return keying.adopt(config, credentials)

    async def _forget(self, distrusted: frozenset[str]) -> list[str]:
        """Give up the keys with peers whose certificate is revoked."""
        if self._protection is not None:
            await self._protection.forget(sorted(distrusted))
        return sorted(distrusted)

    def _loops(self) -> tuple[Loop, ...]:
        parts = (self._duties, self._protection)
        return tuple(loop for part in parts if part is not None for loop in part.loops)

    # --- the service manager and signals

    async def _tell_the_manager(self) -> None:
        """READY once the services have been looked at; they may wait for peers for long."""
        if self._duties is not None:
            await self._duties.ready()
        self._notifier.send("READY=1")
        for advice in self._config.advice:
            log.warning("few nodes", advice=advice)
        log.info("ready", node=self._node.name, cluster=self._config.cluster, version=VERSION)
        if not self._known.is_set():
            with contextlib.suppress(TimeoutError):
                await self._store.wait_for(lambda _: health.readiness(self.situation()).ok, KNOWING_SECONDS)
            self._known.set()
        watchdog = self._notifier.watchdog_seconds
        # A third of what the manager waits for: two may be late.
        pause = STATUS_SECONDS if watchdog is None else min(STATUS_SECONDS, watchdog / 3)
        while True:
            alive = health.alive(self._loops(), boottime(), LIVENESS_SECONDS).ok
            status = f"STATUS={documents.one_line(self.situation())}"
            self._notifier.send(*(("WATCHDOG=1", status) if alive else (status,)))
            await asyncio.sleep(pause)

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        if boottime() < self._keep_until or await starting_again():
            log.info("leaving for the next srd", children=self._duties is not None)
            return
        log.info("stopping")
        self._notifier.send("STOPPING=1", "STATUS=stopping stunnel, sentinel and redis")
        if self._duties is not None:
            # TimeoutStopSec is for the default graces; redis.stop_grace may be longer.
            self._notifier.send(f"EXTEND_TIMEOUT_USEC={self._duties.longest_stop * 1e6:.0f}")
            await self._duties.stop()
        log.info("stopped")

    @contextlib.contextmanager
    def _signals(self) -> Any:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        if self._early_stop.is_set():
            self._stop.set()
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)


def _close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()
