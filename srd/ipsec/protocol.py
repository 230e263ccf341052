"""The protocol by which two nodes make a generation of keys, as pure state machines: one connection, one generation.

As NTS keys NTP (RFC 8915): nothing home-made. A TLS 1.3 connection with certificates on both sides gives the keys, by
its exporter. One of the two always connects and leads (`leads`), so they never collide. Make before break:

    leader                                   follower
    HELLO                             <->    HELLO          each says which SPIs it sends under at this moment
    PREPARE  (SPI to receive on)       ->
                                             install both SAs (inert: nothing is pinned to the outbound one)
                                       <-    PREPARED (SPI to receive on)
    install both SAs; pin
    COMMIT                             ->
                                             pin
                                       <-    COMMITTED
    retire old SAs
    DONE                               ->    retire old SAs

Nobody sends under keys that the other end cannot receive. A connection that breaks before the leader pins rolls back:
both go on under the old keys. After it, forward: the leader sends under the new ones, which the follower can receive
since PREPARED; the follower goes on under the old ones, which the leader still has. The next connection's HELLOs say
which keys are in use, so whatever the last one left behind goes, and the next generation replaces both.

The machines know no kernel, no socket and no clock. `hear` and `start` return actions to carry out in order; each must
be announced by `begin` first, so that `lost` knows what may have happened when the connection or the kernel fails.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, TypeVar

import msgspec
from msgspec import Meta

from srd.cluster import Node
from srd.ipsec.sas import Generation, KeyedLeg
from srd.ipsec.suites import KEY_BYTES, SALT_BYTES, choose
from srd.model import Body, IpAddress, NodeKind, SrdError, Suite

PROTOCOL: Final = 5
EXPORTER_LABEL: Final = b"EXPORTER-srd-esp"
SMALLEST_SPI: Final = 0x1000  # RFC 4303 section 2.1 reserves those below 256
LARGEST_SPI: Final = 0xFFFF_FFFF

# One a second for nine million years. A count without a bound is one that a peer can drive out of its eight bytes.
LAST_GENERATION: Final = 1 << 48
Count = Annotated[int, Meta(ge=0, le=LAST_GENERATION)]
Spi = Annotated[int, Meta(ge=0, le=LARGEST_SPI)]

Leg = tuple[IpAddress, IpAddress]  # local, remote
# Keying material that only the two ends of the connection can compute: (label, context, length) -> bytes.
Exporter = Callable[[bytes, bytes, int], bytes]


class KeyingError(SrdError):
    """The keying channel to a peer failed; running SAs are untouched."""


def leads(mine: Node, theirs: Node) -> bool:
    """Whether the first of two nodes connects and leads: a client, whom the other may not know, or the smaller name."""
    mine_calls, theirs_calls = (node.kind is NodeKind.CLIENT for node in (mine, theirs))
    return mine_calls if mine_calls != theirs_calls else mine.name < theirs.name


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, array_like=True):
    """What one end tells the other."""


class Hello(Message, frozen=True):
    """Who I am in this boot, the last generation I know of, what my kernel can do, and what I send under now.

    `udp_port` is that of ESP in UDP, 0 for ESP alone.
    """

    protocol: int
    boot_id: str
    generation: Count
    grades: dict[str, int]
    sends: list[Spi]
    udp_port: Annotated[int, Meta(ge=0, le=65535)] = 0


class Prepare(Message, frozen=True):
    """The leader's offer: a new generation, its suite, and an SPI to reach the leader at, for each address pair."""

    generation: Count
    suite: str
    spis: list[Spi]


class Prepared(Message, frozen=True):
    """The follower can receive and send; the SPIs are those to reach it at."""

    generation: Count
    spis: list[Spi]


class Commit(Message, frozen=True):
    """The leader sends under the new keys."""

    generation: Count


class Committed(Message, frozen=True):
    """So does the follower."""

    generation: Count


class Done(Message, frozen=True):
    """Both have switched; old keys may go."""

    generation: Count


class Beat(Message, frozen=True):
    """I am alive, and this is how I am. `wants_keys` asks the leader for a new generation."""

    version: str
    initialized: bool
    role: str
    healthy: bool
    offset: int | None
    wants_keys: bool
    drained: bool = False
    pause_number: Count = 0
    pause_until: float = 0.0
    replid: str = ""  # of the stream that `offset` is in


class Ask(Message, frozen=True):
    """A question of one srd to another, about whatever else they do together; `number` comes back with the answer."""

    number: Count
    topic: str
    body: Body


class Told(Message, frozen=True):
    """The answer; `refusal` says in a sentence why there is none."""

    number: Count
    body: Body
    refusal: str = ""


# What may come over a connection that is held.
Word = Beat | Ask | Told

M = TypeVar("M", bound=Message)


def understood(body: bytes, kind: type[M], sender: str) -> M:
    """Return the message that a body is; `KeyingError` when it is no message of that kind."""
    try:
        return msgspec.msgpack.decode(body, type=kind, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError):  # the latter for a text that is not UTF-8
        raise KeyingError("understand", sender, "a message that does not belong here") from None


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message."""

    message: Message


@dataclass(frozen=True, slots=True)
class Agree:
    """The peer sends under these SPIs and no others; whatever else an earlier connection left may go."""

    sends: frozenset[int]


@dataclass(frozen=True, slots=True)
class Install:
    """Give the kernel both SAs of each address pair; nobody sends under them yet."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Pin:
    """Send under the new keys from now on."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Retire:
    """Both ends send under the new keys: the old ones may go."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Take back a generation that nobody sends under."""

    generation: Generation


Action = Say | Agree | Install | Pin | Retire | Discard


@dataclass(frozen=True, slots=True)
class Terms:
    """What an end brings along. `spis` are new, one for each leg, to receive on; `sends` is what it sends under."""

    cluster: str
    me: Node
    peer: Node
    boot_id: str
    legs: tuple[Leg, ...]
    grades: Mapping[Suite, int]
    counted: int
    sends: tuple[int, ...]
    spis: tuple[int, ...]
    udp_port: int | None = None  # of ESP in UDP
    prescribed: bool = False  # the grades are those of ipsec.suites


class End:
    """What leader and follower have in common: greeting, and what may be taken back.

    `expects` is the type of the next message, None when there is none to come; `made` the generation once both ends
    send under it.
    """

    def __init__(self, terms: Terms, export: Exporter) -> None:
        self.terms = terms
        self.counted = terms.counted
        self.expects: type[Message] | None = Hello
        self.made: Generation | None = None
        self._export = export
        self._generation: Generation | None = None
        self._installing = False
        self._promised = False

    def start(self) -> Sequence[Action]:
        """Greet the peer."""
        terms = self.terms
        grades = {str(suite): grade for suite, grade in terms.grades.items()}
        port = terms.udp_port or 0
        return [Say(Hello(PROTOCOL, terms.boot_id, terms.counted, grades, list(terms.sends), port))]

    def hear(self, message: Message) -> Sequence[Action]:
        """Take the next message; `KeyingError` when it is not the one that is due: the connection is over then."""
        if self.expects is None or type(message) is not self.expects:
            raise self._refuse(f"{type(message).__name__} is not what is due")
        return self._STEPS[self.expects](self, message)

    _STEPS: ClassVar[Mapping[type[Message], Callable[..., Sequence[Action]]]] = {}

    def begin(self, action: Action) -> None:
        """Hear that an action is about to be carried out; from here on it may have happened."""
        self._installing = self._installing or isinstance(action, Install)
        # The leader may send under the new keys once the follower has been told that it can.
        told = isinstance(action, Say) and isinstance(action.message, Prepared)
        self._promised = self._promised or told or isinstance(action, Pin)

    def lost(self) -> Sequence[Action]:
        """Return what to take back when the connection breaks or an action fails; there is nothing after this."""
        self.expects = None
        if self._generation is None or not self._installing or self._promised:
            return []
        return [Discard(self._generation)]

    def result(self) -> Generation:
        """Return what was made, once `expects` is None; `KeyingError` when that is nothing."""
        if self.made is None:
            raise self._refuse("the exchange was given up")
        return self.made

    def _choose(self, leaders: Mapping[Suite, int], followers: Mapping[Suite, int]) -> None:
        self._suite, reason = choose(leaders, followers)
        self._reason = "ipsec.suites of cluster.toml has it first" if self.terms.prescribed else reason

    def _greeted(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise KeyingError(
                "speak with", self.terms.peer.name, f"it speaks version {hello.protocol}, this node {PROTOCOL}"
            )
        if (hello.udp_port or None) != self.terms.udp_port:
            theirs, mine = (f"UDP port {port}" if port else "no UDP" for port in (hello.udp_port, self.terms.udp_port))
            raise self._refuse(f"it wants ESP in {theirs}, this node in {mine}: ipsec.encap is not the same on both")

    def _next(self, hello: Hello) -> int:
        """Return the number of the generation that this connection makes: the same at both ends.

        After the last one comes the first: a peer that has claimed the last must not be the end of all keys.
        """
        return max(self.counted, hello.generation) % LAST_GENERATION + 1

    def _refuse(self, reason: str) -> KeyingError:
        return KeyingError("make keys with", self.terms.peer.name, reason)

    def _check_spis(self, spis: Sequence[int]) -> None:
        if len(spis) != len(self.terms.legs) or not all(SMALLEST_SPI <= spi <= LARGEST_SPI for spi in spis):
            raise self._refuse("it names SPIs that cannot be")

    def _same(self, message: Commit | Committed | Done | Prepared) -> Generation:
        """Return the generation in the making, if that is what the peer speaks of."""
        if self._generation is None or message.generation != self._generation.number:
            raise self._refuse(f"it speaks of generation {message.generation}, which is not in the making")
        return self._generation

    def _derive(self, number: int, suite: Suite, reason: str, boot_id: str, their_spis: Sequence[int]) -> Generation:
        """Export the keys of both directions of each address pair.

        The context binds everything that the two must agree on (RFC 5705 section 4): cluster, sender and receiver
        with their boots and addresses, generation, suite, the SPI of this direction and that of the other.
        """
        terms = self.terms

        def key(sender: Sequence[str], receiver: Sequence[str], spi: int, other_spi: int) -> bytes:
            texts = [text.encode() for text in (terms.cluster, *sender, *receiver, suite)]
            packed = b"".join(struct.pack(">H", len(text)) + text for text in texts)
            return self._export(
                EXPORTER_LABEL, packed + struct.pack(">QII", number, spi, other_spi), KEY_BYTES + SALT_BYTES
            )

        legs = []
        for (local, remote), spi_in, spi_out in zip(terms.legs, terms.spis, their_spis, strict=True):
            me, them = (terms.me.name, terms.boot_id, str(local)), (terms.peer.name, boot_id, str(remote))
            key_in, key_out = key(them, me, spi_in, spi_out), key(me, them, spi_out, spi_in)
            legs.append(KeyedLeg(local, remote, spi_in, spi_out, key_in, key_out))
        return Generation(terms.peer.name, number, suite, reason, tuple(legs), terms.udp_port)


class Leader(End):
    """The end that connected: it offers, and it is the first to send under the new keys."""

    def _greet(self, hello: Hello) -> Sequence[Action]:
        self._greeted(hello)
        self._boot_id = hello.boot_id
        self._choose(self.terms.grades, _suites(hello.grades))
        self.counted = self._next(hello)
        self.expects = Prepared
        return [
            Agree(frozenset(hello.sends)),
            Say(Prepare(self.counted, self._suite, list(self.terms.spis))),
        ]

    def _prepared(self, message: Prepared) -> Sequence[Action]:
        if message.generation != self.counted:
            raise self._refuse(f"it prepared generation {message.generation}, not {self.counted}")
        self._check_spis(message.spis)
        made = self._derive(self.counted, self._suite, self._reason, self._boot_id, message.spis)
        self._generation = made
        self.expects = Committed
        return [Install(made), Pin(made), Say(Commit(made.number))]

    def _committed(self, message: Committed) -> Sequence[Action]:
        self.made = self._same(message)
        self.expects = None
        return [Retire(), Say(Done(message.generation))]

    _STEPS: ClassVar[Mapping[type[Message], Callable[..., Sequence[Action]]]] = {
        Hello: _greet,
        Prepared: _prepared,
        Committed: _committed,
    }


class Follower(End):
    """The end that was connected to: it can receive before it says so, and is the second to send under the new keys."""

    def _greet(self, hello: Hello) -> Sequence[Action]:
        self._greeted(hello)
        self._boot_id = hello.boot_id
        self._choose(_suites(hello.grades), self.terms.grades)
        self._due = self._next(hello)
        self.expects = Prepare
        return [Agree(frozenset(hello.sends))]

    def _prepare(self, message: Prepare) -> Sequence[Action]:
        if message.suite != self._suite:
            raise self._refuse(f"it offers {message.suite}, and {self._suite} is what both run best")
        if message.generation != self._due:
            raise self._refuse(f"it offers generation {message.generation}, and {self._due} is due")
        self._check_spis(message.spis)
        self.counted = message.generation
        made = self._derive(message.generation, self._suite, self._reason, self._boot_id, message.spis)
        self._generation = made
        self.expects = Commit
        return [Install(made), Say(Prepared(made.number, list(self.terms.spis)))]

    def _commit(self, message: Commit) -> Sequence[Action]:
        made = self._same(message)
        self.expects = Done
        return [Pin(made), Say(Committed(made.number))]

    def _done(self, message: Done) -> Sequence[Action]:
        self.made = self._same(message)
        self.expects = None
        return [Retire()]

    _STEPS: ClassVar[Mapping[type[Message], Callable[..., Sequence[Action]]]] = {
        Hello: _greet,
        Prepare: _prepare,
        Commit: _commit,
        Done: _done,
    }


def _suites(grades: Mapping[str, int]) -> dict[Suite, int]:
    """Return what a peer offers of the suites that this version knows."""
    return {suite: grades[suite] for suite in Suite if suite in grades}
