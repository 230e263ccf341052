"""ESP in UDP on real nodes, over a wire that drops IP protocol 50."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.lab import Lab, edited, pinging, xfrm

# The bridge between the stations, which is in the root namespace.
DROP_ESP = """table bridge wire {
  chain forward { type filter hook forward priority 0;
    meta protocol ip ip protocol esp counter drop
    meta protocol ip6 ip6 nexthdr esp counter drop
    udp sport 4500 udp dport 4500 counter
  }
}
"""


@contextlib.contextmanager
def no_protocol_50() -> Iterator[None]:
    """Drop ESP on the wire meanwhile."""
    subprocess.run(["nft", "-f", "-"], input=DROP_ESP, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "bridge", "wire"], check=True)


def counted() -> tuple[int, int]:
    """How many packets of ESP were dropped on the wire, and how many of ESP in UDP passed."""
    said = subprocess.run(["nft", "list", "table", "bridge", "wire"], check=True, capture_output=True, text=True).stdout
    esp4, esp6, udp = (int(number) for number in re.findall(r"counter packets (\d+)", said))
    return esp4 + esp6, udp


def in_udp(lab: Lab, node: str) -> bool:
    """Whether all SAs of a node are those of ESP in UDP."""
    said = xfrm(lab, node, "state")
    return said.count("proto esp") == said.count("encap type espinudp sport 4500 dport 4500") > 0


def test_esp_in_udp_is_taken_up_live_passes_where_esp_does_not_and_outlives_srd(lab: Lab) -> None:
    lab.wait_whole()
    node, peer, *_ = (other for other in lab.nodes if other != lab.primary())
    whole = Path(f"/var/lab/{node}/etc/srd/cluster.toml").read_text()
    with pinging(node, peer, "0.05") as changing:
        edited(lab, lab.nodes, f'{whole}\n[ipsec]\nencap = "udp"\n')
        lab.wait(lambda: all(in_udp(lab, other) for other in lab.nodes), "every SA is in UDP")
    assert changing.lost == 0
    lab.wait_whole()
    with no_protocol_50():
        with pinging(node, peer, "0.05") as flow:
            lab.on("client", "redis-cli", "set", "sent", "in UDP")
            os.kill(lab.srd_pid(node), signal.SIGKILL)
            lab.wait(lambda: not Path(f"/proc/{lab.srd_pid(node)}").exists(), "srd has ended")
            lab.start_srd(node)
            lab.wait_whole()
        dropped, passed = counted()
    print(f"\n{passed} packets of ESP in UDP, {flow.sent} pings, {flow.lost} lost")  # noqa: T201 - figures for people
    assert (flow.lost, dropped) == (0, 0)
    assert passed > flow.sent
    with pinging(node, peer, "0.05") as changing:
        edited(lab, lab.nodes, whole)
        lab.wait(lambda: not any("espinudp" in xfrm(lab, other, "state") for other in lab.nodes), "no SA is in UDP")
    assert changing.lost == 0
    lab.wait(lambda: not any("sport 4500" in xfrm(lab, other, "policy") for other in lab.nodes), "no policy is for UDP")
    lab.wait_whole()
