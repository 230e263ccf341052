"""Values and events of the kernel's IPsec tables (XFRM): what the codec and the sockets speak.

Nothing here does I/O. Out of scope: AH, IPComp, authenc (CBC with HMAC) and key export. Such objects of other
programs are read, without their keys; they can't be written.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

ESP: Final = 50
NAME_MAX: Final = 63  # char alg_name[64], NUL-terminated


class Direction(enum.IntEnum):
    """XFRM_POLICY_*: which way traffic goes. The SOCKET ones are read only: setsockopt(IP_XFRM_POLICY) of a process."""

    IN = 0
    OUT = 1
    FORWARD = 2
    SOCKET_IN = 3
    SOCKET_OUT = 4
    SOCKET_FORWARD = 5


class Action(enum.IntEnum):
    """XFRM_POLICY_ALLOW (through the templates, if any) and XFRM_POLICY_BLOCK."""

    ALLOW = 0
    BLOCK = 1


class Mode(enum.IntEnum):
    """XFRM_MODE_*; this library writes the first two and reads all."""

    TRANSPORT = 0
    TUNNEL = 1
    ROUTE_OPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4
    IPTFS = 5


@dataclass(frozen=True, slots=True)
class Mark:
    """XFRMA_MARK: matches where `packet mark & mask == value`. Part of the identity of a policy and of an SA.

    An SA is looked up as a packet would: one without a mark answers to every mark, for deleting too.
    """

    value: int
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Selector:
    """Which traffic: two networks, and below them protocol and ports where a mask is not 0.

    `protocol` 0 is any. A port matches where `packet port & mask == port`. For ICMP the type stands in
    the source port and the code in the destination port. `interface` is an ifindex; 0 is any.
    """

    source: IpNetwork
    destination: IpNetwork
    protocol: int = 0
    source_port: int = 0
    source_port_mask: int = 0
    destination_port: int = 0
    destination_port_mask: int = 0
    interface: int = 0

    def __post_init__(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError(f"{self.source} and {self.destination} are of two IP versions")

    def __str__(self) -> str:
        parts = [f"{self.source} -> {self.destination}"]
        if self.protocol:
            parts.append(f"protocol {self.protocol}")
        if self.source_port_mask:
            parts.append(f"source port {self.source_port}/{self.source_port_mask:#06x}")
        if self.destination_port_mask:
            parts.append(f"destination port {self.destination_port}/{self.destination_port_mask:#06x}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Template:
    """What a policy demands of an SA. SPI 0 is any; no addresses (transport mode) means those of the packet.

    `optional` ("level use") lets plaintext through. It is here so that a policy which somebody weakened
    compares unequal to the one that was wanted; it can't be written.
    """

    reqid: int
    spi: int = 0
    mode: Mode = Mode.TRANSPORT
    protocol: int = ESP
    source: IpAddress | None = None
    destination: IpAddress | None = None
    optional: bool = False


PolicyIdentity = tuple[Selector, Direction, Mark | None]


@dataclass(frozen=True, slots=True)
class Policy:
    """One entry of the SPD. The kernel's identity is (selector, direction, mark); the lowest `priority` wins.

    `index` is `n << 3 | direction`, kept by the kernel across updates, or 0 to let the kernel choose. If
    an index is taken the kernel silently chooses another: read the table to know.
    """

    selector: Selector
    direction: Direction
    action: Action
    priority: int
    index: int = 0
    templates: tuple[Template, ...] = ()
    mark: Mark | None = None

    @property
    def identity(self) -> PolicyIdentity:
        """What makes two policies one to the kernel; the priority is no part of it."""
        return self.selector, self.direction, self.mark

    def __str__(self) -> str:
        index = f" index {self.index}" if self.index else ""
        return f"policy {self.direction.name.lower()} {self.selector}{index}"


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When an SA or policy expires. None is no limit for amounts, 0 is no limit for times.

    Seconds count from installation, on the wall clock (a backward jump of the clock prolongs them). A soft
    limit only sends an event; a hard one deletes the object.
    """

    soft_bytes: int | None = None
    hard_bytes: int | None = None
    soft_packets: int | None = None
    hard_packets: int | None = None
    soft_seconds: int = 0
    hard_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Aead:
    """A combined-mode algorithm by its kernel name, and its key with the salt behind it. Never shows the key."""

    name: str
    key: bytes = field(repr=False)
    icv_bits: int = 128

    def __post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= NAME_MAX:
            raise ValueError(f"{self.name!r} is not an algorithm name of 1 to {NAME_MAX} bytes")


@dataclass(frozen=True, slots=True)
class UdpEncapsulation:
    """XFRMA_ENCAP of the type UDP_ENCAP_ESPINUDP: ESP in UDP between these two ports (RFC 3948).

    To receive it takes a UDP socket on the destination port with UDP_ENCAP set (include/uapi/linux/udp.h).
    """

    source_port: int
    destination_port: int


@dataclass(frozen=True, slots=True)
class Sa:
    """An ESP SA to install.

    The kernel's identity is (destination, SPI, mark); the source does not count. `direction` is IN or OUT
    as seen from this host. `replay_window` (packets, at most 4096) is for IN: an OUT SA has none. `esn`
    is the 64-bit sequence number of RFC 4303 section 2.2.1.
    """

    source: IpAddress
    destination: IpAddress
    spi: int
    reqid: int
    aead: Aead
    direction: Direction
    selector: Selector
    mode: Mode = Mode.TRANSPORT
    replay_window: int = 1024
    lifetime: Lifetime = Lifetime()
    esn: bool = True
    mark: Mark | None = None
    encapsulation: UdpEncapsulation | None = None

    def __post_init__(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError(f"{self.source} and {self.destination} are of two IP versions")
        if self.direction not in (Direction.IN, Direction.OUT):
            raise ValueError("the direction of an SA is IN or OUT")

    def __str__(self) -> str:
        return f"SA {self.source} -> {self.destination} spi {self.spi:#010x}"


@dataclass(frozen=True, slots=True)
class SaInfo:
    """An SA as the kernel reports it, without its key.

    `aead` is "" and `key_bits` 0 where it uses no AEAD. `larval` is one that only reserves an SPI and has no
    keys yet. `direction` is None where the kernel does not say (before 6.10, or SAs of programs that don't).
    `sequence` is the last number received (IN), `output_sequence` the last sent (OUT). Timestamps are Unix
    seconds, 0 is never; `use_timestamp` is the first use. `encapsulation` is None for ESP in TCP (RFC 9329) too.
    """

    source: IpAddress
    destination: IpAddress
    spi: int
    reqid: int
    protocol: int
    mode: Mode
    selector: Selector
    larval: bool
    aead: str
    key_bits: int
    icv_bits: int
    direction: Direction | None
    esn: bool
    replay_window: int
    lifetime: Lifetime
    bytes: int
    packets: int
    add_timestamp: int
    use_timestamp: int
    sequence: int
    output_sequence: int
    replay_window_drops: int
    replay_drops: int
    integrity_failures: int
    mark: Mark | None
    encapsulation: UdpEncapsulation | None = None

    def __str__(self) -> str:
        return f"SA {self.source} -> {self.destination} spi {self.spi:#010x}"


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy as the kernel reports it. `lifetime == Lifetime()` means that it never expires.

    `sub` is a policy of the second table (XFRM_POLICY_TYPE_SUB), `interface_id` that of an xfrm interface: both belong
    to its identity, so one with either is never a policy that this library wrote. XFRM does not count a
    policy's bytes and packets.
    """

    policy: Policy
    lifetime: Lifetime
    add_timestamp: int
    use_timestamp: int
    sub: bool = False
    interface_id: int = 0


@dataclass(frozen=True, slots=True)
class SpdInfo:
    """How many policies there are, per direction; `socket_*` are those of sockets."""

    incoming: int
    outgoing: int
    forward: int
    socket_incoming: int
    socket_outgoing: int
    socket_forward: int


@dataclass(frozen=True, slots=True)
class SaChanged:
    """An SA was added or updated. In all events `pid` is what the originator put in its request's header.

    `XfrmSocket` puts its own number there, the kernel and iproute2 use 0: `pid != socket.pid` is somebody else.
    """

    pid: int
    sa: SaInfo


@dataclass(frozen=True, slots=True)
class SaDeleted:
    """An SA was deleted by a request; `sa` is its last state. One that expired is reported as Expired only."""

    pid: int
    sa: SaInfo


@dataclass(frozen=True, slots=True)
class SaFlushed:
    """All SAs of `protocol` were deleted; 0 or 255 is all protocols."""

    pid: int
    protocol: int


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """A policy was added or updated."""

    pid: int
    info: PolicyInfo


@dataclass(frozen=True, slots=True)
class PolicyDeleted:
    """A policy was deleted by a request."""

    pid: int
    info: PolicyInfo


@dataclass(frozen=True, slots=True)
class PolicyFlushed:
    """All policies of the main table, or of the second one, were deleted."""

    pid: int
    sub: bool


@dataclass(frozen=True, slots=True)
class Expired:
    """An SA reached a limit of its lifetime; after a hard one it is gone."""

    pid: int
    sa: SaInfo
    hard: bool


@dataclass(frozen=True, slots=True)
class PolicyExpired:
    """A policy reached a limit of its lifetime; after a hard one it is gone."""

    pid: int
    info: PolicyInfo
    hard: bool


@dataclass(frozen=True, slots=True)
class Acquire:
    """A packet met a policy whose SA does not exist; `source` and `destination` are the hosts it needs one for."""

    pid: int
    source: IpAddress
    destination: IpAddress
    selector: Selector
    policy: PolicyInfo
    sequence: int


@dataclass(frozen=True, slots=True)
class Overrun:
    """Events were lost or could not be read: read every table again. The subscription is whole again already."""

    reason: str
    pid: int = 0


XfrmEvent = (
    SaChanged
    | SaDeleted
    | SaFlushed
    | PolicyChanged
    | PolicyDeleted
    | PolicyFlushed
    | Expired
    | PolicyExpired
    | Acquire
    | Overrun
)
