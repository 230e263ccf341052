"""The UNIX socket by which the command line talks to the daemon. Only its owner, root, may connect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog
from aiohttp import web

from srd.control import documents
from srd.control.client import is_answered
from srd.model import PermissionRefusedError, SrdError
from srd.state import Situation

log = structlog.get_logger(__name__)

SOCKET_MODE: Final = 0o600

_STOP_SECONDS: Final = 2.0
_OPERATION: Final = "open the control socket"

_UCRED: Final = struct.Struct("iII")  # pid, uid, gid

Action = Callable[[Mapping[str, str]], Awaitable[documents.Document]]

_PATHS: Final[Mapping[str, Callable[[Situation, str], documents.Document]]] = {
    "/v1/status": documents.status,
    "/v1/list": documents.members,
    "/v1/links": documents.links,
    "/v1/children": documents.children,
    "/v1/events": documents.events,
}


class ControlServer:
    """Answers from `situation` at `path`, which no other live daemon may hold.

    `actions` maps what may be POSTed to what does it: it gets the query and, as `by`, who asks; it returns the answer
    or raises `SrdError`.
    `questions` are the same for GET: they change nothing, so nobody keeps a record of them.
    """

    def __init__(
        self,
        path: Path,
        situation: Callable[[], Situation],
        *,
        version: str,
        actions: Mapping[str, Action] = MappingProxyType({}),
        questions: Mapping[str, Action] = MappingProxyType({}),
    ) -> None:
        self._path = path
        self._situation = situation
        self._version = version
        self._actions = actions
        self._questions = questions
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._inode: int | None = None

    async def start(self) -> None:
        """Listen; the socket that a dead daemon left is replaced, that of a live one is refused."""
        listener = _bind(self._path)
        self._inode = self._path.stat().st_ino
        self._server = web.Server(self._handle, access_log=None)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(self._server, sock=listener)

    async def stop(self) -> None:
        """Stop listening and remove the socket, unless it is another daemon's by now."""
        if self._listener is None or self._server is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        self._listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(_STOP_SECONDS)
        await self._listener.wait_closed()
        self._listener = self._server = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.path
        method = "POST" if path in self._actions else "GET"
        if path not in {*_PATHS, *self._questions, *self._actions}:
            return _answer(404, {"error": "not_found", "paths": sorted({*_PATHS, *self._questions, *self._actions})})
        if request.method != method:
            return _answer(405, {"error": "method_not_allowed"})
        if path in self._actions:
            return await self._act(path, request)
        if path in self._questions:
            return await _answered(self._questions[path], request)
        return _answer(200, _PATHS[path](self._situation(), self._version))

    async def _act(self, path: str, request: web.BaseRequest) -> web.StreamResponse:
        """Do what is asked for; who asked, and what came of it, is in the log."""
        asked = dict(request.rel_url.query)
        by = _peer(request)
        try:
            done = await self._actions[path](asked | {"by": by})
        except SrdError as error:
            log.warning("asked", action=path, query=asked, by=by, refused=str(error))
            return _refused(error)
        log.info("asked", action=path, query=asked, by=by)
        return _answer(200, done)


async def _answered(question: Action, request: web.BaseRequest) -> web.StreamResponse:
    try:
        return _answer(200, await question(dict(request.rel_url.query)))
    except SrdError as error:
        return _refused(error)


def _refused(error: SrdError) -> web.Response:
    refusal = {"operation": error.operation, "subject": error.subject, "reason": error.reason}
    return _answer(409, refusal | {"remedy": error.remedy, "exit_status": error.exit_status})


def _peer(request: web.BaseRequest) -> str:
    """Return who is at the other end: pid and uid, by the kernel (unix(7), SO_PEERCRED)."""
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None:
        return "somebody who has gone"
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(packed)
    return f"pid {pid}, uid {uid}"


def _answer(status: int, document: documents.Document) -> web.Response:
    body = json.dumps({"schema": documents.SCHEMA} | document).encode() + b"\n"
    return web.Response(status=status, body=body, content_type="application/json", headers={"Server": "srd"})


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        # unix(7): the file gets the socket's own mode, so it is never open to others, not even for an instant.
        os.fchmod(listener.fileno(), SOCKET_MODE)
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
    except PermissionError as error:
        listener.close()
        raise PermissionRefusedError(_OPERATION, str(path), "permission denied", "run srd as root") from error
    except OSError as error:
        listener.close()
        raise SrdError(_OPERATION, str(path), (error.strerror or str(error)).lower()) from error
    except SrdError:
        listener.close()
        raise
    return listener


def _make_way(path: Path) -> None:
    """Remove the socket of a dead daemon; what is not a socket, or is answered, stays."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SrdError(_OPERATION, str(path), "it is there and is not a socket", "remove it")
    if is_answered(path):
        raise SrdError(_OPERATION, str(path), "another srd answers there", "one daemon per node; stop that one first")
    path.unlink()
