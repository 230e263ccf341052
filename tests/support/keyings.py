"""Keying between real nodes on loopback: everything real but the kernel, which each test brings along."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Set as AbstractSet
from typing import Protocol

import msgspec

from srd.ipsec.exchange import Installer
from srd.ipsec.keying import Keying
from srd.model import Body, Identity, IpsecMode, Role, Suite
from srd.reconcile import boottime
from srd.state import PeerReport, Store
from srd.trust.authority import identify
from srd.trust.bundle import Bundle
from support.clusters import nobody_asks, nobody_joins

SOFTWARE_AES = {Suite.AES_256_GCM: 1, Suite.CHACHA20_POLY1305: 2}
FAST_AES = {Suite.AES_256_GCM: 3, Suite.CHACHA20_POLY1305: 2}


class Installers(Protocol):
    """Each node's kernel."""

    def of(self, node: str) -> Installer: ...


class Remembered:
    """By which certificates keys were made, in memory."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.of = self.known.get
        self.note = self.known.__setitem__


def esp(bundle: Bundle) -> Bundle:
    """Return the bundle with ipsec.mode on: loopback addresses are refused by the file, but key as any other."""
    section = msgspec.structs.replace(bundle.config.ipsec, mode=IpsecMode.ESP)
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, ipsec=section))


def keying_of(
    bundle: Bundle,
    installers: Installers,
    grades: dict[Suite, int],
    wanting: AbstractSet[str] = frozenset(),
    *,
    join: Callable[[Identity], Awaitable[None]] = nobody_joins,
    answer: Callable[[str, str, Body], Awaitable[Body]] = nobody_asks,
) -> tuple[Keying, Store]:
    """Return a node's keying and its store; it wants new keys with the peers that are in `wanting`."""
    store = Store(boottime())
    keying = Keying(
        config=bundle.config,
        node=bundle.node,
        credentials=bundle.credentials,
        identify=identify,
        boot_id=f"boot-of-{bundle.node.name}",
        grades=grades,
        installer=installers.of(bundle.node.name),
        store=store,
        report=lambda: PeerReport(
            bundle.node.name, boottime(), "0.1.0", initialized=False, role=Role.UNKNOWN, healthy=False
        ),
        wants_keys=lambda peer: peer in wanting,
        mark=None,
        serials=Remembered(),
        join=join,
        answer=answer,
    )
    return keying, store


@contextlib.asynccontextmanager
async def running(*keyings: Keying) -> AsyncIterator[None]:
    """Have them listen and connect meanwhile."""
    listeners = [keying.listen() for keying in keyings]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keying.run(bound)) for keying, bound in zip(keyings, listeners, strict=True)]
            yield
            for task in tasks:
                task.cancel()
    finally:
        for bound in listeners:
            for listener in bound:
                listener.close()
