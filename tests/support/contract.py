"""What the mesh relies on of a kernel's tables, as operations that give the same on the fake and on the real one."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Protocol

from srd.ipsec.xfrm import (
    Action,
    Aead,
    Direction,
    Mark,
    Policy,
    Sa,
    Selector,
    Template,
    XfrmError,
    XfrmSocket,
)
from support.kernel import FakeKernel

Kernel = FakeKernel | XfrmSocket

HOSTS = [ip_address(f"10.0.0.{number}") for number in range(1, 4)]
KEY = bytes(range(36))


class Operation(Protocol):
    async def __call__(self, kernel: Kernel) -> object: ...


def random_policy(rng: random.Random) -> Policy:
    direction = rng.choice([Direction.IN, Direction.OUT])
    source, destination = rng.sample(HOSTS, 2)
    port = rng.choice([0, 6379])
    return Policy(
        selector=Selector(
            ip_network(source),
            ip_network(destination),
            protocol=6 if port else 0,
            destination_port=port,
            destination_port_mask=0xFFFF if port else 0,
        ),
        direction=direction,
        action=rng.choice(list(Action)),
        priority=rng.choice([50, 100, 1000]),
        index=rng.choice([0, rng.randrange(0x15000000, 0x15000004) << 3 | direction]),
        templates=rng.choice([(), (Template(reqid=7, spi=rng.choice([0, 0x1234])),)]),
        mark=rng.choice([None, None, Mark(5)]),
    )


def random_sa(rng: random.Random) -> Sa:
    source, destination = rng.sample(HOSTS, 2)
    return Sa(
        source=source,
        destination=destination,
        spi=rng.choice([0x1001, 0x1002]),
        reqid=rng.choice([7, 8]),
        aead=Aead("rfc4106(gcm(aes))", KEY),
        direction=Direction.OUT,
        selector=Selector(ip_network(source), ip_network(destination)),
    )


async def policy_step(kernel: Kernel, policy: Policy, verb: str) -> str:
    """Apply one operation; return the kind of error that it ended with, or nothing."""
    try:
        if verb == "add":
            await kernel.add_policy(policy)
        elif verb == "update":
            await kernel.update_policy(policy)
        else:
            await kernel.delete_policy(replace(policy, index=0) if verb == "delete by selector" else policy)
    except XfrmError as error:
        return type(error).__name__
    return ""


async def sa_step(kernel: Kernel, sa: Sa, verb: str) -> str:
    try:
        if verb == "add":
            await kernel.add_sa(sa)
        else:
            await kernel.delete_sa(sa.destination, sa.spi)
    except XfrmError as error:
        return type(error).__name__
    return ""


async def policies_of(kernel: Kernel) -> set[Policy]:
    """Return the policies, each index that the kernel itself chose replaced by 0: how it counts is its own affair."""
    chosen = range(0x15000000 << 3, 0x16000000 << 3)
    return {
        info.policy if info.policy.index in chosen else replace(info.policy, index=0)
        for info in await kernel.policies()
    }


async def sas_of(kernel: Kernel) -> set[tuple[object, ...]]:
    return {(sa.source, sa.destination, sa.spi, sa.reqid, sa.aead, sa.selector) for sa in await kernel.sas()}


async def compare_policies(real: XfrmSocket, seed: int, steps: int = 60) -> None:
    rng, fake = random.Random(seed), FakeKernel()
    for _ in range(steps):
        policy = random_policy(rng)
        verb = rng.choice(["add", "add", "update", "delete by selector", "delete"])
        if verb == "delete" and policy.index == 0:
            continue
        assert await policy_step(fake, policy, verb) == await policy_step(real, policy, verb), (verb, policy)
        assert await policies_of(fake) == await policies_of(real), (verb, policy)


async def compare_sas(real: XfrmSocket, seed: int, steps: int = 60) -> None:
    rng, fake = random.Random(seed), FakeKernel()
    for _ in range(steps):
        sa, verb = random_sa(rng), rng.choice(["add", "add", "delete"])
        assert await sa_step(fake, sa, verb) == await sa_step(real, sa, verb), (verb, sa)
        assert await sas_of(fake) == await sas_of(real), (verb, sa)
