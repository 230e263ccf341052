"""Connections that cannot hold the server up: caps before a byte is parsed, and a time limit for each of them.

aiohttp has no limit for the headers of a connection's first request, so one byte a second holds it for ever; Patroni
died of five silent connections (patroni#3705). Every connection here has a timer from the instant it is accepted: the
first request must be complete within `header` seconds, and each answer be read and followed by another whole request
within `idle` seconds.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from srd.cluster import HttpSection

log = structlog.get_logger(__name__)

# A whole request fits: a balancer sends some 100 bytes, a browser less than 2 KiB.
MAX_REQUEST_LINE: Final = 2048
MAX_HEADER: Final = 4096
MAX_HEADERS: Final = 32
MAX_HEAD: Final = 16384

_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_HOST: Final = re.compile(rb"\nhost[ \t]*:", re.IGNORECASE)

_BUSY_BODY: Final = json.dumps(
    {"status": "unavailable", "error_code": "too_many_connections", "description": "too many connections"}
).encode()
_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nServer: srd\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BUSY_BODY), _BUSY_BODY)
)
# Closing at once resets the connection when the request is on its way, and the client may never see the 503.
_LINGER_SECONDS: Final = 1.0
_MAX_LINGERING: Final = 64
# A balancer that has just connected sends its check within a round trip; a machine under load may take its time.
_HEARING_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: for the first request's headers, and for reading an answer and sending the next request."""

    header: float = 5.0
    idle: float = 15.0


class Gate:
    """Counts connections, in all and by address, and says which one is one too many."""

    def __init__(self, limits: Callable[[], HttpSection]) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self.connections = 0
        self.lingering: set[asyncio.Transport] = set()
        self.refused: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Whether a connection from this address may stay; if so, `leave` must be called at its end."""
        limits = self._limits()
        if self.connections >= limits.max_connections:
            self.refused["max_connections"] += 1
            return False
        if self._by_address[address] >= limits.max_connections_per_address:
            self.refused["max_connections_per_address"] += 1
            return False
        self.connections += 1
        self._by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Forget a connection that has ended."""
        self.connections -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class GuardedConnection(RequestHandler):
    """One connection: admitted or refused by the gate, and closed when its time is up."""

    __slots__ = (
        "_address",
        "_admitted",
        "_answered",
        "_gate",
        "_guarded",
        "_half_closed",
        "_head",
        "_timeouts",
        "_timer",
    )

    def __init__(self, server: web.Server, gate: Gate, timeouts: Timeouts, **options: Any) -> None:
        super().__init__(server, **options)
        self._gate = gate
        self._timeouts = timeouts
        self._address = ""
        self._admitted = False
        self._answered = 0
        self._half_closed = False
        self._head = b""
        self._guarded: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or answer 503 without reading anything."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - asyncio's stream protocols are given no other
        self._guarded = transport
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        self._admitted = self._gate.enter(self._address)
        if self._admitted:
            self._arm(self._timeouts.header)
            super().connection_made(transport)
            return
        transport.write(_BUSY)
        self._gate.lingering.add(transport)
        if len(self._gate.lingering) > _MAX_LINGERING:
            transport.close()
        else:
            transport.write_eof()
            self._arm(_LINGER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Hand whole heads to the parser; a refused connection is only drained.

        Bodies are never read: aiohttp closes the connection after answering a request whose body has not come.
        """
        if not self._admitted or self._close or self._force_close:
            return
        self._head += data
        while end := _HEAD_END.search(self._head):
            head, self._head = self._head[: end.end()], self._head[end.end() :]
            super().data_received(_with_host(head))
        if self._head and (len(self._head) > MAX_HEAD or not self._head[:1].isalpha()):
            # Not a request, or one that is too long: the parser says 400, or the connection ends here.
            super().data_received(self._head)
            self._head = b""
            if self._answered == self._request_count:
                self._expired()

    def eof_received(self) -> bool:  # type: ignore[override]  # True keeps our half open (asyncio)
        """Answer what was asked before the client closed its half, as `nc -N` does; aiohttp would close at once."""
        self._half_closed = self._admitted and self._answered < self._request_count
        return self._half_closed

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answered += 1
            if self._half_closed and self._answered == self._request_count:
                self.close()

    @property
    def heard(self) -> bool:
        """Whether it has asked for something, and been answered all of it."""
        return 0 < self._request_count == self._answered

    def request_read(self) -> None:
        """Give the client its time to read the answer and to send another request."""
        self._arm(self._timeouts.idle)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        if self._timer is not None:
            self._timer.cancel()
        if self._admitted:
            self._gate.leave(self._address)
            super().connection_lost(exc)
        elif self._guarded is not None:
            self._gate.lingering.discard(self._guarded)
        self._guarded = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it may quote what the client sent
    ) -> web.StreamResponse:
        """Answer what is not HTTP, and what failed; only the latter is worth a line in the log."""
        if request.writer.output_size > 0:
            raise ConnectionError
        if status >= 500:  # noqa: PLR2004 - HTTP
            log.error("a request failed", path=request.path, exc_info=exc)
            body = {"status": "error", "description": "this is a defect of srd; its log has the details"}
        else:
            self._gate.refused["bad_request"] += 1
            body = {"status": "error", "error_code": "bad_request", "description": "this is not an HTTP request"}
        response = web.json_response(body, status=status, headers={"Server": "srd"})
        response.force_close()
        return response

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expired)

    def _expired(self) -> None:
        if self._guarded is None:
            return
        if self._admitted:
            self._gate.refused["timeout"] += 1
        # An answer that is not read would keep a graceful close waiting for ever.
        self._guarded.abort()


def _with_host(head: bytes) -> bytes:
    """Add the Host that HTTP/1.1 requires and that checks of balancers leave out; aiohttp refuses those."""
    line, end, fields = head.partition(b"\r\n")
    if not line.endswith(b" HTTP/1.1") or _HOST.search(head):
        return head
    return line + end + b"Host: localhost" + end + fields


class GuardedServer(web.Server):
    """An aiohttp server whose connections are guarded."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        gate: Gate,
        timeouts: Timeouts,
    ) -> None:
        super().__init__(handler)
        self._gate = gate
        self._timeouts = timeouts

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as aiohttp has it
        """End every connection: let the answers under way be sent within `timeout` seconds.

        Who has just connected may ask first, and not find the connection closed: a balancer would count that as a
        failed check.
        """
        for transport in tuple(self._gate.lingering):
            transport.abort()
        deadline = asyncio.get_running_loop().time() + _HEARING_SECONDS
        while True:
            await asyncio.sleep(_LOOK_SECONDS)  # at least once: what was accepted last is no connection before that
            heard = all(conn.heard for conn in self.connections if isinstance(conn, GuardedConnection))
            if heard or asyncio.get_running_loop().time() >= deadline:
                break
        self.pre_shutdown()
        await super().shutdown(timeout)

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return GuardedConnection(
            self,
            self._gate,
            self._timeouts,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._timeouts.idle,
            lingering_time=0,
            access_log=None,
            max_line_size=MAX_REQUEST_LINE,
            max_field_size=MAX_HEADER,
            max_headers=MAX_HEADERS,
        )
