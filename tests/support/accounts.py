"""What the sentinels of a whole cluster of three say of themselves, and ways to have one say something else."""

from __future__ import annotations

from dataclasses import replace

from srd.ha.doctor import HELLO_LIVES_SECONDS, Look
from srd.ha.patient import Account, ListedSentinel, wanted_settings
from support.situations import at, config, primary_redis

CONFIG = config()
NAMES = ("redis-1", "redis-2", "redis-3")
IDS = {name: f"{number}" * 40 for number, name in enumerate(NAMES, 1)}
SENTINEL_PORT = CONFIG.sentinel.port
OLD = HELLO_LIVES_SECONDS + 1


def listed(number: int, **changes: object) -> ListedSentinel:
    place = at(number, SENTINEL_PORT)
    return replace(ListedSentinel(IDS.get(f"redis-{number}", "9" * 40), str(place), SENTINEL_PORT, 0.3), **changes)


def account(number: int, **changes: object) -> Account:
    name = f"redis-{number}"
    whole = Account(
        node=name,
        run_id=IDS[name],
        primary=str(at(1)),
        epoch=3,
        settings=wanted_settings(CONFIG, CONFIG.node(name)),
        sentinels=tuple(listed(other) for other in (1, 2, 3) if other != number),
        replicas=(str(at(2)), str(at(3))),
    )
    return replace(whole, **changes)


def look(*changed: Account, silent: tuple[str, ...] = (), **changes: object) -> Look:
    accounts = {name: account(number) for number, name in enumerate(NAMES, 1) if name not in silent}
    accounts |= {each.node: each for each in changed}
    return replace(Look(accounts, dict.fromkeys(silent, "no answer in time"), primary_redis()), **changes)
