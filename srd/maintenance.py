"""What a person has asked for while a node, or the cluster, is worked on. Kept in the state directory.

A drained node takes nobody new: :8080 and :8081 say so, and its redis tells the sentinels that it is never to be
primary. That holds until a person ends it, over restarts of srd and of the machine.

A pause is the whole cluster's: no srd does anything by itself that a person might not expect while working. It has an
end. The wish travels with every heartbeat, so that a node that was away has it a second after it is back; the greater
number wins (`state.Pause`). Only nodes that vote are believed, for a client's certificate is an application's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog

from srd.model import NO_PAUSE, AskPeer, Body, Paths, Pause, RefusedError, SrdError
from srd.state import Situation, Store
from srd.supervise.files import TRAVERSABLE_DIRECTORY, make_own_directory, remove_own, write_private

log = structlog.get_logger(__name__)

DRAINED_NAME: Final = "drained"  # there while this node is
PAUSE_NAME: Final = "pause.json"
PAUSE_TOPIC: Final = "pause"
TELL_SECONDS: Final = 2.0


class Maintenance:
    """Keeps `drained` and `pause` of the view true to what was asked for, here or on another node."""

    def __init__(self, paths: Paths, store: Store, ask_peer: AskPeer) -> None:
        self._directory = paths.state_dir
        self._marker, self._file = paths.state_dir / DRAINED_NAME, paths.state_dir / PAUSE_NAME
        self._store, self._ask_peer = store, ask_peer
        self._changing = asyncio.Lock()
        self._write_drained = store.writer("drained")
        self._write_drained(os.path.exists(self._marker))  # noqa: PTH110 - Path.exists raises where it may not look
        self._write_pause = store.writer("pause")
        self._write_pause(self._remembered())

    def _remembered(self) -> Pause:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Pause)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # not UTF-8 is a ValueError, too
            log.warning("whether the cluster is paused is to be learned from the others", reason=str(error))
        return NO_PAUSE

    async def drain(self) -> None:
        """Have this node drained, on disk before anybody is told; `SrdError` when it cannot be written down."""
        await self._keep_file(self._marker.name, b"")
        self._write_drained(True)
        log.warning("drained")

    async def undrain(self) -> None:
        """End that."""
        await asyncio.to_thread(remove_own, self._marker)
        self._write_drained(False)
        log.info("not drained any more")

    async def pause(self, seconds: float, s: Situation) -> Mapping[str, str | None]:
        """Have the cluster paused for so long, 0 ends it; return for each other voter None, or why it does not know."""
        async with self._changing:
            number = max(self._store.view().pause.number + 1, int(s.wall_clock))
            pause = Pause(number, s.wall_clock + seconds if seconds else 0.0)
            await self._take(pause, s)
        body: Body = {"number": pause.number, "until": pause.until}
        others = [voter.name for voter in s.config.voters if voter != s.node]
        async with asyncio.TaskGroup() as group:
            asked = {name: group.create_task(self._tell(name, body)) for name in others}
        return {name: task.result() for name, task in asked.items()}

    async def _tell(self, peer: str, body: Body) -> str | None:
        try:
            await self._ask_peer(peer, PAUSE_TOPIC, body, TELL_SECONDS)
        except SrdError as error:
            return error.reason
        return None

    async def told(self, body: Body, s: Situation) -> Body:
        """Take over what another node has just been asked for; `RefusedError` when it is no pause."""
        match body:
            case {"number": int(number), "until": float(until)}:
                await self._hear(Pause(number, until), s)
                return {}
        raise RefusedError("understand", PAUSE_TOPIC, f"it is {dict(body)!r}")

    async def learn(self, s: Situation) -> None:
        """One pass: hear what the heartbeats of the nodes that vote say."""
        for voter in s.config.voters:
            report = s.view.peers.get(voter.name)
            if report is not None:
                await self._hear(report.pause, s)

    async def _hear(self, pause: Pause, s: Situation) -> None:
        """Take a pause over if it is news."""
        async with self._changing:
            known = self._store.view().pause
            newer = (pause.number, pause.until) > (known.number, known.until)
            if newer and pause.is_possible(s.wall_clock):
                await self._take(pause, s)

    async def _take(self, pause: Pause, s: Situation) -> None:
        await self._keep_file(self._file.name, msgspec.json.encode(pause))
        self._write_pause(pause)
        log.warning("paused" if pause.holds(s.wall_clock) else "not paused", number=pause.number, until=pause.until)

    async def _keep_file(self, name: str, content: bytes) -> None:
        await asyncio.to_thread(make_own_directory, self._directory, TRAVERSABLE_DIRECTORY)
        await asyncio.to_thread(write_private, self._directory / name, content)
