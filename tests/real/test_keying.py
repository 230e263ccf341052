"""Keying between real nodes on loopback: real certificates, real TLS, and a table in the kernel's place."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import socket
from pathlib import Path

import msgspec
import pytest
from support.clusters import cluster_toml, make_bundles, paths_of
from support.keyings import FAST_AES, SOFTWARE_AES, esp, keying_of, running

from srd.cluster import KEYING_CLIENT_PORTS, KEYING_PORT, Node
from srd.ipsec.exchange import STEP_SECONDS
from srd.ipsec.keying import MAX_HANDSHAKES
from srd.ipsec.peering import BEAT_SECONDS, MOST_ASKED, RENEWAL_FLOOR_SECONDS, SILENCE_SECONDS
from srd.ipsec.protocol import KeyingError
from srd.ipsec.sas import Generation
from srd.ipsec.serials import SerialsFile
from srd.ipsec.strangers import STRANGER_PAUSE_SECONDS
from srd.model import Body, Identity, NodeKind, RefusedError, SrdError, Suite, TimedOutError
from srd.reconcile import boottime
from srd.trust.bundle import Bundle, load_bundle
from srd.trust.issuing import add_node, renew_node


class Tables:
    """What each node's kernel would hold, and the one rule that must never break."""

    def __init__(self) -> None:
        self.inbound: dict[tuple[str, int], bytes] = {}  # (receiving node, SPI) -> key
        self.outbound: dict[tuple[str, int], bytes] = {}
        self.pinned: dict[tuple[str, str], Generation] = {}  # (sending node, peer)
        self.keys: list[bytes] = []
        self.full = False  # no more keys are taken
        self.slowness = 0.0  # seconds to retire

    def of(self, node: str) -> NodeTables:
        return NodeTables(self, node)


class NodeTables:
    """One node's side of `Tables`; the shape of `srd.ipsec.exchange.Installer`."""

    def __init__(self, tables: Tables, node: str) -> None:
        self.tables = tables
        self.node = node

    async def sends(self, peer: str) -> tuple[int, ...]:
        pinned = self.tables.pinned.get((self.node, peer))
        return tuple(leg.spi_out for leg in pinned.legs) if pinned is not None else ()

    async def agree(self, peer: str, sends: frozenset[int]) -> None:
        known = {spi for node, spi in self.tables.inbound if node == self.node}
        assert sends <= known, f"{peer} says that it sends under keys that were never installed"

    async def install(self, generation: Generation) -> None:
        if self.tables.full:
            raise SrdError("install", "an SA", "the table is full")
        for leg in generation.legs:
            self.tables.inbound[self.node, leg.spi_in] = leg.key_in
            self.tables.keys.append(leg.key_in)
            self.tables.outbound[self.node, leg.spi_out] = leg.key_out

    async def pin(self, generation: Generation) -> None:
        for leg in generation.legs:
            received_with = self.tables.inbound.get((generation.peer, leg.spi_out))
            assert received_with == self.tables.outbound[self.node, leg.spi_out], "it sends what cannot be received"
        self.tables.pinned[self.node, generation.peer] = generation

    async def retire(self, peer: str) -> None:
        await asyncio.sleep(self.tables.slowness)
        assert (peer, self.node) in self.tables.pinned, "it retires keys that the peer may still send under"

    async def discard(self, generation: Generation) -> None:
        for leg in generation.legs:
            self.tables.inbound.pop((self.node, leg.spi_in), None)


@pytest.fixture
def bundles(tmp_path: Path) -> dict[str, Bundle]:
    return {name: esp(bundle) for name, bundle in make_bundles(tmp_path, cluster_toml()).items()}


async def test_every_pair_is_keyed_and_no_key_is_used_twice(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    nodes = [keying_of(bundle, tables, SOFTWARE_AES) for bundle in bundles.values()]
    async with running(*(keying for keying, _ in nodes)):
        for _, store in nodes:
            await store.wait_for(lambda view: all(c.connected for c in view.channels.values()), 20)
    assert set(tables.pinned) == {(a, b) for a in bundles for b in bundles if a != b}
    assert len(set(tables.keys)) == len(tables.keys) == 6


async def test_the_key_exchange_is_post_quantum_hybrid(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    nodes = [keying_of(bundles[name], tables, SOFTWARE_AES) for name in ("redis-1", "redis-2")]
    async with running(*(keying for keying, _ in nodes)):
        view = await nodes[0][1].wait_for(lambda view: view.channels["redis-2"].connected, 20)
    assert view.channels["redis-2"].group == "X25519MLKEM768"


@pytest.mark.parametrize(
    ("first", "second", "suite"),
    [
        (FAST_AES, FAST_AES, Suite.AES_256_GCM),
        (FAST_AES, SOFTWARE_AES, Suite.CHACHA20_POLY1305),
        (SOFTWARE_AES, SOFTWARE_AES, Suite.CHACHA20_POLY1305),
        (FAST_AES, {Suite.AES_256_GCM: 1}, Suite.AES_256_GCM),
    ],
)
async def test_the_slower_end_decides_the_suite(
    bundles: dict[str, Bundle], first: dict[Suite, int], second: dict[Suite, int], suite: Suite
) -> None:
    tables = Tables()
    one, two = keying_of(bundles["redis-1"], tables, first), keying_of(bundles["redis-2"], tables, second)
    async with running(one[0], two[0]):
        for store, peer in ((one[1], "redis-2"), (two[1], "redis-1")):
            view = await store.wait_for(lambda view, peer=peer: view.channels[peer].connected, 20)
            assert view.channels[peer].suite is suite


async def test_a_node_that_comes_up_knocks_and_is_keyed_at_once(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srd.ipsec.peering.RETRY_SECONDS", 60.0)
    monkeypatch.setattr("srd.reconcile.BACKOFF_FIRST_SECONDS", 60.0)
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    async with running(one):
        await store.wait_for(lambda view: view.channels["redis-2"].failures > 0, 20)
        up = boottime()
        async with running(two):
            view = await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
            assert view.channels["redis-2"].established is not None
            assert view.channels["redis-2"].established - up < 5


async def test_a_node_that_comes_back_is_keyed_anew(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, one_store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, two_store = keying_of(bundles["redis-2"], tables, FAST_AES)
    async with running(one):
        async with running(two):
            await two_store.wait_for(lambda view: view.channels["redis-1"].connected, 20)
            before = tables.pinned["redis-1", "redis-2"]
        await one_store.wait_for(lambda view: not view.channels["redis-2"].connected, 20)
        again, again_store = keying_of(bundles["redis-2"], tables, FAST_AES)
        async with running(again):
            await again_store.wait_for(lambda view: view.channels["redis-1"].connected, 20)
            after = tables.pinned["redis-1", "redis-2"]
    assert after.number > before.number
    assert not after.spis & before.spis


@pytest.mark.parametrize("asks", ["redis-1", "redis-2"])
async def test_either_end_gets_new_keys_and_neither_sees_the_connection_fail(
    bundles: dict[str, Bundle], asks: str
) -> None:
    tables = Tables()
    tables.slowness = 0.3  # both ends take their time to let the old keys go
    nodes = {name: keying_of(bundles[name], tables, FAST_AES) for name in ("redis-1", "redis-2")}
    ends = [(store, peer) for (_, store), peer in zip(nodes.values(), ("redis-2", "redis-1"), strict=True)]
    async with running(*(keying for keying, _ in nodes.values())):
        since = [(await store.wait_for(lambda v, p=peer: v.channels[p].connected, 20)).channels[peer].since
                 for store, peer in ends]  # fmt: skip
        for keyings in (2, 3):
            await nodes[asks][0].renew(["redis-2" if asks == "redis-1" else "redis-1"], 20)
            for store, peer in ends:
                await store.wait_for(lambda v, p=peer, k=keyings: v.channels[p].keyings == k, 20)
        await asyncio.sleep(2 * BEAT_SECONDS)  # the former connection ends with the first beats of the last one
        records = [store.view().channels[peer] for store, peer in ends]
    assert [record.since for record in records] == since
    assert [(record.connected, record.failures, record.keyings) for record in records] == [(True, 0, 3)] * 2


async def test_peers_come_and_go_and_the_others_notice_nothing(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    nodes = {name: keying_of(bundle, tables, FAST_AES) for name, bundle in bundles.items()}
    (one, store), whole = nodes["redis-1"], bundles["redis-1"]
    without = dataclasses.replace(whole.config, nodes=whole.config.nodes[:2])
    async with running(*(keying for keying, _ in nodes.values())):
        for _, every in nodes.values():
            await every.wait_for(lambda view: all(c.connected for c in view.channels.values()), 20)
        before = store.view().channels["redis-2"]
        one.adopt(without, whole.credentials)
        assert set(store.view().channels) == {"redis-2"}
        other = nodes["redis-3"][1]
        view = await other.wait_for(lambda view: not view.channels["redis-1"].connected, 20)
        assert view.channels["redis-2"].connected
        one.adopt(whole.config, whole.credentials)
        await store.wait_for(lambda view: view.channels["redis-3"].connected, 20)
        assert store.view().channels["redis-2"] == before


@pytest.mark.parametrize(("here", "there"), [("redis-1", "redis-2"), ("redis-2", "redis-1")])
async def test_a_revoked_certificate_is_put_out_and_not_let_in_again_but_a_new_one_is(
    bundles: dict[str, Bundle], tmp_path: Path, here: str, there: str
) -> None:
    tables = Tables()
    mine, store = keying_of(bundles[here], tables, FAST_AES)
    theirs, _ = keying_of(bundles[there], tables, FAST_AES)
    serial = bundles[there].credentials.identity.serial
    revoking = dataclasses.replace(bundles[here].config, revoked=frozenset({serial}))
    async with running(mine, theirs):
        await store.wait_for(lambda view: view.channels[there].connected, 20)
        # Of redis-3 nobody knows by which certificate keys could have been made.
        assert mine.adopt(revoking, bundles[here].credentials) == {there, "redis-3"}
        view = await store.wait_for(lambda view: "is revoked" in (view.channels[there].last_error or ""), 20)
        assert not view.channels[there].connected
        renew_node(tmp_path / "bundles", there, dt.datetime.now(dt.UTC))
        renewed = esp(load_bundle(paths_of(tmp_path, there), dt.datetime.now(dt.UTC)))
        theirs.adopt(renewed.config, renewed.credentials)
        await store.wait_for(lambda view: view.channels[there].connected, 20)
        assert mine.distrusted() == {"redis-3"}


async def test_keys_by_a_revoked_certificate_are_not_trusted_although_their_connection_is_gone(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    file = tmp_path / "keyed-by.json"
    one._serials = SerialsFile(file)
    for peering in one._peerings.values():
        peering._keyed = one._serials.note
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    serial = bundles["redis-2"].credentials.identity.serial
    async with running(one):
        async with running(two):
            await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        await store.wait_for(lambda view: not view.channels["redis-2"].connected, 20)
        assert one.distrusted() == frozenset()
        revoking = dataclasses.replace(bundles["redis-1"].config, revoked=frozenset({serial}))
        assert "redis-2" in one.adopt(revoking, bundles["redis-1"].credentials)
    assert SerialsFile(file).of("redis-2") == serial
    assert SerialsFile(file).of("redis-3") is None


async def test_a_renewal_that_is_asked_for_during_an_exchange_is_another_exchange(
    bundles: dict[str, Bundle],
) -> None:
    tables = Tables()
    nodes = [keying_of(bundles[name], tables, FAST_AES) for name in ("redis-1", "redis-2")]
    (one, store), _ = nodes
    async with running(*(keying for keying, _ in nodes)):
        await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        tables.slowness = 1.0
        first = asyncio.create_task(one.renew(["redis-2"], 20))
        await asyncio.sleep(1.5)  # a beat later the exchange has begun, and is slow
        await one.renew(["redis-2"], 20)
        await first
        assert store.view().channels["redis-2"].keyings == 3


async def test_a_new_certificate_and_other_suites_are_in_use_after_a_renewal_of_the_keys(
    bundles: dict[str, Bundle],
) -> None:
    tables = Tables()
    nodes = {name: keying_of(bundles[name], tables, FAST_AES) for name in ("redis-1", "redis-2")}
    store = nodes["redis-1"][1]
    async with running(*(keying for keying, _ in nodes.values())):
        view = await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        assert view.channels["redis-2"].suite is Suite.AES_256_GCM
        for name, (keying, _) in nodes.items():
            section = msgspec.structs.replace(bundles[name].config.ipsec, suites=("chacha20-poly1305",))
            keying.adopt(dataclasses.replace(bundles[name].config, ipsec=section), bundles[name].credentials)
        view = await store.wait_for(lambda view: view.channels["redis-2"].suite is Suite.CHACHA20_POLY1305, 20)
    assert view.channels["redis-2"].suite_reason == "ipsec.suites of cluster.toml has it first"
    assert view.channels["redis-2"].connected


async def test_only_a_peers_keys_can_be_renewed(bundles: dict[str, Bundle]) -> None:
    one, _ = keying_of(bundles["redis-1"], Tables(), FAST_AES)
    with pytest.raises(KeyingError, match="redis-9: it is no peer"):
        await one.renew(["redis-2", "redis-9"], 0)


async def test_keys_that_never_suffice_are_renewed_at_a_bounded_pace(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES, {"redis-2"})
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES, {"redis-1"})
    async with running(one, two):
        await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        await asyncio.sleep(3)
        assert 2 <= store.view().channels["redis-2"].keyings <= 1 + 3 / RENEWAL_FLOOR_SECONDS


async def test_a_peer_that_falls_silent_while_new_keys_fail_is_seen_to_be_gone(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    async with running(one, two):
        await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        tables.full = True
        with pytest.raises(TimedOutError, match="redis-2: it took longer than 1 s"):
            await one.renew(["redis-2"], 1)
        view = await store.wait_for(lambda view: view.channels["redis-2"].failures > 0, 20)
        assert view.channels["redis-2"].connected
        monkeypatch.setattr("srd.ipsec.peering.BEAT_SECONDS", 3600)
        silent = boottime()
        await store.wait_for(lambda view: not view.channels["redis-2"].connected, 20)
        assert boottime() - silent > SILENCE_SECONDS / 2


async def test_garbage_and_strangers_do_not_keep_a_peer_out(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, one_store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    async with running(two):
        strangers = []
        for number in range(50):
            # From outside, and from a peer's address: the latter get as far as a handshake.
            source = ("127.0.0.1" if number % 4 < 2 else "127.0.1.1", 0)
            stranger = socket.create_connection(("127.0.1.2", KEYING_PORT), source_address=source)
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" if number % 2 else b"\x16\x03")
            strangers.append(stranger)
        async with running(one):
            await one_store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        for stranger in strangers:
            stranger.close()


async def test_idle_outsiders_take_no_peers_place_and_an_address_has_one(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    async with running(two):
        idle = [socket.create_connection(("127.0.1.2", KEYING_PORT)) for _ in range(MAX_HANDSHAKES + 44)]
        async with running(one):
            await store.wait_for(lambda view: view.channels["redis-2"].connected, STEP_SECONDS / 2)
        for connection in idle[1:]:
            connection.settimeout(STEP_SECONDS)
            assert connection.recv(1) == b""
        for connection in idle:
            connection.close()


@pytest.fixture
def app(tmp_path: Path, bundles: dict[str, Bundle]) -> Bundle:
    """The bundle of a client that cluster.toml does not have."""
    del bundles
    add_node(tmp_path / "bundles", "app-1", ["127.0.1.9"], NodeKind.CLIENT, dt.datetime.now(dt.UTC))
    return esp(load_bundle(paths_of(tmp_path, "app-1"), dt.datetime.now(dt.UTC)))


async def test_a_client_joins_by_its_certificate_alone(bundles: dict[str, Bundle], app: Bundle) -> None:
    tables = Tables()

    async def join(identity: Identity) -> None:
        config = bundles["redis-1"].config.joined_by(Node(identity.node, identity.kind, identity.addresses))
        node.adopt(config, bundles["redis-1"].credentials)

    node, store = keying_of(bundles["redis-1"], tables, FAST_AES, join=join)
    client, seen = keying_of(app, tables, FAST_AES)
    async with running(node, client):
        view = await seen.wait_for(lambda view: view.channels["redis-1"].connected, 20)
        await store.wait_for(lambda view: "app-1" in view.channels and view.channels["app-1"].connected, 20)
    assert not view.channels["redis-2"].connected
    assert {pair for pair in tables.pinned if "app-1" in pair} == {("app-1", "redis-1"), ("redis-1", "app-1")}


async def test_a_client_that_is_not_let_in_is_refused_counted_and_said_once(
    bundles: dict[str, Bundle], app: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = Tables()
    node, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    client, _ = keying_of(app, tables, FAST_AES)
    async with running(node, client):
        await store.wait_for(lambda view: view.keying_refusals >= 2, 20 * STRANGER_PAUSE_SECONDS)
    said = [line for line in capsys.readouterr().out.splitlines() if "keying connection refused" in line]
    assert len(said) == 1
    assert "cannot admit app-1: it is not a node of this cluster.toml" in said[0]
    assert not tables.pinned


async def test_a_client_whose_certificate_is_revoked_does_not_get_as_far_as_asking(
    bundles: dict[str, Bundle], app: Bundle
) -> None:
    asked = []

    async def join(identity: Identity) -> None:
        asked.append(identity)

    mine = bundles["redis-1"]
    revoking = dataclasses.replace(mine.config, revoked=frozenset({app.credentials.identity.serial}))
    node, store = keying_of(dataclasses.replace(mine, config=revoking), Tables(), FAST_AES, join=join)
    client, _ = keying_of(app, Tables(), FAST_AES)
    async with running(node, client):
        await store.wait_for(lambda view: view.keying_refusals >= 1, 20)
    assert not asked


async def test_a_peer_that_counts_past_all_bounds_is_refused_and_harms_no_other(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    two, _ = keying_of(bundles["redis-2"], tables, FAST_AES)
    three, _ = keying_of(bundles["redis-3"], tables, FAST_AES)
    two._exchange._counted["redis-1"] = 2**64 - 1
    async with running(one, two, three):
        view = await store.wait_for(
            lambda view: view.channels["redis-2"].last_error is not None and view.channels["redis-3"].connected, 20
        )
    assert "does not belong here" in (view.channels["redis-2"].last_error or "")


async def test_another_cluster_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    other = {n: esp(b) for n, b in make_bundles(tmp_path / "other", cluster_toml(name="other")).items()}
    tables = Tables()
    mine, store = keying_of(bundles["redis-1"], tables, FAST_AES)
    theirs, _ = keying_of(other["redis-2"], tables, FAST_AES)
    async with running(mine, theirs):
        view = await store.wait_for(lambda view: view.channels["redis-2"].last_error is not None, 20)
    assert "certificate" in (view.channels["redis-2"].last_error or "")
    assert not tables.pinned


async def test_the_leader_connects_from_the_eight_client_ports(bundles: dict[str, Bundle]) -> None:
    tables = Tables()
    one, _ = keying_of(bundles["redis-1"], tables, FAST_AES)
    listener = socket.create_server(("127.0.1.2", KEYING_PORT))
    listener.settimeout(20)
    async with running(one):
        connection, address = await asyncio.to_thread(listener.accept)
    connection.close()
    listener.close()
    assert address[0] == "127.0.1.1"
    assert address[1] in KEYING_CLIENT_PORTS


async def test_questions_are_answered_each_by_itself_and_end_with_their_connection(bundles: dict[str, Bundle]) -> None:
    began: list[str] = []

    async def answer(peer: str, topic: str, body: Body) -> Body:
        began.append(topic)
        if topic == "slow":
            await asyncio.sleep(20)
        if topic == "refused":
            raise RefusedError("answer", topic, f"{peer} is to know why")
        return {"you": peer, **body, "defect": 1 // (topic != "defect")}

    tables = Tables()
    nodes = [keying_of(bundles[name], tables, FAST_AES, answer=answer) for name in ("redis-1", "redis-2")]
    (one, store), _ = nodes
    async with running(*(keying for keying, _ in nodes)):
        await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        slow = [asyncio.create_task(one.ask("redis-2", "slow", {}, 20)) for _ in range(MOST_ASKED - 1)]
        await asyncio.sleep(0)
        assert await one.ask("redis-2", "quick", {"n": 7}, 5) == {"you": "redis-1", "n": 7, "defect": 1}
        assert began == ["slow"] * len(slow) + ["quick"]
        with pytest.raises(KeyingError, match=r"cannot ask about the refused redis-2: .*redis-1 is to know why"):
            await one.ask("redis-2", "refused", {}, 5)
        with pytest.raises(KeyingError, match="failed unexpectedly: ZeroDivisionError"):
            await one.ask("redis-2", "defect", {}, 5)
        with pytest.raises(KeyingError, match=r"no answer within 0\.2 s"):
            await one.ask("redis-2", "slow", {}, 0.2)
        # Its answer is still to come, so that is one too many now.
        with pytest.raises(KeyingError, match="its connection ended"):
            await one.ask("redis-2", "quick", {}, 15)
        for ended in asyncio.as_completed(slow):
            with pytest.raises(KeyingError, match="its connection ended"):
                await ended
        await store.wait_for(lambda view: view.channels["redis-2"].connected, 20)
        assert (await one.ask("redis-2", "quick", {}, 5))["you"] == "redis-1"
