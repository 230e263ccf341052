"""Which faults a walk is made of: drawn from a seed before anything runs. Pure.

Victims are named by role, since nobody knows beforehand who will be primary: 0 is whoever is when a fault begins, 1, 2,
... are the others in the order of their names. Seed, number of faults and number of nodes give the same walk again,
as long as the kinds stay as they are; the walk itself, as JSON, gives it for ever.

At any time no more nodes are impaired than a minority, for the cluster has to end whole by itself, and what a majority
confirmed has to be there. So the cluster is whole before a step that impairs other nodes than the one before; a step
that is `impatient` goes on with the same nodes at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from chaos.faults import KINDS, Kind

PRIMARY: Final = 0
# The primary is hit as often as all others together.
PRIMARY_SHARE: Final = 0.5
DOUBLE_SHARE: Final = 0.25
IMPATIENT_SHARE: Final = 0.25
PAUSE_SECONDS: Final = (0.5, 4.0)


@dataclass(frozen=True, slots=True)
class Draw:
    """A fault as it was drawn; `kind` is a key of `KINDS`, `choice` one of its choices."""

    kind: str
    choice: str
    victims: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """One fault, or two at once, and how many seconds pass before the next step. `impatient`: see above."""

    draws: tuple[Draw, ...]
    pause: float
    impatient: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A walk for a cluster of so many nodes."""

    nodes: int
    steps: tuple[Step, ...]

    @property
    def faults(self) -> int:
        """How many faults it is made of."""
        return sum(len(step.draws) for step in self.steps)

    def dump(self) -> str:
        """Return it as JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


def load(text: str) -> Plan:
    """Return the walk that `dump` has written; `ValueError` where that is none."""
    try:
        return msgspec.json.decode(text, type=Plan)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error


def minority(nodes: int) -> int:
    """Return how many nodes may be impaired at once."""
    return (nodes - 1) // 2


def plan(seed: int, faults: int, nodes: int, kinds: Mapping[str, Kind] = KINDS) -> Plan:
    """Return a walk of so many faults; each kind comes once before one comes again."""
    rng = random.Random(seed)
    deck = _deck(rng, sorted(kinds))
    steps: list[Step] = []
    while (left := faults - sum(len(step.draws) for step in steps)) > 0:
        draws = [_draw(rng, next(deck), kinds, nodes)]
        if left > 1 and rng.random() < DOUBLE_SHARE:
            second = _draw(rng, next(deck), kinds, nodes)
            both_impair = kinds[draws[0].kind].impairs and kinds[second.kind].impairs
            draws.append(_beside(draws[0], second) if both_impair else second)
        if draws[0].kind == draws[-1].kind:
            draws = draws[:1]
        impatient = bool(steps) and rng.random() < IMPATIENT_SHARE
        steps.append(Step(tuple(draws), round(rng.uniform(*PAUSE_SECONDS), 1), impatient))
    return Plan(nodes, tuple(steps))


def _deck(rng: random.Random, names: list[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(names, len(names))


def _draw(rng: random.Random, name: str, kinds: Mapping[str, Kind], nodes: int) -> Draw:
    kind = kinds[name]
    return Draw(name, rng.choice(kind.choices), _victims(rng, kind.nodes, nodes), round(rng.uniform(*kind.lasting), 1))


def _victims(rng: random.Random, which: str, nodes: int) -> tuple[int, ...]:
    others = rng.sample(range(1, nodes), nodes - 1)
    if which == "none":
        return ()
    if which == "another":
        return tuple(others[:1])
    count = rng.randint(1, minority(nodes)) if which == "minority" else 1
    return (PRIMARY, *others)[:count] if rng.random() < PRIMARY_SHARE else tuple(others[:count])


def _beside(first: Draw, second: Draw) -> Draw:
    """Have a second fault hit the nodes of the first one."""
    count = len(second.victims)
    return Draw(second.kind, second.choice, first.victims[:count], second.seconds)
