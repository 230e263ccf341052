"""What was measured, kept in build/primacy.jsonl and printed as one table: python -m bench.primacy.figures."""

# ruff: noqa: T201 - printing is what this is for
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

FILE: Final = Path(os.environ.get("BENCH_FIGURES", "build/primacy.jsonl"))
ROWS: Final = {
    "kill": "kill -9 of the primary's redis, until writes are back",
    "silence": "the primary's node falls silent, until writes are back",
    "move": "the primary is moved: time without a write, writes lost",
    "reconnect": "a client ends its connection and opens another one: time without a write",
    "restart": "the primary is killed and started again, persistence off",
    "part": "5 nodes, primary and writer in the minority: writes lost",
    "part-1": "the same, writes confirmed by one replica (WAIT 1)",
    "part-2": "the same, writes confirmed by a majority (WAIT 2)",
    "alone": "5 nodes, the primary alone with the writers: writes lost",
    "alone-1": "the same, writes confirmed by one replica (WAIT 1)",
}


@dataclass(frozen=True)
class Figure:
    """What a cluster came to in one row of the table."""

    row: str
    where: str
    cluster: str
    text: str


def seconds(gaps: Sequence[float]) -> str:
    """Return median, extremes and number of some times."""
    if max(gaps) < 1:
        found = f"median {median(gaps) * 1000:.0f} ms ({min(gaps) * 1000:.0f} to {max(gaps) * 1000:.0f})"
    else:
        found = f"median {median(gaps):.2f} s ({min(gaps):.2f} to {max(gaps):.2f})"
    return f"{found}, {len(gaps)} times"


def keep(figure: Figure) -> None:
    """Write a figure down, and print it."""
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps(asdict(figure)) + "\n")
    print(f"\n{figure.where}, {figure.cluster}: {ROWS[figure.row]}: {figure.text}", flush=True)


def table(figures: Sequence[Figure]) -> str:
    """Return them side by side, as Markdown; of two of the same kind the last one counts."""
    clusters = list(dict.fromkeys(figure.cluster for figure in figures))
    found = {(figure.row, figure.where, figure.cluster): figure.text for figure in figures}
    lines = ["| | where | " + " | ".join(clusters) + " |", "|---" * (len(clusters) + 2) + "|"]
    for row, where in dict.fromkeys((row, where) for row in ROWS for kind, where, _ in found if kind == row):
        texts = (found.get((row, where, cluster), "") for cluster in clusters)
        lines.append(f"| {ROWS[row]} | {where} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Figure(**json.loads(line)) for line in FILE.read_text().splitlines()]))
