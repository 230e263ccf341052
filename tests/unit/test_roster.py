"""Which clients a certificate alone lets in, and for how long they are remembered."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from support.clusters import cluster_toml, dual_stack_toml, paths_of

from srd.cluster import Config
from srd.config import parse_config
from srd.model import Identity, NodeKind, Paths, RefusedError, SrdError
from srd.roster import FILE_NAME, Roster

NOW = 1_000_000.0
CONFIG = parse_config(cluster_toml(), "cluster.toml")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = paths_of(tmp_path, "redis-1")
    found.state_dir.mkdir(parents=True)
    return found


def identity(
    name: str = "app-1",
    *addresses: str,
    serial: int = 0xAB,
    not_after: float = NOW + 60,
    kind: NodeKind = NodeKind.CLIENT,
) -> Identity:
    found = tuple(ip_address(text) for text in addresses or ("127.0.1.9",))
    return Identity("lab", name, kind, found, serial, not_after)


def joined(paths: Paths, config: Config = CONFIG, now: float = NOW) -> list[str]:
    """Who is in by the file on disk, besides the nodes of cluster.toml."""
    extended = Roster(paths).extend(config, now)
    assert extended.nodes[: len(config.nodes)] == config.nodes
    return [f"{node.name} {node.address}" for node in extended.nodes[len(config.nodes) :]]


def test_who_was_let_in_is_remembered_across_restarts_until_the_certificate_ends(paths: Paths) -> None:
    roster = Roster(paths)
    roster.admit(identity(), CONFIG, NOW)
    roster.admit(identity("app-2", "127.0.1.10", serial=0xCD, not_after=NOW + 600), CONFIG, NOW)
    assert joined(paths) == ["app-1 127.0.1.9", "app-2 127.0.1.10"]
    assert joined(paths, now=NOW + 60) == ["app-2 127.0.1.10"]


def test_who_is_revoked_is_out(paths: Paths) -> None:
    Roster(paths).admit(identity(), CONFIG, NOW)
    revoking = parse_config(cluster_toml(extra='[trust]\nrevoked = ["ab"]\n'), "cluster.toml")
    assert joined(paths, revoking) == []


def test_a_certificate_that_was_revoked_meanwhile_takes_nobodys_place(paths: Paths) -> None:
    roster = Roster(paths)
    roster.admit(identity(), CONFIG, NOW)
    revoking = parse_config(cluster_toml(extra='[trust]\nrevoked = ["cd"]\n'), "cluster.toml")
    with pytest.raises(RefusedError, match="certificate cd has ended, or is revoked"):
        roster.admit(identity("app-1", "127.0.1.10", serial=0xCD, not_after=NOW + 600), revoking, NOW)
    assert joined(paths, revoking) == ["app-1 127.0.1.9"]


def test_a_new_certificate_takes_the_place_of_the_old_one_and_the_old_one_is_refused(paths: Paths) -> None:
    roster = Roster(paths)
    roster.admit(identity(), CONFIG, NOW)
    roster.admit(identity("app-1", "127.0.1.10", serial=0xCD, not_after=NOW + 600), CONFIG, NOW)
    assert joined(paths) == ["app-1 127.0.1.10"]
    with pytest.raises(RefusedError, match="a later certificate of that name has been let in"):
        roster.admit(identity(), CONFIG, NOW)
    assert joined(paths) == ["app-1 127.0.1.10"]


def test_nothing_is_written_for_a_client_that_is_known(paths: Paths) -> None:
    roster = Roster(paths)
    roster.admit(identity(), CONFIG, NOW)
    (paths.state_dir / FILE_NAME).unlink()
    roster.admit(identity(), CONFIG, NOW)
    assert not (paths.state_dir / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (identity("redis-1"), "cluster.toml has a node of that name"),
        (identity("app-1", "127.0.1.2"), "127.0.1.2 is node 'redis-2' already"),
        (identity("app-1", "127.0.1.10"), "127.0.1.10 is node 'app-2' already"),
        (identity("app-1", "2001:db8::9"), "one address of each IP family that redis-1 has"),
        (identity("redis-9", kind=NodeKind.REDIS), "only a client may join without, not a redis"),
        (identity("app-1", not_after=NOW), "its certificate ab has ended, or is revoked"),
    ],
)
def test_a_certificate_that_does_not_fit_the_cluster_lets_nobody_in(paths: Paths, claim: Identity, words: str) -> None:
    roster = Roster(paths)
    roster.admit(identity("app-2", "127.0.1.10"), CONFIG, NOW)
    with pytest.raises(SrdError, match=words):
        roster.admit(claim, CONFIG, NOW)
    assert joined(paths) == ["app-2 127.0.1.10"]


def test_the_file_goes_before_a_certificate(paths: Paths) -> None:
    Roster(paths).admit(identity("redis-4", "127.0.1.9"), CONFIG, NOW)
    assert joined(paths, parse_config(cluster_toml(nodes=4), "cluster.toml")) == []
    roster = Roster(paths)
    roster.admit(identity("app-1", "127.0.1.10"), parse_config(cluster_toml(nodes=4), "cluster.toml"), NOW)
    assert joined(paths) == ["app-1 127.0.1.10"]


def test_both_families_are_asked_of_a_client_where_the_nodes_have_both(paths: Paths) -> None:
    config = parse_config(dual_stack_toml(3), "cluster.toml")
    with pytest.raises(SrdError, match="one address of each IP family"):
        Roster(paths).admit(identity("app-1", "192.0.2.9"), config, NOW)
    Roster(paths).admit(identity("app-1", "2001:db8::9", "192.0.2.9"), config, NOW)
    assert joined(paths, config) == ["app-1 2001:db8::9"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"name": "a", "addresses": ["x"], "serial": "1", "not_after": 1}]',
        '[{"name": "a", "addresses": ["127.0.1.9"], "serial": "xyz", "not_after": 9e9}]',
    ],
)
def test_a_file_that_cannot_be_read_means_that_nobody_is_known(paths: Paths, content: str) -> None:
    (paths.state_dir / FILE_NAME).write_text(content)
    assert joined(paths) == []
