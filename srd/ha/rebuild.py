"""Which sentinels a doctor has rebuilt (ha/repair.py), and whether the srd beside one does so at that moment. Pure.

A sentinel that begins anew has forgotten in which epoch it has voted, and for whom. That does no harm while nobody
stands for election, nor soon after: the next one who does takes a greater epoch than the majority's, and this one hears
of that within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from srd.findings import Cure, Finding, Trouble
from srd.ha.lease import is_doubted
from srd.model import Body
from srd.state import Situation

REBUILD_TOPIC: Final = "rebuild"
# After that, what the asker has looked at is old.
REBUILD_SECONDS: Final = 10.0


def to_rebuild(findings: Sequence[Finding]) -> list[Finding]:
    """Return whose sentinels a repair rebuilds, each once: of those that have one id, all but the first."""
    found = [finding for finding in findings if finding.cure is Cure.REBUILD]
    firsts = {f.subject: f for f in reversed(found) if f.trouble is Trouble.DUPLICATE_ID}
    return list({f.node: f for f in found if f not in firsts.values()}.values())


def against_rebuild(s: Situation, wish: Body, asked: float) -> str | None:
    """Say why this node's sentinel is not to be rebuilt; None when nothing speaks against it. Pure.

    The wish names the `primary`, and the `run_id` that the sentinel had: one that was rebuilt since has another. It was
    `asked` at that moment, by this node's clock.
    """
    primary, own = s.view.named, s.view.sentinels.get(s.node.name)
    if s.now - asked > REBUILD_SECONDS:
        return f"it was asked for more than {REBUILD_SECONDS:g} s ago"
    if primary is None or str(primary) != wish.get("primary"):
        return f"the sentinels name {primary or 'nobody'} here"
    if own is None or own.run_id != wish.get("run_id"):
        return "it is another one by now, or does not answer"
    for answer in s.view.sentinels.values():
        if answer.primary == primary and is_doubted(answer):
            return f"the sentinel of {answer.node} takes the primary for down, or replaces it"
    return None
