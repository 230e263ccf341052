"""The HTTP server on :8080: health for balancers, state for people, metrics for Prometheus. It changes nothing.

Every answer is made from one snapshot, without I/O, so nothing that is stuck can delay it. The sockets are bound before
any child is started and answer 503 `starting` until there is something better to say. Where an earlier srd has answered
before, checks wait until it is `known` again what this node is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from aiohttp import web

from srd.listening import Listeners
from srd.model import Endpoint
from srd.reconcile import Loop
from srd.state import Situation
from srd.web import documents, health
from srd.web.guard import Gate, GuardedConnection, GuardedServer, Timeouts
from srd.web.health import Verdict
from srd.web.metrics import CONTENT_TYPE, HttpCounts, Metrics

BACKLOG: Final = 256
METHODS: Final = ("GET", "HEAD", "OPTIONS")
# Loops resync every 30 s at most, and a pass is bounded: one that is silent this long is stuck.
LIVENESS_SECONDS: Final = 60.0

_JSON: Final = "application/json"
_HEADERS: Final = {"Server": "srd", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_STOP_SECONDS: Final = 2.0
_NOTHING: Final[Mapping[tuple[str, str], int]] = {}


def _no_loops() -> tuple[Loop, ...]:
    return ()


class WebServer:
    """Listens on every address of the node, and on 127.0.0.1 unless `listen_localhost` is off.

    `situation` and `loops` are asked at each request and must return at once; `agent_answers` is a count that grows.
    """

    def __init__(
        self,
        situation: Callable[[], Situation],
        *,
        version: str,
        loops: Callable[[], tuple[Loop, ...]] = _no_loops,
        timeouts: Timeouts | None = None,
        liveness_seconds: float = LIVENESS_SECONDS,
        known: asyncio.Event | None = None,
        agent_answers: Mapping[tuple[str, str], int] = _NOTHING,
    ) -> None:
        self._situation = situation
        self._known = known
        self._version = version
        self._loops = loops
        self._timeouts = timeouts or Timeouts()
        self._liveness_seconds = liveness_seconds
        self._gate = Gate(lambda: situation().config.http)
        self._requests: Counter[tuple[str, int]] = Counter()
        self._metrics = Metrics(situation, self._http_counts, loops, version, agent_answers=agent_answers)
        self._server: GuardedServer | None = None
        self._listeners: list[asyncio.Server] = []
        self._paths: Mapping[str, Callable[[Situation], tuple[int, str, bytes]]] = {
            "/liveness": self._liveness,
            "/srd": lambda s: _document(health.OK, documents.node_document(s, version)),
            "/cluster": lambda s: _document(health.OK, documents.cluster_document(s, version)),
            "/history": lambda s: _document(health.OK, documents.history_document(s)),
            "/metrics": lambda _: (health.OK, CONTENT_TYPE, self._metrics.render()),
        }

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where this server listens, by its configuration."""
        s = self._situation()
        return s.config.open_endpoints(s.node, s.config.http.port)

    async def start(self, sockets: Listeners) -> None:
        """Listen, then serve; `SrdError` names the address that cannot be had."""
        self._server = GuardedServer(self._handle, self._gate, self._timeouts)
        loop = asyncio.get_running_loop()
        self._listeners = [
            # A copy: asyncio closes what it is given, and whose these are is not its business.
            await loop.create_server(self._server, sock=listener.dup(), backlog=BACKLOG)
            for listener in sockets.open(self.endpoints)
        ]

    async def stop(self) -> None:
        """Stop listening, let the answers under way end, and close every connection."""
        await _accept_no_more(self._listeners)
        if self._server is not None:
            await self._server.shutdown(_STOP_SECONDS)
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()

    def _http_counts(self) -> HttpCounts:
        return HttpCounts(
            requests=dict(self._requests), connections=self._gate.connections, refused=dict(self._gate.refused)
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if isinstance(request.protocol, GuardedConnection):
            request.protocol.request_read()
        started = time.monotonic()
        path = request.rel_url.path
        if self._known is not None and path in health.CHECK_PATHS:
            await self._known.wait()
        status, content_type, body = self._answer(request, path)
        known = path if status not in (web.HTTPNotFound.status_code, web.HTTPMethodNotAllowed.status_code) else "other"
        self._requests[known, status] += 1
        headers = _HEADERS if request.method in ("GET", "HEAD") else _HEADERS | {"Allow": ", ".join(METHODS)}
        response = web.Response(
            status=status,
            body=body if request.method != "OPTIONS" else b"",
            content_type=None,
            headers=headers | {"Content-Type": content_type},
        )
        self._metrics.observe_request(known, time.monotonic() - started)
        return response

    def _answer(self, request: web.BaseRequest, path: str) -> tuple[int, str, bytes]:
        if request.method not in METHODS:
            return _document(
                web.HTTPMethodNotAllowed.status_code,
                {"error_code": "method_not_allowed", "description": "this server changes nothing"},
            )
        situation = self._situation()
        if path in health.CHECK_PATHS:
            return self._check(health.judge(path, request.rel_url.query, situation), situation)
        if path in self._paths:
            return self._paths[path](situation)
        return _document(
            web.HTTPNotFound.status_code,
            {
                "error_code": "not_found",
                "description": "no such path",
                "paths": sorted([*health.CHECK_PATHS, *self._paths]),
            },
        )

    def _check(self, verdict: Verdict, situation: Situation) -> tuple[int, str, bytes]:
        return _document(verdict.status, documents.check_document(verdict, situation, self._version))

    def _liveness(self, situation: Situation) -> tuple[int, str, bytes]:
        return self._check(health.alive(self._loops(), situation.now, self._liveness_seconds), situation)


async def _accept_no_more(listeners: Collection[asyncio.Server]) -> None:
    """Close the listeners, and have whom they have just accepted be connections.

    asyncio drops a connection of the turn of the loop in which its listener is closed (base_events.py, Server._attach
    asserts that it is open), and its client sees a reset.
    """
    loop = asyncio.get_running_loop()
    for listener in listeners:
        for bound in listener.sockets:
            loop.remove_reader(bound.fileno())
    await asyncio.sleep(0)
    for listener in listeners:
        listener.close()


def _document(status: int, document: Any) -> tuple[int, str, bytes]:
    return status, _JSON, json.dumps(document).encode() + b"\n"
