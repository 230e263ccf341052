"""The sockets of ESP in UDP, here and in the programs that hold them while srd is away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.clusters import cluster_toml
from support.nodes import eventually, free_ports

from srd.cluster import Config
from srd.config import parse_config
from srd.ipsec.encap import Encapsulation, end_holder, holder_file, holder_files, holder_pids, is_held, try_sockets
from srd.model import ConfigError, IpsecMode

NAME = "redis-1"


def config_of(*ports: int) -> Config:
    """A cluster on loopback, which the file refuses for ESP: only its addresses and ports matter here."""
    config = parse_config(cluster_toml(), "cluster.toml")
    section = msgspec.structs.replace(config.ipsec, mode=IpsecMode.ESP)
    return dataclasses.replace(config, ipsec=section, parting_udp_ports=frozenset(ports))


def made(run_dir: Path, *ports: int) -> Encapsulation:
    config = config_of(*ports)
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
    for path in holder_files(tmp_path):
        pids = holder_pids(path)
        end_holder(path)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def holder_of(run_dir: Path, port: int) -> int:
    (pid,) = holder_pids(holder_file(run_dir, port))
    return pid


async def test_the_sockets_outlive_srd_and_the_next_one_leaves_them_where_they_are(run_dir: Path) -> None:
    (port,) = free_ports(1)
    first = made(run_dir, port)
    await first.reconcile()
    pid = holder_of(run_dir, port)
    first.close()
    assert bound(port)
    second = made(run_dir, port)
    await second.reconcile()
    await second.reconcile()
    assert holder_of(run_dir, port) == pid
    second.close()


async def test_a_holder_that_is_killed_is_replaced_and_srds_own_sockets_stand_meanwhile(run_dir: Path) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    await kept.reconcile()
    pid = holder_of(run_dir, port)
    os.kill(pid, 9)

    async def ended() -> bool:
        return not is_held(holder_file(run_dir, port))

    await eventually(ended, "the end of the holder")
    assert bound(port)
    await kept.reconcile()
    assert holder_of(run_dir, port) != pid
    kept.close()


async def test_a_holder_that_was_collected_with_a_containers_orphans_is_replaced_too(
    run_dir: Path,
) -> None:
    (port,) = free_ports(1)
    holding = made(run_dir, port)
    await holding.reconcile()
    pid = holder_of(run_dir, port)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, pid, 0)
    await holding.reconcile()
    assert holder_of(run_dir, port) != pid
    holding.close()


async def test_ports_come_and_go_each_with_its_holder_and_no_other_is_touched(run_dir: Path) -> None:
    before, after = free_ports(2)
    kept = made(run_dir, before)
    await kept.reconcile()
    pid = holder_of(run_dir, before)
    kept.adopt(config_of(before, after))
    await kept.reconcile()
    assert holder_of(run_dir, before) == pid
    kept.adopt(config_of(after))
    await kept.reconcile()
    assert not bound(before)
    assert bound(after)
    kept.adopt(config_of())
    await kept.reconcile()
    assert not bound(after)
    assert holder_files(run_dir) == []


async def test_a_holder_of_other_sockets_is_replaced_within_the_pass_whatever_is_written_about_it(
    run_dir: Path,
) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    await kept.reconcile()
    for text in ("", json.dumps([f"('127.0.1.9', {port})"]), '{"pid": 1}'):
        pid = holder_of(run_dir, port)
        holder_file(run_dir, port).write_text(text)
        await kept.reconcile()
        assert holder_of(run_dir, port) != pid
    kept.close()


def files_of(pid: int) -> dict[str, int]:
    """What a process has open, and with which flags (proc(5), fdinfo)."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        flags = next(
            line for line in Path(f"/proc/{pid}/fdinfo/{path.name}").read_text().splitlines() if "flags" in line
        )
        found[str(path.readlink())] = int(flags.split()[1], 8)
    return found


async def test_the_holder_has_nothing_else_of_srds_and_cannot_write_its_file(run_dir: Path) -> None:
    (port,) = free_ports(1)
    kept = made(run_dir, port)
    secret = os.open(run_dir / "secret", os.O_CREAT | os.O_RDWR)
    await kept.reconcile()
    held = files_of(holder_of(run_dir, port))
    assert str(run_dir / "secret") not in held
    assert held[str(holder_file(run_dir, port))] & os.O_ACCMODE == os.O_RDONLY
    os.close(secret)
    kept.close()


async def test_a_port_that_another_daemon_has_is_named_and_srds_own_is_free(run_dir: Path) -> None:
    (port,) = free_ports(1)
    config = config_of(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.1.1", port))
        with pytest.raises(ConfigError, match=rf"127\.0\.1\.1:{port}.*in use; .*choose another ipsec\.encap_port"):
            try_sockets(config, config.node(NAME))
    kept = made(run_dir, port)
    await kept.reconcile()
    try_sockets(config, config.node(NAME))
    kept.close()
