"""The keying channel's transport: TLS 1.3 with mutual certificates over asyncio, typed messages, the TLS exporter.

The standard library's ssl has no exporter (RFC 5705; python/cpython#82133), so this drives pyOpenSSL's `Connection`
over memory BIOs. Only importer of OpenSSL. No tickets, no resumption: each connection is a fresh handshake with a
fresh check of both certificates, which is what gives every generation of keys forward secrecy (RFC 8446 section 1.2).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from srd.ipsec.protocol import KeyingError, M, Message, understood
from srd.model import Credentials, Identity

# Every message of a 1000-node cluster fits in a fraction of this; a peer that claims more is cut off.
MAX_MESSAGE_BYTES: Final = 64 * 1024
_LENGTH: Final = struct.Struct(">I")
_READ_BYTES: Final = 16 * 1024


def tls_context(credentials: Credentials) -> SSL.Context:
    """Return the TLS settings of a node, for both roles: TLS 1.3 only, the peer's certificate from our authority."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # OpenSSL refuses a session without this when certificates are asked for, even one that it will not cache.
    context.set_session_id(b"srd")
    context.use_certificate(x509.load_pem_x509_certificate(credentials.certificate))
    key = load_pem_private_key(credentials.key.reveal().encode(), password=None)
    context.use_privatekey(key)  # type: ignore[arg-type]  # the bundle was checked: an EC key
    store = context.get_cert_store()
    if store is None:
        raise KeyingError("set up TLS", "", "OpenSSL gave no certificate store")
    store.add_cert(crypto.X509.from_cryptography(x509.load_pem_x509_certificate(credentials.authority)))
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    return context


class Channel:
    """One TLS connection to a peer. `group` and `identity` are known after `handshake`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: SSL.Context, *, accepted: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._tls = SSL.Connection(context, None)
        self._buffer = bytearray()
        self.identity: Identity | None = None
        if accepted:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()

    async def handshake(self, identify: Callable[[Any], Identity], seconds: float) -> Identity:
        """Complete the TLS handshake and return who the peer's certificate says it is.

        `identify` reads an identity from a certificate whose signature OpenSSL has checked, or raises `ValueError`.
        """
        async with _translated("shake hands with", self.remote, seconds):
            while True:
                try:
                    self._tls.do_handshake()
                except SSL.WantReadError:
                    await self._flush()
                    await self._feed()
                except SSL.Error:
                    await self._flush()  # the alert tells the peer why
                    raise
                else:
                    await self._flush()
                    break
        certificate = self._tls.get_peer_certificate(as_cryptography=True)
        try:
            self.identity = identify(certificate)
        except ValueError as error:
            raise KeyingError("trust", self.remote, str(error)) from error
        return self.identity

    @property
    def remote(self) -> str:
        """The peer's address, for messages to people."""
        name = self._writer.get_extra_info("peername")
        return str(name[0]) if name else "a peer that has gone"

    @property
    def group(self) -> str:
        """The key exchange group of the handshake, such as X25519MLKEM768."""
        return self._tls.get_group_name() or "unknown"

    def export(self, label: bytes, context: bytes, length: int) -> bytes:
        """Return keying material that only the two ends of this connection can compute (RFC 8446 section 7.5)."""
        return self._tls.export_keying_material(label, length, context)

    async def send(self, message: Message) -> None:
        """Send one message."""
        body = msgspec.msgpack.encode(message)
        async with _translated("write to", self.remote, None):
            self._tls.sendall(_LENGTH.pack(len(body)) + body)
            await self._flush()

    async def receive(self, kind: type[M], seconds: float) -> M:
        """Return the next message, which must be of this kind; `KeyingError` when it is another, or none in time."""
        async with _translated("read from", self.remote, seconds):
            length = _LENGTH.unpack(await self._exactly(_LENGTH.size))[0]
            if length > MAX_MESSAGE_BYTES:
                raise KeyingError("read from", self.remote, f"a message of {length} bytes is too long")
            body = await self._exactly(length)
        return understood(body, kind, self.remote)

    def close(self) -> None:
        """End the connection at once; nothing waits."""
        self._writer.transport.abort()

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                self._buffer += self._tls.recv(_READ_BYTES)
            except SSL.WantReadError:
                await self._flush()
                await self._feed()
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def _feed(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise KeyingError("read from", self.remote, "it closed the connection")
        self._tls.bio_write(data)

    async def _flush(self) -> None:
        while True:
            try:
                self._writer.write(self._tls.bio_read(_READ_BYTES))
            except SSL.WantReadError:
                break
        await self._writer.drain()


@asynccontextmanager
async def _translated(operation: str, remote: str, seconds: float | None) -> AsyncIterator[None]:
    """Turn what OpenSSL and the socket raise into `KeyingError`; bound the block when `seconds` is given."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        bound = "" if seconds is None else f" within {seconds:g} s"  # without one it is TCP's own, ETIMEDOUT
        raise KeyingError(operation, remote, f"no answer{bound}") from None
    except SSL.ZeroReturnError:
        raise KeyingError(operation, remote, "it closed the connection") from None
    except SSL.SysCallError as error:
        raise KeyingError(operation, remote, "the connection broke") from error
    except SSL.Error as error:
        raise KeyingError(operation, remote, _alert(error)) from error
    except OSError as error:
        raise KeyingError(operation, remote, error.strerror or "the connection broke") from error


def _alert(error: SSL.Error) -> str:
    """Return OpenSSL's last reason, such as `certificate verify failed`."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reasons = [entry[2] for entry in queue if len(entry) > 2 and entry[2]]  # noqa: PLR2004 - (library, function, reason)
    return str(reasons[-1]) if reasons else "the TLS connection failed"
