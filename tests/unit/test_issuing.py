"""More nodes and new certificates, from the directory that srd init made."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from support.clusters import NODES, cluster_toml, make_bundles, paths_of

from srd.model import ConfigError, NodeKind
from srd.trust.bundle import load_bundle
from srd.trust.issuing import add_node, remove_node, renew_node, revoke

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_bundles(tmp_path, cluster_toml(), NOW)
    return tmp_path


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_node_that_is_added_has_a_whole_bundle_and_the_others_know_of_it(root: Path) -> None:
    before = [load_bundle(paths_of(root, name), NOW) for name in NODES]
    add_node(root / "bundles", "redis-4", ["127.0.1.4"], NodeKind.REDIS, NOW)
    added = load_bundle(paths_of(root, "redis-4"), NOW)
    assert added.node.name == "redis-4"
    for bundle in before:
        after = load_bundle(paths_of(root, bundle.node.name), NOW)
        assert after.config == added.config
        assert [node.name for node in after.config.nodes] == [*NODES, "redis-4"]
        assert (after.credentials, after.secrets) == (bundle.credentials, added.secrets)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (root / "bundles" / "redis-4").iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"node.key", "tls.key", "secrets.toml"}
    assert [path for path in (root / "bundles").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "addresses", "words"),
    [
        ("redis-1", ["127.0.1.9"], "redis-1 is node 'redis-1' already"),
        ("redis-4", ["127.0.1.1"], "127.0.1.1 is node 'redis-1' already"),
        ("redis-4", ["here"], "'here' is not an IP address"),
        ("client", ["127.0.1.4"], "is taken"),
    ],
)
def test_a_node_that_cannot_be_is_refused_and_changes_nothing(
    root: Path, name: str, addresses: list[str], words: str
) -> None:
    before = contents(root)
    with pytest.raises(ConfigError, match=words):
        add_node(root / "bundles", name, addresses, NodeKind.REDIS, NOW)
    assert contents(root) == before


def test_a_client_gets_a_bundle_without_secrets_and_cluster_toml_stays_as_it_is(root: Path) -> None:
    bundles = root / "bundles"
    before = (bundles / "cluster.toml").read_bytes()
    config, node = add_node(bundles, "app-1", ["127.0.1.9"], NodeKind.CLIENT, NOW)
    made = load_bundle(paths_of(root, "app-1"), NOW)
    assert (made.node, made.secrets) == (node, None)
    assert made.config == config
    assert [peer.name for peer in made.config.peers_of("app-1")] == [*NODES]
    assert {path.name for path in (bundles / "app-1").iterdir()} == {"cluster.toml", "ca.crt", "node.crt", "node.key"}
    assert {place.read_bytes() for place in bundles.rglob("cluster.toml")} == {before}


def test_a_client_is_renewed_and_revoked_and_gets_every_new_file(root: Path) -> None:
    bundles = root / "bundles"
    add_node(bundles, "app-1", ["127.0.1.9"], NodeKind.CLIENT, NOW)
    first = load_bundle(paths_of(root, "app-1"), NOW).credentials.identity.serial
    assert renew_node(bundles, "app-1", NOW).kind is NodeKind.CLIENT
    renewed = load_bundle(paths_of(root, "app-1"), NOW)
    assert renewed.credentials.identity.serial != first
    _, serials = revoke(bundles, "app-1")
    add_node(bundles, "redis-4", ["127.0.1.4"], NodeKind.REDIS, NOW)
    after = load_bundle(paths_of(root, "app-1"), NOW)
    # The one that was renewed goes on being valid for years: it must not be the way back in.
    assert after.config.revoked == {int(serial, 16) for serial in serials}
    assert after.config.revoked == {first, renewed.credentials.identity.serial}
    assert [node.name for node in after.config.nodes] == [*NODES, "redis-4", "app-1"]
    with pytest.raises(ConfigError, match=r"cluster\.toml of .* has no such node; srd node revoke .* app-1 puts"):
        remove_node(bundles, "app-1")


@pytest.mark.parametrize(
    ("name", "addresses"),
    [("app-1", ["127.0.1.1"]), ("app-1", ["127.0.1.9", "2001:db8::1"]), ("redis-1", ["127.0.1.9"])],
)
def test_a_client_that_could_not_join_gets_no_bundle(root: Path, name: str, addresses: list[str]) -> None:
    before = contents(root)
    with pytest.raises(ConfigError):
        add_node(root / "bundles", name, addresses, NodeKind.CLIENT, NOW)
    assert contents(root) == before


@pytest.mark.parametrize(("name", "kind"), [("app-2", NodeKind.CLIENT), ("redis-4", NodeKind.REDIS)])
def test_an_address_that_a_client_has_is_nobody_elses(root: Path, name: str, kind: NodeKind) -> None:
    add_node(root / "bundles", "app-1", ["127.0.1.9"], NodeKind.CLIENT, NOW)
    before = contents(root)
    with pytest.raises(ConfigError, match=r"127\.0\.1\.9 is 'app-1' already"):
        add_node(root / "bundles", name, ["127.0.1.9"], kind, NOW)
    assert contents(root) == before


def test_without_the_authoritys_key_nothing_is_issued(root: Path) -> None:
    (root / "bundles" / "ca.key").unlink()
    before = contents(root)
    with pytest.raises(ConfigError, match=r"ca\.key.*srd init made"):
        add_node(root / "bundles", "redis-4", ["127.0.1.4"], NodeKind.REDIS, NOW)
    with pytest.raises(ConfigError, match=r"ca\.key.*srd init made"):
        renew_node(root / "bundles", "redis-1", NOW)
    assert contents(root) == before


def test_renewed_certificates_are_new_with_new_keys_and_later_ends(root: Path) -> None:
    before = load_bundle(paths_of(root, "redis-1"), NOW)
    later = NOW + dt.timedelta(days=300)
    renew_node(root / "bundles", "redis-1", later)
    after = load_bundle(paths_of(root, "redis-1"), later)
    assert after.credentials.identity.serial != before.credentials.identity.serial
    assert after.credentials.key != before.credentials.key
    assert after.not_after["node"] == before.not_after["node"] + 300 * 86400
    with pytest.raises(ConfigError, match="no such node"):
        renew_node(root / "bundles", "redis-9", NOW)


def test_what_was_revoked_and_removed_stays_so_when_a_node_is_added(root: Path) -> None:
    bundles = root / "bundles"
    serial = load_bundle(paths_of(root, "redis-2"), NOW).credentials.identity.serial
    _, said = revoke(bundles, "redis-2")
    assert [int(text, 16) for text in said] == [serial]
    renew_node(bundles, "redis-2", NOW)
    other = load_bundle(paths_of(root, "redis-2"), NOW).credentials.identity.serial
    revoke(bundles, "redis-2")
    remove_node(bundles, "redis-3")
    add_node(bundles, "redis-4", ["127.0.1.4"], NodeKind.REDIS, NOW)
    for name in ("redis-1", "redis-2", "redis-4"):
        config = load_bundle(paths_of(root, name), NOW).config
        assert config.revoked == {serial, other}
        assert [node.name for node in config.nodes] == ["redis-1", "redis-2", "redis-4"]


@pytest.mark.parametrize("text", ['[trust]\nrevoked = [\n  "ab", # lost\n  "cd",\n]\n', "[trust] # nobody yet\n", ""])
def test_a_list_that_is_there_is_added_to(root: Path, text: str) -> None:
    file = root / "bundles" / "cluster.toml"
    file.write_text(file.read_text() + text)
    before = 2 if "ab" in text else 0
    config, (serial,) = revoke(root / "bundles", "redis-1")
    assert len(config.revoked) == before + 1
    assert int(serial, 16) in config.revoked


def test_lines_that_cannot_be_changed_safely_are_left_to_a_person(root: Path) -> None:
    file = root / "bundles" / "cluster.toml"
    text = file.read_text().replace('name = "redis-3"', '"name" = "redis-3"')
    file.write_text(text)
    with pytest.raises(ConfigError, match="edit it by hand"):
        remove_node(root / "bundles", "redis-3")
    assert file.read_text() == text
    with pytest.raises(ConfigError, match="no such node"):
        remove_node(root / "bundles", "redis-9")
