"""What all other tests of a run left behind: on the wire, and in the kernels' counters."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from support.lab import Lab, no_plaintext, xfrm_errors


@pytest.mark.after_everything
def test_every_error_counter_of_xfrm_is_explained(lab: Lab) -> None:
    """Dropped for want of keys, or refused to outsiders; never a failed integrity check or a lost sequence."""
    explained = {
        "XfrmOutNoStates",  # a policy without keys: at the start
        "XfrmInPolBlock",  # an outsider spoke to redis or sentinel: `Lab.reaches`
        "XfrmOutPolBlock",
        "XfrmInNoStates",  # a peer sent under keys that this node no longer had
    }
    for node in lab.nodes:
        counted = collections.Counter(xfrm_errors(lab, node)) - lab.excused[node]
        print(f"\n{node}: {counted}")  # noqa: T201 - figures for people
        assert not counted.keys() - explained, counted


@pytest.mark.after_everything
def test_no_packet_between_nodes_was_in_plaintext(lab: Lab, wire: Path) -> None:
    """Over bring-up, failovers, deaths, rejoins and a stop: the whole run."""
    del lab
    no_plaintext(wire)
