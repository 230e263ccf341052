"""What ought to run, by what there is: policies, keys with a majority, redis, sentinel, stunnel."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.situations import WALL, arbiter_situation, primary_situation

from srd.config import parse_config
from srd.desired import Start, Wanted, differences, needs_restart, services, voters_changed
from srd.model import Pause, Service
from srd.state import Child, ChildState, Kernel, Situation

RUN = Wanted(run=True)
PAUSE = Pause(1, WALL + 60)
STOPPED = {service: Child(ChildState.STOPPED) for service in Service}


def at_rest(**changes: object) -> Situation:
    """Return a whole node whose children do not run yet."""
    whole = primary_situation()
    return replace(whole, view=replace(whole.view, children=STOPPED, initialized=False, **changes))


def test_redis_comes_first_and_the_others_wait_for_it() -> None:
    wanted = services(at_rest(), Start())
    assert wanted == {
        Service.REDIS: RUN,
        Service.SENTINEL: Wanted(run=False, waiting_for="redis"),
        Service.STUNNEL: Wanted(run=False, waiting_for="redis"),
    }


def test_with_redis_up_all_run() -> None:
    whole = at_rest()
    children = {**STOPPED, Service.REDIS: Child(ChildState.READY)}
    wanted = services(replace(whole, view=replace(whole.view, children=children)), Start())
    assert set(wanted.values()) == {RUN}


def test_nothing_starts_before_the_policies_stand() -> None:
    for kernel in (None, Kernel(policies_installed=False)):
        wanted = services(at_rest(kernel=kernel), Start())
        assert {want.waiting_for for want in wanted.values()} == {"the IPsec policies"}


def test_nothing_starts_before_a_majority_is_keyed() -> None:
    wanted = services(at_rest(links={}), Start())
    assert all("keys with a majority" in (want.waiting_for or "") for want in wanted.values())


def test_one_keyed_peer_of_two_is_enough() -> None:
    links = dict(primary_situation().view.links)
    del links["redis-3"]
    assert services(at_rest(links=links), Start())[Service.REDIS] == RUN


def test_what_runs_goes_on_when_every_peer_is_lost() -> None:
    whole = primary_situation()
    lost = replace(whole, view=replace(whole.view, links={}))
    assert set(services(lost, Start()).values()) == {RUN}


def test_a_held_redis_says_why() -> None:
    assert services(at_rest(), Start(hold="a majority"))[Service.REDIS] == Wanted(run=False, waiting_for="a majority")


@pytest.mark.parametrize("initialized", [True, False])
def test_the_sentinel_of_a_member_starts_before_its_redis(initialized: bool) -> None:  # noqa: FBT001 - a table
    whole = at_rest()
    known = replace(whole, view=replace(whole.view, initialized=initialized))
    assert services(known, Start(hold="a majority"))[Service.SENTINEL].run is initialized


def test_during_a_pause_what_has_ended_stays_down_until_a_person_starts_it() -> None:
    ended = {
        Service.REDIS: Child(ChildState.READY),
        Service.SENTINEL: Child(ChildState.BACKOFF, last_exit="killed by SIGKILL"),
        Service.STUNNEL: Child(ChildState.STOPPED),  # it has not run under this srd
    }
    paused = replace(primary_situation(), view=replace(primary_situation().view, children=ended, pause=PAUSE))
    wanted = services(paused, Start())
    assert [wanted[service].run for service in Service] == [True, False, True]
    assert "the end of the pause" in (wanted[Service.SENTINEL].waiting_for or "")
    assert services(paused, Start(), {Service.SENTINEL})[Service.SENTINEL] == RUN
    over = replace(paused, wall_clock=PAUSE.until)
    assert services(over, Start())[Service.SENTINEL] == RUN


def test_an_arbiter_runs_a_sentinel_alone() -> None:
    whole = arbiter_situation()
    fresh = replace(whole, view=replace(whole.view, children={}))
    assert services(fresh, Start()) == {Service.SENTINEL: RUN}


RELOADED = """
cluster = "orders"
{top}
[[node]]
name = "redis-1"
addresses = ["{address}"]
[[node]]
name = "redis-2"
addresses = ["192.0.2.2"]
{more}
"""


@pytest.mark.parametrize(
    ("changes", "stuck"),
    [
        ({}, ()),
        ({"more": '[[node]]\nname = "redis-3"\naddresses = ["192.0.2.3"]'}, ()),
        ({"more": '[ipsec]\nbypass = []\nsuites = ["aes-256-gcm"]\n[trust]\nrevoked = ["0a:ff"]'}, ()),
        ({"more": "[http]\nmax_connections = 9"}, ()),
        ({"more": "[http]\nport = 8090"}, ("http.port",)),
        ({"more": "[haproxy_agent]\nport = 8090"}, ("haproxy_agent.port",)),
        ({"more": '[redis]\nport = 6390\n[redis.settings]\nmaxmemory = "1gb"'}, ("redis.port", "redis.settings")),
        ({"more": '[ipsec]\nmode = "off"'}, ("ipsec.mode",)),
        ({"top": "listen_localhost = false"}, ("listen_localhost",)),
        ({"address": "192.0.2.9"}, ("node redis-1",)),
    ],
)
def test_what_a_running_node_can_take_in(changes: dict[str, str], stuck: tuple[str, ...]) -> None:
    whole = {"top": "", "address": "192.0.2.1", "more": ""}
    old, new = (parse_config(RELOADED.format(**values), "cluster.toml") for values in (whole, whole | changes))
    assert needs_restart(old, new, old.node("redis-1")) == stuck


def entries(*names: str, kind: str = "redis") -> str:
    return "".join(
        f'[[node]]\nname = "{name}"\naddresses = ["192.0.2.{10 + number}"]\nkind = "{kind}"\n'
        for number, name in enumerate(names)
    )


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("", entries("redis-3"), ("redis-3",)),
        ("", entries("app-1", "app-2", kind="client"), ()),
        (entries("redis-3"), entries("redis-3", kind="sentinel"), ()),
        ("", entries("redis-3", "redis-4"), ("redis-3", "redis-4")),
        (entries("redis-3"), entries("redis-4"), ("redis-3", "redis-4")),
        (entries("redis-3", "redis-4", "redis-5"), entries("redis-3"), ("redis-4", "redis-5")),
    ],
)
def test_which_voters_come_or_go(old: str, new: str, changed: tuple[str, ...]) -> None:
    before, after = (
        parse_config(RELOADED.format(top="", address="192.0.2.1", more=text), "cluster.toml") for text in (old, new)
    )
    assert voters_changed(before, after) == voters_changed(after, before) == changed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", {}),
        ('[[node]]\nname = "redis-3"\naddresses = ["192.0.2.3"]', {"added": ["redis-3"]}),
        ('[trust]\nrevoked = ["0a:ff"]', {"trusted_no_more": ["aff"]}),
        ("[http]\nmax_connections = 9", {"settings": True}),
        ("nofailover = true", {"settings": True}),
        ("noloadbalance = true", {"settings": True}),
        ('[ipsec]\nsuites = ["aes-256-gcm"]\n[trust]\nrevoked = ["1"]', {"trusted_no_more": ["1"], "settings": True}),
    ],
)
def test_what_a_reload_says_of_two_files_and_of_the_way_back(more: str, said: dict[str, object]) -> None:
    lists = ("added", "removed", "trusted_no_more", "trusted_again")
    nothing: dict[str, object] = {name: [] for name in lists} | {"settings": False}
    old, new = (parse_config(RELOADED.format(top="", address="192.0.2.1", more=text), "x") for text in ("", more))
    assert differences(old, new) == nothing | said
    opposite = {"added": "removed", "trusted_no_more": "trusted_again"}
    assert differences(new, old) == nothing | {opposite.get(what, what): value for what, value in said.items()}
