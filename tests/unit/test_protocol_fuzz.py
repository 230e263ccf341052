"""Whatever a peer with a valid certificate says: it is refused or it is a step, and nothing of it is believed twice."""

from __future__ import annotations

import os
import random
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.test_protocol import ALL, GRADES, ONE, TWO, exporter, terms

from srd.ipsec.protocol import (
    PROTOCOL,
    Action,
    Beat,
    Commit,
    Committed,
    Done,
    End,
    Follower,
    Hello,
    Install,
    KeyingError,
    Leader,
    Pin,
    Prepare,
    Prepared,
    Retire,
    Say,
    understood,
)
from srd.model import SrdError, Suite

# More by SRD_FUZZ=100000.
EXAMPLES: Final = int(os.environ.get("SRD_FUZZ", "500"))
KINDS: Final = (Hello, Prepare, Prepared, Commit, Committed, Done, Beat)

numbers = st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**64 - 1))
words = st.one_of(st.sampled_from([suite.value for suite in Suite]), st.text(max_size=40))
spis = st.lists(st.one_of(st.integers(0, 2**32), st.integers(0x1000, 0x2000)), max_size=4)
values = st.one_of(numbers, words, spis, st.booleans(), st.none(), st.dictionaries(words, numbers, max_size=3))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Bytes of any kind, and messages that are wrong in any field, or cut short, or have one too many."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    kind = draw(st.sampled_from(KINDS))
    wanted = next(message for message in ALL if type(message) is kind)
    fields = [getattr(wanted, name) for name in wanted.__struct_fields__]
    for _ in range(draw(st.integers(0, 2))):
        fields[draw(st.integers(0, len(fields) - 1))] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        fields = fields[: draw(st.integers(0, len(fields)))] + draw(st.lists(values, max_size=1))
    encoded = msgspec.msgpack.encode([kind.__name__, *fields])
    return encoded[: draw(st.integers(0, len(encoded)))] if draw(st.integers(0, 9)) == 0 else encoded


def heard(end: End, body: bytes) -> list[Action] | None:
    """Hear a body as the channel hands it on; None when it was refused."""
    if end.expects is None:
        return None
    try:
        return list(end.hear(understood(body, end.expects, "a peer")))
    except SrdError:
        return None


def test_a_text_that_is_not_utf_8_is_refused_as_anything_else_is() -> None:
    for body in (b"\x96\xa3\x00\x00\x80", b"\x96\xa5Hello\x01\xa1\x80\x00\x80\x90"):
        with pytest.raises(KeyingError, match="does not belong here"):
            understood(body, Hello, "a peer")


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([Leader, Follower]), st.lists(bodies(), max_size=6), st.integers(0, 2**32))
def test_nonsense_is_refused_and_leads_to_no_step_out_of_order(kind: type[End], said: list[bytes], seed: int) -> None:
    rng = random.Random(seed)
    end = kind(terms(ONE, TWO, rng) if kind is Leader else terms(TWO, ONE, rng), exporter(b"secret"))
    end.start()
    done: list[type] = []
    for body in said:
        counted = end.counted
        actions = heard(end, body)
        if actions is None:
            assert end.counted >= counted
            break
        for action in actions:
            end.begin(action)
            done.append(type(action))
    # Keys are pinned only after they were installed, and given up only after they were pinned.
    for later, earlier in ((Pin, Install), (Retire, Pin)):
        if later in done:
            assert earlier in done[: done.index(later)]
    assert done.count(Install) <= 1
    leftover = end.lost()
    assert not leftover or (Install in done and Pin not in done)
    if kind is Follower and Say in done:
        assert leftover == [], "the leader was told that it may send"


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.dictionaries(words, numbers, max_size=4))
def test_no_grades_make_a_peer_choose_what_it_does_not_have(grades: dict[str, int]) -> None:
    end = Follower(terms(TWO, ONE, random.Random(1)), exporter(b""))
    body = msgspec.msgpack.encode(["Hello", PROTOCOL, "boot", 0, grades, []])
    if heard(end, body) is not None:
        assert end._suite in GRADES
        assert end._suite in grades
