"""Clusters for tests: a cluster.toml's text, and real bundles made by the real authority."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from srd.config import node_entry
from srd.model import Body, Identity, Paths, RefusedError
from srd.trust.bundle import Bundle, load_bundle, write_bundles

NODES = ("redis-1", "redis-2", "redis-3")


def cluster_toml(*, name: str = "lab", nodes: int = 3, extra: str = "", mode: str = "off") -> str:
    """Return a cluster of nodes redis-1.. on 127.0.1.1.., which every Linux has without being told."""
    parts = [f'cluster = "{name}"\nlisten_localhost = false\n']
    parts += [
        f'[[node]]\nname = "redis-{number}"\naddresses = ["127.0.1.{number}"]\n' for number in range(1, nodes + 1)
    ]
    parts.append(f'[ipsec]\nmode = "{mode}"\n')
    return "\n".join(parts) + extra


def dual_stack_toml(nodes: int) -> str:
    """Return a cluster of nodes redis-1.. that are nowhere: 192.0.2.1.. and 2001:db8::1.., for documentation only."""
    return 'cluster = "orders"\n' + "".join(
        node_entry(f"redis-{number}", [f"192.0.2.{number}", f"2001:db8::{number}"]) for number in range(1, nodes + 1)
    )


def paths_of(root: Path, node: str) -> Paths:
    """Return a node's own directories under `root`; the configuration is its bundle."""
    return Paths(
        config_dir=root / "bundles" / node,
        state_dir=root / node / "state",
        run_dir=root / node / "run",
        log_dir=root / node / "log",
    )


def make_bundles(root: Path, text: str, now: dt.datetime | None = None) -> dict[str, Bundle]:
    """Write the bundles of a cluster under `root` and load each as its node would."""
    moment = now or dt.datetime.now(dt.UTC)
    config = write_bundles(text, root / "bundles", moment)
    return {node.name: load_bundle(paths_of(root, node.name), moment) for node in config.nodes}


async def nobody_joins(_identity: Identity) -> None:
    """Let no client in whom cluster.toml does not have: in the daemon's place, for a test that has no such client."""


async def nobody_asks(peer: str, topic: str, _body: Body) -> Body:
    """Answer no question of a peer: in the daemon's place, for a test that has nothing to be asked about."""
    raise RefusedError("answer", topic, f"{peer} has nothing to ask")
