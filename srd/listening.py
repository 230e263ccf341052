"""Listening TCP sockets that outlive srd: the service manager holds them while there is none, so nobody is refused."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import Final

from srd.model import Endpoint, SrdError
from srd.systemd import FdStore

_NAME: Final = re.compile(r"[a-z]+-([0-9a-f]+)-(\d+)")


class Listeners:
    """The sockets of one purpose, a word of a to z that tells them from others in the manager's store.

    What an earlier srd left listening is taken over here; `open` closes what of it is no longer wanted.
    """

    def __init__(self, purpose: str, fds: FdStore, *, backlog: int) -> None:
        self._purpose = purpose
        self._fds = fds
        self._backlog = backlog
        self._held: dict[Endpoint, socket.socket] = {}
        for name in fds.names:
            endpoint = _endpoint(name)
            if endpoint is None or name != self._name(endpoint):
                continue
            descriptor = fds.take(name)
            if descriptor is not None:
                self._held[endpoint] = socket.socket(fileno=descriptor)

    @property
    def endpoints(self) -> frozenset[Endpoint]:
        """Where it listens."""
        return frozenset(self._held)

    def open(self, endpoints: Collection[Endpoint]) -> list[socket.socket]:
        """Listen on these endpoints and no others; return their sockets in this order, which stay this object's own.

        `SrdError` names the first that cannot be had; nothing is bound then that was not before.
        """
        for endpoint in self._held.keys() - set(endpoints):
            self._close(endpoint)
        with contextlib.ExitStack() as stack:
            fresh = {
                endpoint: stack.enter_context(_listening(endpoint, self._backlog))
                for endpoint in endpoints
                if endpoint not in self._held
            }
            stack.pop_all()
        for endpoint, listener in fresh.items():
            self._held[endpoint] = listener
            self._fds.keep(self._name(endpoint), listener.fileno())
        return [self._held[endpoint] for endpoint in endpoints]

    def close(self) -> None:
        """Listen no more: whoever connects from now on is refused."""
        for endpoint in list(self._held):
            self._close(endpoint)

    def release(self) -> None:
        """Close the sockets here alone: the manager, and whoever has inherited them, go on."""
        for listener in self._held.values():
            listener.close()
        self._held.clear()

    def _close(self, endpoint: Endpoint) -> None:
        self._fds.forget(self._name(endpoint))
        self._held.pop(endpoint).close()

    def _name(self, endpoint: Endpoint) -> str:
        return f"{self._purpose}-{endpoint.address.packed.hex()}-{endpoint.port}"


def kept_endpoints(fds: FdStore) -> frozenset[Endpoint]:
    """Return where sockets listen that an earlier srd left with the manager and nobody has taken yet."""
    return frozenset(endpoint for name in fds.names if (endpoint := _endpoint(name)) is not None)


def _endpoint(name: str) -> Endpoint | None:
    found = _NAME.fullmatch(name)
    try:
        return Endpoint(ip_address(bytes.fromhex(found[1])), int(found[2])) if found else None
    except ValueError:
        return None  # another program's name, or another version's


def bound_socket(endpoint: Endpoint) -> socket.socket:
    """Return a TCP socket that is bound there, and does not listen yet; `OSError` when it cannot be had."""
    version = endpoint.address.version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET  # noqa: PLR2004 - IP version
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a dead listener do not matter
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((str(endpoint.address), endpoint.port))
    except OSError:
        bound.close()
        raise
    return bound


def _listening(endpoint: Endpoint, backlog: int) -> socket.socket:
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(bound_socket(endpoint))
            listener.setblocking(False)
            listener.listen(backlog)
            stack.pop_all()
    except OSError as error:
        remedy = "cluster.toml says where: the node's addresses, http.port, haproxy_agent.port and tls.port"
        raise SrdError("listen on", str(endpoint), (error.strerror or str(error)).lower(), remedy) from error
    return listener
