"""The sockets of `srd verify`: below IPsec (packet(7)) to see and send what is on the wire, and above it (raw(7))."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import socket
import struct
from typing import Any, Final

from srd.model import PLAIN_ENVIRONMENT, PermissionRefusedError, SrdError
from srd.verify.packets import Pair, icmp_protocol

_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_ETH_P_ALL: Final = 0x0003
_ETHERTYPES: Final = {4: 0x0800, 6: 0x86DD}
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_INSTRUCTION_BYTES: Final = 8
_BUFFER_BYTES: Final = 8 << 20
_PROGRAM_SECONDS: Final = 10.0


def packet_socket(program: bytes) -> socket.socket:
    """Open a socket that gets what passes the filter on every interface, both ways, from the IP header on."""
    made = _opened(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    try:
        attach(made, program)
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        _empty(made)
        lost(made)
    except OSError as error:
        made.close()
        raise _refused(error) from error
    return made


def lost(made: socket.socket) -> int:
    """Return how many packets a packet socket could not keep; asking sets the count to 0."""
    _, drops = struct.unpack("II", made.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return int(drops)


def raw_socket(pair: Pair, protocol: int, program: bytes = b"") -> socket.socket:
    """Open a raw socket on the local address."""
    made = _opened(_FAMILIES[pair[0].version], socket.SOCK_RAW, protocol)
    try:
        if program:
            attach(made, program)
            _empty(made)
        made.bind((str(pair[0]), 0))
    except OSError as error:
        made.close()
        raise _refused(error) from error
    return made


def _empty(made: socket.socket) -> None:
    """Throw away what came before the filter was there."""
    with contextlib.suppress(BlockingIOError):
        while True:
            made.recv(1)


def icmp_socket(pair: Pair) -> socket.socket:
    """Open a socket for ICMP on the local address."""
    return raw_socket(pair, icmp_protocol(pair[0].version))


def attach(made: socket.socket, program: bytes) -> None:
    """Have the kernel filter what a socket gets."""
    code = ctypes.create_string_buffer(program)
    # struct sock_fprog: the number of instructions, and where they are.
    fprog = struct.pack("HL", len(program) // _INSTRUCTION_BYTES, ctypes.addressof(code))
    made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


async def way_to(pair: Pair) -> tuple[Any, ...]:
    """Return where a packet socket sends frames for the peer: interface, EtherType and the next hop's link address.

    Raises `SrdError` where there is no such address: a link without them, or a neighbour that nobody has spoken to.
    """
    local, remote = pair
    routes = await _ip("route", "get", str(remote), "from", str(local))
    if not routes:
        raise SrdError("send below IPsec to", str(remote), "there is no route")
    hop, interface = routes[0].get("gateway", str(remote)), routes[0]["dev"]
    neighbours = await _ip(f"-{local.version}", "neigh", "show", "to", hop, "dev", interface)
    address = next((entry["lladdr"] for entry in neighbours if "lladdr" in entry), None)
    if address is None:
        raise SrdError("send below IPsec to", str(remote), f"{interface} knows no link address of {hop}")
    return (interface, _ETHERTYPES[local.version], 0, 0, bytes.fromhex(address.replace(":", "")))


def sending_socket() -> socket.socket:
    """Open a packet socket that gets nothing."""
    return _opened(socket.AF_PACKET, socket.SOCK_DGRAM, 0)


def _opened(family: int, kind: int, protocol: int) -> socket.socket:
    try:
        return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    except OSError as error:
        raise _refused(error) from error


def _refused(error: OSError) -> SrdError:
    if isinstance(error, PermissionError):
        return PermissionRefusedError("verify", "", "permission denied", "run this as root")
    return SrdError("verify", "", error.strerror or "a socket was refused")


async def _ip(*arguments: str) -> list[dict[str, Any]]:
    """Ask iproute2."""
    try:
        process = await asyncio.create_subprocess_exec(
            "ip",
            "-json",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=PLAIN_ENVIRONMENT,
        )
    except OSError as error:
        raise SrdError("run", "ip", "there is no such program", "apt install iproute2") from error
    try:
        async with asyncio.timeout(_PROGRAM_SECONDS):
            output, complaint = await process.communicate()
    except TimeoutError:
        raise SrdError("run", "ip", f"it took longer than {_PROGRAM_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SrdError("run", f"ip {' '.join(arguments)}", complaint.decode(errors="replace").strip())
    found: list[dict[str, Any]] = json.loads(output or b"[]")
    return found
