"""Which sentinels are asked again at an event."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import pytest
from support.sentinels import SECRETS
from support.situations import NOW, config

from srd.ha.observe import Observer, to_be_asked
from srd.ha.resp import NobodyThereError
from srd.ha.sentinel import SUBSCRIBED, Event, SentinelClient
from srd.state import SentinelAnswer, Store

CONFIG = config()
VOTERS = [voter.name for voter in CONFIG.voters]
SPEAKER = VOTERS[1]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        pytest.param("+switch-master", [SPEAKER], id="it names another one"),
        pytest.param("-odown", [SPEAKER], id="it is content again"),
        pytest.param("-tilt", [SPEAKER], id="it counts again"),
        pytest.param(SUBSCRIBED, [SPEAKER], id="words of it were missed"),
        pytest.param("+selected-slave", VOTERS, id="the others have voted for it"),
        pytest.param("+promoted-slave", VOTERS, id="whom they have voted for has promoted its choice"),
        pytest.param("+sdown", [], id="a doubt is heard by the next question"),
        pytest.param("+slave", [], id="how many it lists may be a second old"),
    ],
)
def test_whoever_may_answer_otherwise_by_now_is_asked_again(name: str, asked: list[str]) -> None:
    assert to_be_asked(Event(SPEAKER, name, ""), VOTERS) == asked


def test_one_that_is_no_voter_any_more_is_not_asked() -> None:
    assert to_be_asked(Event("redis-9", "+switch-master", ""), VOTERS) == []


async def test_an_event_has_the_one_asked_that_it_is_about_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    events: asyncio.Queue[Event] = asyncio.Queue()

    async def ask(client: SentinelClient, _seconds: float) -> SentinelAnswer:
        asked[client.node] += 1
        return SentinelAnswer(client.node, NOW, None, 0, False, 0, 0)

    async def listen(client: SentinelClient) -> AsyncGenerator[Event]:
        while client.node == SPEAKER:
            yield await events.get()
        await asyncio.Event().wait()

    async def nobody(*_: object) -> None:
        raise NobodyThereError("ask", "redis", "nobody is there")

    monkeypatch.setattr(SentinelClient, "ask", ask)
    monkeypatch.setattr(SentinelClient, "events", listen)
    monkeypatch.setattr(SentinelClient, "keep_pace", nobody)
    told = asyncio.Event()
    observer = Observer(CONFIG, CONFIG.node("redis-1"), SECRETS, Store(NOW), wake=(told.set,), clock=lambda: NOW)

    async def passes() -> None:
        for _ in range(20):  # turns of the loop, more than a pass takes
            await asyncio.sleep(0)

    observing = asyncio.create_task(observer.ask_sentinels())
    listening = asyncio.create_task(observer.events())
    try:
        await passes()
        assert asked == Counter(VOTERS)
        for name, expected in (("+switch-master", [SPEAKER]), ("+selected-slave", VOTERS), ("+sdown", [])):
            asked.clear()
            told.clear()
            events.put_nowait(Event(SPEAKER, name, ""))
            await passes()
            assert (asked, told.is_set()) == (Counter(expected), bool(expected))
    finally:
        for task in (observing, listening):
            task.cancel()
        await asyncio.gather(observing, listening, return_exceptions=True)
