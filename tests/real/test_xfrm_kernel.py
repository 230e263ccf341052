"""The XFRM sockets against the running kernel, each test in a network namespace of its own; ESP is not needed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import os
import re
import socket
import subprocess
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from types import FrameType, TracebackType

import pytest
from support.namespace import CLONE_NEWNET, CLONE_NEWUSER, in_namespace, unshare

from srd.ipsec import xfrm_abi as abi
from srd.ipsec import xfrm_netlink
from srd.ipsec.xfrm import (
    Acquire,
    Action,
    Aead,
    AlreadyExistsError,
    Direction,
    Lifetime,
    Mark,
    MissingError,
    Mode,
    NotPermittedError,
    NotSupportedError,
    Overrun,
    Policy,
    PolicyChanged,
    PolicyDeleted,
    PolicyExpired,
    PolicyFlushed,
    Sa,
    SaFlushed,
    Selector,
    SpdInfo,
    Template,
    XfrmError,
    XfrmEvents,
    XfrmSocket,
    probe_esp,
)
from srd.model import EXIT_NO_PERMISSION, PermissionRefusedError

NOBODY = 65534
NO_SUCH_AEAD = "rfc4106(none(aes))"
KEY = bytes(range(1, 37))
A, B = ip_address("10.0.0.1"), ip_address("10.0.0.2")
FROM_A = Selector(ip_network("10.0.0.1"), ip_network("10.0.0.2"))
FROM_B = Selector(ip_network("10.0.0.2"), ip_network("10.0.0.1"))
PINNED = Policy(FROM_A, Direction.OUT, Action.ALLOW, 1000, 41, (Template(20481, spi=0x1234),))


def ip(*words: str, stdin: str | None = None) -> str:
    """Run iproute2 in this namespace. It blocks the loop, which some tests want."""
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, input=stdin)
    return done.stdout


async def soon(awaitable: Coroutine[object, object, object]) -> object:
    async with asyncio.timeout(10):
        return await awaitable


async def next_of(events: XfrmEvents, *kinds: type) -> object:
    """Wait for the next event of one of these kinds."""
    async with asyncio.timeout(10):
        async for event in events:
            if isinstance(event, kinds):
                return event
    raise AssertionError("the events ended")


def sa(**changes: object) -> Sa:
    values: dict[str, object] = {
        "source": A,
        "destination": B,
        "spi": 0x10000001,
        "reqid": 7,
        "aead": Aead(NO_SUCH_AEAD, KEY),
        "direction": Direction.OUT,
        "selector": FROM_A,
    }
    return Sa(**(values | changes))


@in_namespace
async def test_policies_are_added_updated_read_and_deleted() -> None:
    marked = replace(PINNED, direction=Direction.OUT, priority=10, index=49, mark=Mark(3))
    block = Policy(FROM_B, Direction.IN, Action.BLOCK, 2000, 40)
    async with XfrmSocket() as kernel:
        for policy in (PINNED, marked, block):
            await kernel.add_policy(policy)
        assert {info.policy for info in await kernel.policies()} == {PINNED, marked, block}
        assert all(info.lifetime == Lifetime() for info in await kernel.policies())
        assert await kernel.spd_info() == SpdInfo(1, 2, 0, 0, 0, 0)
        switched = replace(PINNED, priority=900, templates=(Template(20481, spi=0x5678),))
        await kernel.update_policy(switched)
        assert {info.policy for info in await kernel.policies()} == {switched, marked, block}
        await kernel.delete_policy(replace(marked, index=0))
        await kernel.delete_policy(block)
        assert [info.policy for info in await kernel.policies()] == [switched]


def many(count: int) -> list[Policy]:
    sources = (ip_network(f"10.1.{number >> 8}.{number & 255}") for number in range(count))
    return [
        Policy(Selector(source, ip_network(B)), Direction.OUT, Action.BLOCK, number, number + 1 << 3 | Direction.OUT)
        for number, source in enumerate(sources)
    ]


@in_namespace
async def test_many_policies_are_added_in_their_order_and_a_refused_one_is_named() -> None:
    wanted = many(300)
    async with XfrmSocket() as kernel:
        await kernel.add_policies(wanted)
        # The kernel lists the newest first.
        assert [info.policy for info in await kernel.policies()] == wanted[::-1]
        more = [replace(policy, direction=Direction.IN, index=policy.index & ~7) for policy in wanted[:200]]
        refused = replace(more[150], selector=replace(more[150].selector, source_port_mask=0xFFFF), priority=1)
        bad = replace(refused, index=refused.index | 2)  # the direction in its index is another
        with pytest.raises(XfrmError, match="Invalid argument") as caught:
            await kernel.add_policies([*more[:150], bad, *more[150:]])
        assert str(bad) in str(caught.value)
        there = {info.policy for info in await kernel.policies()}
        assert there >= set(more[:150])
        await kernel.add_policies([policy for policy in more if policy not in there])
        assert {info.policy for info in await kernel.policies()} == {*wanted, *more}


@in_namespace
async def test_a_tables_fingerprint_is_that_of_its_policies_and_not_of_what_passed() -> None:
    ip("link", "set", "lo", "up")
    passing = Policy(FROM_A, Direction.OUT, Action.ALLOW, 1000, 41)
    async with XfrmSocket() as kernel:
        await kernel.add_policy(passing)
        before = await kernel.policy_table()
        ip("addr", "add", f"{A}/32", "dev", "lo")
        ip("route", "add", f"{B}/32", "dev", "lo")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((str(A), 0))
            sender.sendto(b"x", (str(B), 9))
        after = await kernel.policy_table()
        assert after.fingerprint == before.fingerprint
        await kernel.update_policy(replace(passing, priority=999))
        assert (await kernel.policy_table()).fingerprint != before.fingerprint
        await kernel.update_policy(passing)
        assert (await kernel.policy_table()).fingerprint == before.fingerprint
        assert [info.policy for info in after.policies()] == [passing]


@in_namespace
async def test_an_index_outlives_an_update_without_one_and_decides_a_deletion() -> None:
    async with XfrmSocket() as kernel:
        await kernel.add_policy(PINNED)
        await kernel.update_policy(replace(PINNED, index=0, action=Action.BLOCK, templates=()))
        (info,) = await kernel.policies()
        assert (info.policy.index, info.policy.action) == (41, Action.BLOCK)
        elsewhere = Selector(ip_network("10.9.9.9"), ip_network("10.9.9.8"))
        await kernel.delete_policy(replace(PINNED, selector=elsewhere))
        assert await kernel.policies() == []


@in_namespace
async def test_a_taken_index_gets_another() -> None:
    async with XfrmSocket() as kernel:
        await kernel.add_policy(PINNED)
        await kernel.add_policy(replace(PINNED, selector=Selector(ip_network("10.0.0.3"), ip_network("10.0.0.4"))))
        first, second = sorted(info.policy.index for info in await kernel.policies())
        assert first == 41 or second == 41
        assert first != second


COMMANDS = {
    "src 10.0.0.1/32 dst 10.0.0.2/32 dir out priority 1000 index 41 mark 0x3 mask 0xffffffff "
    "tmpl proto esp spi 0x1234 reqid 20481 mode transport": replace(PINNED, mark=Mark(3)),
    "src 10.0.0.2/32 dst 10.0.0.1/32 dir in priority 1000 index 48 tmpl proto esp reqid 20481 mode transport": Policy(
        FROM_B, Direction.IN, Action.ALLOW, 1000, 48, (Template(20481),)
    ),
    "src fd00::1/128 dst fd00::2/128 proto ipv6-icmp type 135 dir out priority 100 index 57": Policy(
        Selector(ip_network("fd00::1"), ip_network("fd00::2"), 58, source_port=135, source_port_mask=0xFFFF),
        Direction.OUT,
        Action.ALLOW,
        100,
        57,
    ),
    "src 0.0.0.0/0 dst 10.0.0.0/24 proto tcp dport 6379 dir fwd action block priority 2000 index 66": Policy(
        Selector(
            ip_network("0.0.0.0/0"),
            ip_network("10.0.0.0/24"),
            6,
            destination_port=6379,
            destination_port_mask=0xFFFF,
        ),
        Direction.FORWARD,
        Action.BLOCK,
        2000,
        66,
    ),
    "src 10.1.0.0/16 dst 10.2.0.0/16 dir out priority 7 index 73 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 9 "
    "mode tunnel": Policy(
        Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")),
        Direction.OUT,
        Action.ALLOW,
        7,
        73,
        (Template(9, mode=Mode.TUNNEL, source=ip_address("192.0.2.1"), destination=ip_address("192.0.2.2")),),
    ),
}


def printed(text: str) -> str:
    return re.sub(r"add \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "add TIME", text)


@in_namespace
async def test_iproute2_prints_the_same_of_our_policies_as_of_its_own() -> None:
    async with XfrmSocket() as kernel:
        for policy in COMMANDS.values():
            await kernel.add_policy(policy)
        ours = ip("-d", "xfrm", "policy")
    unshare(CLONE_NEWNET)
    for command in COMMANDS:
        ip("xfrm", "policy", "add", *command.split())
    assert printed(ours) == printed(ip("-d", "xfrm", "policy"))
    assert ours.count("src ") > len(COMMANDS)
    async with XfrmSocket() as kernel:  # and we read its policies as the values that ours are written from
        assert {info.policy for info in await kernel.policies()} == set(COMMANDS.values())


@in_namespace
async def test_a_weakened_or_limited_policy_is_seen() -> None:
    async with XfrmSocket() as kernel:
        await kernel.add_policy(PINNED)
        words = (
            "src 10.0.0.1 dst 10.0.0.2 dir out priority 1000 limit time-hard 600 tmpl proto esp spi 0x1234 reqid 20481"
        )
        ip("xfrm", "policy", "update", *words.split(), "mode", "transport", "level", "use")
        (info,) = await kernel.policies()
        assert info.policy != PINNED
        assert info.policy.templates[0].optional
        assert info.lifetime == Lifetime(hard_seconds=600)


def connect_namespace() -> None:
    """Make an interface whose other end swallows what is sent to 10.0.0.2."""
    ip("link", "add", "va", "type", "veth", "peer", "name", "vb")
    for name in ("va", "vb"):
        ip("link", "set", name, "up")
    ip("addr", "add", "10.0.0.1/24", "dev", "va")
    ip("neigh", "add", "10.0.0.2", "lladdr", "02:00:00:00:00:02", "dev", "va", "nud", "permanent")


def send_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((str(A), 0))
        sender.sendto(b"x", (str(B), 9))


@in_namespace
async def test_block_refuses_a_packet_and_the_marked_policy_is_another() -> None:
    connect_namespace()
    send_datagram()
    async with XfrmSocket() as kernel:
        block = Policy(FROM_A, Direction.OUT, Action.BLOCK, 100, 41)
        await kernel.add_policy(replace(block, mark=Mark(3)))
        send_datagram()
        await kernel.add_policy(replace(block, index=49))
        with pytest.raises(PermissionError):
            send_datagram()
        await kernel.delete_policy(replace(block, index=49))
        send_datagram()
        with pytest.raises(MissingError):
            await kernel.delete_policy(replace(block, index=0))
        await kernel.delete_policy(replace(block, index=0, mark=Mark(3)))


@in_namespace
async def test_a_packet_without_an_sa_is_an_acquire() -> None:
    connect_namespace()
    async with XfrmSocket() as kernel, XfrmEvents(acquire=True) as events:
        await kernel.add_policy(replace(PINNED, templates=(Template(77),)))
        send_datagram()
        acquire = await next_of(events, Acquire)
        assert isinstance(acquire, Acquire)
        assert (acquire.pid, acquire.source, acquire.destination) == (0, A, B)
        assert acquire.selector.destination_port == 9
        assert acquire.policy.policy == replace(PINNED, templates=(Template(77),))
        (larval,) = await kernel.sas()
        assert (larval.larval, larval.spi, larval.reqid) == (True, 0, 77)


@in_namespace
async def test_events_say_who_did_it() -> None:
    async with XfrmSocket() as kernel, XfrmSocket() as other, XfrmEvents() as events:
        await kernel.add_policy(PINNED)
        changed = await next_of(events, PolicyChanged)
        assert (changed.pid, changed.info.policy) == (kernel.pid, PINNED)
        await other.update_policy(replace(PINNED, priority=5))
        changed = await next_of(events, PolicyChanged)
        assert (changed.pid, changed.info.policy.priority) == (other.pid, 5)
        assert kernel.pid != other.pid
        ip("xfrm", "policy", "update", "src", "10.0.0.1", "dst", "10.0.0.2", "dir", "out", "priority", "6")
        changed = await next_of(events, PolicyChanged)
        assert changed.pid not in (kernel.pid, other.pid)
        await kernel.delete_policy(PINNED)
        deleted = await next_of(events, PolicyDeleted)
        assert (deleted.pid, deleted.info.policy.index) == (kernel.pid, 41)


@in_namespace
async def test_a_foreign_flush_is_noticed() -> None:
    async with XfrmSocket() as kernel, XfrmEvents() as events:
        await kernel.add_policy(PINNED)
        await kernel.alloc_spi(A, B, 7, 0x1000, 0x1FFF)
        ip("xfrm", "policy", "flush")
        assert await next_of(events, PolicyFlushed) == PolicyFlushed(0, sub=False)
        ip("xfrm", "state", "flush")
        flushed = await next_of(events, SaFlushed)
        assert flushed.pid == 0
        assert await kernel.policies() == []


@in_namespace
async def test_the_expiry_of_a_policy_is_an_event() -> None:
    async with XfrmEvents() as events:
        ip("xfrm", "policy", "add", "src", "10.0.0.1", "dst", "10.0.0.2", "dir", "out", "limit", "time-hard", "1")
        expired = await next_of(events, PolicyExpired)
        assert (expired.pid, expired.hard, expired.info.policy.selector) == (0, True, FROM_A)


def many_policies(count: int) -> str:
    """Return `ip -batch` lines that add as many policies."""
    return "".join(
        f"xfrm policy update src 10.1.{n >> 8}.{n & 255} dst 10.0.0.2 dir out priority 9\n" for n in range(count)
    )


@in_namespace
async def test_lost_events_are_an_overrun_and_the_next_ones_arrive() -> None:
    async with XfrmSocket() as kernel, XfrmEvents(receive_buffer=4096) as events:
        ip("-batch", "-", stdin=many_policies(3000))  # the loop stands still meanwhile: the kernel's buffer runs over
        assert await next_of(events, Overrun) == Overrun("No buffer space available")
        assert len(await kernel.policies()) == 3000
        await kernel.add_policy(PINNED)
        changed = await next_of(events, PolicyChanged)
        assert (changed.pid, changed.info.policy.selector) == (kernel.pid, FROM_A)


@in_namespace
async def test_a_reader_that_falls_too_far_behind_gets_an_overrun() -> None:
    xfrm_netlink.QUEUE_LIMIT = 100  # in this child only
    async with XfrmSocket() as kernel, XfrmEvents() as events:
        core = events._core
        batch = await asyncio.create_subprocess_exec("ip", "-batch", "-", stdin=subprocess.PIPE)
        await batch.communicate(many_policies(300).encode())  # the loop goes on, the reader does not
        async with asyncio.timeout(10):
            while not core._overrun:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0)
        assert await soon(anext(events)) == Overrun("No buffer space available")
        await kernel.add_policy(PINNED)
        assert isinstance(await soon(anext(events)), PolicyChanged)


@in_namespace
async def test_all_of_a_large_table_is_read() -> None:
    async with XfrmSocket() as kernel:
        ip("-batch", "-", stdin=many_policies(4000))
        sources = {info.policy.selector.source for info in await kernel.policies()}
        assert len(sources) == 4000


@in_namespace
async def test_only_the_kernel_is_believed() -> None:
    async with XfrmSocket() as kernel, XfrmEvents() as events:
        port, _ = events._core.socket.getsockname()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as forger:
            forger.sendto(abi.HEADER.pack(16, abi.Message.FLUSHPOLICY, 0, 0, 0), (port, 0))
        await kernel.add_policy(PINNED)
        assert isinstance(await soon(anext(events)), PolicyChanged)


@in_namespace
async def test_errors_say_what_they_are() -> None:
    async with XfrmSocket() as kernel:
        await kernel.add_policy(PINNED)
        with pytest.raises(
            AlreadyExistsError, match=r"cannot add policy out 10\.0\.0\.1/32 -> 10\.0\.0\.2/32 index 41"
        ):
            await kernel.add_policy(replace(PINNED, priority=1))
        with pytest.raises(MissingError) as missing:
            await kernel.delete_policy(replace(PINNED, index=0, mark=Mark(9)))
        assert missing.value.errno == errno.ENOENT
        with pytest.raises(MissingError) as missing:
            await kernel.delete_sa(B, 0x1234)
        assert missing.value.errno == errno.ESRCH
        with pytest.raises(MissingError):
            await kernel.get_sa(B, 0x1234)
        with pytest.raises(XfrmError) as refused:
            await kernel.add_policy(replace(PINNED, index=40, selector=FROM_B))  # an index of direction IN
        assert refused.value.errno == errno.EINVAL
        assert await kernel.spd_info() == SpdInfo(0, 1, 0, 0, 0, 0)  # and the socket goes on


def become_nobody() -> None:
    """Lose CAP_NET_ADMIN: as uid 65534, or by leaving for a user namespace that has no say in this one."""
    try:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        unshare(CLONE_NEWUSER)


@in_namespace
async def test_without_the_capability_everything_is_refused() -> None:
    become_nobody()
    async with XfrmSocket() as kernel:
        for request in (kernel.policies(), kernel.sas(), kernel.add_policy(PINNED), kernel.add_sa(sa())):
            with pytest.raises(NotPermittedError, match="CAP_NET_ADMIN") as refused:
                await request
            assert isinstance(refused.value, PermissionRefusedError)
            assert refused.value.exit_status == EXIT_NO_PERMISSION
    with pytest.raises(NotPermittedError, match="listen to the XFRM events"):
        await XfrmEvents().__aenter__()


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """Yield every frame that an exception keeps alive, outside of this file."""
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None:
            continue
        pending += [current.__cause__, current.__context__]
        step: TracebackType | None = current.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename != __file__:
                yield step.tb_frame
            step = step.tb_next


def shown(value: object) -> str:
    """Return what a crash report could show of a local variable: its repr, and bytes of it and inside of it."""
    inside = [getattr(value, name, b"") for name in ("data", "body")]
    return repr(value) + "".join(bytes(part).hex() for part in (value, *inside) if isinstance(part, (bytes, bytearray)))


@in_namespace
async def test_a_refused_sa_leaves_no_trace_of_its_key() -> None:
    log = io.StringIO()
    logging.root.addHandler(logging.StreamHandler(log))
    logging.root.setLevel(logging.DEBUG)
    logging.getLogger("test").debug("everything is logged")
    async with XfrmSocket() as kernel:
        for request in (kernel.add_sa, kernel.update_sa):
            for direction in (Direction.OUT, Direction.IN):
                with pytest.raises(NotSupportedError) as refused:
                    await request(sa(direction=direction))
                error = refused.value
                assert error.errno == errno.ENOSYS
                assert error.kernel_text == "Requested AEAD algorithm not found"
                texts = [str(error), repr(error), repr(error.__dict__)]
                texts += [shown(value) for frame in frames_of(error) for value in frame.f_locals.values()]
                assert len(texts) > 10
                text = "\n".join(texts) + log.getvalue()
                for part in (KEY[:8], KEY[8:16], KEY[-8:]):
                    assert part.hex() not in text
                    assert repr(part)[2:-1] not in text
    assert "everything is logged" in log.getvalue()
    assert "enqueue" not in log.getvalue()  # pyroute2's word at DEBUG for each datagram


@in_namespace
async def test_the_probe_finds_no_aead_that_does_not_exist() -> None:
    async with XfrmSocket() as kernel:
        assert NO_SUCH_AEAD not in await probe_esp(kernel, [NO_SUCH_AEAD])
        assert await kernel.sas() == []


@in_namespace
async def test_an_spi_is_reserved_once() -> None:
    async with XfrmSocket() as kernel:
        spis = [await kernel.alloc_spi(A, B, 7, spi, spi) for spi in (0x1000, 0x1001)]
        assert spis == [0x1000, 0x1001]
        with pytest.raises(MissingError, match="from 0x1000 to 0x1000"):
            await kernel.alloc_spi(A, B, 7, 0x1000, 0x1000)
        assert await kernel.sad_count() == 3  # what was refused is there too, without an SPI
        assert {(i.spi, i.larval, i.source, i.destination, i.reqid) for i in await kernel.sas()} == {
            (spi, True, A, B, 7) for spi in (0, *spis)
        }
        assert (await kernel.get_sa(B, 0x1000)).lifetime.hard_seconds > 0
        await kernel.delete_sa(B, 0x1000)
        v6 = await kernel.alloc_spi(ip_address("fd00::1"), ip_address("fd00::2"), 8, 0x2000, 0xFFFFFFFF)
        assert (await kernel.get_sa(ip_address("fd00::2"), v6)).source == ip_address("fd00::1")


@in_namespace
async def test_requests_at_once_get_their_own_answers() -> None:
    async with XfrmSocket() as kernel:
        policies = [replace(PINNED, index=0, mark=Mark(number)) for number in range(1, 301)]
        await asyncio.gather(*(kernel.add_policy(policy) for policy in policies))
        tables = await asyncio.gather(*(kernel.policies() for _ in range(5)), kernel.spd_info(), kernel.sad_count())
        assert [len(table) for table in tables[:5]] == [300] * 5
        assert tables[5:] == [SpdInfo(0, 300, 0, 0, 0, 0), 0]


@in_namespace
async def test_a_cancelled_or_timed_out_request_spoils_nothing() -> None:
    async with XfrmSocket() as kernel:
        await kernel.add_policy(PINNED)
        reading = asyncio.create_task(kernel.policies())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert [info.policy for info in await kernel.policies()] == [PINNED]
    async with XfrmSocket(timeout=0) as kernel:
        with pytest.raises(XfrmError, match="timed out"):
            await kernel.policies()


@in_namespace
async def test_closing_twice_is_closing_once() -> None:
    kernel, events = XfrmSocket(), XfrmEvents()
    await events.__aenter__()
    waiting = asyncio.create_task(anext(events, None))
    await asyncio.sleep(0)
    await kernel.policies()
    for thing in (kernel, events):
        thing.close()
        thing.close()
    assert await soon(asyncio.wait_for(waiting, 10)) is None
    with pytest.raises(XfrmError, match="the socket is closed"):
        await kernel.policies()
    assert await anext(events, None) is None


@in_namespace
async def test_a_wait_that_is_cut_off_loses_no_event() -> None:
    async with XfrmSocket() as kernel, XfrmEvents() as events:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(events)
        await kernel.add_policy(PINNED)
        await kernel.delete_policy(PINNED)
        assert isinstance(await soon(anext(events)), PolicyChanged)
        assert isinstance(await soon(anext(events)), PolicyDeleted)
