"""What the command line may have a node's duties do: by the path on the control socket, with the query as it came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from srd.cluster import Node
from srd.control.documents import Document
from srd.control.server import Action
from srd.duties import Duties
from srd.model import LONGEST_PAUSE_SECONDS, RefusedError, Service, SrdError
from srd.rolling import RESTART_TOPIC, STATE_TOPIC

LONGEST_WAIT_SECONDS: Final = 86400.0


def seconds_of(text: str, longest: float = LONGEST_WAIT_SECONDS) -> float:
    """Return how long somebody is ready to wait."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= longest:
        raise SrdError("wait", text, f"it is not a number of seconds from 0 to {longest:g}")
    return seconds


@dataclass(frozen=True)
class DutyActions:
    """The actions of a node; without duties, a client's, each is refused."""

    node: Node
    duties: Duties | None

    def by_path(self) -> Mapping[str, Action]:
        """Return what does each."""
        return {
            "/v1/restart": self._restart,
            "/v1/switchover": self._switch_over,
            "/v1/doctor": self._examine,
            "/v1/drain": self._drain,
            "/v1/undrain": self._undrain,
            "/v1/pause": self._pause,
            "/v1/node/restart": partial(self._on_node, RESTART_TOPIC),
        }

    def questions(self) -> Mapping[str, Action]:
        """Return what answers each question that changes nothing."""
        return {"/v1/node": partial(self._on_node, STATE_TOPIC)}

    def _on_duty(self, operation: str, subject: str) -> Duties:
        if self.duties is None:
            raise RefusedError(
                operation, subject, f"{self.node.name} runs no redis and no sentinel", "ask one that does"
            )
        return self.duties

    async def _restart(self, asked: Mapping[str, str]) -> Document:
        """Answer `srd restart`: the query names the `child`, how long to `wait` for it, and whether to `force` it."""
        child = asked.get("child", "")
        if child not in set(Service):
            raise RefusedError("restart", child, f"{self.node.name} runs no such child")
        duties = self._on_duty("restart", child)
        seconds = seconds_of(asked.get("wait", "60"))
        return {"pid": await duties.restart(Service(child), force=_flag(asked, "force"), seconds=seconds)}

    async def _switch_over(self, asked: Mapping[str, str]) -> Document:
        """Answer `srd switchover`: the query names the node it goes `to`, or none for the fittest, and a `dry_run`."""
        duties = self._on_duty("switch over from", self.node.name)
        to, by = asked.get("to"), asked.get("by")
        return dict(await duties.switch_over(to, dry_run=_flag(asked, "dry_run"), by=by))

    async def _examine(self, asked: Mapping[str, str]) -> Document:
        """Answer `srd doctor`: the query says whether to `repair`, or with `dry_run` only to say what would be done."""
        duties = self._on_duty("examine", "the sentinels")
        return await duties.examine(repair=_flag(asked, "repair"), dry_run=_flag(asked, "dry_run"))

    async def _drain(self, _asked: Mapping[str, str]) -> Document:
        """Answer `srd drain`."""
        return await self._on_duty("drain", self.node.name).drain()

    async def _undrain(self, _asked: Mapping[str, str]) -> Document:
        """Answer `srd undrain`."""
        return await self._on_duty("undrain", self.node.name).undrain()

    async def _pause(self, asked: Mapping[str, str]) -> Document:
        """Answer `srd pause` and `srd resume`: the query says for how many `seconds`, 0 to end it."""
        seconds = seconds_of(asked.get("seconds", ""), LONGEST_PAUSE_SECONDS)
        return await self._on_duty("pause", self.node.name).pause(seconds)

    async def _on_node(self, topic: str, asked: Mapping[str, str]) -> Document:
        """Answer a step of `srd rolling`: the query names the `node`, and the `child` that it is to restart."""
        duties = self._on_duty("ask", asked.get("node", ""))
        return dict(await duties.on_node(asked.get("node", ""), topic, {"child": asked.get("child")}))


def _flag(asked: Mapping[str, str], name: str) -> bool:
    return asked.get(name) == "1"
