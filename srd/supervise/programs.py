"""What must be there before a child can be started: its program, its user, its port. Everything here blocks."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srd.cluster import LOCALHOST, Config, Node
from srd.listening import bound_socket
from srd.model import SYSTEM_PATH, ConfigError, Endpoint, Paths, PermissionRefusedError, Service, SrdError
from srd.state import services_of
from srd.supervise.adopt import REGISTER_NAME, Register, Verdict, look_up
from srd.supervise.files import Owner, find_owner
from srd.supervise.listener import HIDDEN, listener_of

_OTHER_NAMES: Final = {
    # One binary that goes by its argv[0]; Debian's redis-tools has it, under this name only.
    "redis-server": "redis-check-rdb",
    # Debian alone has a number in the name.
    "stunnel4": "stunnel",
}
# stunnel serves each connection by a thread, and glibc gives the memory of one that ended back: 60 page faults for the
# next one. With these margins (mallopt(3)) it is less than one, for 5 MiB more after 400 connections at a time.
_STUNNEL_SETTINGS: Final = {"MALLOC_TRIM_THRESHOLD_": str(4 << 20), "MALLOC_TOP_PAD_": str(256 << 10)}
_PACKAGES: Final = {Service.REDIS: "redis-tools", Service.SENTINEL: "redis-tools", Service.STUNNEL: "stunnel4"}


class AddressMissingError(ConfigError):
    """The machine does not have an address: not yet, or not at all."""


class PortTakenError(ConfigError):
    """Somebody else listens there."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program's file, and the name to run it by."""

    path: Path
    argv0: str


def find_program(config: Config, service: Service) -> Program:
    """Find the program of a service; `ConfigError` names the package that has it."""
    name = config.tls.program if service is Service.STUNNEL else config.redis.program
    found = _which(name)
    if found is None and name in _OTHER_NAMES:
        found = _which(_OTHER_NAMES[name])
    if found is None:
        raise ConfigError("find", name, "there is no such program", f"apt install {_PACKAGES[service]}")
    base = Path(name).name
    return Program(
        Path(found).absolute(), base.replace("-server", "-sentinel") if service is Service.SENTINEL else base
    )


def _which(name: str) -> str | None:
    # An empty or relative entry of PATH would be whatever directory srd was started in.
    given = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry.startswith("/")]
    return shutil.which(name, path=os.pathsep.join((*given, SYSTEM_PATH)))


def settings_of(service: Service) -> Mapping[str, str]:
    """Return what is set in the environment of a service's program."""
    return _STUNNEL_SETTINGS if service is Service.STUNNEL else {}


def owner_of(config: Config, service: Service) -> Owner:
    """Look up the user that a service runs as."""
    user, key = {
        Service.REDIS: (config.redis.user, "redis.user"),
        Service.SENTINEL: (config.sentinel.user, "sentinel.user"),
        Service.STUNNEL: (config.tls.user, "tls.user"),
    }[service]
    return find_owner(user, key)


def check_programs(config: Config, node: Node) -> list[SrdError]:
    """Return what is missing to run this node's services: programs and users, each once."""
    found: dict[str, SrdError] = {}
    for service in services_of(node):
        for check in (find_program, owner_of):
            try:
                check(config, service)
            except SrdError as error:
                found.setdefault(str(error), error)
    return list(found.values())


def listen_endpoints(config: Config, node: Node, service: Service) -> tuple[Endpoint, ...]:
    """Return where a service of this node listens."""
    port = {
        Service.REDIS: config.redis.port,
        Service.SENTINEL: config.sentinel.port,
        Service.STUNNEL: config.tls.port,
    }[service]
    local = service is not Service.STUNNEL and config.listen_localhost and LOCALHOST not in node.addresses
    return tuple(Endpoint(address, port) for address in (*node.addresses, *((LOCALHOST,) if local else ())))


def own_children(paths: Paths) -> frozenset[Service]:
    """Return the services of this node that run as children of a srd, be it there or gone."""
    alive = set()
    try:
        records = Register(paths.run_dir / REGISTER_NAME).load()
    except SrdError:
        return frozenset()  # nothing is known to be ours then, and the ports tell the rest
    for service, record in records.items():
        found = look_up(record)
        if found.pidfd is not None:
            os.close(found.pidfd)
        if found.verdict is Verdict.ALIVE:
            alive.add(service)
    return frozenset(alive)


def check_ports(config: Config, node: Node, paths: Paths, kept: Collection[Endpoint] = ()) -> list[SrdError]:
    """Return the ports of this node's services that cannot be had.

    Those that srd's own children hold do not count, nor does where srd itself listens already (`kept`).
    """
    own = own_children(paths)
    found = [
        check_endpoint(endpoint)
        for service in services_of(node)
        if service not in own
        for endpoint in listen_endpoints(config, node, service)
        if endpoint not in kept
    ]
    return [error for error in found if error is not None]


def check_endpoint(endpoint: Endpoint) -> SrdError | None:
    """Return why nobody can listen there now, and who does; None when it is free."""
    try:
        bound_socket(endpoint).close()
    except OSError as error:
        return _explain(endpoint, error)
    return None


def _explain(endpoint: Endpoint, error: OSError) -> SrdError:
    if error.errno == errno.EADDRINUSE:
        found = listener_of(endpoint.port)
        who, remedy = (found, found.remedy) if found is not None else (HIDDEN, HIDDEN.remedy)
        return PortTakenError("listen on", str(endpoint), f"{who} does already, and srd did not start it", remedy)
    if error.errno == errno.EADDRNOTAVAIL:
        remedy = "give the interface this address, or correct cluster.toml"
        return AddressMissingError("use", str(endpoint.address), "this machine does not have the address", remedy)
    if error.errno == errno.EACCES:
        return PermissionRefusedError("listen on", str(endpoint), "the port is privileged", "start srd as root")
    return SrdError("listen on", str(endpoint), error.strerror or str(error))
