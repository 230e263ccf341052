"""IPv6 beside IPv4: neighbours find each other whatever becomes of the keys, and nothing else is in plaintext."""

from __future__ import annotations

from support.lab import Lab, pinging, spis


def test_ipv6_neighbours_that_are_forgotten_are_found_again_under_a_flow_and_rekeys(lab: Lab) -> None:
    lab.wait_whole()
    node, peer, *_ = lab.nodes
    with pinging(node, lab.address(peer, 6), "0.05") as flow:
        for forgetful in (node, peer) * 3:
            lab.on(forgetful, "ip", "-6", "neigh", "flush", "dev", "eth0")
            lab.on(node, "srd", "rekey", peer, "--wait")
    print(f"\n{flow.sent} packets, {flow.lost} lost, while neighbours were forgotten")  # noqa: T201 - a figure for people
    assert flow.lost == 0


def test_keys_come_back_to_a_pair_that_has_neither_keys_nor_neighbours(lab: Lab) -> None:
    lab.wait_whole()
    node, peer, *_ = lab.nodes
    before = spis(lab, node)
    lab.on(node, "ip", "xfrm", "state", "flush")
    for forgetful in (node, peer):
        lab.on(forgetful, "ip", "-6", "neigh", "flush", "dev", "eth0")
    ping = ("ping", "-c", "1", "-W", "1", lab.address(peer, 6))
    lab.wait(lambda: lab.on(node, *ping, check=False).returncode == 0, "the peer answers over IPv6")
    assert not before & spis(lab, node)
    lab.wait_whole()
