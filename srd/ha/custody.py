"""The lease from hand to hand: its holder may give the rest of it to one other node. Pure, the clock is handed in.

A lease keeps everybody else out until it ends (ha/lease.py). Whoever holds it may therefore stop using it and let one
other node use the rest, as leases are transferred elsewhere: still one node at each instant, and the successor need not
wait until a majority of the sentinels has heard of it, which takes Sentinel 0.5 to 1.5 s after a promotion (the leader
learns of the promotion by an INFO that it sends once a second, sentinel.c sentinelSendPeriodicCommands).

Only what is left, and counted on one clock each: the holder says for how many seconds its own lease would have held;
the successor counts them from the moment when it asked, or answered that it is ready, which the holder takes to be when
that answer came. A holder gives its lease away when its redis has ended, or in a
switchover just before it is made a replica; to one node, and has none itself until the given one has ended, whatever
the sentinels say. Only in a switchover that comes to nothing it takes it back, and only if the heir was never told.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Custody:
    """What a node has given away, and what it was given; all moments are CLOCK_BOOTTIME seconds."""

    known_until: float = 0.0  # what the sentinels have given at most, whatever they think of the primary since
    heir: str | None = None
    told: bool = False  # the heir, that it is one
    given_until: float = 0.0
    granted_at: float = 0.0
    granted_until: float = 0.0

    def give(self, heir: str, now: float) -> float:
        """Give what is left of the lease to a node; return for how many seconds, 0 if it is not to be had."""
        if now < self.given_until:
            return self.given_until - now if heir == self.heir else 0.0
        if self.known_until <= now:
            return 0.0
        self.heir, self.given_until, self.told = heir, self.known_until, False
        return self.known_until - now

    def tell(self, since: float) -> float:
        """Return for how many seconds from that moment the heir has it, which is told so."""
        self.told = True
        return self.given_until - since

    def is_heir(self, node: str, now: float) -> bool:
        """Whether a node was given the lease, and it has not ended."""
        return self.heir_at(now) == node

    def heir_at(self, now: float) -> str | None:
        """Return to whom the lease was given, if it has not ended."""
        return self.heir if now < self.given_until else None

    def take_back(self) -> None:
        """Have it back, unless the heir was told already that it was given."""
        if not self.told:
            self.heir, self.given_until = None, 0.0

    def take(self, asked: float, seconds: float, *, promoted: float) -> None:
        """Have been given a lease of so many seconds by an answer to a question that was asked at that moment.

        `promoted` is a moment from which on this node's redis is known to be primary.
        """
        self.granted_at, self.granted_until = promoted, max(self.granted_until, asked + seconds)

    def has(self, now: float) -> bool:
        """Whether what it was given has not ended."""
        return now < self.granted_until

    def lose(self, seen: float) -> None:
        """Have none that was given: this node's redis, asked at that moment, was no primary any more."""
        if seen > self.granted_at:
            self.granted_until = 0.0

    def held_until(self, expires: float, now: float) -> float:
        """Return when this node's lease ends, if the sentinels' answers give it one that ends at `expires`."""
        if now < self.given_until:
            return 0.0
        self.known_until = max(self.known_until, expires)
        return max(expires, self.granted_until)
