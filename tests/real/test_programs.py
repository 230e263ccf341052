"""What `srd check` finds before anything starts: programs, users, ports."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.clusters import cluster_toml, make_bundles, paths_of
from support.nodes import free_ports, world

from srd.cluster import Config
from srd.config import parse_config
from srd.model import ConfigError, Endpoint, PermissionRefusedError, Service
from srd.preflight import _problems_of
from srd.supervise.listener import listener_of
from srd.supervise.programs import (
    _explain,
    check_endpoint,
    check_ports,
    check_programs,
    find_program,
    listen_endpoints,
)

OWN_NAME = pwd.getpwuid(os.geteuid()).pw_name
HERE = ip_address("127.0.1.1")


def config_of(extra: str = "", *, kind: str = "redis", head: str = "") -> Config:
    return parse_config(
        f'cluster = "c"\n{head}\n'
        '[[node]]\nname = "a"\naddresses = ["127.0.1.1", "::1"]\n'
        f'[[node]]\nname = "b"\naddresses = ["127.0.1.2", "::2"]\nkind = "{kind}"\n'
        f'[ipsec]\nmode = "off"\n{extra}',
        "cluster.toml",
    )


def users(redis: str = OWN_NAME, sentinel: str = OWN_NAME, tls: str = OWN_NAME) -> str:
    return f'[redis]\nuser = "{redis}"\n[sentinel]\nuser = "{sentinel}"\n[tls]\nuser = "{tls}"\n'


def test_what_is_installed_is_found_under_the_name_that_makes_it_what_it_is() -> None:
    config = config_of(users())
    assert check_programs(config, config.nodes[0]) == []
    found = {service: find_program(config, service) for service in Service}
    assert [found[service].argv0 for service in Service] == ["redis-server", "redis-sentinel", "stunnel4"]
    for program in found.values():
        assert program.path.is_absolute()
        assert os.access(program.path, os.X_OK)


def test_redis_is_found_by_the_name_that_redis_tools_gives_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(config_of(), Service.REDIS).path.name in ("redis-server", "redis-check-rdb")


def test_another_redis_on_the_path_is_taken_as_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = config_of('[redis]\nprogram = "valkey-server"')
    assert find_program(config, Service.REDIS).path == program
    assert find_program(config, Service.SENTINEL).argv0 == "valkey-sentinel"


def test_the_directory_that_srd_was_started_in_is_never_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    config = config_of('[redis]\nprogram = "valkey-server"')
    for path in ("", ":", "."):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(ConfigError, match="cannot find valkey-server"):
            find_program(config, Service.REDIS)


@pytest.mark.parametrize(
    ("extra", "service", "message"),
    [
        ('[redis]\nprogram = "no-redis-here"', Service.REDIS, "cannot find no-redis-here.*apt install redis-tools"),
        ('[tls]\nprogram = "no-stunnel-here"', Service.STUNNEL, "cannot find no-stunnel-here.*apt install stunnel4"),
    ],
)
def test_a_missing_program_names_its_package(extra: str, service: Service, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_program(config_of(extra), service)


def test_all_that_is_missing_is_found_at_once_and_each_thing_once() -> None:
    extra = (
        '[redis]\nprogram = "no-redis"\nuser = "no-user"\n[sentinel]\nuser = "no-user-2"\n[tls]\nuser = "no-user-3"\n'
    )
    config = config_of(extra)
    found = [str(error) for error in check_programs(config, config.nodes[0])]
    assert len(found) == 4
    assert [sum(key in sentence for sentence in found) for key in ("redis.user", "sentinel.user", "tls.user")] == [
        1
    ] * 3


@pytest.mark.parametrize(("kind", "count"), [("redis", 3), ("sentinel", 1), ("client", 0)])
def test_a_node_needs_only_the_users_of_what_it_runs(kind: str, count: int) -> None:
    config = config_of(users("no-user", "no-user-2", "no-user-3"), kind=kind)
    assert len(check_programs(config, config.nodes[1])) == count


@pytest.mark.parametrize(
    ("head", "service", "expected"),
    [
        ("", Service.REDIS, "127.0.1.1:6379 [::1]:6379 127.0.0.1:6379"),
        ("", Service.SENTINEL, "127.0.1.1:26379 [::1]:26379 127.0.0.1:26379"),
        ("", Service.STUNNEL, "127.0.1.1:6380 [::1]:6380"),
        ("listen_localhost = false", Service.REDIS, "127.0.1.1:6379 [::1]:6379"),
    ],
)
def test_where_services_listen(head: str, service: Service, expected: str) -> None:
    config = config_of(head=head)
    assert " ".join(map(str, listen_endpoints(config, config.nodes[0], service))) == expected


@contextlib.contextmanager
def listening(family: socket.AddressFamily, address: str, port: int) -> Iterator[None]:
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen()
        yield


@pytest.mark.parametrize(
    ("family", "address", "wanted"),
    [
        (socket.AF_INET, "127.0.1.1", "127.0.1.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.1.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "127.0.1.1"),
        (socket.AF_INET6, "::", "::1"),
    ],
)
def test_who_has_the_port_is_named(family: socket.AddressFamily, address: str, wanted: str) -> None:
    (port,) = free_ports(1)
    endpoint = Endpoint(ip_address(wanted), port)
    assert check_endpoint(endpoint) is None
    with listening(family, address, port):
        error = check_endpoint(endpoint)
        assert error is not None
        assert f"pid {os.getpid()} (" in str(error)
    assert check_endpoint(endpoint) is None


@pytest.mark.parametrize(
    ("address", "for_others"),
    [("127.0.0.1", False), ("::1", False), ("::ffff:127.0.0.1", False), ("0.0.0.0", True), ("::", True)],
)
def test_a_listener_on_loopback_is_nothing_that_others_reach(address: str, *, for_others: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        mine = f"pid {os.getpid()} "
        assert str(listener_of(port)).startswith(mine)
        assert str(listener_of(port, for_others=True)).startswith(mine) == for_others


def test_a_listener_on_another_address_is_not_in_the_way() -> None:
    (port,) = free_ports(1)
    with listening(socket.AF_INET, "127.0.1.2", port):
        assert check_endpoint(Endpoint(HERE, port)) is None


def test_connections_that_linger_after_a_listener_are_not_in_the_way() -> None:
    (port,) = free_ports(1)
    with listening(socket.AF_INET, str(HERE), port), socket.create_connection((str(HERE), port)):
        pass  # both ends are closed now, and one of them is in TIME_WAIT
    assert check_endpoint(Endpoint(HERE, port)) is None


def test_an_address_of_another_machine_is_the_operators_mistake() -> None:
    error = check_endpoint(Endpoint(ip_address("192.0.2.1"), 6379))
    assert isinstance(error, ConfigError)
    assert "this machine does not have the address" in str(error)


async def test_a_nodes_own_children_are_not_in_its_way_but_in_anothers() -> None:
    with world() as (member,):
        config, node, paths = member.config, member.node, member.paths
        assert check_ports(config, node, paths) == []
        async with member.supervised() as supervised:
            await supervised.all_ready()
            assert check_ports(config, node, paths) == []
            elsewhere = replace(paths, run_dir=paths.run_dir / "elsewhere")
            found = check_ports(config, node, elsewhere)
            assert len(found) == len(Service)
            assert f"pid {supervised.pid(Service.REDIS)} (redis-" in str(found[0])


def test_a_port_that_the_kernel_refuses_is_a_matter_of_permission() -> None:
    error = _explain(Endpoint(HERE, 1), PermissionError(errno.EACCES, "Permission denied"))
    assert isinstance(error, PermissionRefusedError)


@pytest.mark.parametrize("section", ["http", "haproxy_agent"])
def test_a_taken_port_of_srd_itself_is_named(tmp_path: Path, section: str) -> None:
    with socket.socket() as other:
        other.bind((str(HERE), 0))
        other.listen()
        port = other.getsockname()[1]
        bundle = make_bundles(tmp_path, cluster_toml(extra=f"[{section}]\nport = {port}\n"))["redis-1"]
        paths = paths_of(tmp_path, "redis-1")
        taken = [problem.subject for problem in _problems_of(bundle, paths, children=False)]
        assert f"{HERE}:{port}" in taken
        kept = {Endpoint(HERE, port)}  # by sockets that outlived the srd before
        assert f"{HERE}:{port}" not in {each.subject for each in _problems_of(bundle, paths, own=kept, children=False)}
