"""The family NETLINK_XFRM on pyroute2's asyncio core: marshal, sockets, one request. The only importer of pyroute2.

pyroute2 has no SA or policy messages. This adds them as its own families do (compare AsyncNFCTSocket), with three
differences that keys demand: error messages are asked for without the refused request in them (NETLINK_CAP_ACK), every
key is zeroed in what arrives before it is queued, and requests are wiped once sent.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from typing import Any, ClassVar, Final

from pyroute2.netlink import NETLINK_XFRM, SOL_NETLINK, nlmsg  # type: ignore[import-untyped]
from pyroute2.netlink.marshal import Marshal  # type: ignore[import-untyped]
from pyroute2.netlink.nlsocket import AsyncNetlinkSocket, NetlinkRequest  # type: ignore[import-untyped]

from srd.ipsec import xfrm_abi as abi
from srd.ipsec.xfrm_abi import Message
from srd.ipsec.xfrm_decode import decode_error, decode_event, decode_reply
from srd.ipsec.xfrm_errors import (
    AlreadyExistsError,
    MalformedError,
    MissingError,
    NotPermittedError,
    NotSupportedError,
    XfrmError,
)
from srd.ipsec.xfrm_types import XfrmEvent

NETLINK_CAP_ACK: Final = 10
SO_RCVBUFFORCE: Final = 33
RECEIVE_BUFFER: Final = 8 * 1024 * 1024  # strongSwan's default: some 16,000 events
QUEUE_LIMIT: Final = 20_000  # events between the kernel's buffer and their reader

ERRORS: Final[dict[int, type[XfrmError]]] = {
    errno.EEXIST: AlreadyExistsError,
    errno.ESRCH: MissingError,
    errno.ENOENT: MissingError,
    errno.ENOSYS: NotSupportedError,
    errno.EPROTONOSUPPORT: NotSupportedError,
    errno.EOPNOTSUPP: NotSupportedError,
    errno.EAFNOSUPPORT: NotSupportedError,
    errno.ECONNREFUSED: NotSupportedError,
    errno.EPERM: NotPermittedError,
    errno.EACCES: NotPermittedError,
}
REMEDIES: Final = {
    errno.ENOSYS: "it needs the AEAD in the kernel: CONFIG_CRYPTO_GCM or _CHACHA20POLY1305, and _SEQIV",
    errno.EPROTONOSUPPORT: "it needs CONFIG_XFRM_USER, _INET_ESP and _INET6_ESP in the kernel (xfrm_user, esp4, esp6)",
    errno.ECONNREFUSED: "it needs CONFIG_XFRM_USER in the kernel (xfrm_user)",
    errno.EPERM: "it needs CAP_NET_ADMIN",
}


class KernelError(Exception):
    """An errno with the kernel's sentence, on its way through pyroute2 to where operation and object are known."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def explain(self, operation: str, subject: str) -> XfrmError:
        """Return the error that a caller of this library gets."""
        kind = ERRORS.get(self.code, XfrmError)
        return kind(operation, subject, self.code, self.text, REMEDIES.get(self.code, ""))


class RawMessage(nlmsg):  # type: ignore[misc]  # pyroute2 is untyped
    """Netlink requests of one kind whose bodies are packed already, in one datagram; `data` is what is sent.

    All bear one sequence number, and only the last asks for an ACK: whatever comes before that is an error.
    """

    __slots__ = ("bodies",)

    def __init__(self, *bodies: bytes | bytearray) -> None:
        super().__init__()
        self.bodies = bodies

    def encode(self) -> None:
        """Put the header, which pyroute2 has filled in by now, before each body."""
        header = self["header"]
        flags = header["flags"]
        self.data = bytearray()  # type: ignore[misc]  # a slot of nlmsg_base
        for number, body in enumerate(self.bodies, 1):
            kept = flags if number == len(self.bodies) else flags & ~abi.NLM_F_ACK
            length = abi.HEADER.size + len(body)
            self.data += abi.HEADER.pack(length, header["type"], kept, header["sequence_number"], header["pid"])
            self.data += body
            self.data += bytes(abi.align(length) - length)

    def wipe(self) -> None:
        """Zero what was sent."""
        self.data[:] = bytes(len(self.data))
        self.bodies = ()


class Bodies(tuple[bytes, ...]):
    """The bodies of a dump's policies in one datagram, which nobody may need to decode."""

    __slots__ = ()


class XfrmMarshal(Marshal):  # type: ignore[misc]  # pyroute2 is untyped
    """Turns datagrams into `{"header": ..., "value": ...}`, errors without a look at the request in them."""

    def parse(
        self, data: bytes, _seq: int | None = None, _callback: object = None, _skip_alien_seq: object = None
    ) -> Iterator[dict[str, Any]]:
        """Yield one dict for each message; one that can't be read has the reason in `header.error`.

        Policies of a dump come together: pyroute2 takes 25 us for each message that it hands on.
        """
        frames = list(abi.frames(data))
        listed = [frame for frame in frames if frame.type == Message.NEWPOLICY and frame.flags & abi.NLM_F_MULTI]
        if listed:
            header = dict(zip(("type", "flags", "sequence_number", "pid"), listed[0], strict=False))
            yield {"header": header, "value": Bodies(bytes(frame.body) for frame in listed)}
            frames = [frame for frame in frames if frame.type != Message.NEWPOLICY]
        yield from self._each(frames)

    def _each(self, frames: list[abi.Frame]) -> Iterator[dict[str, Any]]:
        for frame in frames:
            header: dict[str, Any] = dict(zip(("type", "flags", "sequence_number", "pid"), frame, strict=False))
            message: dict[str, Any] = {"header": header, "value": None}
            try:
                if frame.type in (abi.NLMSG_ERROR, abi.NLMSG_DONE):
                    code, text = decode_error(frame.type, frame.flags, frame.body)
                    header["error"] = KernelError(code, text) if code else None
                else:
                    message["value"] = self.decode(frame.type, frame.pid, frame.body)
            except MalformedError as error:
                header["error"] = error
            yield message

    def decode(self, kind: int, _pid: int, body: memoryview) -> object | None:
        """Return the value of one message that is not an error."""
        return decode_reply(kind, body)


class XfrmEventMarshal(XfrmMarshal):
    """Decodes the same messages as events."""

    def decode(self, kind: int, pid: int, body: memoryview) -> object | None:
        """Return an XfrmEvent, or None."""
        return decode_event(kind, pid, body)


class AsyncXfrmSocket(AsyncNetlinkSocket):  # type: ignore[misc]  # pyroute2 is untyped
    """A pyroute2 socket of the family NETLINK_XFRM."""

    marshal_class: ClassVar[type[XfrmMarshal]] = XfrmMarshal

    def __init__(self, receive_buffer: int = RECEIVE_BUFFER) -> None:
        _quiet_pyroute2()
        super().__init__(family=NETLINK_XFRM, ext_ack=True, rcvbuf=receive_buffer)

    def setup_socket(self) -> socket.socket:
        """Open the socket: errors without a copy of the request, and the buffer even beyond net.core.rmem_max."""
        sock: socket.socket = super().setup_socket()
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.status["rcvbuf"])
        except PermissionError:  # an ordinary user: rmem_max stands, and an overrun only costs a new reading
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.status["rcvbuf"])
        return sock

    def enqueue(self, data: bytes, addr: tuple[int, int] | None) -> None:
        """Queue a datagram with its keys zeroed, unless another process sent it: only the kernel is believed.

        An error of the socket itself has no `addr`, and every request that waits must hear of it.
        """
        if addr is None:
            for tag in tuple(self.msg_queue.queues):
                self.msg_queue.put_nowait(tag, data)
        elif addr[0] == 0:
            super().enqueue(abi.redact(data), addr)


class AsyncXfrmEventSocket(AsyncXfrmSocket):
    """The same, for multicast messages. A reader that falls `QUEUE_LIMIT` behind gets ENOBUFS, as from the kernel."""

    marshal_class = XfrmEventMarshal
    _overrun = False

    def enqueue(self, data: bytes, addr: tuple[int, int] | None) -> None:
        """Queue a datagram; after an overrun nothing any more, for a new socket is the answer to that."""
        waiting = self.msg_queue.root
        if self._overrun:
            return
        if addr is not None and waiting.qsize() >= QUEUE_LIMIT:
            while not waiting.empty():
                waiting.get_nowait()
            self.protocol.enqueue_error(errno.ENOBUFS)
            self._overrun = True
        else:
            super().enqueue(data, addr)


def _quiet_pyroute2() -> None:
    """Keep pyroute2 from logging all messages (core.py: log.debug("message %s")). They hold no keys by then."""
    logger = logging.getLogger("pyroute2")
    if logger.getEffectiveLevel() <= logging.DEBUG:
        logger.setLevel(logging.INFO)


async def exchange(core: AsyncXfrmSocket, kind: Message, flags: int, pid: int, message: RawMessage) -> list[object]:
    """Send a request and return the values of its answers; an ACK is None. Raises KernelError and OSError.

    By NetlinkRequest and not by `nlm_request`, which does not let its caller choose the pid.
    """
    request = NetlinkRequest(core, message, msg_type=kind, msg_flags=flags, msg_pid=pid)
    await request.send()
    return [answer["value"] async for answer in request.response()]


async def receive(core: AsyncXfrmEventSocket) -> list[XfrmEvent]:
    """Wait for one datagram and return its events. Raises KernelError, MalformedError and OSError."""
    return [message["value"] async for message in core.get() if message["value"] is not None]
