"""Whom a node answers in what concerns the primary."""

from __future__ import annotations

import pytest
from support.sentinels import SECRETS
from support.situations import NOW, at, config

from srd.changes import RoleChange
from srd.ha.chronicle import HISTORY_TOPIC
from srd.ha.history import word_of
from srd.ha.moves import SWITCHOVER_TOPIC
from srd.ha.primacy import ENDING_TOPIC, Primacy
from srd.ha.progress import Stock
from srd.ha.promotion import HEIR_TOPIC, LEASE_TOPIC, SUCCEED_TOPIC
from srd.model import Body, RefusedError
from srd.state import Situation, Store

CLIENT = """
[[node]]
name = "app-1"
kind = "client"
addresses = ["192.168.205.20"]
"""
CONFIG = config(CLIENT)
WORD = RoleChange(1.0, 9, at(1), at(2))


async def _nobody(peer: str, _topic: str, _body: Body, _seconds: float) -> Body:
    raise RefusedError("ask", peer, "nobody is there")


async def _nothing() -> None:
    return


async def _stock() -> Stock:
    return Stock("redis-1")


async def _nowhere(_end: str) -> None:
    return


def primacy(store: Store) -> Primacy:
    node = CONFIG.node("redis-1")
    return Primacy(
        CONFIG,
        node,
        SECRETS,
        store,
        situation=lambda: Situation(CONFIG, node, store.view(), NOW),
        ask_peer=_nobody,
        wake=lambda: None,
        keep_data=_nothing,
        stock=_stock,
        after=_nowhere,
    )


@pytest.mark.parametrize(
    "topic", [HEIR_TOPIC, LEASE_TOPIC, SUCCEED_TOPIC, SWITCHOVER_TOPIC, ENDING_TOPIC, HISTORY_TOPIC]
)
@pytest.mark.parametrize("peer", ["app-1", "redis-9"])
async def test_a_client_has_no_say_in_who_is_primary(topic: str, peer: str) -> None:
    store = Store(NOW)
    with pytest.raises(RefusedError, match="runs no sentinel of this cluster"):
        await primacy(store).answer(peer, topic, word_of(WORD))
    assert store.view().history == ()


async def test_what_another_node_tells_of_a_change_is_taken_in() -> None:
    store = Store(NOW)
    assert await primacy(store).answer("redis-2", HISTORY_TOPIC, word_of(WORD)) == {}
    assert store.view().history == (WORD,)
