"""One voter's sentinel in full, as the doctor asks it: what it keeps of the cluster; and what the doctor changes in it.

SENTINEL MASTER is asked rather than GET-MASTER-ADDR-BY-NAME: what counts here is what the sentinel monitors, which is
what it writes to its file. The epoch of its last vote and its current epoch are in no reply (sentinel.c 7.0,
addReplySentinelRedisInstance and genRedisInfoString); `config-epoch` is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from srd.cluster import Config, Node
from srd.ha.resp import ANSWER_SECONDS, Credentials, Fields, Wire, checked, flag
from srd.ha.sentinel import SENTINEL_USER
from srd.model import Endpoint, Secrets

# What SENTINEL MASTER shows of what srd renders, and what SENTINEL SET changes, by the same names.
_MASTER_SETTINGS: Final = ("quorum", "down-after-milliseconds", "failover-timeout", "parallel-syncs")
# What is set for the whole sentinel, by SENTINEL CONFIG SET.
_OWN_SETTINGS: Final = ("announce-ip", "announce-port")


@dataclass(frozen=True, slots=True)
class ListedSentinel:
    """Another sentinel, as one lists it: its id, `address:port`, and how many seconds ago its last hello came."""

    run_id: str
    at: str
    port: int
    hello_age: float


@dataclass(frozen=True, slots=True)
class Account:
    """What one node's sentinel keeps. `primary` is whom it monitors as `address:port`, None for nobody of our name."""

    node: str
    run_id: str
    primary: str | None
    epoch: int = 0
    tilt: bool = False
    flags: frozenset[str] = frozenset({"master"})
    settings: Mapping[str, str] = field(default_factory=dict)
    sentinels: tuple[ListedSentinel, ...] = ()
    replicas: tuple[str, ...] = ()
    further_masters: tuple[str, ...] = ()


def wanted_settings(config: Config, node: Node) -> dict[str, str]:
    """Return how a voter's sentinel is to be set, in Sentinel's names and words."""
    return {
        "quorum": str(config.quorum),
        "down-after-milliseconds": str(round(config.sentinel.down_after * 1000)),
        "failover-timeout": str(round(config.sentinel.failover_timeout * 1000)),
        "parallel-syncs": str(config.parallel_syncs),
        "announce-ip": str(node.address),
        "announce-port": str(config.sentinel.port),
    }


class Patient:
    """Asks one voter's sentinel, over a connection of its own."""

    def __init__(self, config: Config, node: Node, secrets: Secrets) -> None:
        self.node = node.name
        self._master = config.sentinel.master
        endpoint = Endpoint(node.address, config.sentinel.port)
        self._wire = Wire("sentinel", endpoint, Credentials(SENTINEL_USER, secrets.sentinel_password))

    async def account(self, seconds: float = ANSWER_SECONDS) -> Account:
        """Return what it keeps."""
        run_id, about, announced, master, sentinels, replicas = await self._wire.ask(
            ("SENTINEL", "MYID"),
            ("INFO", "sentinel"),
            ("SENTINEL", "CONFIG", "GET", "announce-*"),  # a wider pattern would show a password
            ("SENTINEL", "MASTER", self._master),
            ("SENTINEL", "SENTINELS", self._master),
            ("SENTINEL", "REPLICAS", self._master),
            seconds=seconds,
        )
        subject = self._wire.subject
        info = Fields.of_info(subject, [about])
        masters = {line.get("name", str) for line in info.lines("master")}
        own = Fields.of_list(subject, announced)
        account = Account(
            node=self.node,
            run_id=checked(subject, run_id, str),
            primary=None,
            tilt=info.get("sentinel_tilt", flag),
            settings={name: own.get(name, str) for name in _OWN_SETTINGS},
            further_masters=tuple(sorted(masters - {self._master})),
        )
        if self._master not in masters:
            return account
        shown = Fields.of_list(subject, master)
        return replace(
            account,
            primary=_at(shown),
            epoch=shown.get("config-epoch", int),
            flags=shown.get("flags", lambda text: frozenset(text.split(","))),
            settings={**account.settings, **{name: shown.get(name, str) for name in _MASTER_SETTINGS}},
            sentinels=tuple(_sentinel(line) for line in self._lines(sentinels)),
            replicas=tuple(_at(line) for line in self._lines(replicas)),
        )

    def _lines(self, reply: Any) -> list[Fields]:
        subject = self._wire.subject
        return [Fields.of_list(subject, line) for line in checked(subject, reply, list)]

    async def set(self, name: str, value: str, seconds: float = ANSWER_SECONDS) -> None:
        """Change one of `wanted_settings`; the sentinel has it in its file before it answers (sentinelFlushConfig)."""
        command = ("CONFIG", "SET") if name in _OWN_SETTINGS else ("SET", self._master)
        (reply,) = await self._wire.ask(("SENTINEL", *command, name, value), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def reset(self, seconds: float = ANSWER_SECONDS) -> None:
        """Have it forget every sentinel and replica. It finds those again that are there; its file is as before.

        sentinel.c 7.0, sentinelResetMaster: both lists, the connections to the primary and all that has to do with its
        being down go; a failover that this one leads is undone. What stays: the id, the current epoch, the address and
        the epoch of the configuration, and the epoch of the last vote. So it does not vote a second time in an epoch,
        although it forgets for whom it voted. The name is no pattern: it has no character that would make it one.
        """
        (reply,) = await self._wire.ask(("SENTINEL", "RESET", self._master), seconds=seconds)
        checked(self._wire.subject, reply, int)

    async def keep(self, seconds: float = ANSWER_SECONDS) -> None:
        """Have it write what it knows to its file; after RESET alone a restart would bring the lists back."""
        (reply,) = await self._wire.ask(("SENTINEL", "FLUSHCONFIG"), seconds=seconds)
        checked(self._wire.subject, reply, str)

    async def close(self) -> None:
        """Close the connection."""
        await self._wire.close()


def _sentinel(line: Fields) -> ListedSentinel:
    return ListedSentinel(
        run_id=line.get("runid", str),
        at=_at(line),
        port=line.get("port", int),
        hello_age=line.get("last-hello-message", int) / 1000,
    )


def _at(line: Fields) -> str:
    """Return `address:port` as `Endpoint` has it. It may be a name: who announces itself here is not for srd to say."""
    host, port = line.get("ip", str), line.get("port", int)
    try:
        return str(Endpoint(ipaddress.ip_address(host), port))
    except ValueError:
        return f"{host}:{port}"
