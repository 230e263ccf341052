"""What must be true before srd changes anything on a node: `srd check` shows all of it, `srd run` stops at the first.

Nothing here leaves a trace: the ESP probe removes the one SA that it adds.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from srd.config import KEYING_PORT, Config, Node
from srd.ipsec import xfrm
from srd.ipsec.suites import grades, read_proc_crypto
from srd.model import ConfigError, Endpoint, IpAddress, IpsecMode, Paths, PermissionRefusedError, SrdError, Suite
from srd.supervise.services import check_ports, check_programs
from srd.trust.bundle import Bundle, load_bundle

_CAPABILITIES_FILE: Final = "/proc/self/status"
# include/uapi/linux/capability.h
_CAPABILITIES: Final = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_ADMIN": 12}


@dataclass(frozen=True, slots=True)
class Cleared:
    """A node that may start: its bundle, and how well its kernel and CPU run each suite (empty when ipsec is off)."""

    bundle: Bundle
    grades: Mapping[Suite, int]


async def clear(paths: Paths) -> Cleared:
    """Check everything; the first thing that is wrong is raised as an `SrdError` with what to do about it."""
    bundle = load_bundle(paths, dt.datetime.now(dt.UTC))
    for check in _checks(bundle, paths):
        await check()
    return Cleared(bundle, await _suite_grades(bundle.config))


async def problems(paths: Paths) -> list[SrdError]:
    """Check everything and return all that is wrong, in the order in which `clear` would have met it."""
    try:
        bundle = load_bundle(paths, dt.datetime.now(dt.UTC))
    except SrdError as error:
        return [error]
    found = []
    for check in (*_checks(bundle, paths), lambda: _suite_grades(bundle.config)):
        try:
            await check()
        except SrdError as error:
            found.append(error)
    return found


def _checks(bundle: Bundle, paths: Paths) -> tuple[Callable[[], Awaitable[object]], ...]:
    config, node = bundle.config, bundle.node
    return (
        lambda: asyncio.to_thread(_check_addresses, node, paths),
        lambda: asyncio.to_thread(_check_capabilities, config),
        lambda: asyncio.to_thread(check_programs, config, node),
        lambda: asyncio.to_thread(check_ports, config, node, paths),
        lambda: asyncio.to_thread(_check_own_ports, config, node),
    )


def _check_addresses(node: Node, paths: Paths) -> None:
    for address in node.addresses:
        try:
            _bind(address, 0)
        except OSError as error:
            raise ConfigError(
                "use the address",
                str(address),
                f"it is not on this machine ({error.strerror})",
                f"this is the bundle of {node.name}: correct cluster.toml, or copy this machine's to {paths.config_dir}",
            ) from error


def _check_capabilities(config: Config) -> None:
    needed = ["CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID"]
    if config.ipsec.mode is IpsecMode.ESP:
        needed.append("CAP_NET_ADMIN")
    effective = _effective_capabilities()
    missing = [name for name in needed if not effective & 1 << _CAPABILITIES[name]]
    if missing:
        raise PermissionRefusedError(
            "run", "srd", f"it lacks {', '.join(missing)}", "start it as root, or by its systemd unit"
        )


def _effective_capabilities() -> int:
    with open(_CAPABILITIES_FILE, encoding="ascii") as status:  # noqa: PTH123 - procfs
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    raise SrdError("read", _CAPABILITIES_FILE, "it has no CapEff line")


def _check_own_ports(config: Config, node: Node) -> None:
    wanted = [(KEYING_PORT, "the keying channel"), (config.http.port, "http.port")]
    for address in node.addresses:
        for port, what in wanted:
            try:
                _bind(address, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise SrdError("use", str(Endpoint(address, port)), str(error.strerror)) from error
                raise ConfigError(
                    "use",
                    str(Endpoint(address, port)),
                    f"another program listens there, where {what} belongs",
                    "stop it: ss -ltnp names it",
                ) from error


def _bind(address: IpAddress, port: int) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As every server does: connections of an earlier life that linger in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((str(address), port))


async def _suite_grades(config: Config) -> Mapping[Suite, int]:
    if config.ipsec.mode is IpsecMode.OFF:
        return {}
    async with xfrm.XfrmSocket() as kernel:
        names = await xfrm.probe_esp(kernel, [suite.value for suite in Suite])
    installable = [suite for suite in Suite if suite.value in names]
    if not installable:
        raise ConfigError(
            "protect the traffic between nodes",
            "",
            "this kernel has no ESP, or neither AEAD for it",
            "modprobe esp4 esp6 gcm chacha20poly1305, or take a kernel with CONFIG_INET_ESP and CONFIG_INET6_ESP; "
            'ipsec.mode = "off" goes without, in plaintext',
        )
    return grades(installable, await asyncio.to_thread(read_proc_crypto))
