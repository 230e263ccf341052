"""Connections that begin at a station of the lab: in its namespace or, where it has a kernel of its own, in that."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
    kernel = KERNELS / station
    if not kernel.exists():
        with inside(station):
            return _Way(socket.socket(), address)
    with inside(MANAGEMENT):
        opened = socket.socket()
    return _Way(opened, (kernel.read_text().strip(), REMOTE_PORT), json.dumps({"connect": address}).encode() + b"\n")


def connected(station: str, address: Address, seconds: float) -> socket.socket:
    """Return a connection from a station to an address; `OSError` where there is none within that time, or later EOF.

    The time is also that for each answer.
    """
    way = _way(station, address)
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
