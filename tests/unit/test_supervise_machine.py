from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.reconcile import BACKOFF_CAP_SECONDS, BACKOFF_JITTER
from srd.state import ChildState
from srd.supervise.machine import RUNNING, TABLE, Action, Event, failures_after, restart_pause, transition

S, E, A = ChildState, Event, Action

EXPECTED = {
    S.STOPPED: {E.START: (S.STARTING, [A.SPAWN]), E.ADOPT: (S.STARTING, [])},
    S.STARTING: {
        E.REFUSED: (S.BACKOFF, [A.PAUSE]),
        E.ANSWERED: (S.READY, []),
        E.SILENT: (S.DEGRADED, []),
        E.STOP: (S.STOPPING, [A.TERMINATE]),
        E.EXITED: (S.BACKOFF, [A.PAUSE]),
    },
    S.READY: {
        E.SILENT: (S.DEGRADED, []),
        E.STOP: (S.STOPPING, [A.TERMINATE]),
        E.EXITED: (S.BACKOFF, [A.PAUSE]),
    },
    S.DEGRADED: {
        E.ANSWERED: (S.READY, []),
        E.HUNG: (S.DEGRADED, [A.TERMINATE]),
        E.GRACE_OVER: (S.DEGRADED, [A.KILL]),
        E.STOP: (S.STOPPING, [A.TERMINATE]),
        E.EXITED: (S.BACKOFF, [A.PAUSE]),
    },
    S.STOPPING: {
        E.REFUSED: (S.STOPPED, []),
        E.GRACE_OVER: (S.STOPPING, [A.KILL]),
        E.EXITED: (S.STOPPED, []),
    },
    S.BACKOFF: {E.STOP: (S.STOPPED, [A.END_PAUSE]), E.PAUSE_OVER: (S.STOPPED, [])},
}


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("state", list(ChildState))
def test_every_event_in_every_state(state: ChildState, event: Event) -> None:
    expected_state, expected_actions = EXPECTED[state].get(event, (state, []))
    assert transition(state, event) == (expected_state, tuple(expected_actions))


def test_the_table_has_no_entry_that_is_not_expected() -> None:
    assert {(state, event) for state, row in EXPECTED.items() for event in row} == set(TABLE)


def possible(event: Event, state: ChildState, *, alive: bool) -> bool:
    """What the world can do: it ends no process that is not there, and finds none beside srd's own."""
    if event is Event.EXITED:
        return alive
    if event is Event.REFUSED:
        return alive and state in (ChildState.STARTING, ChildState.STOPPING)
    return not (event is Event.ADOPT and alive)


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_a_walk_of_any_events_never_makes_two_processes_nor_signals_none(events: list[Event]) -> None:
    state, alive, pausing = ChildState.STOPPED, False, False
    for event in events:
        if not possible(event, state, alive=alive):
            continue
        before = state
        state, actions = transition(state, event)
        if Action.SPAWN in actions:
            assert not alive
            assert not pausing
        if Action.TERMINATE in actions or Action.KILL in actions:
            assert alive
            assert state in (ChildState.STOPPING, ChildState.DEGRADED)
        adopted = event is Event.ADOPT and state is not before
        alive = (alive or adopted or Action.SPAWN in actions) and event not in (Event.EXITED, Event.REFUSED)
        pausing = Action.PAUSE in actions or (
            pausing and Action.END_PAUSE not in actions and not (state is not before and event is Event.PAUSE_OVER)
        )
        assert alive == (state in RUNNING or state is ChildState.STOPPING)
        assert pausing == (state is ChildState.BACKOFF)


def test_from_every_state_a_stop_leads_to_stopped() -> None:
    for state in ChildState:
        after = transition(state, Event.STOP)[0]
        if after is ChildState.STOPPING:
            assert Action.KILL in transition(after, Event.GRACE_OVER)[1]
            after = transition(after, Event.EXITED)[0]
        assert after is ChildState.STOPPED


@pytest.mark.parametrize(
    ("failures", "ready_seconds", "expected"),
    [(0, None, 1), (3, None, 4), (3, 0.0, 4), (3, 59.9, 4), (3, 60.0, 1), (0, 3600.0, 1)],
)
def test_a_minute_of_health_forgives_what_was(failures: int, ready_seconds: float | None, expected: int) -> None:
    assert failures_after(failures, ready_seconds) == expected


def test_the_first_restart_is_immediate_and_then_pauses_double_up_to_the_cap() -> None:
    pauses = [restart_pause(failures, 0.0) for failures in range(1, 14)]
    assert pauses[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == BACKOFF_CAP_SECONDS
    assert restart_pause(13, 1.0) == BACKOFF_CAP_SECONDS * (1 + BACKOFF_JITTER)
