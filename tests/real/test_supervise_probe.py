"""The TLS probe against real listeners: stunnel, strangers, and nobody."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles, paths_of
from support.nodes import QUICK, free_ports, world

from srd.model import Endpoint, NoAnswerError, Paths, Service, SrdError
from srd.state import ChildState
from srd.supervise.probe import Shown, probe_tls

HERE = ip_address("127.0.1.1")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    make_bundles(tmp_path, cluster_toml(nodes=2))
    return paths_of(tmp_path, "redis-1")


@contextlib.asynccontextmanager
async def serving(certificate: Path, key: Path) -> AsyncIterator[Endpoint]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    (port,) = free_ports(1)
    async with await asyncio.start_server(serve, str(HERE), port, ssl=context):
        yield Endpoint(HERE, port)


async def probe(endpoint: Endpoint, paths: Paths) -> None:
    async with asyncio.timeout(10):
        certificate, authority = ((paths.config_dir / name).read_text() for name in ("tls.crt", "ca.crt"))
        await probe_tls((endpoint,), Shown(certificate, authority))


async def test_the_certificate_that_was_given_is_served(paths: Paths) -> None:
    async with serving(paths.config_dir / "tls.crt", paths.config_dir / "tls.key") as endpoint:
        await probe(endpoint, paths)


async def test_another_certificate_of_the_same_authority_is_not_it(paths: Paths) -> None:
    other = paths.config_dir.parent / "redis-2"
    async with serving(other / "tls.crt", other / "tls.key") as endpoint:
        with pytest.raises(SrdError, match="another certificate"):
            await probe(endpoint, paths)


async def test_a_certificate_of_another_authority_is_not_valid(paths: Paths, tmp_path: Path) -> None:
    make_bundles(tmp_path / "other", cluster_toml(nodes=1))
    other = tmp_path / "other" / "bundles" / "redis-1"
    async with serving(other / "tls.crt", other / "tls.key") as endpoint:
        with pytest.raises(SrdError, match="certificate not valid"):
            await probe(endpoint, paths)


async def test_nobody_listening_is_an_error_that_names_the_place(paths: Paths) -> None:
    endpoint = Endpoint(HERE, free_ports(1)[0])
    with pytest.raises(SrdError, match=rf"cannot use TLS at {endpoint}: "):
        await probe(endpoint, paths)


async def test_an_address_that_the_machine_has_lost_is_not_a_program_that_does_not_answer(paths: Paths) -> None:
    with pytest.raises(SrdError, match="this machine does not have the address") as raised:
        await probe(Endpoint(ip_address("192.0.2.1"), 6380), paths)
    assert not isinstance(raised.value, NoAnswerError)


async def test_plain_text_is_no_tls(paths: Paths) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-NOAUTH Authentication required.\r\n")
        writer.close()

    (port,) = free_ports(1)
    async with await asyncio.start_server(serve, str(HERE), port):
        with pytest.raises(SrdError, match="cannot use TLS at"):
            await probe(Endpoint(HERE, port), paths)


@pytest.mark.parametrize("name", ["tls.crt", "ca.crt"])
@pytest.mark.parametrize("content", ["", "not a certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
async def test_a_file_that_is_no_certificate_is_named(paths: Paths, name: str, content: str) -> None:
    (paths.config_dir / name).write_text(content)
    with pytest.raises(SrdError, match=name.replace(".", r"\.")):
        await probe(Endpoint(HERE, 1), paths)


async def test_stunnel_does_its_job_with_the_certificate_that_it_has_until_another_is_taken_in() -> None:
    with world(nodes=2) as (member, other):
        async with member.supervised() as node:
            await node.all_ready()
            pids = node.pids()
            for name in ("tls.crt", "tls.key"):
                (member.paths.config_dir / name).write_bytes((other.paths.config_dir / name).read_bytes())
            with pytest.raises(TimeoutError):  # for as long as it takes to find one degraded
                await node.store.wait_for(
                    lambda view: view.children[Service.STUNNEL].state is not ChildState.READY,
                    (QUICK.probe_failures + 2) * (QUICK.probe_interval + 0.1),
                )
            for _ in range(2):  # the second time with what it has by then
                await node.services.adopt(member.config)
                await node.all_ready()
            assert node.pids() == pids
