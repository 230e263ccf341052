"""What must be true before srd changes anything on a node: `srd check` shows all of it, `srd run` stops at the first.

Nothing here leaves a trace: the ESP probe removes the one SA that it adds.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from srd.cluster import KEYING_PORT, Config, Node
from srd.control.client import is_answered
from srd.desired import needs_restart, voters_changed
from srd.ipsec import xfrm
from srd.ipsec.encap import try_sockets
from srd.ipsec.suites import grades, read_proc_crypto
from srd.ipsec.teardown import owned
from srd.model import ConfigError, Endpoint, IpsecMode, Paths, PermissionRefusedError, SrdError, Suite
from srd.reconcile import boottime
from srd.supervise.adopt import MARKER_NAME
from srd.supervise.programs import (
    AddressMissingError,
    PortTakenError,
    check_endpoint,
    check_ports,
    check_programs,
)
from srd.trust.bundle import Bundle, load_bundle

log = structlog.get_logger(__name__)

# An IPv6 address is tentative for a second or two (RFC 4862), and DHCP may be late at boot. What is missing after 10 s
# is the operator's mistake, and a service manager need not try again. But a node that has been part of its cluster had
# it once: a switch that comes up after the nodes, say. It is waited for, for less than the unit's TimeoutStartSec, and
# then the service manager tries again.
PATIENCE_SECONDS: Final = 10.0
JOINED_PATIENCE_SECONDS: Final = 40.0
LOOK_SECONDS: Final = 0.2

_CAPABILITIES_FILE: Final = "/proc/self/status"
# include/uapi/linux/capability.h
_CAPABILITIES: Final = {
    "CAP_SETGID": 6,  # to start, to end and to write files for what runs as another user: as that user
    "CAP_SETUID": 7,
    "CAP_NET_BIND_SERVICE": 10,  # the keying channel's ports
    "CAP_NET_ADMIN": 12,  # policies, SAs, the socket mark
}


@dataclass(frozen=True, slots=True)
class Cleared:
    """A node that may start: its bundle, and how well its kernel and CPU run each suite."""

    bundle: Bundle
    grades: Mapping[Suite, int]


async def clear(paths: Paths, kept: Collection[Endpoint] = ()) -> Cleared:
    """Check everything; the first thing that is wrong is raised as an `SrdError` with what to do about it.

    `kept` is where this srd listens already, by sockets that outlived an earlier one.
    """
    # On a node that has been part of its cluster, what its children lack is a condition: srd comes up, protects the
    # links, says what is missing and starts them when it is there. And nothing is the last word that may pass.
    joined = (paths.state_dir / MARKER_NAME).exists()
    bundle = await asyncio.to_thread(_last_good if joined else _present, paths)
    if await asyncio.to_thread(is_answered, paths.control_socket):
        raise ConfigError("start", "srd", "it runs on this node already", "srd status shows it")
    look = partial(_problems_of, bundle, paths, own=kept, children=not joined)
    deadline = boottime() + (JOINED_PATIENCE_SECONDS if joined else PATIENCE_SECONDS)
    passing = (AddressMissingError, PortTakenError) if joined else AddressMissingError
    awaited = ""
    while found := await asyncio.to_thread(look):
        if not isinstance(found[0], passing):
            raise found[0]
        if boottime() >= deadline:
            raise SrdError("start", "srd", str(found[0])) if joined else found[0]
        if joined and str(found[0]) != awaited:
            awaited = str(found[0])
            log.warning("waiting", why=awaited)
        await asyncio.sleep(LOOK_SECONDS)
    return Cleared(bundle, await _suite_grades(bundle.config))


def _present(paths: Paths) -> Bundle:
    return load_bundle(paths, dt.datetime.now(dt.UTC))


def _last_good(paths: Paths) -> Bundle:
    """Read the bundle; where cluster.toml is wrong, by the one that srd last ran by.

    What an operator has left half edited must not end the supervision of a node; `bundle_changed` says it.
    """
    now = dt.datetime.now(dt.UTC)
    try:
        return load_bundle(paths, now)
    except ConfigError as error:
        try:
            bundle = load_bundle(paths, now, cluster_file=paths.last_good_file)
        except ConfigError:
            raise error from None
        log.warning("running by the last good cluster.toml", file=str(paths.cluster_file), error=str(error))
        return bundle


async def problems(paths: Paths) -> list[SrdError]:
    """Check everything and return all that is wrong, in the order in which `clear` would have met it."""
    try:
        bundle = load_bundle(paths, dt.datetime.now(dt.UTC))
        running = await asyncio.to_thread(is_answered, paths.control_socket)
    except SrdError as error:
        return [error]
    found = await asyncio.to_thread(partial(_problems_of, bundle, paths, running=running))
    if any(isinstance(problem, PermissionRefusedError) for problem in found):
        return found  # the kernel would refuse the probe for the same reason
    try:
        await _suite_grades(bundle.config)
    except SrdError as error:
        found.append(error)
    return found


def check_change(old: Bundle, new: Bundle, node: Node, paths: Paths) -> None:
    """Raise `ConfigError` if a running srd cannot take the changed bundle in, or must not."""
    stuck = needs_restart(old.config, new.config, node)
    if new.secrets != old.secrets:
        stuck = (*stuck, "secrets.toml")
    refused = partial(ConfigError, "take in", str(paths.cluster_file))
    if stuck:
        raise refused(f"{', '.join(stuck)} cannot change while srd runs", "stop srd and start it")
    voters = voters_changed(old.config, new.config)
    if node.votes and len(voters) > 1:
        reason = f"{' and '.join(voters)} come or go at once: an old and a new majority need not share a node then"
        raise refused(reason, "change one node at a time, and reload it on every node before the next")


def _missing_addresses(node: Node) -> list[SrdError]:
    return [problem for address in node.addresses if (problem := check_endpoint(Endpoint(address, 0)))]


def _problems_of(
    bundle: Bundle, paths: Paths, *, running: bool = False, own: Collection[Endpoint] = (), children: bool = True
) -> list[SrdError]:
    """Return what is wrong; the ports of the srd that is `running` are its own, and so are those of `own`.

    `children`: with what redis, sentinel and stunnel need.
    """
    config, node = bundle.config, bundle.node
    if strangers := _missing_addresses(node):  # of a machine that is not the bundle's, nothing else is worth saying
        return strangers
    wanted = [Endpoint(address, KEYING_PORT) for address in node.addresses]
    for port in (config.http.port, config.haproxy_agent.port):
        wanted += config.open_endpoints(node, port)
    free = [] if running else [endpoint for endpoint in wanted if endpoint not in own]
    return [
        *_missing_capabilities(config),
        *(check_programs(config, node) if children else ()),
        *(check_ports(config, node, paths, own) if children else ()),
        *(problem for endpoint in free if (problem := check_endpoint(endpoint))),
        *_taken_for_udp(config, node),
    ]


def _taken_for_udp(config: Config, node: Node) -> Iterator[SrdError]:
    """Yield why ESP in UDP could not come in; the sockets of an srd that runs or has run are in nobody's way."""
    try:
        try_sockets(config, node)
    except SrdError as error:
        yield error


def _missing_capabilities(config: Config) -> list[SrdError]:
    spared = {"CAP_NET_ADMIN"} if config.ipsec.mode is IpsecMode.OFF else set()
    effective = _effective_capabilities()
    missing = ", ".join(name for name, bit in _CAPABILITIES.items() if not effective & 1 << bit and name not in spared)
    if not missing:
        return []
    return [PermissionRefusedError("run", "srd", f"it lacks {missing}", "start it as root, or by its systemd unit")]


def _effective_capabilities() -> int:
    with open(_CAPABILITIES_FILE, encoding="ascii") as status:  # noqa: PTH123 - procfs
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    raise SrdError("read", _CAPABILITIES_FILE, "it has no CapEff line")


async def _suite_grades(config: Config) -> Mapping[Suite, int]:
    if config.ipsec.mode is IpsecMode.OFF:
        await _check_leftovers()
        # Nodes agree on keys all the same; no kernel gets them.
        return grades(Suite, await asyncio.to_thread(read_proc_crypto))
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
    # Only now: the probe has had the kernel load or build what it has for each suite.
    return grades(installable, await asyncio.to_thread(read_proc_crypto))


async def _check_leftovers() -> None:
    """Refuse to go without IPsec over the policies of a srd that had it: half of the traffic would be dropped."""
    try:
        async with xfrm.XfrmSocket() as kernel:
            left = await owned(kernel)
    except (xfrm.NotSupportedError, xfrm.NotPermittedError):
        return  # a kernel without XFRM has none, and without CAP_NET_ADMIN nobody can tell
    if left.policies:
        raise ConfigError(
            "go without IPsec",
            "",
            f'{len(left.policies)} policies of a srd with ipsec.mode = "esp" are in the kernel',
            "srd teardown removes them (while its children run, it first needs a start and a stop with the old mode)",
        )
