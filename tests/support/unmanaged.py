"""srd's parts without a service manager: nothing is kept, and nothing was."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from srd.listening import Listeners
from srd.systemd import FdStore, Notifier
from srd.web.agent import AgentServer
from srd.web.app import BACKLOG, WebServer


def no_store() -> FdStore:
    return FdStore(Notifier(None))


@contextlib.asynccontextmanager
async def started(server: WebServer | AgentServer) -> AsyncIterator[None]:
    """Have the server listen and answer meanwhile."""
    listeners = Listeners("http", no_store(), backlog=BACKLOG)
    try:
        await server.start(listeners)
        try:
            yield
        finally:
            await server.stop()
    finally:
        listeners.release()
