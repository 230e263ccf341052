"""The keying channel's sockets: one port to listen on, eight to connect from, and the mark.

Both ports of a connection are privileged and known, so the exemption of the channel from ESP is bounded on both sides.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
from typing import Final

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT, Node
from srd.desired import leg_addresses
from srd.ipsec.protocol import KeyingError
from srd.model import Endpoint, IpAddress, PermissionRefusedError

# One SYN and its first repetition.
CONNECT_SECONDS: Final = 2.0
BACKLOG: Final = 1024


class Sockets:
    """Makes a node's sockets. `mark` is SO_MARK; None, without IPsec, for none."""

    def __init__(self, node: Node, mark: int | None) -> None:
        self._node = node
        self._mark = mark

    def listen(self) -> list[socket.socket]:
        """Bind the keying port on every address of this node; `KeyingError` says which one is taken."""
        return [self._bound(address, KEYING_PORT, listening=True) for address in self._node.addresses]

    async def dial(self, peer: Node) -> socket.socket:
        """Connect from one of the eight client ports; from the next one when the connection's four-tuple is taken."""
        local, remote = leg_addresses(self._node, peer)[0]
        target = Endpoint(remote, KEYING_PORT)
        for port in random.sample(KEYING_CLIENT_PORTS, len(KEYING_CLIENT_PORTS)):
            connection = self._bound(local, port, listening=False)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await asyncio.get_running_loop().sock_connect(connection, (str(remote), KEYING_PORT))
            except TimeoutError:
                connection.close()
                raise KeyingError("connect to", str(target), f"no answer within {CONNECT_SECONDS:g} s") from None
            except OSError as error:
                connection.close()
                if error.errno != errno.EADDRNOTAVAIL:
                    raise KeyingError("connect to", str(target), error.strerror or "refused") from error
            except asyncio.CancelledError:
                connection.close()
                raise
            else:
                return connection
        raise KeyingError("connect to", str(target), "all eight client ports are in use with this peer")

    def _bound(self, address: IpAddress, port: int, *, listening: bool) -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._mark is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            if not listening:
                # Closing resets instead of lingering 60 s in TIME_WAIT: with eight client ports, eight reconnections
                # in a minute would otherwise use them up. Connections end when nobody needs them: nothing is lost.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.bind((str(address), port))
            if listening:
                made.listen(BACKLOG)
        except OSError as error:
            made.close()
            kind = PermissionRefusedError if error.errno in (errno.EACCES, errno.EPERM) else KeyingError
            subject = f"{Endpoint(address, port)}"
            raise kind("use", subject, error.strerror or "refused", "it is the keying channel's port") from error
        return made
