"""Clients that their certificates alone have brought in: who may join, and who has.

A client need not be in cluster.toml: a certificate of its kind by the cluster's authority is enough. Who was let in
stays a peer, connected or not and across restarts, until the certificate ends or is revoked: the policies that keep
what this node exchanges with it inside ESP must not go because it is away.
"""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from typing import Final

import msgspec
import structlog

from srd.cluster import Config, Node
from srd.model import ConfigError, Identity, NodeKind, Paths, RefusedError
from srd.supervise.files import write_private

log = structlog.get_logger(__name__)

FILE_NAME: Final = "clients.json"


class _Entry(msgspec.Struct, frozen=True):
    """A client by its certificate: serial number in hexadecimal, end in Unix seconds."""

    name: str
    addresses: tuple[str, ...]
    serial: str
    not_after: float

    @property
    def number(self) -> int:
        """The serial number."""
        return int(self.serial, 16)

    @property
    def node(self) -> Node:
        """The client as a node of the mesh."""
        return Node(self.name, NodeKind.CLIENT, tuple(ip_address(text) for text in self.addresses))

    def valid(self, config: Config, wall_clock: float) -> bool:
        """Whether the certificate still lets its holder in."""
        return wall_clock < self.not_after and self.number not in config.revoked


class Roster:
    """The clients that were let in: a JSON list in the state directory. Its methods block for a disk write."""

    def __init__(self, paths: Paths) -> None:
        self._path = paths.state_dir / FILE_NAME
        self._entries: dict[str, _Entry] = {}
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=list[_Entry])
            # Both are read here, so that an address or a number that is none is found out.
            self._entries = {entry.node.name: entry for entry in found if entry.number}
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # msgspec's and ipaddress' errors are ValueErrors
            log.warning("the clients of the last start are not known", reason=str(error))

    def extend(self, config: Config, wall_clock: float) -> Config:
        """Return the cluster of a file with all clients that may be in it; the file goes before a certificate."""
        return self._fitting(config, wall_clock)[0]

    def _fitting(self, config: Config, wall_clock: float, but: str = "") -> tuple[Config, dict[str, _Entry]]:
        """Return the cluster with the clients that may be in it, and their entries; without one client."""
        found = {}
        for entry in self._entries.values():
            if entry.name != but and entry.valid(config, wall_clock):
                with contextlib.suppress(ConfigError):  # a node of the file has its name or address now
                    config = config.joined_by(entry.node)
                    found[entry.name] = entry
        return config, found

    def admit(self, identity: Identity, config: Config, wall_clock: float) -> None:
        """Let the holder of a proven identity in, if it fits the cluster as it is, and remember it.

        Raises `RefusedError` for a certificate that holds no more, or if a later one was let in, `ConfigError` if name
        or addresses do not fit, `SrdError` if it cannot be written down.
        """
        known = self._entries.get(identity.node)
        serial = f"{identity.serial:x}"
        if known is not None and known.serial == serial:
            return
        if known is not None and known.valid(config, wall_clock) and known.not_after > identity.not_after:
            raise RefusedError("let in", identity.node, "a later certificate of that name has been let in")
        entry = _Entry(identity.node, tuple(map(str, identity.addresses)), serial, identity.not_after)
        if not entry.valid(config, wall_clock):
            raise RefusedError("let in", identity.node, f"its certificate {serial} has ended, or is revoked")
        cluster, others = self._fitting(config, wall_clock, but=identity.node)
        cluster.joined_by(Node(identity.node, identity.kind, identity.addresses))
        entries = {**others, entry.name: entry}
        write_private(self._path, msgspec.json.encode(list(entries.values())))
        self._entries = entries
        log.info("a client is let in", client=entry.name, addresses=list(entry.addresses), serial=serial)
