"""Whether stunnel does its job: a TLS handshake as a client makes it, with the certificate that stunnel was given.

Not with the one in the bundle: between a new bundle and the reload that takes it in, stunnel serves as well as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ssl
from dataclasses import dataclass
from typing import Final

from srd.model import Endpoint, NoAnswerError, SrdError

_OPERATION: Final = "use TLS at"
_CLOSE_SECONDS: Final = 0.5
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Shown:
    """What stunnel was given to show to clients: its certificate's file and the authority's, as text."""

    certificate: str
    authority: str


async def probe_tls(endpoints: tuple[Endpoint, ...], shown: Shown) -> None:
    """Make a TLS handshake with each endpoint; `SrdError` unless each serves the certificate, valid by the authority.

    The caller bounds the time.
    """
    context, expected = _material(shown)
    for endpoint in endpoints:
        if await _served(endpoint, context) != expected:
            reason = "it serves another certificate than it was given"
            raise SrdError(_OPERATION, str(endpoint), reason, "srd restart stunnel")


@functools.lru_cache(maxsize=1)  # a context costs 1 ms, a tenth of what srd costs while nothing happens
def _material(shown: Shown) -> tuple[ssl.SSLContext, bytes]:
    """Return whom to trust, and the certificate that ought to be served (the first in its file)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate is compared as a whole, so which names it holds does not matter here.
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=shown.authority)
    except (ssl.SSLError, ValueError) as error:
        raise SrdError("read", "stunnel's ca.crt", str(error)) from error
    text = shown.certificate
    try:
        return context, ssl.PEM_cert_to_DER_cert(text[text.index(_BEGIN) : text.index(_END) + len(_END)])
    except ValueError as error:
        raise SrdError("read", "stunnel's tls.crt", "it is not a certificate in PEM") from error


async def _served(endpoint: Endpoint, context: ssl.SSLContext) -> bytes | None:
    try:
        # From the same address: one that the machine has lost is no fault of stunnel's, and is said at once.
        _, writer = await asyncio.open_connection(
            str(endpoint.address), endpoint.port, ssl=context, local_addr=(str(endpoint.address), 0)
        )
        try:
            session: ssl.SSLObject = writer.get_extra_info("ssl_object")
            return session.getpeercert(binary_form=True)
        finally:
            writer.close()
            # stunnel closes its side when redis has closed the other, and how soon that is says nothing of stunnel.
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await writer.wait_closed()
            writer.transport.abort()
    except ssl.SSLCertVerificationError as error:
        raise SrdError(_OPERATION, str(endpoint), f"certificate not valid: {error.verify_message}") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise SrdError(_OPERATION, str(endpoint), "this machine does not have the address") from error
        raise NoAnswerError(_OPERATION, str(endpoint), error.strerror or str(error)) from error
