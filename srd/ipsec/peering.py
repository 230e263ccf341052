"""One peer: its one live connection, the heartbeats and questions on it, and when new keys are made.

The connection of a generation stays open for heartbeats until that of the next one has taken its place: making new
keys may need many attempts, and a peer that falls silent meanwhile is noticed all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final, cast

import structlog

from srd.cluster import Node
from srd.ipsec.channel import Channel as TlsChannel
from srd.ipsec.protocol import Ask, Beat, KeyingError, Told, Word
from srd.ipsec.sas import Generation
from srd.model import Body, Identity, SrdError
from srd.reconcile import boottime, contained, persistently, until_first
from srd.state import Channel

log = structlog.get_logger(__name__)

BEAT_SECONDS: Final = 1.0
# Three lost beats and the time that a busy machine may need to get to them.
SILENCE_SECONDS: Final = 5.0
REKEY_SECONDS: Final = 3600.0
REKEY_JITTER: Final = 0.1
# Keys that somebody deletes again and again, or that never suffice, must not keep two nodes busy.
RENEWAL_FLOOR_SECONDS: Final = 0.5
# Of what a peer asks, at a time. Each question is answered by itself: one that takes long delays no other.
MOST_ASKED: Final = 16
# A peer that is down is tried at least this often: a SYN costs less than a second more without heartbeats.
RETRY_SECONDS: Final = 2.0


class Peering:
    """Keeps one keyed connection with one peer.

    `make` makes a generation of keys over a connection, `beat` is what this node says of itself (its argument:
    whether it wants new keys), `wants_keys` whether the link lacks keys or has worn ones, `trusted` whether a
    certificate is not revoked. `keyed` is told by which certificate keys were made; `changed` and `heard` get every
    change of the record, and every heartbeat. `answer` gives the answers to the peer's questions (topic, body), or
    raises `SrdError`, which the peer is told; it is cancelled when the connection ends.
    """

    def __init__(
        self,
        peer: Node,
        *,
        make: Callable[[Node, TlsChannel], Awaitable[Generation]],
        beat: Callable[[bool], Beat],
        wants_keys: Callable[[str], bool],
        trusted: Callable[[Identity], bool],
        keyed: Callable[[str, int], None],
        changed: Callable[[Channel], None],
        heard: Callable[[Node, Beat], None],
        answer: Callable[[str, str, Body], Awaitable[Body]],
    ) -> None:
        self.peer = peer
        self._answer = answer
        self._number = 0
        self._asked: dict[int, tuple[TlsChannel, asyncio.Future[Told]]] = {}
        self._make = make
        self._beat = beat
        self._wants_keys = wants_keys
        self._trusted = trusted
        self._keyed = keyed
        self._changed = changed
        self._heard = heard
        self._record = Channel(peer=peer.name, connected=False, since=boottime())
        self._live: TlsChannel | None = None
        self._former: TlsChannel | None = None  # held until both ends have seen its successor
        self._making: TlsChannel | None = None
        self._one_at_a_time = asyncio.Lock()
        # New keys are wanted; the leader makes them, the follower says so with each beat.
        self._due = asyncio.Event()
        self._keyed_at = 0.0
        self._waiting: list[asyncio.Event] = []  # who waits for the next exchange that begins
        self._knocked = asyncio.Event()
        self._logged = ""  # the failure that was last said, until keys are made

    @property
    def record(self) -> Channel:
        """What is to be shown of the connection."""
        return self._record

    def renew(self) -> asyncio.Event:
        """Have new keys made, soon and whichever end leads; the event is set when they are in use at both ends.

        By an exchange that begins after this: one that is under way may be by an older certificate or other suites.
        """
        self._due.set()
        renewed = asyncio.Event()
        self._waiting.append(renewed)
        return renewed

    async def ask(self, topic: str, body: Body, seconds: float) -> Body:
        """Return the peer's answer; `KeyingError` when it refuses one, is not connected, or takes too long.

        An answer ends with its connection, which new keys replace, too; what was asked may have been done.
        """
        operation, channel = f"ask about the {topic}", self._live
        if channel is None:
            raise KeyingError(operation, self.peer.name, "it is not connected")
        self._number = number = self._number + 1
        answered: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._asked[number] = channel, answered
        try:
            async with asyncio.timeout(seconds):
                await channel.send(Ask(number, topic, body))
                told = await answered
        except TimeoutError:
            raise KeyingError(operation, self.peer.name, f"no answer within {seconds:g} s") from None
        finally:
            del self._asked[number]
        if told.refusal:
            raise KeyingError(operation, self.peer.name, told.refusal)
        return told.body

    def knock(self) -> None:
        """Hear that the peer has just come up: do not wait to try it again."""
        self._knocked.set()

    @property
    def serials(self) -> frozenset[int]:
        """The serial numbers of the certificates by which the peer is let in on its connections."""
        channels = [channel for channel in (self._live, self._former, self._making) if channel is not None]
        return frozenset(channel.identity.serial for channel in channels if channel.identity is not None)

    def turned_away(self, error: SrdError) -> None:
        """Count somebody at the peer's address who was not let in; show it too, unless the peer itself is let in."""
        if self._live is None:
            self._failed(error)
        else:
            self._log_once(str(error))
            self._update(replace(self._record, failures=self._record.failures + 1))

    def refuse(self, error: KeyingError) -> None:
        """End every connection, because the peer is not to be let in, and show that."""
        self.close()
        self._failed(error)

    def close(self) -> None:
        """Give the connection up; whoever holds it ends by that."""
        for channel in (self._live, self._former, self._making):
            if channel is not None:
                channel.close()
        self._live = None

    def end(self) -> None:
        """Close it for good: what its tasks still have to say is nobody's business any more."""
        self._changed = lambda _record: None
        self._heard = lambda _peer, _beat: None
        self.close()

    async def lead(self, connect: Callable[[], Awaitable[TlsChannel]]) -> None:
        """Connect, make keys, and make new ones when they are due, until cancelled."""
        policy = persistently(SrdError, note=self._failed, cap=RETRY_SECONDS, sleep=self._pause)
        async with asyncio.TaskGroup() as holds:
            while True:
                channel: TlsChannel = await policy(self._attempt, connect)
                holds.create_task(contained(f"heartbeats with {self.peer.name}", partial(self._hold, channel)))
                await self._due.wait()
                await asyncio.sleep(max(0.0, self._keyed_at + RENEWAL_FLOOR_SECONDS - boottime()))

    async def follow(self, channel: TlsChannel) -> None:
        """Make the keys that the peer, which has just connected, leads; then hold the connection until it ends."""
        if self._making is not None:
            self._making.close()  # a peer that connects anew has given that one up
        try:
            async with self._one_at_a_time:
                await self._exchange(channel)
        except SrdError as error:
            self._failed(error)
        else:
            await self._hold(channel)
        finally:
            channel.close()

    async def _attempt(self, connect: Callable[[], Awaitable[TlsChannel]]) -> TlsChannel:
        self._knocked.clear()
        async with self._one_at_a_time:
            channel = await connect()
            try:
                await self._exchange(channel)
            except (SrdError, asyncio.CancelledError):
                channel.close()
                raise
        return channel

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._knocked.wait()

    async def _exchange(self, channel: TlsChannel) -> None:
        identity = channel.identity
        if identity is None or not self._trusted(identity):
            raise KeyingError("make keys with", self.peer.name, "its certificate is revoked")
        waiting, self._waiting = self._waiting, []
        self._due.clear()
        self._making, generation = channel, None
        try:
            generation = await self._make(self.peer, channel)
        finally:
            self._making = None
            if generation is None:
                self._due.set()
                self._waiting = [*waiting, *self._waiting]
        self._established(channel, generation)
        for renewed in waiting:
            renewed.set()

    async def _hold(self, channel: TlsChannel) -> None:
        """Exchange heartbeats until the connection fails or the next one has taken its place.

        The one that is replaced ends with the first heartbeat on its successor, by which both ends know of that:
        were it closed before, the other end would take it for a failure.
        """
        answering: set[asyncio.Task[None]] = set()
        try:
            await until_first(partial(self._listen, channel, answering), partial(self._speak, channel))
        except KeyingError as error:
            if self._live is channel:
                self._live = None
                self._failed(error)
        finally:
            channel.close()
            if self._live in (channel, None):
                self._live = None
                self._end_former()
                self._due.set()
            for asked, answered in self._asked.values():
                if asked is channel and not answered.done():
                    answered.set_result(Told(0, {}, "its connection ended before there was an answer"))
            for task in answering:
                task.cancel()
            if answering:
                await asyncio.wait(answering)

    async def _listen(self, channel: TlsChannel, answering: set[asyncio.Task[None]]) -> None:
        while True:
            word = await channel.receive(cast("type[Word]", Word), SILENCE_SECONDS)
            if isinstance(word, Ask):
                if len(answering) >= MOST_ASKED:
                    raise KeyingError("listen to", self.peer.name, f"it asks more than {MOST_ASKED} things at once")
                task = asyncio.create_task(self._answer_to(channel, word))
                answering.add(task)
                task.add_done_callback(answering.discard)
            elif isinstance(word, Told):
                _, answered = self._asked.get(word.number, (None, None))
                if answered is not None and not answered.done():
                    answered.set_result(word)
            else:
                self._hear(channel, word)

    def _hear(self, channel: TlsChannel, beat: Beat) -> None:
        self._heard(self.peer, beat)
        if self._live is channel:
            self._end_former()
            if beat.wants_keys:
                self._due.set()

    async def _answer_to(self, channel: TlsChannel, question: Ask) -> None:
        body: Body = {}

        async def answer() -> None:
            nonlocal body
            body = await self._answer(self.peer.name, question.topic, question.body)

        refusal = await contained(f"the answer about the {question.topic}", answer, log_failure=_log_defect)
        with contextlib.suppress(KeyingError):  # whoever listens finds out, too
            await channel.send(Told(question.number, body, refusal or ""))

    async def _speak(self, channel: TlsChannel) -> None:
        while True:
            old = self._record.renewal is not None and boottime() >= self._record.renewal
            if self._live is channel and (old or self._wants_keys(self.peer.name)):
                self._due.set()
            await channel.send(self._beat(self._due.is_set()))
            await asyncio.sleep(BEAT_SECONDS)

    def _end_former(self) -> None:
        if self._former is not None:
            self._former.close()
            self._former = None

    def _established(self, channel: TlsChannel, generation: Generation) -> None:
        self._end_former()
        self._former, self._live = self._live, channel
        if channel.identity is not None:
            self._keyed(self.peer.name, channel.identity.serial)
        now, known = boottime(), self._record
        self._keyed_at, self._logged = now, ""
        self._update(
            replace(
                known,
                connected=True,
                since=known.since if known.connected else now,
                generation=generation.number,
                established=now,
                # Each pair at a time of its own, so that a mesh never renews all its keys at once.
                renewal=now + REKEY_SECONDS * (1 - random.uniform(0, REKEY_JITTER)),  # noqa: S311 - no secret
                group=channel.group,
                suite=generation.suite,
                suite_reason=generation.suite_reason,
                keyings=known.keyings + 1,
                last_error=None,
            )
        )
        log.info(
            "keys installed",
            peer=self.peer.name,
            generation=generation.number,
            suite=generation.suite,
            why=generation.suite_reason,
            group=channel.group,
        )

    def _failed(self, error: BaseException) -> None:
        known, connected, text = self._record, self._live is not None, str(error)
        self._log_once(text)
        self._update(
            replace(
                known,
                connected=connected,
                since=known.since if connected == known.connected else boottime(),
                failures=known.failures + 1,
                last_error=text,
            )
        )

    def _log_once(self, text: str) -> None:
        # A peer that is down for a day is one line, not one for every attempt.
        if text != self._logged:
            log.warning("keying failed", peer=self.peer.name, error=text)
        self._logged = text

    def _update(self, record: Channel) -> None:
        self._record = record
        self._changed(record)


def _log_defect(sentence: str, detail: BaseException | None) -> None:
    """A refusal is said to the peer alone."""
    if detail is not None:
        log.error("failed", error=sentence, exc_info=detail)
