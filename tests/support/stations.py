"""Connections that begin at a station of the lab: in its namespace or, where it has a kernel of its own, in that."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from support.namespace import inside

# The lab's way into the nodes' own kernels (lab/cluster), and the port of what answers there (lab/kernels/remote.py).
MANAGEMENT: Final = Path("/run/lab/management")
KERNELS: Final = Path("/run/lab/kernels")
REMOTE_PORT: Final = 1022

Address = tuple[str, int]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class _Way:
    """A socket that is not connected yet, where to connect it, and what to say there first."""

    socket: socket.socket
    address: Address
    request: bytes = b""


def _way(station: str, address: Address) -> _Way:
    if not (KERNELS / station).exists():
        with inside(station):
            return _Way(socket.socket(), address)
    return _to_kernel(station, {"connect": address})


def _to_kernel(station: str, request: dict[str, Any]) -> _Way:
    with inside(MANAGEMENT):
        opened = socket.socket()
    return _Way(opened, ((KERNELS / station).read_text().strip(), REMOTE_PORT), json.dumps(request).encode() + b"\n")


def connected(station: str, address: Address, seconds: float) -> socket.socket:
    """Return a connection from a station to an address; `OSError` where there is none within that time, or later EOF.

    The time is also that for each answer.
    """
    return _begun(_way(station, address), seconds)


def asked(station: str, request: dict[str, Any], seconds: float) -> socket.socket:
    """Return a connection to what runs commands in a station's own kernel, which has been asked that."""
    return _begun(_to_kernel(station, request), seconds)


def _begun(way: _Way, seconds: float) -> socket.socket:
    try:
        way.socket.settimeout(seconds)
        way.socket.connect(way.address)
        way.socket.sendall(way.request)
    except BaseException:
        way.socket.close()
        raise
    return way.socket


async def connect(station: str, address: Address) -> Streams:
    """Open a connection from a station to an address; `OSError`, or EOF later, where that cannot be."""
    way = _way(station, address)
    loop = asyncio.get_running_loop()
    try:
        way.socket.setblocking(False)
        await loop.sock_connect(way.socket, way.address)
        await loop.sock_sendall(way.socket, way.request)
        return await asyncio.open_connection(sock=way.socket)
    except BaseException:
        way.socket.close()
        raise
