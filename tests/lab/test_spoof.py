"""Whoever has a peer's address and a source port that is exempt gets no answer from redis and sentinel."""

from __future__ import annotations

import json
import sys

import pytest
from support.lab import FAMILIES, Lab

# Run on the node whose address it is: it sends frames below IPsec, and hears an answer in plaintext or in ESP.
SPOOF = """
import asyncio, json, sys
from ipaddress import ip_address
from srd.verify.probes import _answered
from srd.verify.sockets import way_to

async def main(pair):
    way = await way_to(pair)
    wanted = [(840, 849), *((own, port) for own in (22, 849, 840) for port in (6379, 26379))]
    print(json.dumps([(own, port) for own, port in wanted if await _answered(pair, own, port, way)]))

asyncio.run(main(tuple(map(ip_address, sys.argv[1:]))))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peers_address_and_an_exempt_source_port_get_no_answer_from_redis_and_sentinel(lab: Lab, family: int) -> None:
    lab.wait_whole()
    peer, node, *_ = lab.nodes
    addresses = (lab.address(peer, family), lab.address(node, family))
    lab.on(peer, "ping", "-c", "1", addresses[1])  # and so the neighbour is known
    answered = json.loads(lab.on(peer, sys.executable, "-c", SPOOF, *addresses).stdout)
    # The keying port is exempt, and listens on both families: such frames do arrive.
    assert answered == [[840, 849]]
