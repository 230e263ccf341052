"""sd_notify(3): telling the service manager that srd is ready, what it is doing, and that it is stopping.

The protocol is a datagram to a UNIX socket; systemd's manual recommends speaking it directly. Without NOTIFY_SOCKET
every call does nothing.
"""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends state lines such as `READY=1` to the socket that the service manager named."""

    def __init__(self, address: str | None) -> None:
        # A leading @ stands for the NUL of Linux' abstract namespace.
        self._address = f"\0{address[1:]}" if address and address.startswith("@") else address

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take NOTIFY_SOCKET out of the environment, so that no child inherits it."""
        return cls(os.environ.pop("NOTIFY_SOCKET", None))

    def send(self, *lines: str) -> None:
        """Send; a manager that is gone is nobody's error."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as notify:
            try:
                notify.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                return
