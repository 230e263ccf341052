"""The kernel's own count of what IPsec has dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Final

XFRM_STAT: Final = Path("/proc/net/xfrm_stat")


def read_xfrm_errors() -> dict[str, int]:
    """Return the counters of /proc/net/xfrm_stat that are not zero; what each means is in docs/ipsec.md."""
    try:
        text = XFRM_STAT.read_text(encoding="ascii")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {name: int(value) for name, value in pairs if value != "0"}
