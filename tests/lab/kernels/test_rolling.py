"""Every srd of a cluster of machines is started anew, one after another, and neither a client nor a child notices."""

from __future__ import annotations

import re

import pytest
from support.machines import Machines, writing

ROLL_SECONDS = 300.0  # a start of srd takes 8 s here


@pytest.mark.timeout(900)
def test_srd_is_started_anew_on_every_node_and_nobody_notices(lab: Machines) -> None:
    lab.wait_whole()
    primary = lab.primary()
    children = {node: lab.pids(node) for node in lab.nodes}
    daemons = {node: lab.show(node, "MainPID") for node in lab.nodes}
    with writing() as (client, written):
        said = lab.on(lab.nodes[0], "srd", "rolling", "restart", "--only", "srd", seconds=ROLL_SECONDS).stdout
        missing = client.ask("missing")
    assert re.findall(r"^(\S+): srd is back after ", said, re.MULTILINE) == [
        *(node for node in lab.nodes if node != primary),
        primary,
    ]
    assert all(lab.show(node, "MainPID") != daemons[node] for node in lab.nodes)
    assert {node: lab.pids(node) for node in lab.nodes} == children
    assert lab.primary() == primary, "its redis runs on, so it need not move away"
    print(f"\n{said}{written.figures}")  # noqa: T201 - for people
    assert written.failed == 0, written.figures
    assert missing == []
    lab.wait_whole()
