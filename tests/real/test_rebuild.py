"""`srd doctor --repair` has another node's srd rebuild its sentinel: three nodes as users have them."""

from __future__ import annotations

import pytest
from support.whole import whole

from srd.control import client
from srd.model import Service
from srd.supervise.launch import FORMER_SUFFIX

REPAIR_SECONDS = 90.0


def test_a_sentinel_that_monitors_nobody_is_rebuilt_by_the_srd_beside_it() -> None:
    with whole("redis", "redis", "redis") as cluster:
        cluster.power_on(*cluster.names)
        cluster.wait_whole()
        primary, former = cluster.wait_primary(), cluster.ask_sentinel("n3", "MYID")
        cluster.ask_sentinel("n3", "REMOVE", cluster.config.sentinel.master)
        answer = client.post(cluster.paths("n1").control_socket, "/v1/doctor?repair=1", timeout=REPAIR_SECONDS)
        assert answer["done"][0].startswith("put n3's sentinel.conf aside: its sentinel began anew")
        assert (answer["findings"], answer["unsettled"]) == ([], None)
        file = cluster.paths("n3").service_dir(Service.SENTINEL) / f"{Service.SENTINEL}.conf"
        assert former in file.with_name(file.name + FORMER_SUFFIX).read_text()
        monitored = cluster.ask_sentinel("n3", "GET-MASTER-ADDR-BY-NAME", cluster.config.sentinel.master)
        assert monitored[0] == str(cluster.config.node(primary).address)
        cluster.wait_whole()
        assert cluster.primaries() == [primary]


@pytest.mark.parametrize("left", [b"", b"port 26379\n"])
def test_a_sentinel_whose_file_says_nothing_begins_anew_instead_of_letting_everybody_in(left: bytes) -> None:
    with whole("redis", "redis", "redis") as cluster:
        cluster.power_on(*cluster.names)
        cluster.wait_whole()
        cluster.power_off("n3")
        file = cluster.paths("n3").service_dir(Service.SENTINEL) / f"{Service.SENTINEL}.conf"
        file.write_bytes(left)
        cluster.power_on("n3")
        cluster.wait_whole()
        assert file.with_name(file.name + FORMER_SUFFIX).read_bytes() == left
        assert b"nopass" not in file.read_bytes()


def test_the_sentinel_beside_the_primary_begins_anew_too() -> None:
    with whole("redis", "redis", "redis") as cluster:
        cluster.power_on(*cluster.names)
        cluster.wait_whole()
        primary = cluster.wait_primary()
        cluster.ask_sentinel(primary, "REMOVE", cluster.config.sentinel.master)
        cluster.kill(primary, Service.SENTINEL)
        cluster.wait_whole()
        assert cluster.primaries() == [primary]
        monitored = cluster.ask_sentinel(primary, "GET-MASTER-ADDR-BY-NAME", cluster.config.sentinel.master)
        assert monitored[0] == str(cluster.config.node(primary).address)
