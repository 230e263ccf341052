"""Filters that the kernel runs for `srd verify`, in classic BPF (linux/filter.h). Pure.

With them a busy node's ESP is not copied to a process that counts what is not ESP.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from srd.desired import TCP, UDP
from srd.verify.packets import ESP, Pair

_LD_PROTOCOL: Final = (0x28, 0xFFFFF000)  # ldh [SKF_AD_OFF + SKF_AD_PROTOCOL]
_LDH, _LD, _LDB, _LDX_IHL = 0x28, 0x20, 0x30, 0xB1
_LDH_X, _LD_X = 0x48, 0x40
_JEQ, _JA, _RET = 0x15, 0x05, 0x06
_SNAP_BYTES: Final = 256
_ETHERTYPES: Final = {4: 0x0800, 6: 0x86DD}
# Per family: where the protocol is, where the last four bytes of both addresses are, where what follows begins.
_OFFSETS: Final = {4: (9, 12, 16), 6: (6, 20, 36)}


class _Program:
    """A classic BPF program (linux/filter.h) with labels: a condition skips the jump that follows it."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, int, int | str]] = []
        self._labels: dict[str, int] = {}

    def add(self, code: int, operand: int) -> None:
        self._lines.append((code, 0, 0, operand))

    def jump_if(self, value: int, label: str) -> None:
        self._lines += [(_JEQ, 0, 1, value), (_JA, 0, 0, label)]

    def jump_unless(self, value: int, label: str) -> None:
        self._lines += [(_JEQ, 1, 0, value), (_JA, 0, 0, label)]

    def jump(self, label: str) -> None:
        self._lines.append((_JA, 0, 0, label))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._lines)

    def assembled(self) -> bytes:
        def lines() -> Iterator[bytes]:
            for number, (code, true, false, operand) in enumerate(self._lines):
                value = self._labels[operand] - number - 1 if isinstance(operand, str) else operand
                yield struct.pack("=HBBI", code, true, false, value)

        return b"".join(lines())


def plaintext_filter(peers: frozenset[bytes], udp_ports: Iterable[int]) -> bytes:
    """Return a filter for packets with one of `peers` that are not ESP: a little too many, which `judge` sorts out."""
    program = _Program()
    program.add(*_LD_PROTOCOL)
    for version, ethertype in _ETHERTYPES.items():
        program.jump_if(ethertype, f"v{version}")
    program.jump("drop")
    for version, (protocol, source, destination) in _OFFSETS.items():
        program.label(f"v{version}")
        program.add(_LDB, protocol)
        program.jump_if(ESP, "drop")
        for port in udp_ports:
            _skip_esp_in_udp(program, version, port)
        ends = sorted({int.from_bytes(peer[-4:]) for peer in peers if len(peer) == (4 if version == 4 else 16)})  # noqa: PLR2004
        for offset in (source, destination):
            program.add(_LD, offset)
            for end in ends:
                program.jump_if(end, "keep")
        program.jump("drop")
    program.label("keep")
    program.add(_RET, _SNAP_BYTES)
    program.label("drop")
    program.add(_RET, 0)
    return program.assembled()


def _skip_esp_in_udp(program: _Program, version: int, port: int) -> None:
    other = f"v{version} not in UDP at {port}"
    program.add(_LDB, _OFFSETS[version][0])
    program.jump_unless(UDP, other)
    base = 0
    if version == 4:  # noqa: PLR2004 - IP version
        program.add(_LDX_IHL, 0)
    else:
        base = 40
    half, whole = (_LDH_X, _LD_X) if version == 4 else (_LDH, _LD)  # noqa: PLR2004 - as above
    for offset in (0, 2):
        program.add(half, base + offset)
        program.jump_unless(port, other)
    program.add(whole, base + 8)
    program.jump_unless(0, "drop")
    program.label(other)


def answer_filter(pair: Pair, port: int, own_port: int, *, headed: bool) -> bytes:
    """Return a filter for TCP segments from the peer's port to ours; `headed` says that the IP header is there."""
    program = _Program()
    half = _LDH
    base = 0
    if headed and pair[0].version == 4:  # noqa: PLR2004 - IP version
        program.add(_LDB, 9)
        program.jump_unless(TCP, "drop")
        program.add(_LD, 12)
        program.jump_unless(int.from_bytes(pair[1].packed), "drop")
        program.add(_LDX_IHL, 0)
        half = _LDH_X
    elif headed:
        program.add(_LDB, 6)
        program.jump_unless(TCP, "drop")
        program.add(_LD, 20)
        program.jump_unless(int.from_bytes(pair[1].packed[-4:]), "drop")
        base = 40
    for offset, value in ((0, port), (2, own_port)):
        program.add(half, base + offset)
        program.jump_unless(value, "drop")
    program.add(_RET, _SNAP_BYTES)
    program.label("drop")
    program.add(_RET, 0)
    return program.assembled()
