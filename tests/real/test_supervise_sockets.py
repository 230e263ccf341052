"""stunnel's listening sockets are srd's: a client waits in them, whatever becomes of stunnel, and is never refused."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import socket
import ssl
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from support.nodes import PATIENCE, QUICK, Member, world
from support.patience import wait

from srd.model import Endpoint, Service, SrdError
from srd.supervise.programs import check_endpoint, listen_endpoints
from srd.trust.issuing import renew_node

RELOADS = 100
RESTARTS = 5
CLIENTS = 4
CONNECTIONS = 50
MOST_FAULTS = 10  # for each; 60 as glibc has it


class Clients:
    """Clients that connect by TLS and ask redis something, again and again, each on a new connection."""

    def __init__(self, member: Member) -> None:
        (endpoint,) = tls_endpoints(member)
        self._at = (str(endpoint.address), endpoint.port)
        self._context = trusting(member)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        self.answered = 0
        self.failed: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with connected(self._at, self._context) as connection:
                    ask(connection)
                self.answered += 1
            except OSError as error:
                self.failed[type(error).__name__] += 1


def tls_endpoints(member: Member) -> tuple[Endpoint, ...]:
    return listen_endpoints(member.config, member.node, Service.STUNNEL)


def trusting(member: Member) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=member.paths.config_dir / "ca.crt")
    context.check_hostname = False
    return context


def connected(at: tuple[str, int], context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(at, timeout=PATIENCE)
    return context.wrap_socket(plain)


def ask(connection: ssl.SSLSocket) -> None:
    """Say something to redis through stunnel, as whoever has not given a password yet."""
    connection.sendall(b"PING\r\n")
    said = connection.recv(100)
    if not said:
        raise ConnectionResetError
    assert said.startswith(b"-NOAUTH")


def renew(member: Member) -> None:
    renew_node(member.paths.config_dir.parent, member.node.name, dt.datetime.now(dt.UTC))


async def test_a_new_certificate_is_served_without_a_client_refused_or_cut_off() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            before = node.pids()
            (endpoint,) = tls_endpoints(member)
            at, context = (str(endpoint.address), endpoint.port), trusting(member)
            with connected(at, context) as patient, Clients(member) as clients:
                first = patient.getpeercert(binary_form=True)
                for _ in range(RELOADS):
                    await asyncio.to_thread(renew, member)
                    await node.services.adopt(member.config)
                await asyncio.to_thread(ask, patient)
            with connected(at, context) as late:
                assert late.getpeercert(binary_form=True) != first
            print(f"\n{RELOADS} certificates: {clients.answered} connections, failed: {dict(clients.failed)}")  # noqa: T201
            assert clients.failed == {}
            assert clients.answered > RELOADS
            assert node.pids() == before


async def test_clients_wait_while_stunnel_is_started_again() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            with Clients(member) as clients:
                for _ in range(RESTARTS):
                    before = node.pid(Service.STUNNEL)
                    await node.services.restart(Service.STUNNEL)
                    await node.until(lambda view, old=before: view.children[Service.STUNNEL].pid not in (old, None))  # type: ignore[misc]
                    await node.all_ready()
            print(f"\n{RESTARTS} restarts: {clients.answered} connections, failed: {dict(clients.failed)}")  # noqa: T201
            assert clients.failed["ConnectionRefusedError"] == 0
            # Whoever is in the middle of something with a stunnel that ends is cut off; nobody else.
            assert clients.failed.total() <= RESTARTS * CLIENTS


async def test_whoever_connects_while_there_is_no_stunnel_is_served_by_the_next_one() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            (endpoint,) = tls_endpoints(member)
            os.kill(node.pid(Service.STUNNEL), signal.SIGSTOP)
            with socket.create_connection((str(endpoint.address), endpoint.port), timeout=PATIENCE) as early:
                os.kill(node.pid(Service.STUNNEL), signal.SIGKILL)
                answered = await asyncio.to_thread(handshake, early, trusting(member))
                assert answered


def handshake(plain: socket.socket, context: ssl.SSLContext) -> bool:
    with context.wrap_socket(plain) as connection:
        ask(connection)
    return True


async def test_both_families_sockets_reach_stunnel_each_in_its_own_section() -> None:
    with world(edit=lambda text: text.replace('["127.0.1.1"]', '["127.0.1.1", "::1"]')) as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            for endpoint in tls_endpoints(member):
                with connected((str(endpoint.address), endpoint.port), trusting(member)) as connection:
                    await asyncio.to_thread(ask, connection)


async def test_a_stop_refuses_clients_at_once_and_frees_the_port() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            await node.services.stop_all()
            (endpoint,) = tls_endpoints(member)
            assert check_endpoint(endpoint) is None


async def test_a_certificate_that_stunnel_cannot_use_is_said_and_the_former_one_goes_on() -> None:
    with world() as (member,):
        async with member.supervised(replace(QUICK, hang_up=1)) as node:
            await node.all_ready()
            before, key = node.pids(), member.paths.config_dir / "tls.key"
            good = key.read_bytes()
            renew(member)
            renewed = key.read_bytes()
            key.write_bytes(good)  # not this certificate's
            with pytest.raises(SrdError, match=r"cannot reload stunnel: .* another certificate"):
                await node.services.adopt(member.config)
            (endpoint,) = tls_endpoints(member)
            with connected((str(endpoint.address), endpoint.port), trusting(member)) as connection:
                await asyncio.to_thread(ask, connection)
            key.write_bytes(renewed)
            await node.services.adopt(member.config)
            assert node.pids() == before


async def test_stunnel_keeps_the_memory_of_a_connection_for_the_next_one() -> None:
    def connect(times: int) -> None:
        for _ in range(times):
            with connected(at, context) as connection:
                ask(connection)
            wait(lambda: "its thread is there" if threads(pid) > idle else "", between=0.001)

    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            (endpoint,) = tls_endpoints(member)
            at, context = (str(endpoint.address), endpoint.port), trusting(member)
            pid = node.pid(Service.STUNNEL)
            idle = threads(pid)
            await asyncio.to_thread(connect, CONNECTIONS)
            before = minor_faults(pid)
            await asyncio.to_thread(connect, CONNECTIONS)
            faults = minor_faults(pid) - before
    print(f"\n{faults / CONNECTIONS:.1f} page faults for a connection")  # noqa: T201 - a figure for people
    assert faults < MOST_FAULTS * CONNECTIONS


async def test_the_program_gets_the_sockets_and_nothing_else() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            (endpoint,) = tls_endpoints(member)
            pid = node.pid(Service.STUNNEL)
            entries = [entry.partition("=") for entry in of(pid, "environ").split("\0") if entry]
            environment = {name: value for name, _, value in entries}
            allocation = {"MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_"}
            assert environment.keys() == {"LC_ALL", "LISTEN_FDS", "LISTEN_PID", "PATH", "PWD", *allocation}
            assert (environment["LISTEN_PID"], environment["LISTEN_FDS"]) == (str(pid), "1")
            assert of(pid, "comm").startswith("stunnel")
            assert listening_ports(pid) == {3: endpoint.port}


def minor_faults(pid: int) -> int:
    """Return how often the system had to give a process a page (proc_pid_stat(5), minflt)."""
    return int(of(pid, "stat").rpartition(")")[2].split()[7])


def threads(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def of(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def listening_ports(pid: int) -> dict[int, int]:
    """Return by descriptor on which ports a process' TCP sockets over IPv4 listen."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = {f"socket:[{row[9]}]": int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A"}
    descriptors = {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {descriptor: ports[what] for descriptor, what in descriptors.items() if what in ports}
