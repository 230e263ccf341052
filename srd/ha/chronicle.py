"""Keeps the history of the changes of primary: sees them, says why where this node knows, tells the others, hears them.

Who knows what:
* That there was a change, every node sees: a majority of the sentinels names another primary.
* Why, whoever acts, and who hears the sentinels (ha/losses.py): the next change of that primary is entered with it.
* When it led, from where its stream went on, and when it could take a write: the srd of the new primary.

Every span of time is measured on one node's clock; only moments to show to people are compared between nodes.

What a node knows it tells the others, and again when it knows more: `_tell` compares the last entries with what each
peer has, so one that was away is told when it is back. A change that this node was not there to see is entered when it
looks again, as `unseen` until somebody tells more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from srd.changes import ChangeKind, RoleChange
from srd.cluster import Node
from srd.ha.fleet import Fleet
from srd.ha.history import History, Key, account_of, entered, key_of, word_of
from srd.ha.lease import endpoint_of
from srd.ha.losses import ENDED, Loss, Losses
from srd.ha.redis import FENCED, RedisClient
from srd.ha.resp import RespError
from srd.model import AskPeer, Body, Endpoint, Role, Service, SrdError
from srd.reconcile import Loop, boottime
from srd.state import Lease, Store, View

log = structlog.get_logger(__name__)

HISTORY_TOPIC: Final = "history"
# Longer than the sentinels take from one name to the other: who hears no majority for so long is not there to see it.
BLIND_SECONDS: Final = 5.0
# How far apart the lease and the majority's word may be that are of one change: a sentinel's INFO, and its hello.
ACCESSION_SECONDS: Final = 10.0
# A new primary has its replicas within milliseconds, or they need all of its data first.
SETTLING_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.02
STEP_SECONDS: Final = 0.5
# The entries that others are told: more than there can be while a node is away for a night.
TOLD: Final = 20
TELL_SECONDS: Final = 1.0
TELL_RESYNC_SECONDS: Final = 5.0
TELL_PASS_SECONDS: Final = 30.0
SAVE_RESYNC_SECONDS: Final = 60.0
SAVE_PASS_SECONDS: Final = 30.0


@dataclass(slots=True)
class _Accession:
    """The reign of this node's redis: it holds the lease since `led`, and could take a write at `settled`."""

    led: float
    settled: float | None = None
    taken_offset: int | None = None


@dataclass(frozen=True, slots=True)
class _Own:
    """The change by which this node is primary, when a majority said so, and whether this srd was there to see it."""

    key: Key
    noted: float
    seen: bool


class Chronicle:
    """Keeps `history` of the view true, on disk and among the nodes. `bodies` are run by the daemon.

    `losses` is what is known of why a primary is being replaced. `saved` is what an earlier srd has kept, `save` keeps
    it and blocks.
    """

    def __init__(
        self,
        fleet: Fleet,
        node: Node,
        store: Store,
        *,
        losses: Losses,
        ask_peer: AskPeer,
        saved: History = (),
        save: Callable[[History], None] = lambda _: None,
        clock: Callable[[], float] = boottime,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._fleet, self._node, self._ask_peer = fleet, node, ask_peer
        self._losses = losses
        self._view = store.view
        self._clock, self._wall_clock = clock, wall_clock
        self._write = store.writer("history")
        self._saved, self._save = saved, save
        self._writing = threading.Lock()
        self._last = saved[-1].current if saved else None
        self._looked = float("-inf")  # when a majority last named somebody
        self._standing: tuple[Endpoint, int, float] | None = None  # the primary, its offset, and when that was true
        self._own: _Own | None = None  # this node's last accession that is not complete yet
        self._accession: _Accession | None = None
        self._acceded = asyncio.Event()
        self._told: dict[str, dict[Key, RoleChange]] = {}  # what each peer is known to know
        self._saving = Loop("history", self._keep, resync=SAVE_RESYNC_SECONDS, timeout=SAVE_PASS_SECONDS)
        self._telling = Loop("tell history", self._tell, resync=TELL_RESYNC_SECONDS, timeout=TELL_PASS_SECONDS)
        self.bodies = (self._saving.run, self._telling.run, self._settle)
        self._write(saved)

    # --- what is seen

    def judged(self) -> None:
        """Look at what was just observed: who is primary, and whether that is another one than before."""
        view, now = self._view(), self._clock()
        if view.lease is None:
            return
        self._note_accession(view, view.lease, now)
        primary = view.lease.primary
        if primary is None:
            return
        blind, self._looked = now - self._looked > BLIND_SECONDS, now
        if primary != self._last:
            previous, self._last = self._last, primary
            epoch = max(answer.epoch for answer in view.sentinels.values() if answer.primary == primary)
            log.info("primary", current=str(primary), previous=str(previous) if previous else None, epoch=epoch)
            self._note(epoch, previous, primary, blind=blind)
        self._note_standing(view, primary)

    def _note_standing(self, view: View, primary: Endpoint) -> None:
        """Remember how far the primary's stream has come, by the primary itself or by its srd's last word."""
        node = self._fleet.config.node_at(primary.address)
        if node is None:
            return
        redis, report = view.redis, view.peers.get(node.name)
        if node == self._node and redis is not None and redis.role is Role.PRIMARY:
            self._standing = primary, redis.offset, redis.answered
            self._losses.serves(redis.answered)
        elif report is not None and report.role is Role.PRIMARY and report.offset is not None:
            self._standing = primary, report.offset, report.received

    def _note_accession(self, view: View, lease: Lease, now: float) -> None:
        leads = lease.held and view.redis is not None and view.redis.role is Role.PRIMARY
        if not leads:
            self._accession = None
        elif self._accession is None:
            self._accession = _Accession(now)
            self._acceded.set()

    def _note(self, epoch: int, previous: Endpoint | None, primary: Endpoint, *, blind: bool) -> None:
        """Enter a change as this node knows it."""
        now = self._clock()
        change = RoleChange(self._wall_clock(), epoch, previous, primary)
        loss = self._losses.take(previous)
        if previous is None:
            change = dataclasses.replace(change, kind=ChangeKind.FIRST, before=epoch > 0)
        elif loss is not None:
            change = self._explained(change, loss, now)
        elif blind:
            change = dataclasses.replace(change, kind=ChangeKind.UNSEEN, before=True)
        change = self._with_offset(change, loss.began if loss is not None else now)
        if previous is not None and primary == endpoint_of(self._fleet.config, self._node):
            self._own = _Own(key_of(change), now, seen=not change.before)
        self._enter(change)
        self._complete()

    def _explained(self, change: RoleChange, loss: Loss, now: float) -> RoleChange:
        own = self._accession if change.current == endpoint_of(self._fleet.config, self._node) else None
        led = loss.led if loss.led is not None else own.led if own is not None else now
        return dataclasses.replace(
            change,
            at_timestamp=max(0.0, change.at_timestamp - (now - led)),
            kind=loss.kind,
            cause=loss.cause or self._cause(loss),
            by=(loss.by,) if loss.by is not None else (),
            duration_seconds=max(0.0, led - loss.began),
            gap_seconds=loss.gap_seconds,
            complete=loss.complete,
        )

    def _with_offset(self, change: RoleChange, began: float) -> RoleChange:
        """Say how far the old primary is known to have come, unless it is known that nothing is missing.

        A redis that is here and does not follow yet says it best, above all one that is back: its fence has ended the
        writes, and what it took before that is lost when it follows.
        """
        redis, standing = self._view().redis, self._standing
        if change.complete or change.previous is None:
            return change
        own = change.previous == endpoint_of(self._fleet.config, self._node)
        if own and redis is not None and redis.role is Role.PRIMARY:
            offset, at = redis.offset, redis.answered
        elif standing is not None and standing[0] == change.previous:
            _, offset, at = standing
        else:
            return change
        return dataclasses.replace(change, known_offset=offset, known_age_seconds=max(0.0, began - at))

    def _cause(self, loss: Loss) -> str | None:
        """Say how this node's redis has ended: by now supervision has written it down."""
        child = self._view().children.get(Service.REDIS)
        ended = child.last_exit if child is not None and loss.kind in ENDED else None
        return f"redis has ended: {ended}"[:200] if ended is not None else None

    def _complete(self) -> None:
        """Add to this node's own accession, once, what only this node knows of it."""
        own, accession = self._own, self._accession
        if own is None or accession is None or accession.settled is None:
            return
        known = next((change for change in self._view().history if key_of(change) == own.key), None)
        if known is None or abs(accession.led - own.noted) > ACCESSION_SECONDS:
            return
        self._own = None
        settling = max(0.0, accession.settled - accession.led) if own.seen else None
        self._enter(dataclasses.replace(known, settling_seconds=settling, taken_offset=accession.taken_offset))

    async def _settle(self) -> None:
        """Whenever this node's redis becomes primary: find out when it can take a write; until cancelled."""
        while True:
            await self._acceded.wait()
            self._acceded.clear()
            accession, own = self._accession, self._fleet.redises.get(self._node.name)
            if accession is None or own is None:
                continue
            while accession is self._accession and not await self._settled(accession, own):
                soon = self._clock() - accession.led < SETTLING_SECONDS
                await asyncio.sleep(LOOK_SECONDS if soon else STEP_SECONDS)
            self._complete()

    async def _settled(self, accession: _Accession, own: RedisClient) -> bool:
        """Whether redis, asked now, would take a write; if so, that is written down."""
        try:
            seen = await own.observe(STEP_SECONDS)
        except RespError:
            return False
        needed = seen.min_replicas_to_write
        if seen.role is not Role.PRIMARY or needed >= FENCED or seen.online < needed:
            return False
        accession.settled, accession.taken_offset = self._clock(), seen.promoted_at_offset
        return True

    # --- what is told, and kept

    def answer(self, peer: str, body: Body) -> Body:
        """Take what another node's srd tells of a change; `SrdError` when that is no account of one."""
        change = account_of(body)
        self._told.setdefault(peer, {})[key_of(change)] = change
        self._enter(change)
        return {}

    def _enter(self, change: RoleChange) -> None:
        before = self._view().history
        after = entered(before, change)
        if after != before:
            self._write(after)
            self._saving.wake()
            self._telling.wake()

    async def _keep(self) -> None:
        """One pass: have on disk what is known."""
        history = self._view().history
        if history == self._saved:
            return
        if self._writing.locked():
            # Another thread for each attempt on a disk that hangs, and soon there is none left for anything else.
            raise SrdError("write", "the history", "the disk has not answered the last attempt")

        def write() -> None:
            with self._writing:
                self._save(history)

        await asyncio.to_thread(write)
        self._saved = history

    async def _tell(self) -> None:
        """One pass: tell every node the entries that it is not known to have."""
        recent = {key_of(change): change for change in self._view().history[-TOLD:]}
        for peer in self._fleet.config.voters:
            if peer == self._node:
                continue
            told = self._told.get(peer.name, {})
            self._told[peer.name] = told = {key: change for key, change in told.items() if key in recent}
            try:
                for key, change in recent.items():
                    if told.get(key) != change:
                        await self._ask_peer(peer.name, HISTORY_TOPIC, word_of(change), TELL_SECONDS)
                        told[key] = change
            except SrdError as error:
                log.debug("not told", peer=peer.name, error=str(error))
