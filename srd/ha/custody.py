"""The lease from hand to hand: its holder may give the rest of it to one other node. Pure, the clock is handed in.

A lease keeps everybody else out until it ends (ha/lease.py). Whoever holds it may therefore stop using it and let one
other node use the rest, as leases are transferred elsewhere: still one node at each instant, and the successor need not
wait until a majority of the sentinels has heard of it, which takes Sentinel 0.5 to 1.5 s after a promotion (the leader
learns of the promotion by an INFO that it sends once a second, sentinel.c sentinelSendPeriodicCommands).

Only what is left, and counted on one clock each: the holder says for how many seconds its own lease would have held;
the successor counts them from the moment when it asked, or answered that it is ready, which the holder takes to be when
that answer came. A holder gives its lease away when its redis has ended, or in a switchover just before it is made a
replica; to one node, and has none itself until the given one has ended, whatever the sentinels say. Only in a
switchover that comes to nothing it takes it back, and only if the heir was never told, or has declined it.

It also waits for `ASSURANCE_SECONDS` for a newer epoch than the one in which it held its lease: the given one may end
before a majority names the successor, which then need not wait until a lease of its predecessor must have ended. One
that has no lease any more may give that assurance alone, again to one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from srd.cluster import Node
from srd.model import Body

# A majority names the successor within 2 s. Should nobody be promoted, it is so long that nobody leads.
ASSURANCE_SECONDS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node's srd gives of its lease, on this node's clock, from the moment `since`: for so many `seconds`.

    For `assured` seconds it has none itself, unless it is named in a newer epoch.
    """

    source: str
    since: float
    seconds: float
    assured: float

    def left(self, now: float) -> float:
        """Return for how many seconds more it holds; negative when it has ended."""
        return self.since + self.seconds - now


@dataclass
class Custody:
    """What a node has given away, and what it was given; all moments are CLOCK_BOOTTIME seconds."""

    known_until: float = 0.0  # what the sentinels have given at most, whatever they think of the primary since
    known_epoch: int = 0  # and in which epoch
    heir: str | None = None
    told: bool = False  # the heir, and it has not declined
    given_until: float = 0.0
    given_epoch: int = 0
    barred_until: float = 0.0  # from a lease in that epoch or an older one
    granted_by: str | None = None
    granted_at: float = 0.0
    granted_until: float = 0.0
    assured_until: float = 0.0

    def give(self, heir: str, now: float) -> float:
        """Give what is left of the lease to a node; return for how many seconds, 0 if it is not to be had."""
        if now >= self.given_until:
            self.told = False
            if self.known_until <= now:
                return 0.0
            self.heir, self.given_until, self.given_epoch = heir, self.known_until, self.known_epoch
        elif heir != self.heir:
            return 0.0
        self.barred_until = now + ASSURANCE_SECONDS
        return self.given_until - now

    def assure(self, heir: str, now: float, epoch: int) -> bool:
        """Give one node the assurance alone, where there is no lease that could be given; return whether it has it.

        `epoch` is the one in which a majority names this node.
        """
        if self.known_until > now:
            return False
        if heir != self.heir and now < self.barred_until and epoch <= self.given_epoch:
            return False  # another one counts on it
        self.heir, self.given_epoch = heir, epoch
        self.barred_until = now + ASSURANCE_SECONDS
        return True

    def tell(self, since: float) -> Body:
        """Return the words in which the heir is told what it has, counted from that moment; they make an `Offer`."""
        self.told = True
        return {"seconds": max(0.0, self.given_until - since), "assured": ASSURANCE_SECONDS}

    def is_heir(self, node: str, now: float) -> bool:
        """Whether a node was given the lease, and it has not ended."""
        return self.heir_at(now) == node

    def heir_at(self, now: float) -> str | None:
        """Return to whom the lease was given, if it has not ended."""
        return self.heir if now < self.given_until else None

    def may_lead(self, now: float) -> bool:
        """Whether another node may lead by what this one has given it: it was told, and that has not ended."""
        return self.told and now < self.given_until

    def declined(self) -> None:
        """Take note that the heir has not taken it, and will not: it is as if it had not been told."""
        self.told = False

    def take_back(self) -> None:
        """Have it back, unless the heir may have it: it was told, and has not declined."""
        if not self.told:
            self.heir, self.given_until, self.barred_until = None, 0.0, 0.0

    def take(self, offer: Offer, *, promoted: float) -> None:
        """Have been given what is left of a lease; from `promoted` on this node's redis is known to be primary."""
        self.granted_by, self.granted_at = offer.source, promoted
        self.told = False  # whoever was given this node's own is not before it any more
        self.granted_until = max(self.granted_until, offer.since + offer.seconds)
        self.assured_until = max(self.assured_until, offer.since + offer.assured)

    def is_assured(self, now: float) -> bool:
        """Whether the giver has none, and will have none before it is named anew."""
        return now < max(self.granted_until, self.assured_until)

    def named(self, node: Node | None, own: Node) -> None:
        """Take note of whom a majority names; a third one is another successor, of which the giver knows nothing."""
        if node is not None and node.name not in (own.name, self.granted_by):
            self.granted_until = self.assured_until = 0.0

    def lose(self, seen: float) -> None:
        """Have none that was given: this node's redis, asked at that moment, was no primary any more."""
        if seen > self.granted_at:
            self.granted_until = self.assured_until = 0.0

    def held_until(self, expires: float, now: float, epoch: int) -> float:
        """Return when this node's lease ends, if the sentinels give it one in that epoch which ends at `expires`."""
        if now < self.given_until or (now < self.barred_until and epoch <= self.given_epoch):
            return 0.0
        if expires > self.known_until:
            self.known_until, self.known_epoch = expires, epoch
        return max(expires, self.granted_until)
