"""Machines that lose their power, are switched off or rebooted in order, or come up without srd.

How many lose their power, one after the other, is said by LAB_POWER_CUTS.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.lab import PATIENCE_SECONDS
from support.machines import SERVICES, Machines, writing

CUTS = int(os.environ.get("LAB_POWER_CUTS", "1"))
CUT_SECONDS = 120  # with what follows it


def others_serve(lab: Machines, node: str) -> bool:
    primaries = lab.primaries()
    return len(primaries) == 1 and node not in primaries


def replica(lab: Machines) -> str:
    return next(node for node in reversed(lab.nodes) if node != lab.primary())


def ended(lab: Machines, node: str) -> dict[str, str]:
    """Return how each child ended before this boot, in the order of their ends."""
    lines = [line for line in lab.journal(node, "--boot=-1") if line["event"] == "child ended"]
    return {line["service"]: line["how"] for line in lines[-len(SERVICES) :]}


@pytest.mark.timeout(300 + CUTS * CUT_SECONDS)
def test_a_machine_loses_its_power_and_boots_and_no_confirmed_write_is_lost(lab: Machines) -> None:
    lab.wait_whole()
    figures = []
    first = lab.nodes.index(lab.primary())
    with writing() as (client, written):
        for number in range(CUTS):
            node = lab.nodes[(first + number) % len(lab.nodes)]
            role, boot = "primary" if lab.primary() == node else "replica", lab.boots(node)
            lab.power("cut", node)
            began = time.monotonic()
            before = client.ask("count")
            lab.wait(lambda node=node: others_serve(lab, node), "the others have a primary")
            lab.wait(lambda before=before: client.ask("count") > before, "writes are confirmed without it")
            served = time.monotonic() - began
            lab.power("on", node)
            up = time.monotonic()
            assert lab.boots(node) != boot
            lab.wait_whole()
            figures.append(
                f"{node}, {role}: confirmed writes {served:.1f} s after the cut, "
                f"whole {time.monotonic() - up:.1f} s after it answered again"
            )
        missing = client.ask("missing")
    print("", *figures, f"{written.figures}, missing {len(missing)}", sep="\n")  # noqa: T201 - figures for people
    assert missing == []
    assert written.acknowledged > 50 * CUTS


def keep_a_disk_busy(lab: Machines, node: str) -> None:
    """Have a program write a file of its own to the disk again and again: how long redis' file is goes there with it.

    What redis wrote since its own fsync does not, so after a power cut that file ends in zeros.
    """
    again = "while :; do echo >>/var/lib/busy; sync /var/lib/busy; sleep 0.05; done"
    lab.on(node, "systemd-run", "--quiet", "sh", "-c", again)


@pytest.mark.timeout(600)
def test_all_machines_lose_their_power_at_once_and_no_write_that_a_disk_has_is_lost(lab: Machines) -> None:
    """What a replica had on its disk is in the copy that is kept before it follows: all of that, the primary has."""
    lab.wait_whole()
    with writing() as (client, written), ThreadPoolExecutor() as at_once:
        lab.wait(lambda: client.ask("count") > 100, "writes are confirmed")
        list(at_once.map(lambda node: keep_a_disk_busy(lab, node), lab.nodes))
        before = client.ask("count")
        lab.wait(lambda: client.ask("count") > before + 100, "writes are confirmed meanwhile")
        list(at_once.map(lambda node: lab.power("cut", node), lab.nodes))
        list(at_once.map(lambda node: lab.power("on", node), lab.nodes))
        up = time.monotonic()
        lab.wait_whole()
        whole = time.monotonic() - up
        missing = client.ask("missing")
    leader = lab.primary()
    has = set(lab.on(leader, "redis-cli", "--scan", "--pattern", "confirmed:*").stdout.split())
    kept = {node: kept_keys(lab, node) for node in lab.nodes}
    told = [line for node in lab.nodes for line in lab.journal(node, "--boot")]
    zeros = [line["bytes"] for line in told if line["event"].startswith("cut zeros off")]
    compared = [line for line in told if line["event"] == "compared"]
    figures = f"{leader} leads, whole after {whole:.1f} s, zeros {zeros}, {written.figures}, missing {len(missing)}"
    print("", figures, *compared, sep="\n")  # noqa: T201 - figures for people
    assert zeros
    assert {node: keys - has for node, keys in kept.items() if keys - has} == {}
    assert any(kept.values())


def kept_keys(lab: Machines, node: str) -> set[str]:
    """Return the keys of the writing client that stand in the copies of a node's append-only files."""
    logs = "/var/lib/srd/redis/kept/*/appendonlydir/*.incr.aof"
    said = lab.on(node, "sh", "-c", f"cat {logs} | grep -a -o 'confirmed:[0-9]*:[0-9]*' | sort -u", check=False).stdout
    return set(said.split())


def test_a_machine_that_is_off_comes_up_closed_and_stays_closed_without_srd(lab: Machines) -> None:
    lab.wait_whole()
    node, peer = replica(lab), lab.primary()
    assert lab.reaches(node, peer, 6379)
    lab.on(node, "systemctl", "disable", "srd")
    lab.on(node, "systemctl", "poweroff", check=False)
    lab.wait_off(node)
    lab.power("on", node)
    lab.wait(lambda: lab.booted(node), "it is up, without srd")
    assert lab.show(node, "ActiveState") == ("inactive",)
    closed = lab.moment(node, "srd-failclosed", "ActiveEnter")
    assert 0 < closed < lab.moment(node, "network", "InactiveExit"), "closed before it has an address"
    assert lab.on(node, "ping", "-c", "3", "-W", "1", lab.address(peer), check=False).returncode != 0
    assert not lab.reaches(node, peer, 6379)
    assert lab.on(node, "ping", "-c", "1", lab.address("client")).returncode == 0, "whoever is no node is reached"
    assert ended(lab, node) == dict.fromkeys(SERVICES, "exit status 0")

    lab.on(node, "systemctl", "enable", "--now", "--no-block", "srd")
    lab.wait_whole()
    assert lab.reaches(node, peer, 6379)


def test_a_primary_that_is_rebooted_ends_its_children_in_order_and_joins_by_itself(lab: Machines) -> None:
    lab.wait_whole()
    node = lab.primary()
    boot, redis = lab.boots(node), f"{lab.pids(node)['redis']}:"
    with writing() as (client, written):
        lab.on(node, "systemctl", "reboot", check=False)
        lab.wait(lambda: answer(lab, node) not in ("", boot), "it has booted again", 2 * PATIENCE_SECONDS)
        lab.wait_whole()
        missing = client.ask("missing")
    assert list((last := ended(lab, node)).items())[-1] == ("redis", "exit status 0"), last
    assert last == dict.fromkeys(SERVICES, "exit status 0")
    log = [line for line in lab.on(node, "cat", "/var/log/srd/redis.log").stdout.splitlines() if line.startswith(redis)]
    assert any("DB saved on disk" in line for line in log[-5:]), log[-10:]
    print(f"\n{written.figures}, missing {len(missing)}")  # noqa: T201 - figures for people
    assert missing == []


def answer(lab: Machines, node: str) -> str:
    return lab.on(node, "cat", "/proc/sys/kernel/random/boot_id", check=False).stdout.strip()
