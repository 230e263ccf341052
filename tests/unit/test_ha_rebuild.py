"""Which sentinels are rebuilt, and what speaks against it on the node itself. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.situations import NOW, at, primary_situation

from srd.findings import Cure, Finding, Trouble
from srd.ha.rebuild import REBUILD_SECONDS, against_rebuild, to_rebuild
from srd.model import Body
from srd.state import Situation, View

OWN_ID = "a" * 40


def situation(**flags: str) -> Situation:
    """redis-1, whose sentinel has an id; `flags` are what the sentinel of a node shows of the primary."""
    whole = primary_situation()
    sentinels = {
        name: replace(
            answer, run_id=OWN_ID if name == "redis-1" else name, flags=frozenset(flags.get(name[-1:], "").split())
        )
        for name, answer in whole.view.sentinels.items()
    }
    return replace(whole, view=replace(whole.view, sentinels=sentinels))


@pytest.mark.parametrize(
    ("s", "wish", "asked", "why"),
    [
        (situation(), {"primary": str(at(1)), "run_id": OWN_ID}, NOW, None),
        (situation(), {"primary": str(at(2)), "run_id": OWN_ID}, NOW, "the sentinels name 192.168.205.10:6379 here"),
        (situation(), {"primary": str(at(1)), "run_id": "b" * 40}, NOW, "another one by now"),
        (situation(), {}, NOW, "the sentinels name"),
        (situation(), {"primary": str(at(1)), "run_id": OWN_ID}, NOW - REBUILD_SECONDS - 1, "more than 10 s ago"),
        (situation(**{"2": "s_down"}), {"primary": str(at(1)), "run_id": OWN_ID}, NOW, "redis-2 takes the primary"),
        (situation(**{"3": "failover_in_progress"}), {"primary": str(at(1)), "run_id": OWN_ID}, NOW, "redis-3 takes"),
        (
            replace(situation(), view=View()),
            {"primary": str(at(1)), "run_id": OWN_ID},
            NOW,
            "the sentinels name nobody",
        ),
    ],
)
def test_a_sentinel_is_rebuilt_only_while_what_the_doctor_saw_is_so(
    s: Situation, wish: Body, asked: float, why: str | None
) -> None:
    found = against_rebuild(s, wish, asked)
    assert found is None if why is None else why in (found or "")


def finding(trouble: Trouble, node: str, subject: str, cure: Cure = Cure.REBUILD) -> Finding:
    return Finding(trouble, node, subject, "", cure)


def test_of_those_with_one_id_the_first_keeps_it_and_nobody_is_rebuilt_twice() -> None:
    found = [
        finding(Trouble.DUPLICATE_ID, "n1", "id"),
        finding(Trouble.DUPLICATE_ID, "n2", "id"),
        finding(Trouble.DUPLICATE_ID, "n3", "id"),
        finding(Trouble.OTHER_PRIMARY, "n3", "10.0.0.9:6379"),
        finding(Trouble.EPOCH_TIE, "n4", "10.0.0.8:6379"),
        finding(Trouble.SETTING, "n5", "quorum", Cure.SET),
    ]
    assert [each.node for each in to_rebuild(found)] == ["n2", "n3", "n4"]
