"""Services on real redis, sentinel and stunnel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import redis.exceptions
from support.nodes import PATIENCE, QUICK, Member, Supervised, eventually, freeze, world

from srd.desired import Start
from srd.ha.lease import endpoint_of
from srd.ha.redis import RedisClient
from srd.model import Pause, Role, Service
from srd.reconcile import boottime
from srd.state import ChildState, Redis, Store, Symptom
from srd.supervise.adopt import MARKER_NAME, REGISTER_NAME
from srd.supervise.programs import check_endpoint, check_ports, listen_endpoints
from srd.supervise.services import KEEPING_SECONDS


def shown_to_all(pid: int | None) -> bytes:
    """Return what every user of the machine, or its owner, may read of a process' start."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


def status_of(pid: int | None) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def processes_below(directory: Path) -> int:
    """Count the processes that work in a directory or below: the children of one node."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found += (entry / "cwd").readlink().is_relative_to(directory)
        except OSError:  # it has ended
            continue
    return found


async def test_a_node_comes_up_in_order_and_a_second_pass_changes_nothing() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            view = await node.all_ready()
            started = [view.children[service].started for service in Service]
            assert started == sorted(started, key=lambda moment: moment or 0)
            await node.until(lambda view: view.initialized)
            before, view = node.pids(), node.store.view()
            await node.services.reconcile()
            await node.services.reconcile()
            assert node.pids() == before
            assert node.store.view() == view


@pytest.mark.parametrize("service", list(Service))
async def test_a_killed_child_is_back_with_another_pid(service: Service) -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            old = node.pid(service)
            os.kill(old, signal.SIGKILL)
            await node.until(lambda view: view.children[service].pid not in (old, None))
            view = await node.all_ready()
            child = view.children[service]
            assert child.restarts == 1
            assert child.exits == {"SIGKILL": 1}
            assert child.last_exit == "killed by SIGKILL"
            assert [view.children[other].restarts for other in Service if other is not service] == [0, 0]


@pytest.mark.parametrize("service", list(Service))
async def test_a_child_that_was_stopped_by_a_signal_goes_on(service: Service) -> None:
    with world() as (member,):
        async with member.supervised(replace(QUICK, probe_timeout=0.5)) as node:
            await node.all_ready()
            before = node.pids()
            freeze(node.pid(service))
            await node.until(lambda view: view.children[service].symptom is Symptom.STOPPED)
            await node.until(lambda view: view.children[service].symptom is None)
            await node.all_ready()
            assert node.pids() == before


async def test_a_deposed_primary_that_was_stopped_takes_no_more_writes() -> None:
    with world() as (member,):
        async with member.supervised(replace(QUICK, probe_timeout=0.5)) as node:
            await node.all_ready()
            async with dialled(member) as (reader, writer):
                member.deposed = True
                freeze(node.pid(Service.REDIS))
                writer.write(b"SET late 1\r\n")
                await node.until(lambda view: view.children[Service.REDIS].exits == {"silent": 1})
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            member.deposed = False
            await node.all_ready()
            assert await member.ask("GET", "late") is None


@contextlib.asynccontextmanager
async def dialled(member: Member) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection to redis by hand, where nothing is said twice."""
    endpoint = listen_endpoints(member.config, member.node, Service.REDIS)[0]
    reader, writer = await asyncio.open_connection(str(endpoint.address), endpoint.port)
    try:
        writer.write(f"AUTH srd {member.secrets.srd_password.reveal()}\r\n".encode())
        assert await reader.readline() == b"+OK\r\n"
        yield reader, writer
    finally:
        writer.transport.abort()


async def ends_script(member: Member, over: asyncio.Future[bytes]) -> bool:
    async with dialled(member) as (reader, writer):
        writer.write(b"SCRIPT KILL\r\n")
        await reader.readline()
    return over.done()


async def test_written_data_survives_a_kill_of_redis() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            await member.ask("SET", "key", "value")
            os.kill(node.pid(Service.REDIS), signal.SIGKILL)
            await node.until(lambda view: view.children[Service.REDIS].restarts == 1)
            await node.all_ready()
            assert await member.ask("GET", "key") == "value"


async def test_a_node_with_both_families_serves_both() -> None:
    with world(edit=lambda text: text.replace('["127.0.1.1"]', '["127.0.1.1", "::1"]')) as (member,):
        async with member.supervised() as node:
            await node.all_ready()  # the probe of stunnel makes a handshake with each address
            assert check_ports(member.config, member.node, member.paths) == []
            for service in Service:
                for endpoint in listen_endpoints(member.config, member.node, service):
                    assert check_endpoint(endpoint) is not None


async def test_an_arbiter_runs_a_sentinel_only_which_watches_the_first_redis_node() -> None:
    arbiter = 'addresses = ["127.0.1.2"]\nkind = "sentinel"'
    with world(nodes=3, edit=lambda text: text.replace('addresses = ["127.0.1.2"]', arbiter)) as members:
        member = members[1]
        member.start = Start()
        async with member.supervised() as node:
            view = await node.until(lambda view: view.initialized)
            assert set(view.children) == {Service.SENTINEL}
            name = member.config.sentinel.master
            command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
            named = await member.ask(*command, service=Service.SENTINEL)
            assert named == ["127.0.1.1", str(member.config.redis.port)]
            assert sorted(path.name for path in member.paths.state_dir.iterdir()) == ["initialized", "sentinel"]


async def test_children_end_in_order_and_nothing_is_started_after_that() -> None:
    ends: list[Service] = []
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()

            def note() -> None:
                for service, child in node.store.view().children.items():
                    if child.state is ChildState.STOPPED and service not in ends:
                        ends.append(service)

            node.store.on_change(note)
            await node.services.stop_all()
            assert ends == [Service.STUNNEL, Service.SENTINEL, Service.REDIS]
            assert {child.last_exit for child in node.store.view().children.values()} == {"exit status 0"}
            await node.services.reconcile()
            assert set(node.pids().values()) == {None}
            assert json.loads((member.paths.run_dir / REGISTER_NAME).read_text())["children"] == []


async def test_a_frozen_child_is_killed_after_its_grace_and_the_others_end_well() -> None:
    with world(redis_extra="stop_grace = 0.5") as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            assert [node.services.grace(service) for service in Service] == [0.5, 5, 2]
            freeze(node.pid(Service.REDIS))
            await node.services.stop_all()
            children = node.store.view().children
            assert children[Service.REDIS].last_exit == "killed by SIGKILL"
            assert children[Service.STUNNEL].last_exit == children[Service.SENTINEL].last_exit == "exit status 0"


async def test_a_redis_that_is_busy_with_a_script_is_shown_as_degraded_and_left_alone() -> None:
    with world() as (member,):
        async with member.supervised(replace(QUICK, hung_after=2)) as node:
            await node.all_ready()
            pid = node.pid(Service.REDIS)
            async with dialled(member) as (result, script):
                script.write(b'EVAL "while true do end" 0\r\n')
                await node.until(lambda view: view.children[Service.REDIS].symptom is Symptom.SLOW)
                # It listens to this after 5 s (busy-reply-threshold): it is silent for longer than a hung one may be.
                over = asyncio.ensure_future(result.readline())
                await eventually(partial(ends_script, member, over), "redis ends its script")
                assert over.result().startswith(b"-ERR Script killed")
            await node.all_ready()
            assert node.pid(Service.REDIS) == pid


async def test_secrets_are_in_private_files_only() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            secrets = [
                secret.reveal().encode()
                for secret in (
                    member.secrets.redis_password,
                    member.secrets.replication_password,
                    member.secrets.sentinel_password,
                    member.secrets.srd_password,
                )
            ]
            for pid in node.pids().values():
                assert not any(secret in shown_to_all(pid) for secret in secrets)
            directories = [member.paths.service_dir(service) for service in Service]
            files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
            holders = {path.name for path in files if any(secret in path.read_bytes() for secret in secrets)}
            assert holders == {"redis.conf", "sentinel.conf"}
            logs = [path.read_bytes() for path in member.paths.log_dir.iterdir()]
            assert len(logs) == 3
            assert not any(secret in log for log in logs for secret in secrets)


async def test_each_child_is_its_own_user_in_its_own_directory_without_rights() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            for service, pid in node.pids().items():
                status = status_of(pid)
                directory = member.paths.service_dir(service).stat()
                assert stat.S_IMODE(directory.st_mode) == 0o700
                assert directory.st_uid != 0
                assert status["Uid"] == [str(directory.st_uid)] * 4
                assert status["Gid"] == [str(directory.st_gid)] * 4
                assert {status[key][0] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
                assert status["NoNewPrivs"] == ["1"]


async def test_redis_waits_while_it_is_not_known_as_what_it_may_start() -> None:
    with world() as (member,):
        member.start = Start(hold="the word of a majority of sentinels")
        async with member.supervised() as node:
            await node.loop.ready()
            children = node.store.view().children
            assert children[Service.REDIS].waiting_for == "the word of a majority of sentinels"
            assert {child.state for child in children.values()} == {ChildState.STOPPED}
            assert not member.paths.service_dir(Service.REDIS).exists()
            member.start = Start()
            node.loop.wake()
            await node.all_ready()


async def test_a_node_that_has_joined_starts_its_sentinel_before_redis_is_clear() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            await node.until(lambda view: view.initialized)
        assert stat.S_IMODE((member.paths.state_dir / MARKER_NAME).stat().st_mode) == 0o600
        identity = (member.paths.service_dir(Service.SENTINEL) / "sentinel.conf").read_text()
        member.start = Start(hold="the sentinels")
        async with member.supervised() as node:
            view = await node.until(
                lambda view: (
                    (child := view.children.get(Service.SENTINEL)) is not None and child.state is ChildState.READY
                )
            )
            assert view.initialized
            assert view.children[Service.REDIS].state is ChildState.STOPPED
            assert await member.ask("SENTINEL", "MYID", service=Service.SENTINEL) in identity


async def test_without_a_sentinel_conf_sentinel_waits_until_it_is_known_who_is_primary() -> None:
    with world() as (member,):
        member.paths.state_dir.mkdir(parents=True)
        (member.paths.state_dir / MARKER_NAME).touch()
        member.start = Start(hold="the sentinels")
        async with member.supervised() as node:
            view = await node.until(
                lambda view: (child := view.children.get(Service.SENTINEL)) is not None and child.last_exit is not None
            )
            assert "who is primary is not known: the sentinels" in (view.children[Service.SENTINEL].last_exit or "")


async def test_a_strangers_listener_is_named_and_left_alone() -> None:
    with world() as (member,), socket.create_server((str(member.node.address), member.config.redis.port)):
        async with member.supervised() as node:
            view = await node.until(
                lambda view: (child := view.children.get(Service.REDIS)) is not None and child.last_exit is not None
            )
            shown = view.children[Service.REDIS].last_exit or ""
            assert f"pid {os.getpid()} (" in shown
            assert f"{member.node.address}:{member.config.redis.port}" in shown


async def test_a_missing_tls_key_is_an_error_that_names_it_and_redis_runs() -> None:
    with world() as (member,):
        (member.paths.config_dir / "tls.key").unlink()
        async with member.supervised() as node:
            view = await node.until(lambda view: bool(view.children and view.children[Service.STUNNEL].last_exit))
            assert f"cannot read {member.paths.config_dir / 'tls.key'}" in (
                view.children[Service.STUNNEL].last_exit or ""
            )
            assert view.children[Service.REDIS].state is ChildState.READY


async def test_a_child_that_cannot_be_verified_is_neither_doubled_nor_ended() -> None:
    with world() as (member,):
        async with member.supervised(leave=True) as node:
            await node.all_ready()
            pids = node.pids()
        register = member.paths.run_dir / REGISTER_NAME
        whole = register.read_text()
        document = json.loads(whole)
        for record in document["children"]:
            record["pid"] = 1 if record["service"] == "redis" else record["pid"]
        register.write_text(json.dumps(document))
        try:
            async with member.supervised() as node:
                await node.loop.ready()
                child = node.store.view().children[Service.REDIS]
                assert child.state is ChildState.STOPPED
                assert "pid 1," in (child.waiting_for or "")
                assert child.restarts == 0
            redis_pid = pids[Service.REDIS]
            assert redis_pid is not None
            os.kill(redis_pid, 0)
        finally:
            register.write_text(whole)


async def test_restart_ends_one_child_and_it_comes_back_without_a_pause() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            before = node.pids()
            await node.services.restart(Service.STUNNEL)
            await node.until(lambda view: view.children[Service.STUNNEL].pid not in (before[Service.STUNNEL], None))
            await node.all_ready()
            after = node.pids()
            assert {service for service in Service if after[service] != before[service]} == {Service.STUNNEL}


async def test_a_random_walk_always_ends_with_everything_ready_once_each() -> None:
    choice = random.Random(20240101)
    with world(redis_extra="stop_grace = 1") as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            for _ in range(25):
                service = choice.choice(list(Service))
                pid = node.pids()[service]
                act = choice.choice(["kill", "term", "freeze", "pass", "restart"])
                if act == "restart":
                    await node.services.restart(service)
                elif act == "pass":
                    await node.services.reconcile()
                elif pid is not None and act == "freeze":
                    os.kill(pid, signal.SIGSTOP)
                    os.kill(pid, signal.SIGCONT)
                elif pid is not None:
                    os.kill(pid, signal.SIGKILL if act == "kill" else signal.SIGTERM)
                if choice.random() < 0.7:
                    await node.all_ready()
            await node.all_ready()
            await eventually(lambda: counts_one_of_each(member), "one process of each service")


async def counts_one_of_each(member: Member) -> bool:
    """Whether exactly one process was started from each configuration file of this node."""
    return processes_below(member.paths.state_dir.parent) == len(Service)


@contextlib.contextmanager
def memory_of(pid: int, more: int) -> Iterator[None]:
    """Let a process have so many bytes more than it has, and no others: the kernel kills it where it wants them."""
    parent = Path("/sys/fs/cgroup/memory")  # control groups version 1
    limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
    if not parent.is_dir():
        parent, limit, usage = parent.parent, "memory.max", "memory.current"
    group = parent / f"srd-test-{pid}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / limit).write_text(str(int((group / usage).read_text()) + more))
        yield
    finally:
        group.rmdir()


async def test_a_child_that_the_kernel_kills_for_want_of_memory_is_counted_as_that() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            before = node.pid(Service.REDIS)
            with memory_of(before, 32 << 20):
                with contextlib.suppress(redis.exceptions.ConnectionError):  # the client may ask the next one again
                    await member.ask("SETRANGE", "large", str(200 << 20), "x")
                view = await node.until(lambda view: view.children[Service.REDIS].pid not in (before, None))
            child = view.children[Service.REDIS]
            assert dict(child.exits) == {"oom": 1}
            assert child.last_exit == "the kernel was out of memory (killed by SIGKILL)"


async def test_cancelling_a_pass_loses_no_child() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            for _ in range(10):
                one = asyncio.ensure_future(node.services.reconcile())
                await asyncio.sleep(0)
                one.cancel()
                await asyncio.wait({one})
            await node.all_ready()
            await eventually(lambda: counts_one_of_each(member), "one process of each service")


async def test_during_a_pause_a_child_that_ends_stays_down_until_a_person_starts_it_or_ends_the_pause() -> None:
    with world() as (member,):
        async with member.supervised() as node:
            await node.all_ready()
            pause = node.store.writer("pause")
            pause(Pause(1, 60.0))
            for ended_by in ("restart", "resume"):
                os.kill(node.pid(Service.STUNNEL), signal.SIGKILL)
                view = await node.until(lambda view: view.children[Service.STUNNEL].waiting_for is not None)
                assert view.children[Service.STUNNEL].pid is None
                assert "the end of the pause" in (view.children[Service.STUNNEL].waiting_for or "")
                if ended_by == "restart":
                    await node.services.restart(Service.STUNNEL)
                else:
                    pause(Pause(2, 0.0))
                    node.loop.wake()
                await node.all_ready()


async def observed(node: Supervised, write: Callable[[Redis], None], *, role: Role) -> None:
    """Have it known what redis says of itself, once that is its role and nothing is under way."""
    client = RedisClient(endpoint_of(node.member.config, node.member.node), node.member.secrets)

    async def settled() -> bool:
        seen = await client.observe()
        write(seen)
        return seen.role is role and not seen.loading and seen.link_up is (role is Role.REPLICA)

    try:
        async with asyncio.timeout(PATIENCE):
            while not await settled():  # noqa: ASYNC110 - redis announces nothing
                await asyncio.sleep(0.05)
    finally:
        await client.close()
    await node.services.reconcile()


async def test_what_only_a_primary_had_is_kept_and_restarts_as_a_replica_do_not_push_it_out() -> None:
    with world(nodes=2) as (first, second):
        copies = second.paths.service_dir(Service.REDIS) / "kept"
        second.start = Start()
        async with first.supervised() as leading, second.supervised() as node:
            write = node.store.writer("redis")
            await leading.all_ready()
            await node.all_ready()
            await observed(node, write, role=Role.PRIMARY)
            await second.ask("SAVE")
            second.start = Start(primary=endpoint_of(first.config, first.node))
            for _ in range(2):
                await node.services.restart(Service.REDIS)
                await node.all_ready()
                await observed(node, write, role=Role.REPLICA)
                assert len(list(copies.iterdir())) == 1
                await second.ask("SAVE")
            second.start = Start()
            await node.services.restart(Service.REDIS)
            await node.all_ready()
            await observed(node, write, role=Role.PRIMARY)
            second.start = Start(primary=endpoint_of(first.config, first.node))
            await node.services.restart(Service.REDIS)
            await node.all_ready()
            assert len(list(copies.iterdir())) == 2
            await node.until(lambda view: view.kept == str(max(copies.iterdir())))


async def test_a_disk_that_hangs_does_not_keep_a_replaced_primary_from_following(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hanging, attempts = threading.Event(), []
    with world() as (member,):
        services = member.supervisor(lambda: None, Store(boottime()))
        monkeypatch.setattr(services._launcher.data, "keep", lambda: attempts.append(hanging.wait(30)))
        began = boottime()
        await services.keep_data()
        await services.keep_data()
        assert KEEPING_SECONDS * 2 <= boottime() - began < 15
        assert attempts == [], "and it is tried once at a time"
        hanging.set()
        await services.keep_data()
        assert attempts == [True]
        services.release()
