"""XFRM netlink message bodies to values and events. Pure; layouts are in xfrm_abi.

What can't be read raises MalformedError, never anything else. Keys are not looked at.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6, AF_UNSPEC, ntohl, ntohs
from typing import Final

from srd.ipsec import xfrm_abi as abi
from srd.ipsec.xfrm_abi import Attribute, Message
from srd.ipsec.xfrm_errors import MalformedError
from srd.ipsec.xfrm_types import (
    Acquire,
    Action,
    Direction,
    Expired,
    IpAddress,
    IpNetwork,
    Lifetime,
    Mark,
    Mode,
    Policy,
    PolicyChanged,
    PolicyDeleted,
    PolicyExpired,
    PolicyFlushed,
    PolicyInfo,
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

Attributes = dict[int, memoryview]
IPV4_BITS: Final = 32
IPV6_BITS: Final = 128


def _unpack(layout: struct.Struct, body: memoryview, offset: int = 0) -> tuple[int, ...]:
    """Unpack a layout of integers only."""
    return layout.unpack(_part(body, offset, layout.size))


def _part(body: memoryview, offset: int, size: int) -> memoryview:
    part = body[offset : offset + size]
    if len(part) != size:
        raise MalformedError("a structure is cut short")
    return part


def _attributes(body: memoryview, size: int) -> Attributes:
    return {kind: value for kind, _, value in abi.attributes(body, size)}


def _decode_address(raw: bytes, family: int) -> IpAddress:
    if family == AF_INET:
        return IPv4Address(raw[:4])
    if family == AF_INET6:
        return IPv6Address(raw)
    raise MalformedError(f"address family {family}")


@functools.lru_cache(maxsize=16384)  # a dump names each address many times, and making a network takes 10 us
def _decode_network(raw: bytes, prefix: int, family: int) -> IpNetwork:
    if family == AF_INET and prefix <= IPV4_BITS:
        return IPv4Network((raw[:4], prefix), strict=False)
    if family == AF_INET6 and prefix <= IPV6_BITS:
        return IPv6Network((raw, prefix), strict=False)
    raise MalformedError(f"prefix length {prefix} in address family {family}")


def _decode_selector(raw: bytes, family: int = AF_UNSPEC) -> Selector:
    """Read an xfrm_selector; `family` is for one that names none (an SA for everything between two hosts)."""
    dst, src, dport, dmask, sport, smask, own, dlen, slen, protocol, interface, _ = abi.SELECTOR.unpack(raw)
    family = own or family
    return Selector(
        _decode_network(src, slen, family),
        _decode_network(dst, dlen, family),
        protocol,
        ntohs(sport),
        ntohs(smask),
        ntohs(dport),
        ntohs(dmask),
        interface,
    )


def _decode_lifetime(raw: bytes) -> Lifetime:
    values: tuple[int, ...] = abi.LIMITS.unpack(raw)
    soft_bytes, hard_bytes, soft_packets, hard_packets = (None if n == abi.XFRM_INF else n for n in values[:4])
    return Lifetime(soft_bytes, hard_bytes, soft_packets, hard_packets, values[4], values[5])


def _decode_mark(found: Attributes) -> Mark | None:
    raw = found.get(Attribute.MARK)
    if raw is None:
        return None
    value, mask = _unpack(abi.MARK, raw)
    return Mark(value, mask)


def _decode_mode(value: int) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        raise MalformedError(f"mode {value}") from None


def _decode_template(raw: memoryview) -> Template:
    identity, family, src, reqid, mode, _, optional, *_ = abi.TEMPLATE.unpack(raw)
    dst, spi, protocol = abi.ID.unpack(identity)
    return Template(
        reqid=reqid,
        spi=ntohl(spi),
        mode=_decode_mode(mode),
        protocol=protocol,
        source=None if src == abi.NO_ADDRESS else _decode_address(src, family),
        destination=None if dst == abi.NO_ADDRESS else _decode_address(dst, family),
        optional=bool(optional),
    )


def _decode_policy_info(raw: memoryview, found: Attributes) -> PolicyInfo:
    selector, limits, usage, priority, index, direction, action, _, _ = abi.POLICY_INFO.unpack(
        _part(raw, 0, abi.POLICY_INFO.size)
    )
    templates = found.get(Attribute.TMPL, memoryview(b""))
    size = abi.TEMPLATE.size
    try:
        way, deed = Direction(direction), Action(action)
    except ValueError:
        raise MalformedError(f"policy direction {direction}, action {action}") from None
    _, _, add_timestamp, use_timestamp = abi.USAGE.unpack(usage)
    return PolicyInfo(
        policy=Policy(
            selector=_decode_selector(selector),
            direction=way,
            action=deed,
            priority=priority,
            index=index,
            templates=tuple(
                _decode_template(_part(templates, offset, size)) for offset in range(0, len(templates), size)
            ),
            mark=_decode_mark(found),
        ),
        lifetime=_decode_lifetime(limits),
        add_timestamp=add_timestamp,
        use_timestamp=use_timestamp,
        sub=_decode_sub(found),
        interface_id=_unpack(abi.U32, found[Attribute.IF_ID])[0] if Attribute.IF_ID in found else 0,
    )


def _decode_sub(found: Attributes) -> bool:
    """Read xfrm_userpolicy_type, whose first byte is XFRM_POLICY_TYPE_MAIN (0) or _SUB (1)."""
    return bool(_part(found[Attribute.POLICY_TYPE], 0, 1)[0]) if Attribute.POLICY_TYPE in found else False


def _decode_sequences(found: Attributes, window_byte: int) -> tuple[int, int, int]:
    """Return the replay window, the last sequence number received, and the last one sent."""
    if (raw := found.get(Attribute.REPLAY_ESN_VAL)) is not None:
        _, oseq, seq, oseq_high, seq_high, window = _unpack(abi.REPLAY_ESN, raw)
        return window, seq_high << 32 | seq, oseq_high << 32 | oseq
    if (raw := found.get(Attribute.REPLAY_VAL)) is not None:
        oseq, seq, _ = _unpack(abi.REPLAY, raw)
        return window_byte, seq, oseq
    return window_byte, 0, 0


def _decode_aead(found: Attributes) -> tuple[str, int, int]:
    """Return name, key length and ICV length in bits; the key behind them stays where it is."""
    if (raw := found.get(Attribute.ALG_AEAD)) is None:
        return "", 0, 0
    name, key_bits, icv_bits = abi.AEAD.unpack(_part(raw, 0, abi.AEAD.size))
    return name.split(b"\0", 1)[0].decode("ascii", "replace"), key_bits, icv_bits


_SA_DIRECTION: Final = {0: None, 1: Direction.IN, 2: Direction.OUT}


def _decode_sa_info(raw: memoryview, found: Attributes) -> SaInfo:
    (selector, identity, src, limits, usage, window_drops, replay_drops, integrity, _, reqid, family, mode, byte,
     flags) = abi.SA_INFO.unpack(_part(raw, 0, abi.SA_INFO.size))  # fmt: skip
    dst, spi, protocol = abi.ID.unpack(identity)
    octets, packets, add_timestamp, use_timestamp = abi.USAGE.unpack(usage)
    aead, key_bits, icv_bits = _decode_aead(found)
    window, sequence, output_sequence = _decode_sequences(found, byte)
    sa_dir = _part(found[Attribute.SA_DIR], 0, 1)[0] if Attribute.SA_DIR in found else 0
    return SaInfo(
        source=_decode_address(src, family),
        destination=_decode_address(dst, family),
        spi=ntohl(spi),
        reqid=reqid,
        protocol=protocol,
        mode=_decode_mode(mode),
        selector=_decode_selector(selector, family),
        larval=not any(kind in found for kind in abi.KEY_OFFSET),
        aead=aead,
        key_bits=key_bits,
        icv_bits=icv_bits,
        direction=_SA_DIRECTION.get(sa_dir),
        esn=bool(flags & abi.STATE_ESN),
        replay_window=window,
        lifetime=_decode_lifetime(limits),
        bytes=octets,
        packets=packets,
        add_timestamp=add_timestamp,
        use_timestamp=use_timestamp,
        sequence=sequence,
        output_sequence=output_sequence,
        replay_window_drops=window_drops,
        replay_drops=replay_drops,
        integrity_failures=integrity,
        mark=_decode_mark(found),
        encapsulation=_decode_encapsulation(found),
    )


def _decode_encapsulation(found: Attributes) -> UdpEncapsulation | None:
    if (raw := found.get(Attribute.ENCAP)) is None:
        return None
    kind, source_port, destination_port, _ = _unpack(abi.ENCAP, raw)
    if kind != abi.UDP_ENCAP_ESPINUDP:
        return None
    return UdpEncapsulation(ntohs(source_port), ntohs(destination_port))


def _decode_sa(body: memoryview) -> SaInfo:
    return _decode_sa_info(body, _attributes(body, abi.SA_INFO.size))


def _decode_policy(body: memoryview) -> PolicyInfo:
    return _decode_policy_info(body, _attributes(body, abi.POLICY_INFO.size))


def _nested(body: memoryview, size: int, kind: Attribute) -> tuple[memoryview, Attributes]:
    """Return the object that a deletion carries in an attribute of its own, and its other attributes."""
    found = _attributes(body, size)
    if kind not in found:
        raise MalformedError(f"no {kind.name} in a deletion")
    return found[kind], found


def _sa_deleted(pid: int, body: memoryview) -> SaDeleted:
    return SaDeleted(pid, _decode_sa_info(*_nested(body, abi.SA_ID.size, Attribute.SA)))


def _policy_deleted(pid: int, body: memoryview) -> PolicyDeleted:
    return PolicyDeleted(pid, _decode_policy_info(*_nested(body, abi.POLICY_ID.size, Attribute.POLICY)))


def _expired(pid: int, body: memoryview) -> Expired:
    info, hard = abi.EXPIRE.unpack(_part(body, 0, abi.EXPIRE.size))
    return Expired(pid, _decode_sa_info(memoryview(info), _attributes(body, abi.EXPIRE.size)), bool(hard))


def _policy_expired(pid: int, body: memoryview) -> PolicyExpired:
    info, hard = abi.POLICY_EXPIRE.unpack(_part(body, 0, abi.POLICY_EXPIRE.size))
    found = _attributes(body, abi.POLICY_EXPIRE.size)
    return PolicyExpired(pid, _decode_policy_info(memoryview(info), found), bool(hard))


def _acquire(pid: int, body: memoryview) -> Acquire:
    identity, src, selector, info, *_, sequence = abi.ACQUIRE.unpack(_part(body, 0, abi.ACQUIRE.size))
    policy = _decode_policy_info(memoryview(info), _attributes(body, abi.ACQUIRE.size))
    dst, _, _ = abi.ID.unpack(identity)
    family = AF_INET if policy.policy.selector.source.version == 4 else AF_INET6  # noqa: PLR2004 - IP version
    return Acquire(
        pid,
        _decode_address(src, family),
        _decode_address(dst, family),
        _decode_selector(selector, family),
        policy,
        sequence,
    )


def _decode_sad_count(body: memoryview) -> int:
    found = _attributes(body, abi.U32.size)
    return _unpack(abi.U32, found.get(abi.SAD_CNT, memoryview(b"")))[0]


def _decode_spd_info(body: memoryview) -> SpdInfo:
    found = _attributes(body, abi.U32.size)
    return SpdInfo(*_unpack(abi.SPD_COUNTS, found.get(abi.SPD_INFO, memoryview(b""))))


_REPLIES: Final[dict[int, Callable[[memoryview], object]]] = {
    Message.NEWSA: _decode_sa,
    Message.NEWPOLICY: _decode_policy,
    Message.NEWSADINFO: _decode_sad_count,
    Message.NEWSPDINFO: _decode_spd_info,
}

_EVENTS: Final[dict[int, Callable[[int, memoryview], XfrmEvent]]] = {
    Message.NEWSA: lambda pid, body: SaChanged(pid, _decode_sa(body)),
    Message.UPDSA: lambda pid, body: SaChanged(pid, _decode_sa(body)),
    Message.DELSA: _sa_deleted,
    Message.FLUSHSA: lambda pid, body: SaFlushed(pid, _part(body, 0, 1)[0]),
    Message.EXPIRE: _expired,
    Message.NEWPOLICY: lambda pid, body: PolicyChanged(pid, _decode_policy(body)),
    Message.UPDPOLICY: lambda pid, body: PolicyChanged(pid, _decode_policy(body)),
    Message.DELPOLICY: _policy_deleted,
    Message.FLUSHPOLICY: lambda pid, body: PolicyFlushed(pid, _decode_sub(_attributes(body, 0))),
    Message.POLEXPIRE: _policy_expired,
    Message.ACQUIRE: _acquire,
}


def decode_reply(kind: int, body: memoryview) -> object | None:
    """Read an answer: SaInfo, PolicyInfo, SpdInfo or a number of SAs; None for a type that is none of these."""
    decode = _REPLIES.get(kind)
    return None if decode is None else decode(body)


def decode_event(kind: int, pid: int, body: memoryview) -> XfrmEvent | None:
    """Read a multicast message; None for a type that no event is made of."""
    decode = _EVENTS.get(kind)
    return None if decode is None else decode(pid, body)


def decode_error(kind: int, flags: int, body: memoryview) -> tuple[int, str]:
    """Read NLMSG_ERROR, or NLMSG_DONE, which repeats no request: (errno, extended-ACK sentence); 0 is success."""
    code = abs(_unpack(abi.ERROR, body)[0])
    if not flags & abi.NLM_F_ACK_TLVS:
        return code, ""
    offset = abi.ERROR.size
    if kind == abi.NLMSG_ERROR:
        length = _unpack(abi.HEADER, body, offset)[0]
        offset += abi.HEADER.size if flags & abi.NLM_F_CAPPED else max(abi.HEADER.size, abi.align(length))
    text = _attributes(body, offset).get(abi.NLMSGERR_ATTR_MSG, memoryview(b""))
    return code, bytes(text).split(b"\0", 1)[0].decode("utf-8", "replace")
