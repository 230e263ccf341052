"""The XFRM netlink ABI: numbers, layouts, framing. Pure: no I/O, no clock, no state.

Layouts are those of include/uapi/linux/xfrm.h, which may never change; `name (size)` in a comment is the C
structure and its sizeof on every architecture with 8-byte alignment of u64. Integers are in host order;
SPIs, ports, port masks and addresses are in network order, and an IPv4 address is the first 4 of 16 bytes.

Keys go out and never come in: `redact` zeroes them in what the kernel sends before anything else sees it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from srd.ipsec.xfrm_errors import MalformedError


class Message(enum.IntEnum):
    """XFRM_MSG_*: netlink message types of the family NETLINK_XFRM."""

    NEWSA = 0x10
    DELSA = 0x11
    GETSA = 0x12
    NEWPOLICY = 0x13
    DELPOLICY = 0x14
    GETPOLICY = 0x15
    ALLOCSPI = 0x16
    ACQUIRE = 0x17
    EXPIRE = 0x18
    UPDPOLICY = 0x19
    UPDSA = 0x1A
    POLEXPIRE = 0x1B
    FLUSHSA = 0x1C
    FLUSHPOLICY = 0x1D
    NEWSADINFO = 0x22
    GETSADINFO = 0x23
    NEWSPDINFO = 0x24
    GETSPDINFO = 0x25


class Group(enum.IntEnum):
    """XFRMNLGRP_*: multicast groups."""

    ACQUIRE = 1
    EXPIRE = 2
    SA = 3
    POLICY = 4


class Attribute(enum.IntEnum):
    """XFRMA_*: the attributes that this library reads or writes, and all that carry keys."""

    ALG_AUTH = 1
    ALG_CRYPT = 2
    ENCAP = 4
    TMPL = 5
    SA = 6
    POLICY = 7
    REPLAY_VAL = 10
    POLICY_TYPE = 16
    ALG_AEAD = 18
    ALG_AUTH_TRUNC = 20
    MARK = 21
    REPLAY_ESN_VAL = 23
    IF_ID = 31
    SA_DIR = 33


XFRM_INF: Final = 0xFFFFFFFFFFFFFFFF
UDP_ENCAP_ESPINUDP: Final = 2  # include/uapi/linux/udp.h
STATE_ESN: Final = 128  # XFRM_STATE_ESN in xfrm_usersa_info.flags
LEGACY_WINDOW_MAX: Final = 32  # bits of xfrm_replay_state.bitmap
SAD_CNT: Final = 1  # XFRMA_SAD_CNT
SPD_INFO: Final = 1  # XFRMA_SPD_INFO
ALL_ALGORITHMS: Final = 0xFFFFFFFF
ALL_FLAGS: Final = b"\xff\xff\xff\xff"  # the body of GETSADINFO and GETSPDINFO, as iproute2 sends it; unused

NLA_TYPE_MASK: Final = 0x3FFF
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_MULTI: Final = 0x02
NLM_F_ACK: Final = 0x4
NLM_F_DUMP: Final = 0x300
NLM_F_CAPPED: Final = 0x100
NLM_F_ACK_TLVS: Final = 0x200
NLMSGERR_ATTR_MSG: Final = 1

HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr (16): length, type, flags, sequence, pid
ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr (4): length with this header, type
ERROR: Final = struct.Struct("=i")  # nlmsgerr.error, before the refused message's header
SELECTOR: Final = struct.Struct("=16s16s4HHBBB3xiI")  # xfrm_selector (56)
ID: Final = struct.Struct("=16sIB3x")  # xfrm_id (24)
LIMITS: Final = struct.Struct("=8Q")  # xfrm_lifetime_cfg (64)
USAGE: Final = struct.Struct("=4Q")  # xfrm_lifetime_cur (32)
SA_INFO: Final = struct.Struct("=56s24s16s64s32s3IIIHBBB7x")  # xfrm_usersa_info (224)
SA_ID: Final = struct.Struct("=16sIHBx")  # xfrm_usersa_id (24)
SPI_RANGE: Final = struct.Struct("=224sII")  # xfrm_userspi_info (232)
POLICY_USAGE: Final = slice(120, 152)  # its curlft: bytes, packets, times of adding and of use
POLICY_INFO: Final = struct.Struct("=56s64s32sIIBBBB4x")  # xfrm_userpolicy_info (168)
POLICY_ID: Final = struct.Struct("=56sIB3x")  # xfrm_userpolicy_id (64)
TEMPLATE: Final = struct.Struct("=24sH2x16sIBBBx3I")  # xfrm_user_tmpl (64)
ACQUIRE: Final = struct.Struct("=24s16s56s168s4I")  # xfrm_user_acquire (280)
EXPIRE: Final = struct.Struct("=224sB7x")  # xfrm_user_expire (232)
POLICY_EXPIRE: Final = struct.Struct("=168sB7x")  # xfrm_user_polexpire (176)
AEAD: Final = struct.Struct("=64sII")  # xfrm_algo_aead (72) before the key
REPLAY: Final = struct.Struct("=3I")  # xfrm_replay_state (12)
REPLAY_ESN: Final = struct.Struct("=6I")  # xfrm_replay_state_esn (24) before the bitmap
ENCAP: Final = struct.Struct("=3H2x16s")  # xfrm_encap_tmpl (24): type, both ports, an address that ESP never uses
MARK: Final = struct.Struct("=II")  # xfrm_mark (8)
SPD_COUNTS: Final = struct.Struct("=6I")  # xfrmu_spdinfo (24)
U32: Final = struct.Struct("=I")

NO_ADDRESS: Final = bytes(16)
NO_SELECTOR: Final = bytes(SELECTOR.size)
NO_USAGE: Final = bytes(USAGE.size)

# Where a key starts in each attribute that has one: sizeof xfrm_algo, xfrm_algo_auth, xfrm_algo_aead.
KEY_OFFSET: Final[dict[int, int]] = {
    Attribute.ALG_AUTH: 68,
    Attribute.ALG_CRYPT: 68,
    Attribute.ALG_AUTH_TRUNC: 72,
    Attribute.ALG_AEAD: 72,
}
# Message bodies that may be followed by keys, with the size of what stands before their attributes.
BODY_SIZE: Final[dict[int, int]] = {
    Message.NEWSA: SA_INFO.size,
    Message.UPDSA: SA_INFO.size,
    Message.DELSA: SA_ID.size,
    Message.EXPIRE: EXPIRE.size,
    Message.NEWPOLICY: POLICY_INFO.size,
    Message.UPDPOLICY: POLICY_INFO.size,
    Message.DELPOLICY: POLICY_ID.size,
    Message.ACQUIRE: ACQUIRE.size,
    Message.POLEXPIRE: POLICY_EXPIRE.size,
    Message.FLUSHSA: 1,
    Message.FLUSHPOLICY: 0,
    Message.NEWSADINFO: U32.size,
    Message.NEWSPDINFO: U32.size,
}


class Frame(NamedTuple):
    """One netlink message of a datagram; `start` is where its body begins in the datagram."""

    type: int
    flags: int
    sequence: int
    pid: int
    body: memoryview
    start: int


def align(length: int) -> int:
    """Round up to NLMSG_ALIGNTO, which is NLA_ALIGNTO too: 4."""
    return (length + 3) & ~3


def frames(data: bytes | bytearray) -> Iterator[Frame]:
    """Take a datagram apart. Raises MalformedError where a length can't be true."""
    view, offset = memoryview(data), 0
    while offset + HEADER.size <= len(view):
        length, kind, flags, sequence, pid = HEADER.unpack_from(view, offset)
        if not HEADER.size <= length <= len(view) - offset:
            raise MalformedError("a message is cut short")
        start = offset + HEADER.size
        yield Frame(kind, flags, sequence, pid, view[start : offset + length], start)
        offset += align(length)


def attributes(body: memoryview, offset: int) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (type, offset in the body, value) of each attribute behind a fixed part of `offset` bytes."""
    offset = align(offset)
    while offset + ATTRIBUTE.size <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if not ATTRIBUTE.size <= length <= len(body) - offset:
            raise MalformedError("an attribute is cut short")
        yield kind & NLA_TYPE_MASK, offset + ATTRIBUTE.size, body[offset + ATTRIBUTE.size : offset + length]
        offset += align(length)


def redact(data: bytes) -> bytes:
    """Zero every key in a datagram of the kernel, and all of it that can't be read well enough to tell."""
    clean = bytearray(data)
    try:
        for frame in frames(data):
            if frame.type == NLMSG_ERROR and not frame.flags & NLM_F_CAPPED:
                _wipe(clean, frame.start + ERROR.size + HEADER.size, frame.start + len(frame.body))
            size = BODY_SIZE.get(frame.type)
            if size is None or frame.type in (Message.NEWPOLICY, Message.UPDPOLICY):
                continue  # no key has a place there, and a dump may have 18,000 of them
            for kind, offset, value in attributes(frame.body, size):
                if kind in KEY_OFFSET:
                    begin = frame.start + offset
                    _wipe(clean, begin + KEY_OFFSET[kind], begin + len(value))
    except MalformedError:
        _wipe(clean, HEADER.size, len(clean))
    return bytes(clean)


def _wipe(data: bytearray, begin: int, end: int) -> None:
    if begin < end:
        data[begin:end] = bytes(end - begin)
