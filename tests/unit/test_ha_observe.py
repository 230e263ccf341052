"""Which sentinels are asked again at an event."""

from __future__ import annotations

import pytest

from srd.ha.observe import retold
from srd.ha.sentinel import SUBSCRIBED, Event

VOTERS = ("n1", "n2", "n3")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        pytest.param("+switch-master", ["n2"], id="it names another one"),
        pytest.param("-odown", ["n2"], id="it is content again"),
        pytest.param("-tilt", ["n2"], id="it counts again"),
        pytest.param(SUBSCRIBED, ["n2"], id="words of it were missed"),
        pytest.param("+selected-slave", ["n1", "n2", "n3"], id="the others have voted for it"),
        pytest.param("+promoted-slave", ["n1", "n2", "n3"], id="whom they have voted for has promoted its choice"),
        pytest.param("+sdown", [], id="a doubt is heard by the next question"),
        pytest.param("+slave", [], id="how many it lists may be a second old"),
    ],
)
def test_whoever_may_answer_otherwise_by_now_is_asked_again(name: str, asked: list[str]) -> None:
    assert retold(Event("n2", name, ""), VOTERS) == asked


def test_one_that_is_no_voter_any_more_is_not_asked() -> None:
    assert retold(Event("n4", "+switch-master", ""), VOTERS) == []
