"""Errors about a file of TOML that name the dotted key and the line where it stands. Pure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import msgspec

from srd.model import ConfigError


@dataclass(frozen=True, slots=True)
class Refusal:
    """Makes errors that name the dotted key and the line where it stands."""

    text: str
    origin: str

    def stands(self, key: str) -> bool:
        """Whether the file itself sets the key, so that it can be pointed at."""
        line = line_of(self.text, key)
        return line is not None and key.rpartition(".")[2] in self.text.splitlines()[line - 1]

    def at(self, key: str, reason: str, remedy: str = "") -> ConfigError:
        """Return the error that a key is wrong, why, and what to do."""
        line = line_of(self.text, key)
        where = f"{self.origin}:{line}" if line else self.origin
        return ConfigError("use", where, f"{key}: {reason}", remedy)

    def invalid(self, error: msgspec.ValidationError) -> ConfigError:
        """Return msgspec's error in words."""
        message, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`").replace("[...]", "")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message.partition(" - at")[0])
        if unknown:
            key = f"{key}.{unknown[1]}" if key else unknown[1]
            return self.at(key, "no such key", "config/cluster.reference.toml lists them all")
        missing = re.fullmatch(r"Object missing required field `(.*)`", message.partition(" - at")[0])
        if missing:
            key = f"{key}.{missing[1]}" if key else missing[1]
            return self.at(key, "missing", "config/cluster.toml is a complete example")
        words = message.replace("`", "").replace("object", "table")
        return self.at(key, words[0].lower() + words[1:])


def line_of(text: str, key: str) -> int | None:
    """Return the 1-based line where a dotted key such as `node[1].addresses` stands, or that of its table."""
    wanted = [part.partition("[") for part in key.split(".")]
    path = [(name, int(index[:-1]) if index else 0) for name, _, index in wanted]
    best, line_number = 0, None
    table: list[tuple[str, int]] = []
    counts: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if header := re.match(r"\[\[\s*([\w.-]+)\s*\]\]", stripped):
            table = [(header[1], counts[header[1]])]
            counts[header[1]] += 1
            here = table
        elif header := re.match(r"\[\s*([\w.-]+)\s*\]", stripped):
            table = [(name, 0) for name in header[1].split(".")]
            here = table
        elif assignment := re.match(r"[\"']?([\w.-]+)[\"']?\s*=", stripped):
            here = [*table, *((name, 0) for name in assignment[1].split("."))]
        else:
            continue
        depth = len(here) if here == path[: len(here)] else 0
        if depth > best:
            best, line_number = depth, number
    return line_number
