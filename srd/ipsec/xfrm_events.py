"""What happens to the kernel's IPsec tables, as it happens."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from srd.ipsec.xfrm_abi import Group
from srd.ipsec.xfrm_errors import MalformedError
from srd.ipsec.xfrm_netlink import RECEIVE_BUFFER, AsyncXfrmEventSocket, KernelError, receive
from srd.ipsec.xfrm_types import Overrun, XfrmEvent


class XfrmEvents:
    """What happens to the tables: `async with XfrmEvents() as events: async for event in events: ...`.

    Read the tables only after entering, then nothing is missed. When events were lost an Overrun comes in their
    place, and the subscription has been renewed by then. A wait may be cut off (asyncio.timeout) without loss.

    Listening to `acquire` makes the kernel create a larval SA for each packet that has none: only for a key manager.
    """

    def __init__(self, *, acquire: bool = False, receive_buffer: int = RECEIVE_BUFFER) -> None:
        self._groups = (Group.SA, Group.POLICY, Group.EXPIRE, *((Group.ACQUIRE,) if acquire else ()))
        self._receive_buffer = receive_buffer
        self._core: AsyncXfrmEventSocket | None = None
        self._ready: deque[XfrmEvent] = deque()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._subscribe()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription, and with it a waiting iteration."""
        self._closed = True
        self._drop()

    def __aiter__(self) -> AsyncIterator[XfrmEvent]:
        return self

    async def __anext__(self) -> XfrmEvent:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            if self._core is None:
                await self._subscribe()
                self._ready.append(Overrun("events were lost while there was no subscription"))
            else:
                await self._receive(self._core)
        return self._ready.popleft()

    async def _receive(self, core: AsyncXfrmEventSocket) -> None:
        """Wait for one datagram; all of its events become ready at once."""
        try:
            self._ready.extend(await receive(core))
        except MalformedError as error:
            self._ready.append(Overrun(error.reason))
        except (KernelError, OSError) as error:
            self._drop()
            if not self._closed:
                code = error.code if isinstance(error, KernelError) else error.errno or errno.EIO
                await self._subscribe()  # should this fail, the next `__anext__` tries again
                self._ready.append(Overrun(os.strerror(code)))

    async def _subscribe(self) -> None:
        core = AsyncXfrmEventSocket(self._receive_buffer)
        try:
            await core.setup_endpoint()
            core.socket.bind((0, 0))  # an address is needed to be sent anything; pyroute2's bind() hides why it fails
            for group in self._groups:
                core.add_membership(group)
        except OSError as error:
            core.close()
            failure = KernelError(error.errno or errno.EIO, "")
        except BaseException:
            core.close()
            raise
        else:
            self._drop()
            self._core = core
            if self._closed:  # meanwhile
                self._drop()
            return
        raise failure.explain("listen to", "the XFRM events")

    def _drop(self) -> None:
        if self._core is not None:
            self._core.close()
            self._core = None
