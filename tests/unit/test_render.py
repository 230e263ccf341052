from __future__ import annotations

import fnmatch
import hashlib
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.cluster import Config
from srd.config import parse_config
from srd.model import ConfigError, Endpoint, Secret, Secrets
from srd.supervise import render

SECRETS = Secrets(
    redis_password=Secret("redis-password"),
    replication_password=Secret("replication-password"),
    sentinel_password=Secret("sentinel-password"),
    srd_password=Secret("srd-password"),
)
HERE = Path("/var/lib/srd/redis")
OTHER = Endpoint(ip_address("10.0.0.2"), 6379)


def config_of(*addresses: str, extra: str = "", head: str = "") -> Config:
    nodes = "".join(
        f'[[node]]\nname = "n{index}"\naddresses = [{", ".join(map(repr, text.split()))}]\n'
        for index, text in enumerate(addresses or ("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    )
    return parse_config(f'cluster = "c"\n{head}\n{nodes}\n{extra}', "cluster.toml")


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and line[0] not in "#;"]


def redis_lines(config: Config, primary: Endpoint | None = None) -> list[str]:
    return lines_of(render.redis_conf(config, config.nodes[0], SECRETS, HERE, primary))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(), "bind 10.0.0.1 127.0.0.1"),
        (config_of(head="listen_localhost = false"), "bind 10.0.0.1"),
        (config_of("10.0.0.1 fd00::1", "10.0.0.2 fd00::2"), "bind 10.0.0.1 fd00::1 127.0.0.1"),
        (config_of("127.0.0.1", extra='[ipsec]\nmode="off"'), "bind 127.0.0.1"),
        (config_of(), "bind-source-addr 10.0.0.1"),
        (config_of("fd00::1", "fd00::2"), "bind-source-addr fd00::1"),
        (config_of(), "replica-announce-ip 10.0.0.1"),
        (config_of("fd00::1 10.0.0.1", "fd00::2 10.0.0.2"), "replica-announce-ip fd00::1"),
        (config_of(extra="[redis]\nport = 7000"), "port 7000"),
        (config_of(extra="[redis]\nport = 7000"), "replica-announce-port 7000"),
        (config_of("10.0.0.1"), "min-replicas-to-write 0"),
        (config_of(), "min-replicas-to-write 1"),
        (config_of(*(f"10.0.0.{n}" for n in range(1, 6))), "min-replicas-to-write 2"),
        (config_of(), "min-replicas-max-lag 2"),
        (config_of(), 'requirepass "redis-password"'),
        (config_of(), "masteruser replica"),
        (config_of(), 'masterauth "replication-password"'),
        (config_of(), "appendonly yes"),
        (config_of(), "protected-mode yes"),
        (config_of(), "enable-debug-command no"),
        (config_of(), f'dir "{HERE}"'),
    ],
)
def test_redis_conf_says(config: Config, expected: str) -> None:
    assert expected in redis_lines(config)


def test_no_source_address_is_fixed_where_nodes_lead_with_different_families() -> None:
    mixed = config_of("10.0.0.1 fd00::1", "fd00::2 10.0.0.2")
    text = render.redis_conf(mixed, mixed.nodes[0], SECRETS, HERE, None)
    text += render.sentinel_conf(mixed, mixed.nodes[0], SECRETS, HERE, OTHER)
    assert "bind-source-addr" not in text


def test_no_redis_is_to_be_promoted_before_it_has_been_in_step() -> None:
    for primary in (OTHER, None):
        assert "replica-priority 0" in redis_lines(config_of(), primary)


def test_a_replica_follows_and_a_primary_does_not() -> None:
    config = config_of()
    assert "replicaof 10.0.0.2 6379" in redis_lines(config, OTHER)
    assert not any(line.startswith("replicaof") for line in redis_lines(config))


def test_settings_of_the_operator_come_last_and_as_written() -> None:
    extra = (
        '[redis.settings]\nmaxmemory = "2gb"\nsave = ""\nhz = 20\n"client-output-buffer-limit" = "replica 1gb 0 0"\n'
    )
    config = config_of(extra=extra)
    assert redis_lines(config)[-4:] == [
        "maxmemory 2gb",
        'save ""',
        "hz 20",
        "client-output-buffer-limit replica 1gb 0 0",
    ]


def test_users_are_these_four_and_their_passwords_are_digests() -> None:
    users = {line.split()[1]: line.split()[2:] for line in redis_lines(config_of()) if line.startswith("user ")}
    assert set(users) == {"default", "replica", "sentinel", "srd"}
    for name, password in (
        ("default", SECRETS.redis_password),
        ("replica", SECRETS.replication_password),
        ("sentinel", SECRETS.sentinel_password),
        ("srd", SECRETS.srd_password),
    ):
        digest = hashlib.sha256(password.reveal().encode()).hexdigest()
        assert users[name][:2] == ["on", f"#{digest}"]
    assert users["srd"][2:] == ["~*", "allchannels", "+@all"]
    assert [name for name, rules in users.items() if "+@all" in rules and "-@admin" not in rules] == ["srd"]
    assert [name for name, rules in users.items() if "~*" in rules] == ["default", "srd"]


def test_only_the_passwords_that_redis_needs_in_clear_are_in_its_file() -> None:
    text = render.redis_conf(config_of(), config_of().nodes[0], SECRETS, HERE, None)
    assert SECRETS.srd_password.reveal() not in text
    assert SECRETS.sentinel_password.reveal() not in text


def test_an_application_gets_the_commands_and_channels_that_the_operator_adds() -> None:
    extra = '[redis]\napp_commands = ["client|list", "slowlog"]\napp_channels = ["news.*"]\n'
    default = next(line for line in redis_lines(config_of(extra=extra)) if line.startswith("user default"))
    assert default.endswith("+client|list +slowlog")
    assert " &news.* " in default


def glob(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[^", "[!"))


@given(st.text(st.sampled_from("_sentilhox:*"), max_size=14))
def test_application_channels_are_all_but_sentinels(tail: str) -> None:
    patterns = render.application_channels()
    assert not any(glob(pattern, f"__sentinel__{tail}") for pattern in patterns)
    if not "__sentinel__".startswith(tail) and not tail.startswith("__sentinel__"):
        assert any(glob(pattern, tail) for pattern in patterns)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(), "sentinel monitor master 10.0.0.2 6379 2"),
        (config_of(*(f"10.0.0.{n}" for n in range(1, 6))), "sentinel monitor master 10.0.0.2 6379 3"),
        (config_of(extra='[sentinel]\nmaster = "orders"'), "sentinel monitor orders 10.0.0.2 6379 2"),
        (config_of(), "sentinel auth-user master sentinel"),
        (config_of(), "sentinel auth-pass master sentinel-password"),
        (config_of(), 'requirepass "sentinel-password"'),
        (config_of(), "sentinel down-after-milliseconds master 5000"),
        (config_of(extra="[sentinel]\ndown_after = 4.5"), "sentinel down-after-milliseconds master 4500"),
        (config_of(extra="[sentinel]\nfailover_timeout = 7"), "sentinel failover-timeout master 7000"),
        (config_of(), "sentinel parallel-syncs master 2"),
        (config_of("10.0.0.1"), "sentinel parallel-syncs master 1"),
        (config_of(), "sentinel resolve-hostnames no"),
        (config_of(), "sentinel announce-ip 10.0.0.1"),
        (config_of(), "bind 10.0.0.1 127.0.0.1"),
        (config_of(extra="[sentinel]\nport = 7001"), "port 7001"),
    ],
)
def test_sentinel_conf_says(config: Config, expected: str) -> None:
    text = render.sentinel_conf(config, config.nodes[0], SECRETS, HERE, OTHER)
    assert expected in lines_of(text)
    assert SECRETS.redis_password.reveal() not in text
    assert SECRETS.srd_password.reveal() not in text


def test_stunnel_listens_on_the_nodes_addresses_and_connects_to_its_redis() -> None:
    config = config_of("10.0.0.1 fd00::1", "10.0.0.2 fd00::2", extra="[tls]\nport = 7002")
    lines = lines_of(render.stunnel_conf(config, config.nodes[0], Path("/s")))
    start = lines.index("[redis-ipv4]")
    assert lines[start:] == [
        "[redis-ipv4]",
        "accept = 10.0.0.1:7002",
        "connect = 10.0.0.1:6379",
        "[redis-ipv6]",
        "accept = fd00::1:7002",
        "connect = fd00::1:6379",
    ]
    for line in ("sslVersionMin = TLSv1.2", "renegotiation = no", "foreground = yes", "syslog = no", "pid ="):
        assert line in lines


@pytest.mark.parametrize(
    "password", ["short", "with blank in it", 'quote"quote"', "line\nline\nline", "#hash-like-password"]
)
def test_a_password_that_a_file_could_garble_is_refused_without_being_shown(password: str) -> None:
    secrets = Secrets(Secret(password), Secret(password), Secret(password), Secret(password))
    config = config_of()
    with pytest.raises(ConfigError) as of_redis:
        render.redis_conf(config, config.nodes[0], secrets, HERE, None)
    with pytest.raises(ConfigError) as of_sentinel:
        render.sentinel_conf(config, config.nodes[0], secrets, HERE, OTHER)
    assert password not in str(of_redis.value) + str(of_sentinel.value)


def test_rendering_is_repeatable() -> None:
    config = config_of()
    first = render.redis_conf(config, config.nodes[0], SECRETS, HERE, OTHER)
    assert render.redis_conf(config, config.nodes[0], SECRETS, HERE, OTHER) == first
