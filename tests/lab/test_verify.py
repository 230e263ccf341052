"""`srd verify` on real nodes: what it proves when all is well, and what it says of a peer that lets plaintext in."""

from __future__ import annotations

import collections
import json
from typing import Any

from support.lab import FAMILIES, Lab, xfrm_errors


def verify(lab: Lab, node: str, *options: str) -> tuple[int, dict[str, Any]]:
    done = lab.on(node, "srd", "verify", "-o", "json", *options, check=False)
    return done.returncode, json.loads(done.stdout)


def test_every_link_is_proven_and_nothing_is_on_the_wire_but_esp(lab: Lab) -> None:
    lab.wait_whole()
    node = lab.nodes[0]
    status, found = verify(lab, node, "--wire", "5")
    assert status == 0, found
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
    said = lab.on(node, "srd", "verify").stdout
    assert said.count("proven") == len(found["proofs"])
    assert said.count("refused") == len(found["proofs"])


def test_a_peer_that_lets_plaintext_in_is_found_out_from_outside(lab: Lab) -> None:
    lab.wait_whole()
    peer = next(node for node in lab.nodes if node != lab.primary())
    node = next(other for other in lab.nodes if other != peer)
    # Both nets of the peer are opened: a policy that wins, and no rules.
    selector = ("src", f"{lab.address(node)}/32", "dst", f"{lab.address(peer)}/32", "proto", "tcp")
    lab.on(peer, "ip", "xfrm", "policy", "add", *selector, "dir", "in", "priority", "10", "action", "allow")
    before = collections.Counter(xfrm_errors(lab, peer))
    try:
        for _ in range(3):  # srd may put the second net back in between, which it looks at every 30 s
            lab.on(peer, "iptables-legacy", "-F", "SRD-IN")
            status, found = verify(lab, node)
            if status:
                break
    finally:
        lab.on(peer, "ip", "xfrm", "policy", "delete", *selector, "dir", "in")
    assert status == 22, found
    assert [p["remote"] for p in found["proofs"] if p["plaintext"] == "answered"] == [lab.address(peer)]
    lab.wait_whole()
    lab.wait(lambda: "SRD-IN-PEER" in lab.on(peer, "iptables-legacy", "-S", "SRD-IN").stdout, "the second net is back")
    # Without the second net the policies drop the probes, and count them.
    lab.excused[peer].update(collections.Counter(xfrm_errors(lab, peer)) - before)
    assert verify(lab, node)[0] == 0
