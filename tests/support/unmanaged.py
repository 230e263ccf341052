"""srd's parts without a service manager: nothing is kept, and nothing was."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from srd.listening import Listeners
from srd.systemd import FdStore, Notifier
from srd.web.app import BACKLOG, WebServer


def no_store() -> FdStore:
    return FdStore(Notifier(None))


@contextlib.asynccontextmanager
async def started(web: WebServer) -> AsyncIterator[None]:
    """Have the server listen and answer meanwhile."""
    listeners = Listeners("http", no_store(), backlog=BACKLOG)
    try:
        await web.start(listeners)
        try:
            yield
        finally:
            await web.stop()
    finally:
        listeners.release()
