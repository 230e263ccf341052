"""A node's certificate is changed, over and over, under clients that connect all the while: none is refused.

How often is said by LAB_CERT_RELOADS.
"""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.lab import Lab
from support.machines import Machines
from support.namespace import inside

BUNDLES = Path("/var/lab/bundles")
RELOADS = int(os.environ.get("LAB_CERT_RELOADS", "5"))
RELOAD_SECONDS = 10
CLIENTS = 2
ANSWER_SECONDS = 30.0  # for a connection; the lab's nodes share two CPUs
RELOAD = ("curl", "-s", "-m", "60", "-X", "POST", "--unix-socket", "/run/srd/control.sock", "http://srd/v1/reload")


class Connecting:
    """A client straight at a node's TLS port, one connection after the other; each is served or counted."""

    def __init__(self, lab: Lab, node: str) -> None:
        self._target = (lab.address(node), 6380)
        self._context = ssl.create_default_context(cafile=str(BUNDLES / "client" / "ca.crt"))
        self._over = threading.Event()
        self.serials: list[str] = []
        self.failures: list[str] = []

    @contextmanager
    def connecting(self) -> Iterator[None]:
        thread = threading.Thread(target=self._connect)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _connect(self) -> None:
        with inside("client"):  # this thread alone
            while not self._over.is_set():
                try:
                    self.serials.append(self._served())
                except OSError as error:
                    self.failures.append(f"after {len(self.serials)}: {error!r}")

    def _served(self) -> str:
        """Have redis answer through a new connection; return the serial number of the certificate."""
        with (
            socket.create_connection(self._target, ANSWER_SECONDS) as plain,
            self._context.wrap_socket(plain, server_hostname="lab.srd") as connection,
        ):
            connection.sendall(b"PING\r\n")
            if not connection.recv(64).startswith(b"-NOAUTH"):
                raise ConnectionError("redis did not answer")
            return str(connection.getpeercert()["serialNumber"])  # type: ignore[index]


def hand_over(lab: Machines, node: str, to: str) -> None:
    """Issue a certificate and put it on the node's disk, not yet where srd reads it."""
    subprocess.run(["srd", "node", "renew", str(BUNDLES), node], check=True, capture_output=True)
    for file in (BUNDLES / node).glob("[nt]*.*"):
        lab.on(node, "install", "-D", "-m", "0600", "/dev/stdin", f"{to}/{file.name}", stdin=file.read_text())


@pytest.mark.timeout(300 + RELOADS * RELOAD_SECONDS)
def test_certificates_are_changed_and_no_client_is_refused(lab: Machines) -> None:
    lab.wait_whole()
    node = lab.primary()
    former = lab.pids(node)
    for directory in ("/root/a", "/root/b"):
        hand_over(lab, node, directory)
    clients = [Connecting(lab, node) for _ in range(CLIENTS)]
    with ExitStack() as stack:
        for client in clients:
            stack.enter_context(client.connecting())
        for directory in itertools.islice(itertools.cycle(("/root/a", "/root/b")), RELOADS):
            taken = lab.on(node, "sh", "-c", f"cp {directory}/* /etc/srd/ && {' '.join(RELOAD)}").stdout
            assert '"revoked"' in taken, taken
    served = sum(len(client.serials) for client in clients)
    failures = [failure for client in clients for failure in client.failures]
    changes = max(sum(a != b for a, b in itertools.pairwise(client.serials)) for client in clients)
    print(  # noqa: T201 - figures for people
        f"\n{RELOADS} reloads under {CLIENTS} clients: {served} connections, {len(failures)} failed {failures[:5]}; "
        f"one of them saw {changes} changes of the certificate"
    )
    assert failures == []
    assert changes >= RELOADS - 1
    assert lab.pids(node) == former
    lab.wait_whole()
