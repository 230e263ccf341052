"""The agent-check on real sockets, asked as haproxy asks, and as nobody should."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from ipaddress import ip_address

import pytest
from support.situations import NOW, primary_situation, replica_situation
from support.unmanaged import started

from srd.cluster import HaproxyAgentSection, HttpSection, Node
from srd.model import NodeKind
from srd.reconcile import boottime
from srd.state import Lease, Situation
from srd.web import agent
from srd.web.agent import AgentServer

# Long enough for a slow machine, and never waited for when all is well.
PATIENCE = 30.0
SHORTLY = 0.1
UP = b"up ready\n"
WRONG_ROLE = b"down # wrong_role: the role is replica\n"


def loopback(number: int) -> str:
    """Return an address of 127/8 that no other process of this suite uses."""
    return f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}.{number}"


@dataclass
class Served:
    """An agent at work, what it knows, and how it is asked."""

    server: AgentServer
    port: int
    now: Situation

    def becomes(self, situation: Situation) -> None:
        """Have something written into the store."""
        self.now = replace(situation, node=self.now.node, config=self.now.config)
        self.server.wake()

    def held(self) -> int:
        """How many have asked and were not told yet."""
        return sum(connection.question is not None for connection in self.server._open)

    async def connect(self, question: bytes, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(loopback(1), self.port, local_addr=(source, 0))
        writer.write(question)
        return reader, writer

    async def ask(self, question: bytes = b"primary\n", source: str | None = None) -> bytes:
        """Ask as one check does; return the answer, b"" when the connection ended without one."""
        reader, writer = await self.connect(question, source or loopback(2))
        try:
            async with asyncio.timeout(PATIENCE):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def waiting(self, question: bytes = b"primary\n", source: str | None = None) -> asyncio.Task[bytes]:
        """Ask what is known already; return once the server has read it and holds the connection."""
        before = self.held()
        task = asyncio.create_task(self.ask(question, source))
        async with asyncio.timeout(PATIENCE):
            while self.held() == before:
                assert not task.done(), "it was told at once"
                await asyncio.sleep(0.001)
        return task


@contextlib.asynccontextmanager
async def serving(
    situation: Situation,
    *,
    known: asyncio.Event | None = None,
    hold_seconds: float = 60.0,
    moves: bool = False,
    **limits: int,
) -> AsyncIterator[Served]:
    """Serve; the situation's clock stands still unless it `moves`."""
    own = Node(situation.node.name, NodeKind.REDIS, (ip_address(loopback(1)),))
    with socket.socket() as probe:
        probe.bind((loopback(1), 0))
        port: int = probe.getsockname()[1]
    config = replace(
        situation.config,
        nodes=(own, *situation.config.peers_of(own.name)),
        http=HttpSection(**limits),
        haproxy_agent=HaproxyAgentSection(port=port),
        listen_localhost=False,
    )
    began = boottime()

    def present() -> Situation:
        return replace(served.now, now=served.now.now + boottime() - began) if moves else served.now

    server = AgentServer(present, known=known, hold_seconds=hold_seconds)
    served = Served(server, port, replace(situation, node=own, config=config))
    async with started(server):
        yield served


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an answer count for as long as a test may take to ask again."""
    monkeypatch.setattr(agent, "REMEMBERED_SECONDS", PATIENCE)


async def told(task: asyncio.Task[bytes]) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return await task


async def test_what_is_not_known_yet_is_told_at_once() -> None:
    async with serving(primary_situation()) as served:
        assert await served.ask(b"primary\n") == UP
        assert (await served.ask(b"replica\r\n")).startswith(b"down # wrong_role: ")
        assert await served.ask(b"primary\n", loopback(3)) == UP
        assert served.server.answers == {("primary", "up"): 2, ("replica", "down"): 1}


async def test_what_is_known_is_told_again_when_it_changes() -> None:
    async with serving(primary_situation()) as served:
        assert await served.ask() == UP
        for becomes, line in ((replica_situation(), WRONG_ROLE), (primary_situation(), UP)) * 5:
            check = await served.waiting()
            since = boottime()
            served.becomes(becomes)
            assert await told(check) == line
            print(f"told after {(boottime() - since) * 1000:.2f} ms")  # noqa: T201


async def test_a_change_of_something_else_tells_nobody() -> None:
    async with serving(primary_situation()) as served:
        await served.ask()
        check = await served.waiting()
        served.becomes(replace(primary_situation(), wall_clock=1.0))
        await asyncio.sleep(3 * agent.TICK_SECONDS)
        assert not check.done()
        served.becomes(replica_situation())
        await told(check)


async def test_a_lease_that_ends_by_itself_is_noticed() -> None:
    lease = Lease(True, NOW + 1, 3, 3, primary_situation().view.lease.primary)  # type: ignore[union-attr]
    async with serving(primary_situation(lease=lease)) as served:
        assert await served.ask() == UP
        check = await served.waiting()
        served.now = replace(served.now, now=NOW + 1)  # time alone: nothing is written, nobody is woken
        assert (await told(check)).startswith(b"down # lease_expired: ")


async def test_the_end_of_a_lease_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "TICK_SECONDS", PATIENCE)
    lease = Lease(True, NOW + 0.5, 3, 3, primary_situation().view.lease.primary)  # type: ignore[union-attr]
    async with serving(primary_situation(lease=lease), moves=True) as served:
        assert await served.ask() == UP
        check = await served.waiting()
        shorter = replace(lease, expires=NOW + 0.3)
        served.becomes(primary_situation(lease=shorter))  # by the word of others, and before the timer would look
        assert (await told(check)).startswith(b"down # lease_expired: ")
        ended = served.server._situation().now - shorter.expires
        print(f"told after {ended * 1000:.2f} ms")  # noqa: T201
        assert ended < 0.1


async def test_a_connection_is_not_held_for_ever() -> None:
    async with serving(primary_situation(), hold_seconds=0.3) as served:
        assert await served.ask() == UP
        since = boottime()
        assert await served.ask() == UP
        assert boottime() - since >= 0.3


async def test_who_starts_anew_is_told_at_once() -> None:
    async with serving(primary_situation()) as served:
        assert await served.ask() == UP
        check = await served.waiting()
        check.cancel()  # closes what it waits for
        await asyncio.wait([check])
        assert await served.ask() == UP


async def test_what_was_given_up_before_it_was_answered_counts_for_nothing() -> None:
    async with serving(primary_situation()) as served:
        # The server has no turn before all of this is over: so it is in a listening socket while there is no srd.
        with socket.create_connection((loopback(1), served.port), source_address=(loopback(2), 0)) as gone:
            gone.sendall(b"primary\n")
        assert await served.ask() == UP
        assert served.server.answers == {("primary", "up"): 2}


async def test_who_asks_late_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "REMEMBERED_SECONDS", SHORTLY)
    async with serving(primary_situation()) as served:
        assert await served.ask() == UP
        await asyncio.sleep(SHORTLY)
        assert await served.ask() == UP


async def test_two_that_share_an_address_are_both_told() -> None:
    async with serving(primary_situation()) as served:
        assert await served.ask() == UP
        one = await served.waiting()
        assert await served.ask() == UP  # another one that has just been started, or a reload
        two = await served.waiting()
        served.becomes(replica_situation())
        assert [await told(one), await told(two)] == [WRONG_ROLE] * 2
        again = [await served.waiting(), await served.waiting()]
        served.becomes(primary_situation())
        assert [await told(check) for check in again] == [UP] * 2


async def test_checks_wait_until_it_is_known_what_the_node_is() -> None:
    known = asyncio.Event()
    async with serving(primary_situation(), known=known, hold_seconds=0.0) as served:
        check = await served.waiting()
        await asyncio.sleep(2 * agent.TICK_SECONDS)
        assert not check.done()
        known.set()
        assert await told(check) == UP


@pytest.mark.parametrize(
    "question", [b"\n", b"master\n", b"primary replica\n", b"PRIMARY\n", b"\xff\0\n", b"primary\0\n"]
)
async def test_what_is_no_question_takes_the_server_down(question: bytes) -> None:
    async with serving(primary_situation()) as served:
        assert await served.ask(question) == b"down # unknown question\n"
        assert served.server.answers == {("unknown", "down"): 1}


async def test_who_says_nothing_or_too_much_or_half_of_it_is_shown_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "QUESTION_SECONDS", 0.2)
    async with serving(primary_situation()) as served:
        for said in (b"", b"primary", b"p" * 1000, b"primary\n" * 100):
            assert await served.ask(said, loopback(4)) in (b"", UP)
        assert await served.ask() == UP
        assert served.server.gate.refused == {"timeout": 2, "bad_request": 2}
        assert served.server.gate.connections <= 1


async def test_many_from_one_address_keep_nobody_else_out() -> None:
    async with serving(primary_situation(), max_connections_per_address=4) as served:
        silent = [await served.connect(b"", loopback(5)) for _ in range(20)]
        assert await served.ask(source=loopback(6)) == UP
        assert served.server.gate.refused["max_connections_per_address"] == 16
        for _, writer in silent:
            writer.close()


async def test_stopping_ends_what_waits_without_a_word() -> None:
    async with serving(primary_situation()) as served:
        await served.ask()
        check = await served.waiting()
    assert await told(check) == b""
