"""Three nodes from rendered configuration: replication, Sentinel's own failover with the rights that it has, rejoin."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import redis.exceptions
from support.nodes import Member, eventually, world

from srd.desired import Start
from srd.model import Endpoint, Service


async def role_of(member: Member) -> list[Any]:
    try:
        return list(await member.ask("ROLE"))
    except redis.exceptions.ConnectionError:
        return ["down"]


async def primary_by(member: Member) -> str:
    name = member.config.sentinel.master
    address, _port = await member.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name, service=Service.SENTINEL)
    return str(address)


async def follows(member: Member, primary: Member) -> bool:
    role = await role_of(member)
    return role[:4] == ["slave", str(primary.node.address), primary.config.redis.port, "connected"]


async def sentinels_know_all(members: list[Member]) -> bool:
    for member in members:
        master = await member.ask("SENTINEL", "MASTER", member.config.sentinel.master, service=Service.SENTINEL)
        if isinstance(master, list):
            master = dict(zip(master[::2], master[1::2], strict=True))
        # INFO of the primary is asked every 10 s only; replicas that are not known yet cannot be promoted.
        known = (int(master["num-other-sentinels"]), int(master["num-slaves"]))
        if known != (len(members) - 1, len(members) - 1):
            return False
    return True


async def test_a_killed_primary_is_replaced_and_comes_back_as_a_replica() -> None:
    with world(nodes=3) as members:
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(member.supervised()) for member in members]
            for node in nodes:
                await node.all_ready()
            first, *others = members
            for other in others:
                await eventually(partial(follows, other, first), "replication")
                # As ha/observe.py does of a replica that is in step.
                await other.ask("CONFIG", "SET", "replica-priority", "100")
            await eventually(lambda: sentinels_know_all(members), "the sentinels to know one another")
            await first.ask("SET", "key", "before")
            assert await first.ask("WAIT", "2", "5000") == 2

            first.start = Start(hold="the sentinels")
            os.kill(nodes[0].pid(Service.REDIS), signal.SIGKILL)

            async def replaced() -> bool:
                named = {await primary_by(member) for member in members}
                return len(named) == 1 and named != {str(first.node.address)}

            await eventually(replaced, "another primary by the word of all sentinels")
            named = await primary_by(first)
            new = next(member for member in others if str(member.node.address) == named)
            third = next(member for member in others if member is not new)
            await eventually(lambda: follows(third, new), "the other replica to follow the new primary")
            assert (await role_of(new))[0] == "master"
            # Sentinel wrote its decision into redis.conf, as its user is allowed to.
            files = {m.node.name: (m.paths.service_dir(Service.REDIS) / "redis.conf").read_text() for m in others}
            assert f"replicaof {named} {new.config.redis.port}" in files[third.node.name]
            assert "\nreplicaof " not in files[new.node.name]

            first.start = Start(primary=Endpoint(new.node.address, new.config.redis.port))
            nodes[0].loop.wake()
            await eventually(lambda: follows(first, new), "the old primary to follow the new one")
            await new.ask("SET", "key", "after")
            assert await new.ask("WAIT", "2", "5000") == 2
            assert [await member.ask("GET", "key") for member in members] == ["after"] * 3


async def test_a_primary_without_replicas_takes_no_write() -> None:
    with world(nodes=3) as members:
        first = members[0]
        async with first.supervised() as node:
            await node.all_ready()
            try:
                await first.ask("SET", "key", "value")
            except redis.exceptions.ResponseError as error:
                assert str(error).startswith("NOREPLICAS")  # noqa: PT017 - the message is the point
            else:
                raise AssertionError


async def test_a_replica_that_cannot_read_its_append_only_file_begins_anew() -> None:
    with world(nodes=2) as members:
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(member.supervised()) for member in members]
            for node in nodes:
                await node.all_ready()
            primary, replica = members
            replica.start = replace(replica.start, led=True)
            await eventually(partial(follows, replica, primary), "replication")
            await primary.ask("SET", "key", "value")
            assert await primary.ask("WAIT", "1", "5000") == 1
            # Zeros before a command: what redis 7 leaves after a full disk.
            (log,) = replica.paths.service_dir(Service.REDIS).glob("appendonlydir/*.incr.aof")
            with log.open("ab") as file:
                file.write(bytes(20) + b"*1\r\n$4\r\nPING\r\n")
            os.kill(nodes[1].pid(Service.REDIS), signal.SIGKILL)
            await nodes[1].until(lambda view: view.children[Service.REDIS].restarts > 0)
            await nodes[1].all_ready()
            await eventually(partial(follows, replica, primary), "it to follow again")
            assert await replica.ask("GET", "key") == "value"
            (kept,) = replica.paths.service_dir(Service.REDIS).glob(f"kept/*/appendonlydir/{log.name}")
            assert bytes(20) in kept.read_bytes()
