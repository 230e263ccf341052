"""Whom a majority of the sentinels names primary, and until when this node may rely on being named. Pure.

Why two nodes never hold the lease at one instant. A lease needs a majority of all configured sentinels, two majorities
share a sentinel, and a sentinel names one primary at a time; so two leases need a sentinel that named one node and
then, within `primary_lease`, another. Take a primary that is cut off at the instant t:

* No answer to it was asked for later than t. An answer counts from when it was asked for, not from when it came, so
  its lease ends at t + primary_lease at the latest, without anything having to reach it.
* A sentinel pings once a second (SENTINEL_PING_PERIOD) and takes the primary for down `down_after` after the first ping
  that stayed without a reply (sentinel.c, sentinelCheckSubjectivelyDown). That ping left at t - round trip or later,
  so nobody else is promoted before t + down_after, less a round trip. srd hurries them (ha/failover.py), but not before
  2.1 s after that ping, and a vote takes 0.3 s more.
* primary_lease is 2 s, so the old lease ended before.

A primary whose redis has died is replaced sooner than that. It says no to /primary by itself then, and gives what is
left of its lease to the one that was elected, to nobody else and once (ha/custody.py).

A primary that hangs is not cut off: it may wake up while the sentinels replace it, and ask them. So a sentinel that
sees it down, or is replacing it, does not count for the lease though it still names it. A sentinel in TILT counts for
nothing: it has seen its own clock or itself stand still (sentinel.c, sentinelCheckTiltCondition).

Not covered here: a promotion without a failure that somebody else asks for (SENTINEL FAILOVER) waits for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from srd.cluster import Config, Node
from srd.model import Endpoint
from srd.state import Lease, SentinelAnswer

# sentinel.c, addReplySentinelRedisInstance: what a sentinel shows of a primary that it takes for down or is replacing.
DOWN_FLAGS: Final = frozenset({"s_down", "o_down"})
FAILOVER_FLAG: Final = "failover_in_progress"
NEVER: Final = 0.0


def endpoint_of(config: Config, node: Node) -> Endpoint:
    """Return how the sentinels name a node's redis."""
    return Endpoint(node.address, config.redis.port)


def fresh(config: Config, answers: Mapping[str, SentinelAnswer], now: float) -> Mapping[str, SentinelAnswer]:
    """Return the configured voters' answers that were asked for within the last `primary_lease`, TILT included."""
    voters = (node.name for node in config.voters)
    return {
        name: answer
        for name in voters
        if (answer := answers.get(name)) is not None and 0 <= now - answer.asked < config.primary_lease
    }


def assess(config: Config, node: Node, answers: Mapping[str, SentinelAnswer], now: float) -> Lease:
    """Judge the sentinels' last answers, one per node.

    `reachable` counts fresh answers, `agree` the most that name one endpoint: `primary`, if they are a majority.
    `expires` is when the lease of this node ends or ended, 0 if these answers never gave it one.
    """
    heard = fresh(config, answers, now)
    naming = Counter(answer.primary for answer in heard.values() if answer.primary is not None and not answer.tilt)
    named, agree = naming.most_common(1)[0] if naming else (None, 0)
    expires = _expiry(config, endpoint_of(config, node), answers, now)
    return Lease(
        held=now < expires,
        expires=expires,
        agree=agree,
        reachable=len(heard),
        primary=named if agree >= config.majority else None,
    )


def _expiry(config: Config, endpoint: Endpoint, answers: Mapping[str, SentinelAnswer], now: float) -> float:
    """Return when the answers stop being a majority: the majority-th latest of them then gets too old."""
    voters = {node.name for node in config.voters}
    asked = sorted(
        (a.asked for name, a in answers.items() if name in voters and a.asked <= now and _supports(a, endpoint)),
        reverse=True,
    )
    return asked[config.majority - 1] + config.primary_lease if len(asked) >= config.majority else NEVER


def _supports(answer: SentinelAnswer, endpoint: Endpoint) -> bool:
    doubted = answer.flags & DOWN_FLAGS or FAILOVER_FLAG in answer.flags
    return answer.primary == endpoint and not answer.tilt and not doubted
