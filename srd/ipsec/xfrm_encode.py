"""XFRM values to netlink message bodies. Pure; layouts are in xfrm_abi.

The bytes are those that iproute2 sends for the same object; tests compare with recordings of it.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, htonl, htons

from srd.ipsec import xfrm_abi as abi
from srd.ipsec.xfrm_abi import Attribute
from srd.ipsec.xfrm_types import (
    ESP,
    Direction,
    IpAddress,
    IpNetwork,
    Lifetime,
    Mark,
    Mode,
    Policy,
    Sa,
    Selector,
    Template,
)


def _family(value: IpAddress | IpNetwork) -> int:
    return int(AF_INET if value.version == 4 else AF_INET6)  # noqa: PLR2004 - IP version


def _address(value: IpAddress | None) -> bytes:
    """Return an xfrm_address_t (16)."""
    return abi.NO_ADDRESS if value is None else value.packed.ljust(16, b"\0")


def _attribute(kind: Attribute, value: bytes) -> bytes:
    length = abi.ATTRIBUTE.size + len(value)
    return (abi.ATTRIBUTE.pack(length, kind) + value).ljust(abi.align(length), b"\0")


def _mark(mark: Mark | None) -> bytes:
    return b"" if mark is None else _attribute(Attribute.MARK, abi.MARK.pack(mark.value, mark.mask))


def _encode_selector(selector: Selector) -> bytes:
    return abi.SELECTOR.pack(
        _address(selector.destination.network_address),
        _address(selector.source.network_address),
        htons(selector.destination_port),
        htons(selector.destination_port_mask),
        htons(selector.source_port),
        htons(selector.source_port_mask),
        _family(selector.source),
        selector.destination.prefixlen,
        selector.source.prefixlen,
        selector.protocol,
        selector.interface,
        0,
    )


def _encode_lifetime(lifetime: Lifetime) -> bytes:
    amounts = (lifetime.soft_bytes, lifetime.hard_bytes, lifetime.soft_packets, lifetime.hard_packets)
    limits = (abi.XFRM_INF if amount is None else amount for amount in amounts)
    return abi.LIMITS.pack(*limits, lifetime.soft_seconds, lifetime.hard_seconds, 0, 0)


def _encode_template(template: Template, family: int) -> bytes:
    if template.optional:
        raise ValueError("a template that lets plaintext through can't be written")
    return abi.TEMPLATE.pack(
        abi.ID.pack(_address(template.destination), htonl(template.spi), template.protocol),
        family,
        _address(template.source),
        template.reqid,
        template.mode,
        0,
        0,
        *(abi.ALL_ALGORITHMS,) * 3,
    )


def encode_policy(policy: Policy) -> bytes:
    """Return the body of NEWPOLICY and UPDPOLICY."""
    body = abi.POLICY_INFO.pack(
        _encode_selector(policy.selector),
        _encode_lifetime(Lifetime()),
        abi.NO_USAGE,
        policy.priority,
        policy.index,
        policy.direction,
        policy.action,
        0,
        0,
    )
    family = _family(policy.selector.source)
    templates = b"".join(_encode_template(template, family) for template in policy.templates)
    return body + (_attribute(Attribute.TMPL, templates) if templates else b"") + _mark(policy.mark)


def encode_policy_id(policy: Policy) -> bytes:
    """Return the body of DELPOLICY. The kernel goes by the index if there is one, else by the selector."""
    identity = abi.POLICY_ID.pack(_encode_selector(policy.selector), policy.index, policy.direction)
    return identity + _mark(policy.mark)


def _encode_encapsulation(sa: Sa) -> bytes:
    if sa.encapsulation is None:
        return b""
    ports = sa.encapsulation
    template = (abi.UDP_ENCAP_ESPINUDP, htons(ports.source_port), htons(ports.destination_port), abi.NO_ADDRESS)
    return _attribute(Attribute.ENCAP, abi.ENCAP.pack(*template))


def _encode_replay(sa: Sa, window: int) -> bytes:
    """Return XFRMA_REPLAY_ESN_VAL: always with ESN, else where the window is too large for the SA's own byte.

    The bitmap may be left out, and the kernel makes an empty one of `bmp_len` words.
    """
    if not sa.esn and window <= abi.LEGACY_WINDOW_MAX:
        return b""
    return _attribute(Attribute.REPLAY_ESN_VAL, abi.REPLAY_ESN.pack((window + 31) // 32, 0, 0, 0, 0, window))


def _encode_sa_info(sa: Sa, *, window_byte: int) -> bytes:
    return abi.SA_INFO.pack(
        _encode_selector(sa.selector),
        abi.ID.pack(_address(sa.destination), htonl(sa.spi), ESP),
        _address(sa.source),
        _encode_lifetime(sa.lifetime),
        abi.NO_USAGE,
        0,
        0,
        0,
        0,
        sa.reqid,
        _family(sa.source),
        sa.mode,
        window_byte,
        abi.STATE_ESN if sa.esn else 0,
    )


def encode_sa(sa: Sa, *, with_direction: bool) -> bytearray:
    """Return the body of NEWSA and UPDSA; it holds the key, so wipe it after use.

    Kernels from 6.10 on know SA_DIR, and then want no replay window on an OUT SA; earlier ones refuse ESN without one.
    """
    window = sa.replay_window
    if sa.direction is Direction.OUT:
        window = 0 if with_direction or not sa.esn else 1
    replay = _encode_replay(sa, window)
    body = bytearray(_encode_sa_info(sa, window_byte=0 if replay else window))
    body += _encode_encapsulation(sa)
    aead = sa.aead
    length = abi.ATTRIBUTE.size + abi.AEAD.size + len(aead.key)
    body += abi.ATTRIBUTE.pack(length, Attribute.ALG_AEAD)
    body += abi.AEAD.pack(aead.name.encode(), 8 * len(aead.key), aead.icv_bits)
    body += aead.key
    body += bytes(abi.align(length) - length)
    body += _mark(sa.mark) + replay
    if with_direction:
        body += _attribute(Attribute.SA_DIR, bytes([1 + sa.direction]))
    return body


def encode_sa_id(destination: IpAddress, spi: int, mark: Mark | None) -> bytes:
    """Return the body of DELSA and GETSA."""
    return abi.SA_ID.pack(_address(destination), htonl(spi), _family(destination), ESP) + _mark(mark)


def encode_spi_range(source: IpAddress, destination: IpAddress, reqid: int, low: int, high: int) -> bytes:
    """Return the body of ALLOCSPI; the range includes both ends."""
    info = abi.SA_INFO.pack(
        abi.NO_SELECTOR,
        abi.ID.pack(_address(destination), 0, ESP),
        _address(source),
        bytes(abi.LIMITS.size),
        abi.NO_USAGE,
        0,
        0,
        0,
        0,
        reqid,
        _family(source),
        Mode.TRANSPORT,
        0,
        0,
    )
    return abi.SPI_RANGE.pack(info, low, high)
