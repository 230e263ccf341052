"""support/stations.py: a connection that begins on a machine, without a process to be started there for it."""

from __future__ import annotations

from support.machines import Machines
from support.stations import connected

SECONDS = 10.0


def test_a_connection_from_a_machine_reaches_what_the_machine_reaches(lab: Machines) -> None:
    lab.wait_whole()
    node, peer = lab.nodes[:2]
    for address in ("127.0.0.1", lab.address(peer)):
        with connected(node, (address, 8080), SECONDS) as connection:
            connection.sendall(b"GET /liveness HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.0 200 OK\r\n"


def test_a_connection_from_a_machine_to_nobody_has_ended(lab: Machines) -> None:
    with connected(lab.nodes[0], ("127.0.0.1", 1), SECONDS) as connection:
        assert connection.recv(1) == b""
