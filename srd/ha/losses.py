"""Why a primary is about to be replaced, as far as this node knows; the next change away from it is the consequence.

Whoever acts says so beforehand: the srd beside a redis that has ended, those that hurry the sentinels, the one that was
asked to switch over. Where nobody's srd acts, the sentinels' events tell whether they had found the primary down or
were asked to replace it: a sentinel that tries of its own accord has announced +odown before +try-failover, one that
was told SENTINEL FAILOVER has not (sentinel.c, sentinelStartFailover).
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from srd.changes import ChangeKind
from srd.ha.sentinel import Event
from srd.model import Endpoint
from srd.state import View

# A failover that finds nobody good is tried again after twice the failover-timeout, which is 6 s by default.
LOSS_SECONDS: Final = 60.0

# The redis has ended: no loss if it is seen to be primary again.
ENDED: Final = (ChangeKind.CRASH, ChangeKind.OPERATOR)
_MASTER: Final = "master"  # sentinel.c, sentinelEvent "%@": the type comes first, then name, address and port


@dataclass(frozen=True, slots=True)
class Loss:
    """What is about to cost a primary its role.

    `began`, `led` (when the new one had its lease) and `noted` are CLOCK_BOOTTIME seconds. `complete`: the new one has
    all that the old one has written.
    """

    kind: ChangeKind
    primary: Endpoint
    began: float
    cause: str | None = None
    by: str | None = None
    led: float | None = None
    gap_seconds: float | None = None
    complete: bool = False
    noted: float = 0.0


class Losses:
    """What is known at this moment, one loss of each kind. `own` is this node's redis, `view` what was observed."""

    def __init__(self, own: Endpoint, *, view: Callable[[], View], clock: Callable[[], float]) -> None:
        self._own, self._view, self._clock = own, view, clock
        self._known: dict[ChangeKind, Loss] = {}
        self._down: set[str] = set()  # nodes whose sentinel has found the primary objectively down

    def note(self, loss: Loss) -> None:
        """Take note that a primary is being replaced, or will be."""
        self._known[loss.kind] = dataclasses.replace(loss, noted=self._clock())

    def given(self) -> None:
        """Take note that this node's lease was given to its successor, which leads from now on, as it says last."""
        now = self._clock()
        for kind, loss in self._known.items():
            if loss.primary == self._own:
                self._known[kind] = dataclasses.replace(loss, led=now)

    def handed_over(self, gap_seconds: float) -> None:
        """Take note that a switchover is done, and for how long nobody took a write meanwhile; nothing was lost."""
        loss = self._known.get(ChangeKind.SWITCHOVER)
        if loss is None:
            return  # the sentinels have named somebody meanwhile
        led = loss.led if loss.led is not None else self._clock()
        self.note(dataclasses.replace(loss, led=led, gap_seconds=gap_seconds, complete=True))

    def stayed(self) -> None:
        """Take note that a switchover came to nothing."""
        self._known.pop(ChangeKind.SWITCHOVER, None)

    def serves(self, asked: float) -> None:
        """Take note that this node's redis has said that it is primary, when it was asked at that moment."""
        for kind in ENDED:
            loss = self._known.get(kind)
            if loss is not None and loss.primary == self._own and asked > loss.began:
                del self._known[kind]

    def heard(self, event: Event) -> None:
        """Take note of what a sentinel has announced: that it has found the primary down, that it replaces it."""
        words = event.payload.split()
        if len(words) < 4 or words[0] != _MASTER:  # noqa: PLR2004 - type, name, address, port
            return
        if event.name == "+odown":
            self._down.add(event.node)
        elif event.name == "-odown":
            self._down.discard(event.node)
        elif event.name == "+try-failover":
            with contextlib.suppress(ValueError):
                self._tried(event.node, Endpoint(ipaddress.ip_address(words[2]), int(words[3])))

    def _tried(self, node: str, primary: Endpoint) -> None:
        now = self._clock()
        loss = Loss(ChangeKind.OUTSIDE, primary, now, f"SENTINEL FAILOVER, asked of the sentinel of {node}")
        if node in self._down:
            answers = (answer for answer in self._view().sentinels.values() if answer.primary == primary)
            began = min((answer.unanswered for answer in answers if answer.unanswered is not None), default=now)
            loss = Loss(ChangeKind.SENTINEL, primary, began, "the sentinels have found it down")
        known = self._known.get(loss.kind)
        if known is not None and known.primary == primary and self._stands(known, now):
            loss = dataclasses.replace(known, began=min(known.began, loss.began))  # another attempt
        self.note(loss)

    def take(self, primary: Endpoint | None) -> Loss | None:
        """Return what is known best of why this primary was replaced just now, and forget everything."""
        now, kinds = self._clock(), list(ChangeKind)
        found = [loss for loss in self._known.values() if loss.primary == primary and self._stands(loss, now)]
        self._known.clear()
        self._down.clear()
        return max(found, key=lambda loss: kinds.index(loss.kind), default=None)

    def _stands(self, loss: Loss, now: float) -> bool:
        """Whether a change would still be its consequence: of this node's own redis it is known when it is not."""
        known = loss.kind in ENDED and loss.primary == self._own
        return known or now - loss.noted < LOSS_SECONDS
