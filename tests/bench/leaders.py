"""Many leaders in one process, each a node of its own with one peer: python -m leaders ROOT FIRST LAST.

Says READY, waits for a line, connects all, and says for each when both ends sent under its keys.
"""

# ruff: noqa: T201 - printing is how it tells
from __future__ import annotations

import asyncio
import datetime as dt
import logging
import sys
from pathlib import Path

import msgspec
import structlog
from support.clusters import nobody_asks, nobody_joins

from srd.config import parse_config
from srd.ipsec.exchange import Unprotected
from srd.ipsec.keying import Keying
from srd.model import Credentials, Identity, NodeKind, Role, Secret, Suite
from srd.reconcile import boottime
from srd.state import PeerReport, Store
from srd.trust.authority import Issued, identify, issue_node, make_authority

SERVER, SERVER_ADDRESS = "z", "127.2.0.1"
GRADES = {Suite.AES_256_GCM: 1, Suite.CHACHA20_POLY1305: 2}


class Paper(msgspec.Struct):
    """A node's certificate and key, as PEM."""

    certificate: bytes
    key: str


def name_of(number: int) -> str:
    return f"n{number:04}"


def address_of(number: int) -> str:
    return f"127.1.{number >> 8}.{number & 255}"


def toml(*numbers: int) -> str:
    nodes = [(name_of(number), address_of(number)) for number in numbers] + [(SERVER, SERVER_ADDRESS)]
    entries = "".join(f'[[node]]\nname = "{name}"\naddresses = ["{address}"]\n' for name, address in nodes)
    return f'cluster = "storm"\n{entries}[ipsec]\nmode = "off"\n'


def make(root: Path, numbers: range) -> None:
    """Issue a certificate for each node and the server."""
    now = dt.datetime.now(dt.UTC)
    authority = make_authority("storm", now)
    (root / "ca.crt").write_bytes(authority.certificate)
    for node in parse_config(toml(*numbers), "toml").nodes:
        issued: Issued = issue_node(authority, Identity("storm", node.name, node.kind, node.addresses), now)
        paper = Paper(issued.certificate, issued.key.reveal())
        (root / node.name).write_bytes(msgspec.msgpack.encode(paper))


class Forgetful:
    """Remembers no certificate."""

    def of(self, _peer: str) -> None:
        return None

    def note(self, _peer: str, _serial: int) -> None:
        return


def keying(root: Path, name: str, numbers: range) -> tuple[Keying, Store]:
    config = parse_config(toml(*numbers), "toml")
    node = config.node(name)
    paper = msgspec.msgpack.decode((root / name).read_bytes(), type=Paper)
    identity = Identity("storm", name, NodeKind.REDIS, node.addresses)
    store = Store(boottime())
    made = Keying(
        config=config,
        node=node,
        credentials=Credentials(identity, paper.certificate, Secret(paper.key), (root / "ca.crt").read_bytes()),
        identify=identify,
        boot_id=f"boot of {name}",
        grades=GRADES,
        installer=Unprotected(),
        store=store,
        report=lambda: PeerReport(name, boottime(), "0", initialized=False, role=Role.UNKNOWN, healthy=False),
        wants_keys=lambda _: False,
        mark=None,
        serials=Forgetful(),
        join=nobody_joins,
        answer=nobody_asks,
    )
    return made, store


def quiet() -> None:
    """Say nothing but what is asked for."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def lead(root: Path, numbers: range) -> None:
    made = [keying(root, name_of(number), range(number, number + 1)) for number in numbers]
    print("READY", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started = boottime()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one.run([])) for one, _ in made]
        for _, store in made:
            view = await store.wait_for(lambda view: view.channels[SERVER].connected, 120)
            established = view.channels[SERVER].established
            assert established is not None
            print(f"{established - started:.3f}", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    quiet()
    asyncio.run(lead(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3]))))
