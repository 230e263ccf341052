"""Stopped, traced, slow or hung: the judgement on a child that does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import pytest

from srd.state import Symptom
from srd.supervise.pulse import Pulse, Remedy, Silence, read_pulse, remedy

HUNG_AFTER = 30.0


def judged(*looks: tuple[float, Pulse | None]) -> Symptom:
    """Return what the last of some looks says; a spell begins at 0 s."""
    silence = Silence(0.0, hung_after=HUNG_AFTER)
    said = [silence.judge(pulse, moment) for moment, pulse in looks]
    return said[-1]


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([(1, Pulse("S", 5))], Symptom.SLOW),
        ([(1, Pulse("S", 5)), (30, Pulse("S", 5))], Symptom.SLOW),
        ([(1, Pulse("S", 5)), (31, Pulse("S", 5))], Symptom.HUNG),
        ([(1, Pulse("S", 5)), (30, Pulse("S", 6)), (59, Pulse("S", 6))], Symptom.SLOW),
        ([(1, Pulse("S", 5)), (30, Pulse("S", 6)), (60, Pulse("S", 6))], Symptom.HUNG),
        ([(1, Pulse("R", 5)), (99, Pulse("R", 999))], Symptom.SLOW),
        ([(1, Pulse("D", 5)), (99, Pulse("D", 5))], Symptom.SLOW),
        ([(1, Pulse("D", 5)), (99, Pulse("D", 5)), (128, Pulse("S", 5))], Symptom.SLOW),
        ([(1, Pulse("D", 5)), (99, Pulse("D", 5)), (129, Pulse("S", 5))], Symptom.HUNG),
        ([(1, Pulse("T", 5))], Symptom.STOPPED),
        ([(1, Pulse("T", 5)), (99, Pulse("T", 5)), (100, Pulse("S", 5))], Symptom.SLOW),
        ([(1, Pulse("t", 5)), (99, Pulse("t", 5))], Symptom.TRACED),
        ([(1, None), (99, None)], Symptom.SLOW),
    ],
)
def test_what_is_the_matter(looks: Sequence[tuple[float, Pulse | None]], expected: Symptom) -> None:
    assert judged(*looks) is expected


@pytest.mark.parametrize("deposed", [False, True])
@pytest.mark.parametrize("slow_limit", [None, 600.0])
@pytest.mark.parametrize("seconds", [1.0, 599.0, 600.0])
@pytest.mark.parametrize("symptom", list(Symptom))
def test_the_remedy(symptom: Symptom, seconds: float, slow_limit: float | None, deposed: bool) -> None:  # noqa: FBT001 - pytest's way
    expected = {
        Symptom.STOPPED: Remedy.KILL if deposed else Remedy.RESUME,
        Symptom.TRACED: Remedy.WAIT,
        Symptom.HUNG: Remedy.END,
        Symptom.SLOW: Remedy.END if slow_limit is not None and seconds >= slow_limit else Remedy.WAIT,
    }
    assert remedy(symptom, seconds, slow_limit=slow_limit, deposed=deposed) is expected[symptom]


def test_a_process_that_works_has_another_pulse_afterwards_and_one_that_is_gone_has_none() -> None:
    before = read_pulse(os.getpid())
    over = time.process_time() + 0.02
    while time.process_time() < over:
        pass
    after = read_pulse(os.getpid())
    assert before is not None
    assert after is not None
    assert after.ran > before.ran
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert read_pulse(pid) is None
