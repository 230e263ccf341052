"""Paths that are worse than the lab's bridge: a link for smaller packets on the way, and delay while keys change.

The number of rekeys is that of LAB_REKEYS.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import pytest
from support.lab import FAMILIES, Lab, rekey, xfrm_errors
from support.routing import Router, routed
from support.traffic import Datagrams, Way, queueing, streaming

HOP_MTU = 1400
TRANSFER_BYTES = 4 << 20
REKEYS = int(os.environ.get("LAB_REKEYS", "10"))
RATE = 2000
DELAY_MILLISECONDS = 5
LEAST_RATE = 2 * 1000 / DELAY_MILLISECONDS  # on a machine that has other work; so two are on their way at any instant


def transfer(lab: Lab, way: Way) -> int:
    """Have a transfer be completed; return what TCP then takes for the MTU of the path, within ESP."""
    with streaming(way) as stream:
        lab.wait(lambda: stream.received >= TRANSFER_BYTES, f"{way} has carried it all")
        return stream.path_mtu()


def judge(lab: Lab, router: Router, ends: Mapping[str, str]) -> None:
    """Transfer either way, and see that the router forwarded ESP alone and that its ICMP was heeded."""
    (left, left_address), (right, right_address) = ends.items()
    for way in (Way(left, right, right_address), Way(right, left, left_address)):
        mtu = transfer(lab, way)
        print(f"\n{way.source} to {way.target}, {router.too_big()} times too big, MTU {mtu} within ESP")  # noqa: T201
        assert f"mtu {HOP_MTU}" in lab.on(way.source, "ip", "route", "get", way.address).stdout
        assert mtu < HOP_MTU
    assert router.too_big() >= len(ends)
    esp, others = router.forwarded()
    assert esp > 2 * TRANSFER_BYTES / HOP_MTU
    assert others == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hop_with_a_smaller_mtu_between_two_nodes_does_not_stall_tcp(lab: Lab, family: int) -> None:
    lab.wait_whole()
    ends = {node: lab.address(node, family) for node in lab.nodes[:2]}
    with routed(ends, HOP_MTU) as router:
        judge(lab, router, ends)
    for node, far in zip(ends, reversed(ends.values()), strict=True):
        assert " via " not in lab.on(node, "ip", "route", "get", far).stdout
    lab.wait_whole()


@pytest.mark.timeout(300 + 3 * REKEYS)
def test_rekeys_under_two_thousand_packets_a_second_and_delay_lose_none(lab: Lab) -> None:
    """Half of them while the leader sends, half while the other end does."""
    lab.wait_whole()
    leader, peer = lab.nodes[0], lab.nodes[1]
    before = {name: xfrm_errors(lab, name) for name in (leader, peer)}
    with queueing((f"w-{leader}", f"w-{peer}"), "netem", "delay", f"{DELAY_MILLISECONDS}ms", "limit", "10000"):
        for way in (Way(leader, peer, lab.address(peer)), Way(peer, leader, lab.address(leader))):
            flow = Datagrams(way, RATE)
            started = time.monotonic()
            with flow.flowing():
                for _ in range(REKEYS // 2):
                    rekey(leader, peer)
            print(  # noqa: T201 - figures for people
                f"\n{REKEYS // 2} rekeys in {time.monotonic() - started:.0f} s, {flow.sent} packets from {way.source} "
                f"at {flow.rate_reached:.0f}/s, {flow.lost} lost"
            )
            assert flow.lost == 0
            assert flow.rate_reached > LEAST_RATE
    assert {name: xfrm_errors(lab, name) for name in (leader, peer)} == before
