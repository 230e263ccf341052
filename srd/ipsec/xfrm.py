"""The kernel's IPsec tables (XFRM) over netlink: SAs, policies, events. What the rest of a program imports.

Two sockets, because pyroute2 hands messages out by sequence number and XFRM's events repeat that of the request
which caused them: `XfrmSocket` asks, `XfrmEvents` listens. Neither follows its process into another
network namespace: they work in the one where they were opened.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from types import TracebackType
from typing import Final, Self, TypeVar

from srd.ipsec import xfrm_abi as abi
from srd.ipsec import xfrm_encode as encode
from srd.ipsec.xfrm_abi import Message
from srd.ipsec.xfrm_decode import decode_reply
from srd.ipsec.xfrm_errors import (
    AlreadyExistsError,
    MalformedError,
    MissingError,
    NotPermittedError,
    NotSupportedError,
    XfrmError,
)
from srd.ipsec.xfrm_events import XfrmEvents
from srd.ipsec.xfrm_netlink import (
    REMEDIES,
    AsyncXfrmSocket,
    Bodies,
    KernelError,
    RawMessage,
    exchange,
)
from srd.ipsec.xfrm_types import (
    Acquire,
    Action,
    Aead,
    Direction,
    Expired,
    IpAddress,
    IpNetwork,
    Lifetime,
    Mark,
    Mode,
    Overrun,
    Policy,
    PolicyChanged,
    PolicyDeleted,
    PolicyExpired,
    PolicyFlushed,
    PolicyIdentity,
    PolicyInfo,
    Sa,
    SaChanged,
    SaDeleted,
    SaFlushed,
    SaInfo,
    Selector,
    SpdInfo,
    Template,
    UdpEncapsulation,
    XfrmEvent,
)

__all__ = [
    "Acquire",
    "Action",
    "Aead",
    "AlreadyExistsError",
    "Direction",
    "Expired",
    "IpAddress",
    "IpNetwork",
    "Lifetime",
    "MalformedError",
    "Mark",
    "MissingError",
    "Mode",
    "NotPermittedError",
    "NotSupportedError",
    "Overrun",
    "Policy",
    "PolicyChanged",
    "PolicyDeleted",
    "PolicyExpired",
    "PolicyFlushed",
    "PolicyIdentity",
    "PolicyInfo",
    "PolicyTable",
    "Sa",
    "SaChanged",
    "SaDeleted",
    "SaFlushed",
    "SaInfo",
    "Selector",
    "SpdInfo",
    "Template",
    "UdpEncapsulation",
    "XfrmError",
    "XfrmEvent",
    "XfrmEvents",
    "XfrmSocket",
    "probe_esp",
    "try_aead",
]

T = TypeVar("T")

REQUEST_TIMEOUT: Final = 5.0  # the kernel answers within its send(); a dump of 4000 SAs takes 0.08 s
# Some 40 KiB in a datagram; the kernel copies it whole, and answers before send() returns.
_BATCH: Final = 128
# Where the kernel answers with data, an ACK would come after it and be nobody's.
_ANSWERED: Final = abi.NLM_F_REQUEST
_ACKED: Final = abi.NLM_F_REQUEST | abi.NLM_F_ACK
_DUMPED: Final = abi.NLM_F_REQUEST | abi.NLM_F_DUMP
_BROKEN: Final = (errno.ENOBUFS, errno.ECONNRESET, errno.EBADF)  # the socket is of no more use


class XfrmSocket:
    """Requests to the kernel's SA and policy tables. An async context manager; `close` may be called at any time.

    Every method raises an XfrmError that names the object, within `timeout` seconds. The kernel has acted by the
    time a request is sent, so one that is cancelled or timed out may have been carried out.

    `sa_direction` is whether to send XFRMA_SA_DIR; None asks the kernel's release (6.10 and later).
    """

    def __init__(self, *, timeout: float = REQUEST_TIMEOUT, sa_direction: bool | None = None) -> None:
        self.pid = secrets.randbits(31) | 1  # XFRM repeats what the header says; this tells our events from all others
        self._timeout = timeout
        self._sa_direction = _kernel_has_sa_direction() if sa_direction is None else sa_direction
        self._core: AsyncXfrmSocket | None = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close for good; what is installed stays."""
        self._closed = True
        self._discard()

    async def add_sa(self, sa: Sa) -> None:
        """Install an SA. AlreadyExistsError if its destination, SPI and mark are in use, whatever the source."""
        await self._send_sa(Message.NEWSA, "add", sa)

    async def update_sa(self, sa: Sa) -> None:
        """Give a larval SA (`alloc_spi`) its key, or a complete one new limits.

        The kernel takes a new key for a complete SA without a word and ignores it: to rekey, take a new SPI.
        """
        await self._send_sa(Message.UPDSA, "update", sa)

    async def delete_sa(self, destination: IpAddress, spi: int, mark: Mark | None = None) -> None:
        """Delete an ESP SA."""
        body = encode.encode_sa_id(destination, spi, mark)
        await self._request(Message.DELSA, _ACKED, body, "delete", _sa_name(destination, spi))

    async def get_sa(self, destination: IpAddress, spi: int, mark: Mark | None = None) -> SaInfo:
        """Read one ESP SA."""
        body = encode.encode_sa_id(destination, spi, mark)
        return await self._ask(Message.GETSA, body, "read", _sa_name(destination, spi), SaInfo)

    async def sas(self) -> list[SaInfo]:
        """Read all SAs of all protocols, in one dump."""
        return _only(SaInfo, await self._request(Message.GETSA, _DUMPED, b"", "read", "the SAs"))

    async def alloc_spi(self, source: IpAddress, destination: IpAddress, reqid: int, low: int, high: int) -> int:
        """Reserve a free SPI from `low` to `high` by a larval SA; the kernel drops it after xfrm_acq_expires (30 s).

        MissingError if the kernel hits on none: it tries at random, as often as the range has numbers. A larval SA
        of SPI 0 is then left for as long.
        """
        body = encode.encode_spi_range(source, destination, reqid, low, high)
        subject = f"an SPI for {source} -> {destination} from {low:#x} to {high:#x}"
        return (await self._ask(Message.ALLOCSPI, body, "reserve", subject, SaInfo)).spi

    async def add_policy(self, policy: Policy) -> None:
        """Install a policy. AlreadyExistsError if one has its selector, direction and mark, whatever the priority."""
        await self._request(Message.NEWPOLICY, _ACKED, encode.encode_policy(policy), "add", str(policy))

    async def add_policies(self, policies: Sequence[Policy]) -> None:
        """Install many, in their order, some hundred with each system call.

        Raises the error of the first that the kernel refuses; those before it, and some after, are installed then.
        """
        for start in range(0, len(policies), _BATCH):
            batch = policies[start : start + _BATCH]
            bodies = [encode.encode_policy(policy) for policy in batch]
            try:
                await self._request(Message.NEWPOLICY, _ACKED, bodies, "add", f"{len(batch)} policies")
            except XfrmError:
                # Which one it was is not in the answer. One by one it is, without those that are there by now.
                there = {info.policy.identity for info in await self.policies()}
                for policy in batch:
                    if policy.identity not in there:
                        await self.add_policy(policy)

    async def update_policy(self, policy: Policy) -> None:
        """Replace the policy of this selector, direction and mark atomically, or add it if there is none."""
        await self._request(Message.UPDPOLICY, _ACKED, encode.encode_policy(policy), "update", str(policy))

    async def delete_policy(self, policy: Policy) -> None:
        """Delete by index and mark if `policy.index` is set, else by selector, direction and mark."""
        await self._request(Message.DELPOLICY, _ACKED, encode.encode_policy_id(policy), "delete", str(policy))

    async def policies(self) -> list[PolicyInfo]:
        """Read all policies, those of sockets and of the second table too, in one dump."""
        return (await self.policy_table()).policies()

    async def policy_table(self) -> PolicyTable:
        """Read all policies in one dump, and decode none."""
        answers = await self._request(Message.GETPOLICY, _DUMPED, b"", "read", "the policies")
        return PolicyTable([body for bodies in _only(Bodies, answers) for body in bodies])

    async def sad_count(self) -> int:
        """Count the SAs."""
        return await self._ask(Message.GETSADINFO, abi.ALL_FLAGS, "count", "the SAs", int)

    async def spd_info(self) -> SpdInfo:
        """Count the policies."""
        return await self._ask(Message.GETSPDINFO, abi.ALL_FLAGS, "count", "the policies", SpdInfo)

    async def _send_sa(self, kind: Message, operation: str, sa: Sa) -> None:
        body = encode.encode_sa(sa, with_direction=self._sa_direction)
        try:
            await self._request(kind, _ACKED, body, operation, str(sa))
        except MissingError as error:
            if error.errno != errno.ENOENT:
                raise
            # A missing SA is ESRCH; ENOENT is crypto_alloc_aead() finding only a part of the algorithm.
            remedy = REMEDIES[errno.ENOSYS]
            raise NotSupportedError(operation, str(sa), error.errno, error.kernel_text, remedy) from None
        finally:
            body[:] = bytes(len(body))

    async def _ask(self, kind: Message, body: bytes, operation: str, subject: str, type_: type[T]) -> T:
        answers = _only(type_, await self._request(kind, _ANSWERED, body, operation, subject))
        if not answers:
            raise XfrmError(operation, subject, errno.EBADMSG, "no answer of the kind")
        return answers[0]

    async def _request(
        self, kind: Message, flags: int, body: bytes | bytearray | Sequence[bytes], operation: str, subject: str
    ) -> list[object]:
        """Send one request, or several of a kind, and collect the answers: the kernel works inside send() anyway.

        The error is raised outside of every `except`, so that it drags no frame with the request's bytes along.
        """
        async with self._one_at_a_time:
            bodies = (body,) if isinstance(body, bytes | bytearray) else body
            message, reusable = RawMessage(*bodies), False
            try:
                async with asyncio.timeout(self._timeout):
                    answers = await self._exchange(kind, flags, message)
            except KernelError as error:
                failure, reusable = error, error.code not in _BROKEN
            except TimeoutError:
                failure = KernelError(errno.ETIMEDOUT, "")
            except MalformedError as error:
                failure = KernelError(error.errno, error.kernel_text)
            except OSError as error:
                failure = KernelError(error.errno or errno.EIO, "")
            else:
                reusable = True
                return answers
            finally:
                message.wipe()
                if not reusable:
                    self._discard()  # what is still to come would be nobody's answer
        raise failure.explain(operation, subject)

    async def _exchange(self, kind: Message, flags: int, message: RawMessage) -> list[object]:
        if self._closed:
            raise KernelError(errno.EBADF, "the socket is closed")
        if self._core is None:
            self._core = AsyncXfrmSocket()
        return await exchange(self._core, kind, flags, self.pid, message)

    def _discard(self) -> None:
        if self._core is not None:
            self._core.close()
            self._core = None


class PolicyTable:
    """All policies as one dump gave them."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self._bodies = bodies

    @cached_property
    def fingerprint(self) -> bytes:
        """The same for the same policies in the same order, whatever passed by them: without counters and times."""
        digest = hashlib.blake2b()
        for body in self._bodies:
            digest.update(body[: abi.POLICY_USAGE.start])
            digest.update(body[abi.POLICY_USAGE.stop :])
        return digest.digest()

    def policies(self) -> list[PolicyInfo]:
        """Decode them; MalformedError where one can't be read."""
        return _only(PolicyInfo, [decode_reply(Message.NEWPOLICY, memoryview(body)) for body in self._bodies])


async def try_aead(socket_: XfrmSocket, name: str, key_bytes: int = 36) -> None:
    """Install an ESP SA with this AEAD between two documentation addresses (RFC 5737) and delete it.

    Raises NotSupportedError with what the kernel lacks. The key is random; its 36 bytes are those of AES-256-GCM
    (RFC 4106 section 8.1) and of ChaCha20-Poly1305 (RFC 7634 section 2), salt included.
    """
    here, there = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
    sa = Sa(
        source=here,
        destination=there,
        spi=0x1000 + secrets.randbelow(0xFFFFF000),
        reqid=0,
        aead=Aead(name, secrets.token_bytes(key_bytes)),
        direction=Direction.OUT,
        selector=Selector(IPv4Network(here), IPv4Network(there)),
        lifetime=Lifetime(hard_seconds=60),  # should we not get to deleting it
    )
    await socket_.add_sa(sa)
    await socket_.delete_sa(sa.destination, sa.spi)


async def probe_esp(socket_: XfrmSocket, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the AEADs that the kernel can use for ESP, in the order given."""
    usable = []
    for name in names:
        try:
            await try_aead(socket_, name)
        except NotSupportedError:
            continue
        usable.append(name)
    return tuple(usable)


def _sa_name(destination: IpAddress, spi: int) -> str:
    return f"SA to {destination} spi {spi:#010x}"


def _only(kind: type[T], answers: list[object]) -> list[T]:
    return [answer for answer in answers if isinstance(answer, kind)]


def _kernel_has_sa_direction() -> bool:
    """Tell whether the kernel is 6.10 or later."""
    major, minor = (int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return (major, minor) >= (6, 10)
