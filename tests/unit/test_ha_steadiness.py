"""srd/ha/steadiness.py: whether a node's redis can be counted on, by how its processes have ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.ha.steadiness import FAILING_SECONDS, Steadiness

NOW = 1000.0

# Seconds ago: "L" a redis is seen with its data, a new one each time, "l" the same one again, "x" one ends.
Story = tuple[tuple[float, str], ...]


def told(story: Story) -> tuple[Steadiness, list[float]]:
    steadiness, ends, run = Steadiness(), list[float](), 0
    for ago, what in story:
        if what == "x":
            ends.append(NOW - ago)
        else:
            run += what == "L"
            steadiness.loaded(f"run {run}", ends, NOW - ago)
    return steadiness, ends


@pytest.mark.parametrize(
    ("story", "fails"),
    [
        ((), False),
        (((50, "x"),), True),
        (((70, "x"),), False),
        (((50, "x"), (40, "x"), (30, "x"), (20, "L")), False),
        (((50, "x"), (40, "x"), (30, "x"), (20, "L"), (10, "x")), False),
        (((50, "L"), (40, "x")), False),
        (((50, "L"), (40, "x"), (30, "x")), True),
        (((50, "L"), (40, "x"), (30, "x"), (20, "L")), False),
        (((50, "L"), (40, "x"), (35, "L"), (30, "x"), (25, "L"), (20, "x")), True),
        (((50, "L"), (40, "x"), (35, "L"), (30, "x"), (25, "L"), (20, "x"), (15, "L"), (1, "l")), True),
        (((90, "L"), (80, "x"), (35, "L"), (30, "x"), (25, "L"), (20, "x"), (15, "L")), False),
        (((200, "L"), (90, "l"), (50, "x"), (40, "x"), (30, "x"), (20, "L"), (10, "l")), False),
    ],
)
def test_whether_it_is_counted_on(story: Story, *, fails: bool) -> None:
    steadiness, ends = told(story)
    assert steadiness.fails(ends, NOW) is fails


@given(st.lists(st.sampled_from("Llx"), max_size=12))
def test_it_is_again_after_a_while_in_which_none_ends(whats: list[str]) -> None:
    story = tuple((float(len(whats) - place), what) for place, what in enumerate(whats))
    steadiness, ends = told(story)
    assert not steadiness.fails(ends, NOW + FAILING_SECONDS)


@given(st.integers(0, 9))
def test_one_that_has_its_data_and_ended_less_than_three_times_with_it_is_counted_on(vain: int) -> None:
    moments = [10.0 + place for place in range(vain)]
    steadiness = Steadiness()
    steadiness.loaded("first", [], 1.0)
    steadiness.loaded("second", [2.0, *moments], 30.0)
    assert not steadiness.fails([2.0, *moments], 31.0)
