"""Which AEAD two nodes use: what both kernels have, weighed by what both CPUs do well.

Without AES instructions, AES-GCM in C is about half as fast as ChaCha20-Poly1305 (0.24-0.34 against 0.60 Gbit/s
measured on one core), and with them it is faster. The slower end of a link sets its speed, so it decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from srd.model import SrdError, Suite

PROC_CRYPTO: Final = Path("/proc/crypto")

# How well a node runs a suite; only the order of the numbers means anything.
_AES_ACCELERATED: Final = 3
_CHACHA: Final = 2
_AES_IN_SOFTWARE: Final = 1

_SHORT_NAMES: Final = {Suite.AES_256_GCM: "AES-256-GCM", Suite.CHACHA20_POLY1305: "ChaCha20-Poly1305"}

# The generic parts of crypto/: a driver that is built of one of them has no help from the CPU.
_IN_C: Final = r"aes-generic|aes-fixed-time"

KEY_BYTES: Final = 32
SALT_BYTES: Final = 4  # RFC 4106 section 8.1, RFC 7634 section 2: the last four bytes of the keying material


def grades(installable: Iterable[Suite], proc_crypto: str) -> Mapping[Suite, int]:
    """Grade each suite that the kernel can install by how well this machine runs it."""
    aes = _AES_ACCELERATED if _aes_accelerated(proc_crypto) else _AES_IN_SOFTWARE
    known = {Suite.AES_256_GCM: aes, Suite.CHACHA20_POLY1305: _CHACHA}
    return {suite: known[suite] for suite in installable}


def prescribed(grades_here: Mapping[Suite, int], suites: Sequence[Suite]) -> Mapping[Suite, int]:
    """Return grades by which the first of `suites` that both ends have wins; the ones given when `suites` is empty."""
    if not suites:
        return grades_here
    return {suite: len(suites) - rank for rank, suite in enumerate(suites) if suite in grades_here}


def choose(mine: Mapping[Suite, int], theirs: Mapping[Suite, int]) -> tuple[Suite, str]:
    """Return the suite that the slower end runs best, and why in words; `SrdError` when the two have none in common.

    Both ends compute the same from the same two grades, so neither can talk the other into a weaker one.
    """
    common = [suite for suite in Suite if suite in mine and suite in theirs]
    if not common:
        raise SrdError("agree on a suite", "", "the two kernels have no AEAD in common", "load gcm or chacha20poly1305")
    best = max(common, key=lambda suite: min(mine[suite], theirs[suite]))
    if len(common) == 1:
        return best, f"{_SHORT_NAMES[best]} is the only suite that both kernels have"
    if best is Suite.AES_256_GCM:
        return best, "both ends have AES instructions"
    return best, "an end has no AES instructions"


def read_proc_crypto() -> str:
    """Return /proc/crypto, or nothing where the kernel has no such file."""
    try:
        return PROC_CRYPTO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _aes_accelerated(proc_crypto: str) -> bool:
    """Whether a driver for AES-GCM in ESP is registered that is not built of the generic C parts.

    An entry's `name` is `rfc4106(gcm(aes))` and its `driver` says who does it: `rfc4106-gcm-aesni` or, in C,
    `rfc4106(gcm_base(ctr(aes-generic),ghash-generic))`. While somebody's first use has the kernel build that one, its
    entry is there without a driver (311 of 2102 reads during one `ip xfrm state add`): that says nothing yet.
    """
    name = ""
    for line in proc_crypto.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "name":
            name = value.strip()
        elif key.strip() == "driver" and name == Suite.AES_256_GCM and value.strip() and not re.search(_IN_C, value):
            return True
    return False
