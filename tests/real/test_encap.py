"""The sockets of ESP in UDP, here and in the program that holds them while srd is away."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.clusters import cluster_toml
from support.nodes import eventually, free_ports

from srd.cluster import Config
from srd.config import parse_config
from srd.ipsec.encap import FILE_NAME, Encapsulation, end_holder, find_holder
from srd.model import ConfigError, IpsecMode

NAME = "redis-1"


def config_of(port: int | None) -> Config:
    """A cluster on loopback, which the file refuses for ESP: only its addresses matter here."""
    extra = "" if port is None else f'encap = "udp"\nencap_port = {port}\n'
    config = parse_config(cluster_toml(extra=extra), "cluster.toml")
    return dataclasses.replace(config, ipsec=msgspec.structs.replace(config.ipsec, mode=IpsecMode.ESP))


def made(run_dir: Path, port: int | None) -> Encapsulation:
    config = config_of(port)
    return Encapsulation(config=config, node=config.node(NAME), run_dir=run_dir)


def bound(port: int) -> bool:
    """Whether somebody has the UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.1.1", port))
        except OSError:
            return True
    return False


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    holder = find_holder(tmp_path / FILE_NAME)
    if end_holder(tmp_path / FILE_NAME) and holder is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(holder.pid, 0)  # its port is free then


def holder_of(run_dir: Path) -> int:
    holder = find_holder(run_dir / FILE_NAME)
    assert holder is not None
    return holder.pid


async def test_the_sockets_outlive_srd_and_the_next_one_leaves_them_where_they_are(run_dir: Path) -> None:
    (port,) = free_ports(1)
    first = made(run_dir, port)
    await first.reconcile()
    pid = holder_of(run_dir)
    first.close()
    assert bound(port)
    second = made(run_dir, port)
    await second.reconcile()
    await second.reconcile()
    assert holder_of(run_dir) == pid
    second.close()


async def test_a_holder_that_is_killed_is_replaced_and_srds_own_sockets_stand_meanwhile(run_dir: Path) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    await kept.reconcile()
    pid = holder_of(run_dir)
    os.kill(pid, 9)

    async def ended() -> bool:
        return find_holder(run_dir / FILE_NAME) is None

    await eventually(ended, "the end of the holder")
    assert bound(port)
    await kept.reconcile()
    assert holder_of(run_dir) != pid
    kept.close()


async def test_a_holder_that_nobody_wrote_down_is_found_and_replaced(run_dir: Path) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    await kept.reconcile()
    pid = holder_of(run_dir)
    with (run_dir / FILE_NAME).open("r+b") as file:
        file.truncate(0)
    assert holder_of(run_dir) == pid

    async def replaced() -> bool:
        await kept.reconcile()
        holder = find_holder(run_dir / FILE_NAME)
        return holder is not None and holder.pid != pid and holder.endpoints == (f"127.0.1.1:{port}",)

    await eventually(replaced, "a holder that is written down")
    kept.close()


async def test_another_port_has_another_holder_and_without_udp_there_is_none(run_dir: Path) -> None:
    before, after = free_ports(2)
    kept = made(run_dir, before)
    await kept.reconcile()
    kept.adopt(config_of(after))

    async def moved() -> bool:
        await kept.reconcile()
        holder = find_holder(run_dir / FILE_NAME)
        return holder is not None and holder.endpoints == (f"127.0.1.1:{after}",)

    await eventually(moved, "a holder for the other port")
    assert not bound(before)
    kept.adopt(config_of(None))

    async def gone() -> bool:
        await kept.reconcile()
        return not bound(after)

    await eventually(gone, "the end of the sockets")
    assert not end_holder(run_dir / FILE_NAME)


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def files_of(pid: int) -> set[str]:
    return {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}


async def test_the_holder_has_no_rights_and_nothing_else_of_srds(run_dir: Path) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    secret = os.open(run_dir / "secret", os.O_CREAT | os.O_RDWR)
    await kept.reconcile()
    pid = holder_of(run_dir)
    assert "CapEff:\t0000000000000000" in status_of(pid)
    assert str(run_dir / "secret") not in files_of(pid)
    assert str(run_dir / FILE_NAME) in files_of(pid)
    os.close(secret)
    kept.close()


async def test_a_port_that_another_daemon_has_is_named(run_dir: Path) -> None:
    (port,) = free_ports(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.1.1", port))
        with pytest.raises(ConfigError, match=rf"127\.0\.1\.1:{port}.*in use; .*choose another ipsec\.encap_port"):
            await made(run_dir, port).reconcile()
