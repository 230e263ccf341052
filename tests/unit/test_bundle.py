"""What srd init writes, and what a node makes of it. tests/lab tries the refusals on a whole node."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.clusters import NODES, cluster_toml, make_bundles, paths_of

from srd.model import ConfigError, NodeKind
from srd.trust.authority import CERTIFICATE_DAYS, identify, tls_name
from srd.trust.bundle import load_bundle, write_bundles

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PRIVATE = {"node.key", "tls.key", "secrets.toml"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_bundles(tmp_path, cluster_toml(), NOW)
    return tmp_path


def certificate(root: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((root / "bundles" / "redis-1" / name).read_bytes())


def test_a_bundle_is_whole_and_its_secrets_are_private(root: Path) -> None:
    for node in NODES:
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root / "bundles" / node).iterdir()}
        assert files.keys() == PRIVATE | {"cluster.toml", "ca.crt", "node.crt", "tls.crt"}
        assert {name for name, mode in files.items() if mode == 0o600} == PRIVATE
    assert stat.S_IMODE((root / "bundles" / "ca.key").stat().st_mode) == 0o600


def test_the_authoritys_key_is_in_no_bundle(root: Path) -> None:
    key = (root / "bundles" / "ca.key").read_text()
    for directory in (*NODES, "client"):
        assert all(key not in path.read_text() for path in (root / "bundles" / directory).iterdir())


def test_the_certificate_says_which_node_it_is(root: Path) -> None:
    identity = identify(certificate(root, "node.crt"))
    assert (identity.cluster, identity.node, identity.kind) == ("lab", "redis-1", NodeKind.REDIS)
    assert [str(address) for address in identity.addresses] == ["127.0.1.1"]


def test_what_clients_see_is_no_membership(root: Path) -> None:
    shown = certificate(root, "tls.crt")
    with pytest.raises(ValueError, match="names no srd node"):
        identify(shown)
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tls_name("lab") in names.get_values_for_type(x509.DNSName)
    usage = shown.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_passwords_are_the_same_on_every_node_and_differ_from_one_another(root: Path) -> None:
    loaded = [load_bundle(paths_of(root, node), NOW).secrets for node in NODES]
    assert loaded[0] == loaded[1] == loaded[2]
    one = loaded[0]
    assert len({one.redis_password, one.replication_password, one.sentinel_password, one.srd_password}) == 4
    assert "hidden" in repr(one)
    assert one.redis_password.reveal() not in repr(one)


def test_an_existing_directory_is_not_written_into(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="it exists already"):
        write_bundles(cluster_toml(), root / "bundles", NOW)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_wrong_file_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such key"):
        write_bundles(cluster_toml(extra="[redis]\nprot = 1\n"), tmp_path / "bundles", NOW)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_of_a_cluster_that_cluster_toml_takes_makes_bundles_too(tmp_path: Path) -> None:
    name = "c" * 63
    assert make_bundles(tmp_path, cluster_toml(name=name), NOW)["redis-1"].credentials.identity.cluster == name


def test_a_node_may_not_take_the_name_of_the_clients_bundle(tmp_path: Path) -> None:
    text = cluster_toml().replace('"redis-2"', '"client"')
    with pytest.raises(ConfigError, match=r"my\.toml.*no node may be called 'client'"):
        write_bundles(text, tmp_path / "bundles", NOW, origin="my.toml")
    assert list(tmp_path.iterdir()) == []


KEY_OF_AN_UNKNOWN_KIND = """-----BEGIN PRIVATE KEY-----
MCoCAQAwCQYHKqoDBAUGBwQaBBgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", KEY_OF_AN_UNKNOWN_KIND.encode()])
def test_what_is_not_a_key_is_refused_in_one_sentence(root: Path, content: bytes) -> None:
    refused_key(root, content)


def test_a_key_with_a_comment_that_is_not_ascii_is_refused_without_quoting_it(root: Path) -> None:
    key = (root / "bundles" / "redis-1" / "node.key").read_bytes()
    refused_key(root, "schl\u00fcssel\n".encode() + key)


def refused_key(root: Path, content: bytes) -> None:
    (root / "bundles" / "redis-1" / "node.key").write_bytes(content)
    with pytest.raises(ConfigError, match="not an unencrypted PEM private key") as caught:
        load_bundle(paths_of(root, "redis-1"), NOW)
    assert caught.value.__cause__ is None


def test_a_certificate_ends_when_it_says(root: Path) -> None:
    paths, end = paths_of(root, "redis-1"), dt.timedelta(days=CERTIFICATE_DAYS)
    load_bundle(paths, NOW + end - dt.timedelta(seconds=1))
    with pytest.raises(ConfigError, match="expired on"):
        load_bundle(paths, NOW + end)


@pytest.mark.parametrize("text", ["redis_password = ", 'redis_password = "hunter2hunter2"', 'hunter2hunter2 = "x"'])
def test_a_broken_secrets_file_is_refused_without_quoting_it(root: Path, text: str) -> None:
    secrets = root / "bundles" / "redis-1" / "secrets.toml"
    secrets.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_bundle(paths_of(root, "redis-1"), NOW)
    assert str(secrets) in str(caught.value)
    assert '"hunter2hunter2"' not in str(caught.value)
