"""Asks the daemon over its UNIX socket. Standard library only, and little of it: this is what `srd status` waits for.

HTTP/1.0 by hand is one line out and everything up to the end in: http.client would import 60 modules more, the half of
the command's start-up time.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from srd.model import PermissionRefusedError, SrdError

DEFAULT_TIMEOUT_SECONDS: Final = 5.0

_OPERATION: Final = "ask the daemon at"
_CHUNK: Final = 65536


def post(control_socket: Path, path: str, *, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> dict[str, Any]:
    """Have the daemon do something; return what it answers. `SrdError` is its own refusal, or that of `get`."""
    return _ask(control_socket, "POST", path, timeout)


def get(control_socket: Path, path: str, *, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> dict[str, Any]:
    """Return the JSON document at `path`; `SrdError` says why the daemon cannot be asked."""
    return _ask(control_socket, "GET", path, timeout)


def _ask(control_socket: Path, method: str, path: str, timeout: float) -> dict[str, Any]:
    where = str(control_socket)
    try:
        answer = _exchange(where, f"{method} {path} HTTP/1.0\r\nContent-Length: 0\r\n\r\n".encode("ascii"), timeout)
    except FileNotFoundError as error:
        raise SrdError(_OPERATION, where, "there is no such socket", "is srd running? systemctl status srd") from error
    except ConnectionRefusedError as error:
        raise SrdError(_OPERATION, where, "nobody listens there", "is srd running? systemctl status srd") from error
    except PermissionError as error:
        raise PermissionRefusedError(_OPERATION, where, "permission denied", "run this as root") from error
    except TimeoutError as error:
        raise SrdError(_OPERATION, where, f"no answer within {timeout:g} s", "--timeout sets another limit") from error
    except OSError as error:
        raise SrdError(_OPERATION, where, (error.strerror or str(error)).lower()) from error
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.partition(b"\r\n")[0].split()
    if words[1:2] == [b"409"]:
        raise _refusal(body)
    if len(words) < 2 or words[1] != b"200":  # noqa: PLR2004 - protocol version and status
        said = words[1].decode("ascii", "replace") if len(words) > 1 else "nothing"
        raise SrdError(_OPERATION, where, f"it answers {said} to {path}", "are srd and its daemon the same version?")
    try:
        document: dict[str, Any] = json.loads(body)
    except ValueError as error:
        raise SrdError(_OPERATION, where, f"its answer to {path} is not JSON") from error
    return document


def _refusal(body: bytes) -> SrdError:
    """Return the error that the daemon answers with, as if it had been raised here."""
    said = json.loads(body)
    error = SrdError(said["operation"], said["subject"], said["reason"], said["remedy"])
    error.exit_status = said["exit_status"]
    return error


def is_answered(control_socket: Path) -> bool:
    """Return whether a daemon holds the socket; `SrdError` when that cannot be found out."""
    where = str(control_socket)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(where)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True  # unix(7): its backlog is full, so somebody holds it
        except PermissionError as error:
            raise PermissionRefusedError(_OPERATION, where, "permission denied", "run this as root") from error
        except OSError as error:
            raise SrdError(_OPERATION, where, (error.strerror or str(error)).lower()) from error
    return True


def _exchange(where: str, request: bytes, timeout: float) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(where)
        connection.sendall(request)
        chunks = []
        while chunk := connection.recv(_CHUNK):
            chunks.append(chunk)
    return b"".join(chunks)
