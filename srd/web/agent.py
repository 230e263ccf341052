"""haproxy's agent-check: the verdicts of /primary and /replica, told at the instant they change. It changes nothing.

A check sends its question, one line, and gets one line. What it does not know is answered at once; otherwise the
connection is held until the answer changes, for `HOLD_SECONDS` at most, and answered all the same then (a long poll).
haproxy so learns of a change in 3 ms, where asking every 100 ms takes 40 to 93.

What a check knows is what the connection before it was told, of the same address and question, if that has just ended:
an answer is counted on once, and for `REMEMBERED_SECONDS`. So a haproxy that is started anew, and has closed what it
waited for, is answered at once; and so is each of two that share an address. One that ends in the very moment between
two questions, and asks again as another within that time, is answered after `HOLD_SECONDS` at the latest.

A verdict also changes by time alone: everybody who waits is looked at after each change of the store, at the moment
when the lease ends, and every `TICK_SECONDS`, by one timer for all of them.
"""

from __future__ import annotations

import asyncio
import enum
import re
import select
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from srd.listening import Listeners
from srd.model import Endpoint
from srd.reconcile import boottime
from srd.state import Situation
from srd.web import health
from srd.web.guard import Gate
from srd.web.health import ErrorCode

BACKLOG: Final = 256
# haproxy gives up after its `timeout check`, which is 3 s: that same limit is how soon it finds a srd that hangs.
HOLD_SECONDS: Final = 2.0
# For what is not that urgent: an answer that is due without anything new, evidence that gets too old.
TICK_SECONDS: Final = 0.25
# haproxy asks again after `agent-inter`, 20 ms. Who comes later is told once more what it knows: that harms nobody.
REMEMBERED_SECONDS: Final = 0.1
MAX_REMEMBERED: Final = 256
QUESTION_SECONDS: Final = 2.0
MAX_QUESTION: Final = 64
# haproxy keeps 127 bytes of a reason (HCHK_DESC_LEN in include/haproxy/check-t.h).
MAX_REASON: Final = 120

_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


class Question(enum.StrEnum):
    """What a check may ask: the path of the same name on :8080."""

    PRIMARY = "primary"
    REPLICA = "replica"


class Word(enum.StrEnum):
    """What haproxy does with the server: all clients, no new ones, none."""

    UP = "up"
    DRAIN = "drain"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a check is told. Two are the same when the words are.

    The way to `up` is past several reasons, and whoever has just been told one of them is between two questions when it
    is reached.
    """

    word: Word
    code: ErrorCode | None = field(default=None, compare=False)
    reason: str = field(default="", compare=False)

    @property
    def line(self) -> bytes:
        """The line as haproxy reads it; `up` alone would leave a server in the DRAIN or MAINT that it is in."""
        if self.word is Word.UP:
            return b"up ready\n"
        reason = _UNPRINTABLE.sub("?", f"{self.code}: {self.reason}" if self.code is not None else self.reason)
        return f"{self.word} # {reason[:MAX_REASON]}\n".encode()


_KEEPS_CLIENTS: Final = (ErrorCode.DRAINED, ErrorCode.HANDED_OVER)
UNKNOWN_QUESTION: Final = Answer(Word.DOWN, reason="unknown question")


def answer(question: Question, situation: Situation) -> Answer:
    """Return what is true of this node at this moment. Pure.

    One that is drained and could do it otherwise keeps the clients that it has. So does one that is handing over: srd
    ends their connections once its successor leads, and whoever were cut off before would knock where nobody is.
    """
    verdict = health.judge(f"/{question}", {}, situation)
    word = Word.DRAIN if verdict.error_code in _KEEPS_CLIENTS else Word.UP if verdict.ok else Word.DOWN
    return Answer(word, verdict.error_code, verdict.description)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a connection was told that ended just now, until when (CLOCK_BOOTTIME seconds) that counts."""

    address: str
    question: Question
    answer: Answer
    until: float


class AgentServer:
    """Answers checks on every address of the node, and on 127.0.0.1 unless `listen_localhost` is off.

    `situation` is asked at each answer and must return at once. Until it is `known` what this node is, checks wait.
    """

    def __init__(
        self,
        situation: Callable[[], Situation],
        *,
        known: asyncio.Event | None = None,
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self._situation = situation
        self._known = known
        self._hold_seconds = hold_seconds
        self.gate = Gate(lambda: situation().config.http)
        self._answers: Counter[tuple[str, str]] = Counter()
        self._open: set[_Connection] = set()
        self._told: deque[_Told] = deque(maxlen=MAX_REMEMBERED)
        self._listeners: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where this server listens, by its configuration."""
        s = self._situation()
        return s.config.open_endpoints(s.node, s.config.haproxy_agent.port)

    @property
    def answers(self) -> Mapping[tuple[str, str], int]:
        """How many answers were given, by question (`unknown` is every other one) and word."""
        return self._answers

    def wake(self) -> None:
        """Say that the situation has changed; any number of calls in one turn of the event loop are one."""
        if self._open and not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._review)

    async def start(self, sockets: Listeners) -> None:
        """Listen, then answer; `SrdError` names the address that cannot be had."""
        loop = asyncio.get_running_loop()
        self._listeners = [
            # A copy: asyncio closes what it is given. It also sets TCP_NODELAY on what it accepts.
            await loop.create_server(lambda: _Connection(self), sock=listener.dup(), backlog=BACKLOG)
            for listener in sockets.open(self.endpoints)
        ]

    async def stop(self) -> None:
        """Stop listening and end every connection without a word: haproxy keeps what it was told last."""
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self._open):
            connection.abort()
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def opened(self, connection: _Connection) -> None:
        """Look after a connection from now on."""
        self._open.add(connection)
        if self._timer is None:
            self._arm(self._situation())

    def closed(self, connection: _Connection) -> None:
        """Forget a connection, and with it what was known to whoever waited in it."""
        self._open.discard(connection)

    def asked(self, connection: _Connection, line: bytes) -> None:
        """Answer a question at once, or let it wait until there is something to say that is new to the asker."""
        try:
            question = Question(line.decode("ascii", "replace").strip())
        except ValueError:
            self._answers["unknown", UNKNOWN_QUESTION.word] += 1
            connection.answer(UNKNOWN_QUESTION)
            return
        now = boottime()
        connection.wait(question, self._recalled(connection.address, question, now), now + self._hold_seconds)
        self._look_at(connection, self._truth(self._situation()), now)

    def _recalled(self, address: str, question: Question, now: float) -> Answer | None:
        """Return what this asker was told just now, and count on it only once."""
        for told in reversed(self._told):
            if now < told.until and (told.address, told.question) == (address, question):
                self._told.remove(told)
                return told.answer
        return None

    def _truth(self, situation: Situation) -> Mapping[Question, Answer]:
        if self._known is not None and not self._known.is_set():
            return {}
        return {question: answer(question, situation) for question in Question}

    def _review(self) -> None:
        self._woken = False
        situation, now = self._situation(), boottime()
        truth = self._truth(situation)
        for connection in tuple(self._open):
            self._look_at(connection, truth, now)
        self._arm(situation)

    def _arm(self, s: Situation) -> None:
        """Have it looked again when the lease ends, and before that soon; nobody waits: not at all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._open:
            left = s.view.lease.expires - s.now if s.view.lease is not None else 0.0
            pause = min(left, TICK_SECONDS) if left > 0 else TICK_SECONDS
            self._timer = asyncio.get_running_loop().call_later(pause, self._review)

    def _look_at(self, connection: _Connection, truth: Mapping[Question, Answer], now: float) -> None:
        """Answer what waits, if there is something new or its time is up; end what does not ask."""
        late = now >= connection.deadline
        question = connection.question
        if question is None:
            if late:
                self.gate.refused["timeout"] += 1
                connection.abort()
            return
        now_true = truth.get(question)
        if now_true is None or (now_true == connection.knows and not late):
            return
        self._answers[question, now_true.word] += 1
        if connection.answer(now_true):
            self._told.append(_Told(connection.address, question, now_true, now + REMEMBERED_SECONDS))


class _Connection(asyncio.Protocol):
    """One check: it says one line, waits, is told one line."""

    def __init__(self, server: AgentServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._admitted = False
        self._said = b""
        self._spoken = False
        self.address = ""
        self.question: Question | None = None  # what it waits for
        self.knows: Answer | None = None
        self.deadline = 0.0  # for its question, then for its answer; CLOCK_BOOTTIME seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or end it without having read anything."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - asyncio's stream protocols are given no other
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        self._admitted = self._server.gate.enter(self.address)
        if not self._admitted:
            transport.abort()
            return
        self.deadline = boottime() + QUESTION_SECONDS
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        """Take the question; what comes after it is read, to notice the end, and bounded with it."""
        if self._transport is None or self._transport.is_closing():
            return
        self._said += data
        line, end, _ = self._said.partition(b"\n")
        if len(self._said) > MAX_QUESTION:
            self._server.gate.refused["bad_request"] += 1
            self.abort()
        elif end and not self._spoken:
            self._spoken = True
            self._server.asked(self, line)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - how it ended makes no difference
        """Forget the connection."""
        self._transport = None
        self._server.closed(self)
        if self._admitted:
            self._server.gate.leave(self.address)

    def wait(self, question: Question, knows: Answer | None, deadline: float) -> None:
        """Be one that has asked, and knows this already."""
        self.question, self.knows, self.deadline = question, knows, deadline

    def answer(self, told: Answer) -> bool:
        """Say it and close; return whether somebody still listens, as far as the kernel knows.

        One line always fits into the kernel's buffer, so nobody has to read it. What has waited in the listening socket
        while there was no srd is answered, too, and most of it has been given up long since.
        """
        self._server.closed(self)
        if self._transport is None:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        listens = not poll.poll(0)
        self._transport.write(told.line)
        self._transport.close()
        return listens

    def abort(self) -> None:
        """End the connection here and now."""
        self._server.closed(self)
        if self._transport is not None:
            self._transport.abort()
