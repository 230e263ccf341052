"""What protects the links takes a changed file in: in a real kernel's policies, without keys."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.clusters import dual_stack_toml
from support.namespace import in_namespace

from srd.cluster import Config
from srd.config import parse_config
from srd.ipsec import xfrm
from srd.ipsec.encap import end_holder, holder_files
from srd.model import ConfigError
from srd.protection import Protection
from srd.state import Store


def config_of(port: int | None, nodes: int = 3) -> Config:
    section = "" if port is None else f'[ipsec]\nencap = "udp"\nencap_port = {port}\n'
    return parse_config(dual_stack_toml(nodes) + section, "cluster.toml")


def give_addresses(config: Config) -> None:
    subprocess.run(("ip", "link", "set", "lo", "up"), check=True)
    for address in config.node("redis-1").addresses:
        subprocess.run(
            ("ip", "addr", "add", str(address), "dev", "lo", *(("nodad",) if address.version == 6 else ())), check=True
        )


@contextlib.asynccontextmanager
async def standing(config: Config) -> AsyncIterator[tuple[Protection, xfrm.XfrmSocket]]:
    """The protection of redis-1 in a namespace that has its addresses."""
    give_addresses(config)
    with tempfile.TemporaryDirectory() as run_dir:
        async with xfrm.XfrmSocket() as kernel:
            node, store = config.node("redis-1"), Store(0.0)
            protection = Protection(config=config, node=node, store=store, kernel=kernel, run_dir=Path(run_dir))
            try:
                await protection.stand()
                yield protection, kernel
            finally:
                protection.release()
                for path in holder_files(Path(run_dir)):
                    end_holder(path)


async def ports_let_in(kernel: xfrm.XfrmSocket) -> set[int]:
    """The ports of ESP in UDP that the policies let in."""
    policies = [info.policy for info in await kernel.policies()]
    return {policy.selector.destination_port for policy in policies if policy.selector.protocol == socket.IPPROTO_UDP}


@in_namespace
async def test_former_ports_of_esp_in_udp_stay_open_until_no_sa_is_for_them() -> None:
    async with standing(config_of(4511)) as (protection, kernel):
        for port in (4512, 4513):
            await protection.adopt(config_of(port))
        assert await ports_let_in(kernel) == {4511, 4512, 4513}
        await protection.adopt(config_of(None))
        assert await ports_let_in(kernel) == {4511, 4512, 4513}
        await protection._keep_udp()  # there are no SAs at all
        assert await ports_let_in(kernel) == set()


@in_namespace
async def test_a_port_that_is_taken_is_refused_before_a_policy_is_changed() -> None:
    async with standing(config_of(None)) as (protection, kernel):
        before = [info.policy for info in await kernel.policies()]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("0.0.0.0", 4512))
            with pytest.raises(ConfigError, match=r"choose another ipsec\.encap_port"):
                await protection.adopt(config_of(4512, nodes=2))
        assert [info.policy for info in await kernel.policies()] == before
