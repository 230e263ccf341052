"""What goes wrong with the kernel's IPsec tables: one error for each thing that a caller can do about it."""

from __future__ import annotations

import errno as errno_codes
import os

from srd.model import PermissionRefusedError, SrdError


class XfrmError(SrdError):
    """The kernel refused a request. `errno` is its number, `kernel_text` its extended-ACK sentence, or ""."""

    def __init__(self, operation: str, subject: str, errno: int, kernel_text: str = "", remedy: str = "") -> None:
        reason = os.strerror(errno)
        super().__init__(operation, subject, f"{reason} ({kernel_text})" if kernel_text else reason, remedy)
        self.errno = errno
        self.kernel_text = kernel_text


class AlreadyExistsError(XfrmError):
    """There is an object of this identity; it may be somebody else's."""


class MissingError(XfrmError):
    """There is no such object, or no free SPI in the range."""


class NotSupportedError(XfrmError):
    """The kernel lacks XFRM, ESP or the algorithm."""


class NotPermittedError(XfrmError, PermissionRefusedError):
    """The process lacks CAP_NET_ADMIN."""


class MalformedError(XfrmError):
    """A message of the kernel can't be understood; nothing of its contents is in the text."""

    def __init__(self, reason: str) -> None:
        super().__init__("understand", "the kernel's XFRM message", errno_codes.EBADMSG, reason)
