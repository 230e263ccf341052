"""`srd close` in a real kernel: what it closes a node to, before any srd runs."""

from __future__ import annotations

import asyncio
import datetime as dt
import tempfile
from ipaddress import ip_address
from pathlib import Path

from support.clusters import dual_stack_toml, make_bundles, paths_of
from support.namespace import in_namespace

from srd import closing
from srd.ipsec import xfrm
from srd.model import Identity, NodeKind, Paths
from srd.roster import Roster

CLIENT = (ip_address("192.0.2.40"), ip_address("2001:db8::40"))


def made(root: Path) -> Paths:
    """A node of three whose srd has let a client in."""
    bundles = make_bundles(root, dual_stack_toml(3))
    paths = paths_of(root, "redis-1")
    paths.state_dir.mkdir(parents=True)
    not_after = dt.datetime.now(dt.UTC).timestamp() + 3600
    identity = Identity("orders", "app-1", NodeKind.CLIENT, CLIENT, serial=7, not_after=not_after)
    Roster(paths).admit(identity, bundles["redis-1"].config, 0.0)
    return paths


@in_namespace
async def test_a_node_is_closed_to_its_peers_and_to_clients_that_were_let_in_without_keys() -> None:
    with tempfile.TemporaryDirectory() as root:
        said = await closing.close(await asyncio.to_thread(made, Path(root)))
    assert said.startswith("redis-1 is closed to plaintext with 3 peers")
    async with xfrm.XfrmSocket() as kernel:
        policies = [info.policy for info in await kernel.policies()]
    for address in (*CLIENT, ip_address("192.0.2.2"), ip_address("2001:db8::3")):
        out = [
            policy
            for policy in policies
            if policy.direction is xfrm.Direction.OUT
            and policy.selector.destination.network_address == address
            and not policy.selector.protocol
        ]
        assert [len(policy.templates) for policy in out] == [1], address
