"""What an agent-check is told of a situation."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.situations import NOW, arbiter_situation, primary_redis, primary_situation, replica_situation, with_child

from srd.model import Service
from srd.state import ChildState, Situation, View
from srd.web.agent import MAX_REASON, UNKNOWN_QUESTION, Answer, Question, Word, answer
from srd.web.health import ErrorCode


@pytest.mark.parametrize(
    ("situation", "primary", "replica"),
    [
        (primary_situation(), b"up ready\n", b"down # wrong_role: the role is primary\n"),
        (replica_situation(), b"down # wrong_role: the role is replica\n", b"up ready\n"),
        (arbiter_situation(), *[b"down # wrong_role: redis-3 runs no redis\n"] * 2),
        (
            replace(primary_situation(), view=View()),
            *[b"down # starting: redis is not started yet\n"] * 2,
        ),
        (
            replace(primary_situation(), now=NOW + 1.5, view=replace(primary_situation().view, lease=None)),
            b"down # starting: no sentinel has been asked yet\n",
            b"down # wrong_role: the role is primary\n",
        ),
        (
            with_child(primary_situation(), Service.STUNNEL, state=ChildState.STOPPING),
            b"down # stunnel_down: stunnel is stopping\n",
            b"down # wrong_role: the role is primary\n",
        ),
    ],
)  # fmt: skip
def test_the_answer_is_the_verdict_of_http(situation: Situation, primary: bytes, replica: bytes) -> None:
    assert [answer(question, situation).line for question in Question] == [primary, replica]


def test_another_reason_is_no_new_answer() -> None:
    stale = primary_situation(redis=primary_redis(answered=NOW - 3))
    answers = [answer(Question.PRIMARY, each) for each in (stale, replace(stale, now=NOW + 1), replica_situation())]
    assert len({each.line for each in answers}) == 3
    assert answers[0] == answers[1] == answers[2] != answer(Question.PRIMARY, primary_situation())


def test_a_drained_server_takes_no_new_clients() -> None:
    assert Answer(Word.DRAIN, reason="by operator").line == b"drain # by operator\n"
    assert UNKNOWN_QUESTION.line == b"down # unknown question\n"


@given(st.sampled_from([Word.DRAIN, Word.DOWN]), st.none() | st.sampled_from(ErrorCode), st.text())
def test_whatever_the_reason_is_it_is_one_short_line(word: Word, code: ErrorCode | None, reason: str) -> None:
    line = Answer(word, code, reason).line
    assert line.endswith(b"\n")
    assert line[:-1].decode("ascii").isprintable()
    assert len(line) <= len(f"{word} # \n") + MAX_REASON
