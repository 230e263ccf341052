"""The XFRM codec against bytes that iproute2 sent and kernels answered; xfrm_bytes.json says how it was recorded."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.ipsec import xfrm_abi as abi
from srd.ipsec.xfrm import (
    Acquire,
    Action,
    Aead,
    Direction,
    Lifetime,
    MalformedError,
    Mark,
    Mode,
    Policy,
    PolicyChanged,
    PolicyDeleted,
    PolicyExpired,
    PolicyFlushed,
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
    XfrmError,
    XfrmSocket,
)
from srd.ipsec.xfrm_decode import decode_error, decode_event, decode_reply
from srd.ipsec.xfrm_encode import encode_policy, encode_sa

RECORDED = json.loads(Path(__file__).with_name("xfrm_bytes.json").read_text())
KEY = bytes(range(1, 37))
GCM = "rfc4106(gcm(aes))"
CHACHA = "rfc7539esp(chacha20,poly1305)"
A, B = ip_address("10.0.0.1"), ip_address("10.0.0.2")
A6, B6 = ip_address("fd00::1"), ip_address("fd00::2")
FROM_A = Selector(ip_network("10.0.0.1"), ip_network("10.0.0.2"))
FROM_B = Selector(ip_network("10.0.0.2"), ip_network("10.0.0.1"))
PORT = 0xFFFF  # iproute2's mask for a port that was given
SRCADDR, ADDRESS_FILTER = 13, 26

PINNED = Policy(FROM_A, Direction.OUT, Action.ALLOW, 1000, 41, (Template(20481, spi=0x1234),), Mark(3))
ICMPV6 = Policy(
    Selector(
        ip_network("fd00::1"),
        ip_network("fd00::2"),
        58,
        source_port=135,
        source_port_mask=PORT,
        destination_port_mask=PORT,
    ),
    Direction.OUT,
    Action.ALLOW,
    100,
)
TWO_TEMPLATES = Policy(
    Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")),
    Direction.OUT,
    Action.ALLOW,
    7,
    templates=(
        Template(9, mode=Mode.TUNNEL, source=ip_address("192.0.2.1"), destination=ip_address("192.0.2.2")),
        Template(10, spi=0x77),
    ),
)
Call = Callable[[XfrmSocket], Awaitable[object]]


def recorded(group: str, name: str) -> bytes:
    return bytes.fromhex(RECORDED[group][name]["bytes"])


class Recorder(XfrmSocket):
    """An XfrmSocket whose messages go no further."""

    sent = b""

    async def _exchange(self, kind: int, flags: int, message: Any) -> list[object]:
        (body,) = message.bodies
        self.sent = abi.HEADER.pack(16 + len(body), kind, flags, 0, 0) + bytes(body)
        return [None]


async def written(call: Call, *, sa_direction: bool = False) -> bytes:
    async with Recorder(sa_direction=sa_direction) as socket:
        with contextlib.suppress(XfrmError):  # no answer, for those that want one
            await call(socket)
        return socket.sent


def without(attribute: int, message: bytes, body_size: int) -> bytes:
    """Take one attribute out of a message, and the sequence number that iproute2 chose."""
    length, kind, flags, _, _ = abi.HEADER.unpack_from(message)
    body = message[16:]
    kept = body[:body_size]
    for number, _, value in abi.attributes(memoryview(body), body_size):
        if number != attribute:
            kept += abi.ATTRIBUTE.pack(4 + len(value), number) + bytes(value)
        else:
            length -= 4 + len(value)
    return abi.HEADER.pack(length, kind, flags, 0, 0) + kept


def sa(**changes: object) -> Sa:
    values = {
        "source": B,
        "destination": A,
        "spi": 0x10000001,
        "reqid": 20481,
        "aead": Aead(GCM, KEY),
        "direction": Direction.IN,
        "selector": FROM_B,
    }
    return Sa(**(values | changes))


REQUESTS: dict[str, Call] = {
    "policy_out_pinned": lambda s: s.add_policy(PINNED),
    "policy_in_reqid": lambda s: s.update_policy(
        Policy(FROM_B, Direction.IN, Action.ALLOW, 1000, 40, (Template(20481),))
    ),
    "policy_icmpv6": lambda s: s.add_policy(ICMPV6),
    "policy_block": lambda s: s.add_policy(
        Policy(
            Selector(ip_network("0.0.0.0/0"), ip_network("10.0.0.0/24"), 6, 26379, PORT, 6379, PORT),
            Direction.FORWARD,
            Action.BLOCK,
            2000,
        )
    ),
    "policy_block_v6": lambda s: s.add_policy(
        Policy(
            Selector(ip_network("::/0"), ip_network("::/0"), 17, destination_port=4789, destination_port_mask=PORT),
            Direction.IN,
            Action.BLOCK,
            3000,
        )
    ),
    "policy_two_templates": lambda s: s.add_policy(TWO_TEMPLATES),
    "policy_tunnel_v6": lambda s: s.add_policy(
        Policy(
            Selector(ip_network("fd00:1::/32"), ip_network("fd00:2::/32")),
            Direction.OUT,
            Action.ALLOW,
            8,
            templates=(Template(9, mode=Mode.TUNNEL, source=A6, destination=B6),),
        )
    ),
    "policy_delete_selector": lambda s: s.delete_policy(Policy(FROM_A, Direction.OUT, Action.ALLOW, 0, mark=Mark(3))),
    "policy_delete_index": lambda s: s.delete_policy(
        Policy(Selector(ip_network("0.0.0.0/0"), ip_network("0.0.0.0/0")), Direction.IN, Action.ALLOW, 0, 40)
    ),
    "sa_in_esn": lambda s: s.add_sa(sa()),
    "sa_out_esn": lambda s: s.add_sa(
        sa(
            source=A,
            destination=B,
            spi=0x10000002,
            aead=Aead(CHACHA, KEY),
            direction=Direction.OUT,
            selector=FROM_A,
        )
    ),
    "sa_in_window32": lambda s: s.add_sa(sa(spi=0x10000003, aead=Aead(GCM, KEY[:20]), replay_window=32, esn=False)),
    "sa_in_window64": lambda s: s.add_sa(sa(spi=0x10000004, aead=Aead(GCM, KEY, 64), replay_window=64, esn=False)),
    "sa_v6_limits_mark": lambda s: s.add_sa(
        sa(
            source=A6,
            destination=B6,
            spi=0x10000005,
            reqid=20482,
            selector=Selector(ip_network("fd00::1"), ip_network("fd00::2"), 6, 10, PORT, 20, PORT),
            replay_window=0,
            esn=False,
            mark=Mark(7, 0xFF),
            lifetime=Lifetime(1000, 2000, 30, 40, 50, 60),
        )
    ),
    "sa_udp_encapsulation": lambda s: s.add_sa(
        sa(
            source=A,
            destination=B,
            spi=0x10000007,
            direction=Direction.OUT,
            selector=FROM_A,
            replay_window=0,
            esn=False,
            encapsulation=UdpEncapsulation(4500, 4501),
        )
    ),
    "sa_update_tunnel": lambda s: s.update_sa(
        sa(
            spi=0x10000006,
            reqid=3,
            mode=Mode.TUNNEL,
            selector=Selector(ip_network("10.2.0.0/16"), ip_network("10.1.0.0/16")),
            aead=Aead(GCM, KEY, 96),
            replay_window=0,
            esn=False,
        )
    ),
    "sa_get": lambda s: s.get_sa(A, 0x10000001),
    "sa_delete": lambda s: s.delete_sa(A, 0x10000001, Mark(7, 0xFF)),
    "sa_allocspi": lambda s: s.alloc_spi(B, A, 20481, 0x1000, 0x1FFF),
    "sa_allocspi_v6": lambda s: s.alloc_spi(B6, A6, 20481, 4096, 4294967295),
    "sad_count": lambda s: s.sad_count(),
    "spd_info": lambda s: s.spd_info(),
    "sa_dump": lambda s: s.sas(),
    "policy_dump": lambda s: s.policies(),
}
# What iproute2 sends and we don't: SRCADDR, which the kernel reads for protocols without an SPI only, and a filter
# that lets everything through. (body size, attribute)
LEFT_OUT = {"sa_get": (24, SRCADDR), "sa_delete": (24, SRCADDR), "sa_dump": (0, ADDRESS_FILTER)}


@pytest.mark.parametrize("name", RECORDED["requests"])
async def test_a_request_is_what_iproute2_sends_for_the_same_object(name: str) -> None:
    size, attribute = LEFT_OUT.get(name, (len(recorded("requests", name)) - 16, 0))
    expected = without(attribute, recorded("requests", name), size)
    assert (await written(REQUESTS[name])).hex() == expected.hex()


@pytest.mark.parametrize(
    ("direction", "esn", "with_direction", "replay"),
    [
        (Direction.OUT, True, True, (0, 0, 0, 0, 0, 0)),
        (Direction.OUT, True, False, (1, 0, 0, 0, 0, 1)),
        (Direction.OUT, False, True, None),
        (Direction.OUT, False, False, None),
        (Direction.IN, True, True, (32, 0, 0, 0, 0, 1024)),
        (Direction.IN, False, True, (32, 0, 0, 0, 0, 1024)),
    ],
)
def test_the_replay_window_follows_the_rules_of_sa_dir(
    *, direction: Direction, esn: bool, with_direction: bool, replay: tuple[int, ...] | None
) -> None:
    body = memoryview(encode_sa(sa(direction=direction, esn=esn), with_direction=with_direction))
    found = {kind: bytes(value) for kind, _, value in abi.attributes(body, abi.SA_INFO.size)}
    state = found.get(abi.Attribute.REPLAY_ESN_VAL)
    assert body[215] == 0  # xfrm_usersa_info.replay_window
    assert (abi.REPLAY_ESN.unpack_from(state) if state else None) == replay
    assert found.get(abi.Attribute.SA_DIR) == (bytes([1 + direction]) if with_direction else None)


def decoded_dump(name: str) -> list[object]:
    frames = list(abi.frames(abi.redact(recorded("dumps_6_1", name))))
    assert frames.pop().type == abi.NLMSG_DONE
    return [decode_reply(frame.type, frame.body) for frame in frames]


def test_sas_of_a_kernel_with_esp_are_read() -> None:
    foreign, outgoing, incoming = decoded_dump("sas")
    assert isinstance(incoming, SaInfo)
    assert (incoming.source, incoming.destination, incoming.spi) == (B, A, 0x10000001)
    assert (incoming.aead, incoming.key_bits, incoming.icv_bits) == (GCM, 288, 128)
    assert (incoming.esn, incoming.replay_window, incoming.larval) == (True, 1024, False)
    assert incoming.lifetime == Lifetime(soft_bytes=1_000_000, hard_packets=4000, soft_seconds=3600, hard_seconds=7200)
    assert incoming.selector == FROM_B
    assert isinstance(outgoing, SaInfo)
    assert (outgoing.esn, outgoing.replay_window, outgoing.mark) == (False, 32, Mark(7, 0xFF))
    assert isinstance(foreign, SaInfo)
    assert (foreign.aead, foreign.key_bits, foreign.larval, foreign.mode) == ("", 0, False, Mode.TUNNEL)
    assert (foreign.source, foreign.selector.source) == (A6, ip_network("::/0"))


def test_policies_are_read_as_the_values_they_were_written_from() -> None:
    infos = decoded_dump("policies")
    assert all(isinstance(info, PolicyInfo) and info.lifetime == Lifetime() for info in infos)
    policies = {info.policy.priority: info.policy for info in infos}
    assert policies[100] == Policy(
        **{name: getattr(ICMPV6, name) for name in ("selector", "direction", "action", "priority")},
        index=policies[100].index,
    )
    assert policies[7].templates == TWO_TEMPLATES.templates
    pinned, weakened = sorted((i.policy for i in infos if i.policy.priority == 1000), key=lambda p: -p.direction)
    assert pinned == PINNED
    assert weakened.templates == (Template(20481, optional=True),)  # level use


def events(group: str) -> list[object]:
    datagrams = (abi.redact(bytes.fromhex(entry["bytes"])) for entry in RECORDED[group])
    return [decode_event(frame.type, frame.pid, frame.body) for datagram in datagrams for frame in abi.frames(datagram)]


@pytest.mark.parametrize("group", ["events_6_1", "events_6_18"])
def test_events_are_read(group: str) -> None:
    found = events(group)
    common = found[-10:]
    assert [type(event) for event in common] == [
        PolicyChanged,
        PolicyChanged,
        PolicyChanged,
        PolicyChanged,
        PolicyDeleted,
        Acquire,
        PolicyChanged,
        PolicyExpired,
        PolicyFlushed,
        SaFlushed,
    ]
    assert all(event.pid == 0 for event in common)  # iproute2 and the kernel
    assert common[0].info.policy == PINNED
    assert common[4].info.policy == PINNED
    acquire = common[5]
    assert (acquire.source, acquire.destination) == (A, B)
    assert acquire.selector.destination_port == 9
    assert acquire.policy.policy.templates == (Template(77),)
    assert common[7].hard
    assert common[7].info.lifetime == Lifetime(hard_seconds=1)
    assert common[8] == PolicyFlushed(0, sub=False)


def test_events_of_sas_are_read() -> None:
    added, _, _, deleted, *_ = events("events_6_1")
    assert isinstance(added, SaChanged)
    assert isinstance(deleted, SaDeleted)
    assert deleted.sa == added.sa
    assert added.sa.spi == 0x10000001


def test_answers_are_read() -> None:
    (spi,) = abi.frames(recorded("replies", "sa_allocspi"))
    larval = decode_reply(spi.type, spi.body)
    assert isinstance(larval, SaInfo)
    assert (larval.larval, larval.reqid, larval.selector) == (True, 20481, FROM_B)
    assert 0x1000 <= larval.spi <= 0x1FFF
    (count,) = abi.frames(recorded("replies", "sad_count"))
    assert decode_reply(count.type, count.body) == 2
    (spd,) = abi.frames(recorded("replies", "spd_info"))
    assert decode_reply(spd.type, spd.body) == SpdInfo(1, 3, 1, 0, 0, 0)


def test_an_error_is_read_behind_the_request_it_repeats() -> None:
    (frame,) = abi.frames(recorded("replies", "sa_in_esn"))
    assert decode_error(frame.type, frame.flags, frame.body) == (38, "Requested AEAD algorithm not found")


def everything_from_kernels() -> list[bytes]:
    groups = [*RECORDED["replies"].values(), *RECORDED["dumps_6_1"].values()]
    groups += [*RECORDED["events_6_1"], *RECORDED["events_6_18"]]
    return [bytes.fromhex(entry["bytes"]) for entry in groups]


def places(message: bytes, key: bytes) -> Iterator[int]:
    """Yield the index of each byte of `message` that belongs to `key`."""
    for match in re.finditer(re.escape(key), message):
        yield from range(*match.span())


def test_redacting_removes_every_key_and_nothing_else() -> None:
    keys = (KEY, bytes(range(0x40, 0x60)), bytes(range(0x60, 0x70)))
    kept = [bytes.fromhex(RECORDED["replies"][name]["bytes"]) for name in ("sa_allocspi", "sad_count", "spd_info")]
    raw = everything_from_kernels()
    assert sum(key in message for key in keys for message in raw) == 9
    for message in raw:
        clean = abi.redact(message)
        assert len(clean) == len(message)
        assert not any(key in clean for key in keys)
        changed = {index for index, (old, new) in enumerate(zip(message, clean, strict=True)) if old != new}
        secret = {at for key in keys for at in places(message, key)}
        if abi.HEADER.unpack_from(message)[1] == abi.NLMSG_ERROR:  # what it repeats goes as a whole
            assert min(changed) >= 36
        else:
            assert changed == secret
    assert [abi.redact(message) for message in kept] == kept


def test_keys_are_in_no_repr() -> None:
    text = repr(sa()) + str(sa()) + repr(sa().aead)
    assert KEY.hex() not in text
    assert "\\x01\\x02" not in text


ports = st.integers(0, 0xFFFF)
u32 = st.integers(0, 2**32 - 1)


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    network, bits = draw(st.sampled_from([(IPv4Network, 32), (IPv6Network, 128)]))
    ends = [network((draw(st.integers(0, 2**bits - 1)), draw(st.integers(0, bits))), strict=False) for _ in range(2)]
    return Selector(*ends, draw(st.integers(0, 255)), *[draw(ports) for _ in range(4)], draw(st.integers(0, 2**31 - 1)))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    selector = draw(selectors())
    bits = selector.source.max_prefixlen
    some = st.none() | st.integers(1, 2**bits - 1).map(type(selector.source.network_address))
    template = st.builds(
        Template,
        reqid=u32,
        spi=u32,
        mode=st.sampled_from(Mode),
        protocol=st.sampled_from([50, 51, 108]),
        source=some,
        destination=some,
    )
    return Policy(
        selector,
        draw(st.sampled_from(Direction)),
        draw(st.sampled_from(Action)),
        draw(u32),
        draw(u32),
        tuple(draw(st.lists(template, max_size=6))),
        draw(st.none() | st.builds(Mark, u32, u32)),
    )


@given(policies())
def test_a_policy_survives_the_round_trip(policy: Policy) -> None:
    info = decode_reply(abi.Message.NEWPOLICY, memoryview(encode_policy(policy)))
    assert isinstance(info, PolicyInfo)
    assert info.policy == policy


@st.composite
def sas(draw: st.DrawFn) -> Sa:
    selector = draw(selectors())
    amount, seconds = st.none() | st.integers(0, 2**64 - 2), st.integers(0, 2**64 - 1)
    return Sa(
        selector.source.network_address,
        selector.destination.network_address,
        draw(u32),
        draw(u32),
        Aead(CHACHA, KEY),
        draw(st.sampled_from([Direction.IN, Direction.OUT])),
        selector,
        replay_window=draw(st.integers(0, 4096)),
        lifetime=draw(st.builds(Lifetime, amount, amount, amount, amount, seconds, seconds)),
        esn=draw(st.booleans()),
        encapsulation=draw(st.none() | st.builds(UdpEncapsulation, st.integers(1, 65535), st.integers(1, 65535))),
    )


@given(wanted=sas(), with_direction=st.booleans())
def test_an_sa_survives_the_round_trip(*, wanted: Sa, with_direction: bool) -> None:
    body = bytes(encode_sa(wanted, with_direction=with_direction))
    datagram = abi.HEADER.pack(16 + len(body), abi.Message.NEWSA, 0, 0, 0) + body
    (frame,) = abi.frames(abi.redact(datagram))
    info = decode_reply(frame.type, frame.body)
    assert isinstance(info, SaInfo)
    assert KEY not in bytes(frame.body)
    same = ("source", "destination", "spi", "reqid", "mode", "selector", "lifetime", "esn", "mark", "encapsulation")
    for name in same:
        assert getattr(info, name) == getattr(wanted, name)
    assert info.direction == (wanted.direction if with_direction else None)
    if wanted.direction is Direction.IN:
        assert info.replay_window == wanted.replay_window


def read_all(datagram: bytes) -> None:
    """Do what the sockets do with a datagram; only MalformedError may come of it, and it means: refused."""
    with contextlib.suppress(MalformedError):
        for frame in abi.frames(abi.redact(datagram)):
            decode_error(frame.type, frame.flags, frame.body)
            decode_reply(frame.type, frame.body)
            decode_event(frame.type, frame.pid, frame.body)


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_ignored(garbage: bytes) -> None:
    read_all(garbage)


@given(st.sampled_from(sorted(abi.Message)), st.integers(0, 0x3FF), st.binary(max_size=600))
def test_garbage_of_every_type_is_refused_or_ignored(kind: int, flags: int, body: bytes) -> None:
    frame = memoryview(body)
    for read in (
        lambda: decode_reply(kind, frame),
        lambda: decode_event(kind, 0, frame),
        lambda: decode_error(abi.NLMSG_ERROR, flags, frame),
        lambda: decode_error(abi.NLMSG_DONE, flags, frame),
    ):
        with contextlib.suppress(MalformedError):
            read()


@given(st.sampled_from(everything_from_kernels()), st.data())
def test_a_damaged_message_is_refused_or_ignored_and_never_shows_a_key(message: bytes, data: st.DataObject) -> None:
    damaged = bytearray(message[: data.draw(st.integers(0, len(message)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    read_all(bytes(damaged))
    assert KEY[:16] not in abi.redact(bytes(damaged))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Selector(ip_network("10.0.0.0/8"), ip_network("::/0")),
        lambda: sa(source=A6),
        lambda: sa(direction=Direction.FORWARD),
        lambda: Aead("x" * 64, KEY),
        lambda: encode_policy(Policy(FROM_A, Direction.IN, Action.ALLOW, 1, 0, (Template(1, optional=True),))),
    ],
)
def test_what_can_not_be_written_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"versions|IN or OUT|name of|plaintext"):
        make()
