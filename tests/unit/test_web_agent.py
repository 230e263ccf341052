"""What an agent-check is told of a situation."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.situations import NOW, arbiter_situation, primary_redis, primary_situation, replica_situation, with_child

from srd.model import Service
from srd.state import ChildState, Lease, Situation, View
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


def test_a_drained_node_keeps_the_clients_that_it_has_and_takes_no_new_ones() -> None:
    kept = b"drain # drained: redis-1 is drained: it takes nobody new\n"
    primary, replica = primary_situation(drained=True), replica_situation(drained=True)
    assert answer(Question.PRIMARY, primary).line == answer(Question.REPLICA, replica).line == kept
    assert answer(Question.PRIMARY, replica).line == b"down # wrong_role: the role is replica\n"
    assert answer(Question.REPLICA, primary).line == b"down # wrong_role: the role is primary\n"


def test_a_primary_that_hands_over_keeps_its_clients_until_its_redis_is_a_replica() -> None:
    lease = Lease(held=False, expires=0.0, agree=3, reachable=3, primary=None, heir="redis-2")
    handing = primary_situation(lease=lease)
    assert answer(Question.PRIMARY, handing).line == b"drain # handed_over: the lease was handed over to redis-2\n"
    assert answer(Question.PRIMARY, replica_situation(lease=lease)).word is Word.DOWN
    dead = with_child(handing, Service.REDIS, state=ChildState.BACKOFF)
    assert answer(Question.PRIMARY, dead).word is Word.DOWN


def test_a_drained_node_that_could_serve_nobody_is_down() -> None:
    broken = with_child(replica_situation(drained=True), Service.STUNNEL, state=ChildState.STOPPING)
    assert answer(Question.REPLICA, broken).line == b"down # stunnel_down: stunnel is stopping\n"


def test_what_nobody_asks_for_is_down() -> None:
    assert UNKNOWN_QUESTION.line == b"down # unknown question\n"


@given(st.sampled_from([Word.DRAIN, Word.DOWN]), st.none() | st.sampled_from(ErrorCode), st.text())
def test_whatever_the_reason_is_it_is_one_short_line(word: Word, code: ErrorCode | None, reason: str) -> None:
    line = Answer(word, code, reason).line
    assert line.endswith(b"\n")
    assert line[:-1].decode("ascii").isprintable()
    assert len(line) <= len(f"{word} # \n") + MAX_REASON
