"""Bytes on the keying channel of a node that runs: whatever they are, nothing breaks and nothing is left of them.

Before TLS, raw ones to the port and as an answer to the node's own hello. After a handshake with a peer's valid
certificate, messages that are wrong in every way at every step, from the end that leads and from the one that is led.
What is said is made of the seed and the input's number alone; TLS and the honest parts add their own randomness.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from OpenSSL import SSL
from support.adversary import (
    HONEST,
    LEADING,
    LED,
    LENGTH,
    STUCK_SECONDS,
    TARGET,
    Adversary,
    Ground,
    Said,
    Saying,
    cast,
    emptied,
    framed,
    reset,
)
from support.clusters import cluster_toml, make_bundles
from support.nodes import eventually

from srd.ipsec.channel import MAX_MESSAGE_BYTES, Channel
from srd.ipsec.exchange import Unprotected
from srd.ipsec.protocol import Beat, Commit, Committed, Done, Hello, KeyingError, Message, Prepare, Prepared
from srd.trust.bundle import Bundle

SEED: Final = os.environ.get("SRD_FUZZ_SEED", "srd")
# More by SRD_FUZZ=100000.
INPUTS: Final = int(os.environ.get("SRD_FUZZ", "500"))
# What the interpreter, OpenSSL and asyncio keep once they have seen everything is kept before it is measured.
WARM_UP: Final = 200
# At a time; those that the target must connect to are one at a time.
TOGETHER: Final = 4
# Resident memory of the process, which is both ends.
LEFT_OVER_MIB: Final = 16
AT_ONCE_SECONDS: Final = 5.0
LONGEST_TEXT: Final = MAX_MESSAGE_BYTES - 200

ALL: Final[Sequence[Message]] = (
    Hello(1, "boot", 0, {"rfc4106(gcm(aes))": 1}, []),
    Prepare(1, "rfc7539esp(chacha20,poly1305)", [0x1000]),
    Prepared(1, [0x1000]),
    Commit(1),
    Committed(1),
    Done(1),
    Beat("0", initialized=False, role="replica", healthy=True, offset=None, wants_keys=False),
)


# --- messages, after TLS


def encoded(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def odd(rng: random.Random) -> Any:
    """A value that may be of the right type, and is hardly what is expected."""
    return rng.choice(
        [
            0, 1, 2, 0x1000, 255, -1, 2**31, 2**32 - 1, 2**32, 2**48, 2**48 + 1, 2**63, 2**64 - 1, -(2**63),
            None, True, 1.5, float("nan"), float("inf"), "", "x", "rfc4106(gcm(aes))", "\x00\n\x1b[2J",
            "x" * LONGEST_TEXT,
            b"", b"\xff" * 40, [], [0x1000], [0x1000, 0x1000], [1], [0] * 5000, {}, {"x": 1}, {"rfc4106(gcm(aes))": -1},
            {"rfc7539esp(chacha20,poly1305)": 2**64 - 1}, msgspec.Raw(b"\xa3\x00\x00\x80"), msgspec.Raw(b"\x91" * 5000),
            msgspec.Raw(b"\xdd\xff\xff\xff\xff"), msgspec.Raw(b"\xdb\xff\xff\xff\xff"), msgspec.Raw(b"\xc1"),
            msgspec.Raw(b"\x81\xa1\x80\x01"), rng.randrange(2**64), rng.randbytes(20),
        ]
    )  # fmt: skip


def wrong_bytes(rng: random.Random, message: Message) -> Said:
    return [framed(flip(rng, encoded(message)))], True


def wrong_fields(rng: random.Random, message: Message) -> Said:
    fields = [getattr(message, name) for name in message.__struct_fields__]
    for _ in range(rng.randint(1, 2)):
        fields[rng.randrange(len(fields))] = odd(rng)
    return [framed(msgspec.msgpack.encode([type(message).__name__, *fields]))], True


def wrong_count(rng: random.Random, message: Message) -> Said:
    fields = [type(message).__name__, *(getattr(message, name) for name in message.__struct_fields__)]
    fields = fields[: rng.randint(0, len(fields))] if rng.random() < 0.5 else [*fields, odd(rng)]
    return [framed(msgspec.msgpack.encode(fields))], True


def another(rng: random.Random, _message: Message) -> Said:
    return [framed(encoded(rng.choice(ALL)))], True


def nonsense(rng: random.Random, _message: Message) -> Said:
    return [framed(rng.randbytes(rng.choice([0, 1, 10, 300, 16384, MAX_MESSAGE_BYTES])))], True


def wrong_length(rng: random.Random, message: Message) -> Said:
    body = encoded(message)
    near = [len(body) - 1, len(body) + 1, MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 1]
    length = rng.choice([0, 1, *near, 2**31, 2**32 - 1])
    return [LENGTH.pack(length) + body], False


def cut_short(rng: random.Random, message: Message) -> Said:
    whole = framed(encoded(message))
    return [whole[: rng.randrange(len(whole))] or b"\x00"], False


def too_long(rng: random.Random, _message: Message) -> Said:
    length = MAX_MESSAGE_BYTES + rng.choice([1, 1000, 1 << 20])
    return [LENGTH.pack(length), bytes(length)], False


def twice(rng: random.Random, message: Message) -> Said:
    return [framed(encoded(message)) * rng.choice([2, 3, 50])], True


def ahead(rng: random.Random, message: Message) -> Said:
    """What is due comes, after and before what is not yet."""
    order = [encoded(message), *(encoded(other) for other in rng.sample(ALL, rng.randint(1, 3)))]
    rng.shuffle(order)
    return [b"".join(map(framed, order))], True


def in_pieces(rng: random.Random, message: Message) -> Said:
    """As it should be, but for the records: nothing may depend on them."""
    whole = framed(encoded(message))
    size = rng.choice([1, 2, 3, 7])
    return [whole[at : at + size] for at in range(0, len(whole), size)], True


def nothing(_rng: random.Random, _message: Message) -> Said:
    return [], False


SPOILERS: Final = (
    wrong_bytes, wrong_bytes, wrong_fields, wrong_fields, wrong_fields, wrong_count, another, nonsense, wrong_length,
    cut_short, too_long, twice, ahead, in_pieces, nothing,
)  # fmt: skip


async def speak(rng: random.Random, evil: Adversary, channel: Saying, heartbeats: int) -> None:
    """Make keys, and say heartbeats, with one or two messages spoilt on the way."""
    with contextlib.suppress(KeyingError):
        await evil.make(channel, Unprotected())
        for _ in range(heartbeats):
            await channel.send(Beat("0", False, rng.choice(["primary", "\x00"]), True, rng.randrange(99), False))


def spoilt(rng: random.Random, steps: int) -> dict[int, Callable[[Message], Said]]:
    """One of so many steps, or two, and how."""
    return {rng.randrange(steps): partial(rng.choice(SPOILERS), rng) for _ in range(rng.choice([1, 1, 1, 2]))}


# --- bytes, before TLS


def record(kind: int, body: bytes, length: int | None = None, version: int = 0x0301) -> bytes:
    return struct.pack(">BHH", kind, version, len(body) if length is None else length) + body


def client_hello(rng: random.Random) -> bytes:
    """A TLS 1.3 client's hello, as RFC 8446 section 4.1.2 has it; X25519 takes any 32 bytes for a key."""

    def extension(number: int, body: bytes) -> bytes:
        return struct.pack(">HH", number, len(body)) + body

    extensions = (
        extension(43, b"\x02\x03\x04")  # supported_versions: 1.3
        + extension(10, b"\x00\x02\x00\x1d")  # supported_groups: x25519
        + extension(13, b"\x00\x04\x04\x03\x08\x07")  # signature_algorithms
        + extension(51, b"\x00\x24\x00\x1d\x00\x20" + rng.randbytes(32))  # key_share
    )
    body = b"\x03\x03" + rng.randbytes(32) + b"\x20" + rng.randbytes(32) + b"\x00\x02\x13\x01\x01\x00"
    body += struct.pack(">H", len(extensions)) + extensions
    return record(22, b"\x01" + len(body).to_bytes(3) + body)


def raw(rng: random.Random) -> list[bytes]:
    """What somebody may send who has no TLS, or half of it."""
    hello = client_hello(rng)
    at = rng.randrange(len(hello))
    return rng.choice(
        [
            [],
            [hello],
            [flip(rng, hello)],
            [flip(rng, hello)],
            [flip(rng, hello)],
            [hello[:at]],
            [hello[:at], hello[at:]],
            [hello, hello],
            [record(22, hello[5:], rng.randrange(1 << 16))],
            [record(22, hello[5 + n : 6 + n]) for n in range(len(hello) - 5)],  # a record for each byte
            [record(22, b"")] * rng.randint(1, 40),
            [record(rng.randrange(256), rng.randbytes(rng.randrange(400)), version=rng.randrange(1 << 16))],
            [record(23, bytes(1 << 15))],
            [hello, record(20, b"\x01"), record(23, rng.randbytes(rng.randrange(1, 600)))],
            [hello, record(21, rng.randbytes(2))],
            [hello, record(22, rng.randbytes(rng.randrange(1, 600)))],
            [rng.randbytes(rng.randrange(1, 3000))],
            [rng.randbytes(70_000)],
            [b"GET / HTTP/1.0\r\n\r\n"],
            [b"SSH-2.0-x\r\n"],
            [b"\x80\x2e\x01\x00\x02" + rng.randbytes(43)],  # SSL 2
        ]
    )


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def pour(rng: random.Random, ends: Ends, said: list[bytes]) -> None:
    """Say it and see the other end close the connection, which it has got until the end of what was said to do."""
    reader, writer = ends
    try:
        with contextlib.suppress(OSError):
            for piece in said:
                writer.write(piece)
                await writer.drain()
            if rng.random() < 0.1:
                reset(writer)
            writer.write_eof()
        await emptied(reader)
    finally:
        writer.transport.abort()


class Rough(Channel):
    """A channel whose handshake is spoilt in one of its flights; what it says is encrypted, so not of its making."""

    def __init__(self, *args: Any, rng: random.Random, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rng = rng
        self._flight = rng.randrange(3)

    async def _flush(self) -> None:
        self._flight -= 1
        if self._flight != -1:
            await super()._flush()
            return
        data = b""
        with contextlib.suppress(SSL.WantReadError):
            while True:
                data += self._tls.bio_read(1 << 16)
        cut = self._rng.randrange(len(data) + 1)
        self._writer.write(self._rng.choice([flip(self._rng, data), data[:cut], data + data, data[cut:], b""]))
        raise KeyingError("shake hands with", self.remote, "the rest is silence")


# --- the inputs


class Fuzzer:
    """Makes input number N and has the target take it."""

    def __init__(self, ground: Ground, strangers: Sequence[Adversary]) -> None:
        self.ground = ground
        self.leading = Adversary(ground, LEADING)
        self.led = Adversary(ground, LED)
        self.strangers = strangers
        self._one_call_at_a_time = asyncio.Lock()
        self._kinds: dict[Callable[[random.Random], Awaitable[None]], int] = {
            self.before_tls: 40,
            self.before_tls_led: 5,
            self.in_the_handshake: 5,
            self.as_a_stranger: 2,
            self.as_the_leader: 36,
            self.as_the_led: 12,
        }

    async def take_all(self, numbers: range) -> None:
        async with self.led.listening():
            for first in numbers[::TOGETHER]:
                some = numbers[first - numbers.start :][:TOGETHER]
                async with asyncio.TaskGroup() as group:
                    for number in some:
                        group.create_task(self.take(number))
                await self.ground.target.passes()
                assert not self.ground.journal.faults, f"{some} of seed {SEED!r}: {self.ground.journal.faults}"

    async def take(self, number: int) -> None:
        rng = random.Random(f"{SEED} {number}")
        (kind,) = rng.choices(list(self._kinds), list(self._kinds.values()))
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                await kind(rng)
        except (Exception, asyncio.CancelledError) as error:
            error.add_note(f"input {number} of seed {SEED!r}, {kind.__name__}")
            raise

    async def before_tls(self, rng: random.Random) -> None:
        await pour(rng, await self.leading.call(), raw(rng))

    async def before_tls_led(self, rng: random.Random) -> None:
        async with self._one_call_at_a_time:
            await pour(rng, await self.led.called(), raw(rng))

    async def in_the_handshake(self, rng: random.Random) -> None:
        ends = await self.leading.call()
        channel = Rough(*ends, self.leading.context, accepted=False, rng=rng)
        with contextlib.suppress(KeyingError):
            await self.leading.make(channel, Unprotected())
        await pour(rng, ends, [])

    async def as_a_stranger(self, rng: random.Random) -> None:
        """With a certificate that does not let in, whatever is said."""
        evil = rng.choice(self.strangers)
        ends = await evil.call()
        channel = Saying(*ends, evil.context, accepted=False, instead={})
        with pytest.raises(KeyingError):
            await evil.make(channel, Unprotected())
        await pour(rng, ends, [])

    async def as_the_leader(self, rng: random.Random) -> None:
        heartbeats = rng.randrange(4)
        ends = await self.leading.call()
        instead = spoilt(rng, 4 + heartbeats)
        channel = Saying(*ends, self.leading.context, accepted=False, instead=instead)
        await speak(rng, self.leading, channel, heartbeats)
        await pour(rng, ends, [])

    async def as_the_led(self, rng: random.Random) -> None:
        heartbeats = rng.randrange(4)
        async with self._one_call_at_a_time:
            ends = await self.led.called()
            instead = spoilt(rng, 3 + heartbeats)
            channel = Saying(*ends, self.led.context, accepted=True, instead=instead)
            await speak(rng, self.led, channel, heartbeats)
            await pour(rng, ends, [])


class Anonymous(Adversary):
    """Somebody without a certificate."""

    def __init__(self, ground: Ground, name: str) -> None:
        super().__init__(ground, name)
        self.context = SSL.Context(SSL.TLS_METHOD)


# --- what is left


def held() -> tuple[int, int]:
    """Return how many descriptors and tasks this process has."""
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.fixture
def bundles(tmp_path: Path) -> dict[str, Bundle]:
    return cast(tmp_path)


@pytest.fixture
async def ground(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ground]:
    # Keys that the target leads are due again at once: its connections are inputs, and the floor is tested elsewhere.
    monkeypatch.setattr("srd.ipsec.peering.RENEWAL_FLOOR_SECONDS", 0.0)
    async with Ground(bundles).standing() as ground:
        yield ground


@pytest.mark.timeout(120 + INPUTS // 20)
async def test_whatever_is_said_nothing_breaks_and_nothing_is_left(
    ground: Ground, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    other = make_bundles(tmp_path / "other", cluster_toml(nodes=4))
    strangers = [
        Anonymous(ground, LEADING),
        Adversary(ground, LEADING, other[LEADING].credentials),
        Adversary(ground, LEADING, bundles[HONEST].credentials),
    ]
    fuzzer = Fuzzer(ground, strangers)
    honest, keys = ground.store.view().channels[HONEST], ground.target.keys_with(ground.node(HONEST))
    before = held()

    async def no_more_than_before() -> bool:
        return all(now <= then for now, then in zip(held(), before, strict=True))

    await fuzzer.take_all(range(WARM_UP))
    await eventually(no_more_than_before, "an end of all connections")
    resident, started = resident_mib(), time.monotonic()
    await fuzzer.take_all(range(WARM_UP, INPUTS))
    pace = (INPUTS - WARM_UP) / (time.monotonic() - started)
    await eventually(no_more_than_before, "an end of all connections")
    more = resident_mib() - resident
    print(  # noqa: T201 - figures for people
        f"\n{INPUTS} inputs, {pace:.0f} a second: {held()} descriptors and tasks after {before}, {more:.1f} MiB more, "
        f"{ground.journal.lines} lines"
    )
    assert more < LEFT_OVER_MIB
    assert ground.journal.warnings <= INPUTS
    # The honest peer has noticed nothing, and both are keyed anew when they want to be.
    assert ground.store.view().channels[HONEST] == honest
    assert ground.target.keys_with(ground.node(HONEST)) == keys
    await ground.honest.renew([TARGET], AT_ONCE_SECONDS)
    await ground.same_keys(HONEST)
    for name in (LEADING, LED):
        await ground.keyed_with(name, AT_ONCE_SECONDS)
    await ground.target.passes()
    assert ground.target.sas == 2 * 3, "one SA for each direction with each peer"
    assert not ground.journal.faults
