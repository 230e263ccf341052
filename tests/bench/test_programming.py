"""A thousand peers' policies in a real kernel: against `ip -batch` on the same input, and passes without a change."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address
from statistics import median

from support.namespace import in_namespace

from srd.cluster import Config
from srd.config import parse_config
from srd.desired import rules
from srd.ipsec import xfrm
from srd.ipsec.mesh import Mesh
from srd.ipsec.policies import INDEX_BASE, compile_policy
from srd.state import Store

PEERS = 1000
RUNS = 3


def cluster(peers: int) -> Config:
    nodes = "".join(
        f'[[node]]\nname = "n{number}"\naddresses = ["{ip_address("10.0.0.0") + number}"]\n'
        for number in range(1, peers + 2)
    )
    return parse_config(f'cluster = "big"\n{nodes}', "cluster.toml")


def batch(config: Config) -> Iterator[str]:
    """The same policies, as `ip -batch` takes them."""
    node = config.nodes[0]
    for number, (flow, rule) in enumerate(sorted(rules(config, node).items(), key=lambda item: item[1].rank)):
        policy = compile_policy(flow, rule)
        selector = policy.selector
        line = f"xfrm policy add src {selector.source} dst {selector.destination}"
        if selector.protocol:
            line += f" proto {selector.protocol}"
        for end in ("source", "destination"):
            port = getattr(selector, f"{end}_port")
            if port:
                line += f" {'sport' if end == 'source' else 'dport'} {port}"
        line += f" dir {policy.direction.name.lower()} index {(INDEX_BASE + number) << 3 | policy.direction}"
        line += f" action {'block' if policy.action is xfrm.Action.BLOCK else 'allow'} priority {policy.priority}"
        if policy.mark is not None:
            line += f" mark {policy.mark.value:#x} mask {policy.mark.mask:#x}"
        for template in policy.templates:
            line += f" tmpl proto esp spi {template.spi:#x} reqid {template.reqid} mode transport"
        yield line


def run_batch(lines: list[str]) -> float:
    started = time.monotonic()
    done = subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=False, capture_output=True)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr[:300]
    return took


@in_namespace
async def test_programming_takes_at_most_twice_the_time_of_ip_batch_and_a_pass_a_tenth_of_a_second() -> None:
    config = cluster(PEERS)
    lines = list(batch(config))
    by_ip, by_srd, passes = [], [], []
    async with xfrm.XfrmSocket() as kernel:
        for _ in range(RUNS):
            by_ip.append(run_batch(lines))
            assert len(await kernel.policies()) >= len(set(lines)) - PEERS  # port masks are no words of iproute2's
            subprocess.run(["ip", "xfrm", "policy", "flush"], check=True)  # noqa: ASYNC221 - a namespace of its own
            started = time.monotonic()
            mesh = Mesh(config=config, node=config.nodes[0], socket=kernel, store=Store(0.0), wake=lambda: None)
            await mesh.reconcile()
            by_srd.append(time.monotonic() - started)
            for _ in range(3):
                started = time.monotonic()
                await mesh.reconcile()
                passes.append(time.monotonic() - started)
            subprocess.run(["ip", "xfrm", "policy", "flush"], check=True)  # noqa: ASYNC221 - as above
    ratio = median(by_srd) / median(by_ip)
    print(  # noqa: T201 - figures for people
        f"\n{len(lines)} policies: ip -batch {median(by_ip):.2f} s, srd {median(by_srd):.2f} s, ratio {ratio:.2f}; "
        f"unchanged pass {median(passes) * 1000:.0f} ms"
    )
    assert ratio <= 2
    assert median(passes) <= 0.1
