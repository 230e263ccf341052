"""One node's part in a restart of the whole cluster, node by node: it begins what it is told, and says how it is.

Who drives it is the command line (cli/rolling.py), by way of the srd of its own node, which asks the others over their
keying channels. A restart is begun and answered at once, and how far it is asked for again and again: an answer ends
with its connection, whenever keys are renewed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from srd.cluster import Node
from srd.conditions import Code, conditions
from srd.ha.lease import endpoint_of, fresh
from srd.ha.successor import LAG_SECONDS, is_heard
from srd.model import AskPeer, Body, RefusedError, Role, Service
from srd.reconcile import contained
from srd.state import ChildState, Situation, services_of
from srd.web import health
from srd.web.health import ErrorCode

RESTART_TOPIC: Final = "restart"
STATE_TOPIC: Final = "state"
ASK_SECONDS: Final = 5.0
SRD: Final = "srd"

# What is so for long, and is neither better nor worse after a restart.
ENDURING: Final = frozenset({
    Code.IPSEC_OFF, Code.NO_SECOND_NET, Code.CERTIFICATE_EXPIRING, Code.BUNDLE_CHANGED, Code.CHILD_OUTDATED,
    Code.DRAINED, Code.PAUSED,
})  # fmt: skip


def missing(s: Situation) -> list[str]:
    """Return, in words, what this node and its view of the cluster lack to be whole. Pure."""
    found = [f"{item.code} {item.subject}: {item.text}" for item in conditions(s) if item.code not in ENDURING]
    verdict = health.readiness(s)
    if not verdict.ok and verdict.error_code is not ErrorCode.DRAINED:
        found.append(verdict.description)
    others = [voter for voter in s.config.voters if voter != s.node]
    found += [f"the srd of {voter.name} is not heard" for voter in others if not is_heard(s, voter)]
    return [*found, *_replicas_missing(s), *_sentinels_missing(s)]


def _replicas_missing(s: Situation) -> list[str]:
    redis = s.view.redis
    if redis is None or redis.role is not Role.PRIMARY:
        return []
    in_step = {r.endpoint for r in redis.replicas if r.state == "online" and r.lag_seconds <= LAG_SECONDS}
    others = [node for node in s.config.redis_nodes if node != s.node]
    return [f"{node.name} is no replica in step" for node in others if endpoint_of(s.config, node) not in in_step]


def _sentinels_missing(s: Situation) -> list[str]:
    """Every sentinel answers, names the one primary, sees it well, and knows all the others and all replicas."""
    config, found = s.config, []
    answers = fresh(config, s.view.sentinels, s.now)
    primary = s.view.named
    wanted = (primary, frozenset({"master"}), len(config.voters) - 1, len(config.redis_nodes) - 1)
    for voter in config.voters:
        answer = answers.get(voter.name)
        if answer is None or answer.tilt:
            found.append(f"the sentinel of {voter.name} does not answer")
        elif (answer.primary, answer.flags, answer.known_sentinels, answer.known_replicas) != wanted:
            found.append(f"the sentinel of {voter.name} does not see the whole cluster, and well, yet")
    return found


class Restarts:
    """Begins restarts on this node, and has other nodes begin theirs. `run` is one of the daemon's bodies.

    `restart` ends a service, which is then started again; `begin_anew` has the service manager start the next srd, or
    raises `RefusedError`. `situation` is asked for every answer.
    """

    def __init__(
        self,
        node: Node,
        *,
        situation: Callable[[], Situation],
        restart: Callable[[Service], Awaitable[None]],
        begin_anew: Callable[[], None],
        ask_peer: AskPeer,
    ) -> None:
        self._node = node
        self._situation = situation
        self._restart = restart
        self._begin_anew = begin_anew
        self._ask_peer = ask_peer
        self._wanted: asyncio.Queue[Service] = asyncio.Queue(1)

    async def run(self) -> None:
        """Do what has been begun, one at a time, until cancelled."""
        while True:
            service = await self._wanted.get()
            await contained(f"restart of {service}", partial(self._restart, service))

    async def on(self, node: str, topic: str, body: Body) -> Body:
        """Ask a node of the cluster, this one too; what it answers is in `answer`. `SrdError` says why it does not."""
        if node == self._node.name:
            return self.answer(topic, body)
        return await self._ask_peer(node, topic, body, ASK_SECONDS)

    def answer(self, topic: str, body: Body) -> Body:
        """Begin a restart (`child`, nothing is answered), or say how this node is (`_state`)."""
        if topic == RESTART_TOPIC:
            self._begin(str(body.get("child")))
            return {}
        return self._state()

    def _begin(self, what: str) -> None:
        s = self._situation()
        if what == SRD:
            self._begin_anew()
            return
        service = next((each for each in services_of(self._node) if each == what), None)
        if service is None:
            raise RefusedError("restart", what, f"{self._node.name} runs no such child")
        if service is Service.REDIS and s.view.redis is not None and s.view.redis.role is Role.PRIMARY:
            raise RefusedError("restart", what, f"{self._node.name} is the primary", "move it away: srd switchover")
        try:
            self._wanted.put_nowait(service)
        except asyncio.QueueFull:
            raise RefusedError("restart", what, f"another restart is under way on {self._node.name}") from None

    def _state(self) -> Body:
        """Return what is `missing` here, whether it is `primary`, and by what each program is known again.

        That is its pid, None unless it is ready; of `srd` when it started, on this machine's own clock.
        """
        s = self._situation()
        named = s.view.named
        leads = s.view.redis is not None and s.view.redis.role is Role.PRIMARY
        ready = {service: child for service, child in s.view.children.items() if child.state is ChildState.READY}
        pids = {str(service): ready[service].pid if service in ready else None for service in services_of(s.node)}
        return {
            "missing": "; ".join(missing(s)),
            "primary": leads or named == endpoint_of(s.config, s.node),
            SRD: s.view.started,
            **pids,
        }
