"""`srd verify` on real nodes: what it proves when all is well, and what it says of a peer that lets plaintext in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from support.lab import FAMILIES, Lab


def verify(lab: Lab, node: str, *options: str) -> tuple[int, dict[str, Any]]:
    done = lab.on(node, "srd", "verify", "-o", "json", *options, check=False)
    return done.returncode, json.loads(done.stdout)


def until(lab: Lab, status: int, node: str, *options: str) -> dict[str, Any]:
    """Verify until it says so: on a CPU that others use too, an echo may be late."""
    found: list[dict[str, Any]] = []

    def said() -> bool:
        answer, document = verify(lab, node, *options)
        found.append(document)
        return answer == status

    lab.wait(said, f"srd verify exits with {status}")
    return found[-1]


def test_every_link_is_proven_and_nothing_is_on_the_wire_but_esp(lab: Lab) -> None:
    lab.wait_whole()
    node = lab.nodes[0]
    found = until(lab, 0, node, "--wire", "5")
    assert {proof["peer"] for proof in found["proofs"]} == {*lab.nodes} - {node}
    for proof in found["proofs"]:
        assert proof["plaintext"] == "refused"
        assert proof["sent"] == proof["answered"] > 0
        assert proof["carried_out"] >= proof["sent"]
        assert proof["carried_in"] >= proof["answered"]
    assert {proof["remote"] for proof in found["proofs"]} == {
        lab.address(peer, family) for peer in lab.nodes if peer != node for family in FAMILIES
    }
    assert (found["wire"]["plaintext"], found["wire"]["lost"]) == (0, 0)
    assert found["wire"]["exempt"] > 0, "it sees the keying channel's heartbeats"
    said = lab.on(node, "srd", "verify", check=False).stdout
    assert said.count(" refused") == len(found["proofs"])


@contextlib.contextmanager
def open_to_plaintext(lab: Lab, peer: str, node: str) -> Iterator[None]:
    """Open both nets of a peer for TCP from a node meanwhile: a policy that wins, and no rules.

    srd puts the rules back within 30 s, so whoever relies on that they are gone flushes them (`flush`) again.
    """
    selector = ("src", f"{lab.address(node)}/32", "dst", f"{lab.address(peer)}/32", "proto", "tcp")
    # Without the second net the policies drop what comes in plaintext, and count it.
    with lab.excusing(peer):
        lab.on(peer, "ip", "xfrm", "policy", "add", *selector, "dir", "in", "priority", "10", "action", "allow")
        try:
            yield
        finally:
            lab.on(peer, "ip", "xfrm", "policy", "delete", *selector, "dir", "in")
            back = "SRD-IN-PEER"
            lab.wait(lambda: back in lab.on(peer, "iptables-legacy", "-S", "SRD-IN").stdout, "the rules are back")


def flush(lab: Lab, peer: str) -> None:
    lab.on(peer, "iptables-legacy", "-F", "SRD-IN")


def test_a_peer_that_lets_plaintext_in_is_found_out_from_outside(lab: Lab) -> None:
    lab.wait_whole()
    peer = next(node for node in lab.nodes if node != lab.primary())
    node = next(other for other in lab.nodes if other != peer)
    with open_to_plaintext(lab, peer, node):
        for _ in range(5):
            flush(lab, peer)
            status, found = verify(lab, node)
            if status == 22:
                break
    assert status == 22, found
    assert [p["remote"] for p in found["proofs"] if p["plaintext"] == "answered"] == [lab.address(peer)]
    lab.wait_whole()
    until(lab, 0, node)
