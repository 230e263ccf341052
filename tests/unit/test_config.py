"""cluster.toml: the samples that ship, and every mistake that a person can make in one, by key and line."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srd.cluster import Config
from srd.config import load_config, parse_config
from srd.model import EXIT_CONFIG, ConfigError

SAMPLES = Path(__file__).parents[2] / "config"
MINIMAL = (SAMPLES / "cluster.toml").read_text()
REFERENCE = (SAMPLES / "cluster.reference.toml").read_text()


def parse(text: str) -> Config:
    return parse_config(text, "cluster.toml")


def test_the_reference_shows_the_defaults() -> None:
    assert parse(REFERENCE) == parse(MINIMAL)


def test_the_reference_names_every_key() -> None:
    config = parse(REFERENCE)
    for section in ("redis", "sentinel", "tls", "ipsec", "http", "haproxy_agent"):
        text = REFERENCE[REFERENCE.index(f"[{section}]") :]
        for key in getattr(config, section).__struct_fields__:
            assert re.search(rf"^#? ?{key} = |^\[{section}\.{key}\]", text, re.MULTILINE), f"{section}.{key}"


def test_a_cluster_of_three() -> None:
    config = parse(MINIMAL)
    assert [node.name for node in config.peers_of("redis-2")] == ["redis-1", "redis-3"]
    assert (config.majority, config.quorum, config.min_replicas_to_write) == (2, 2, 1)
    assert config.primary_lease == 2


def test_an_arbiter_votes_and_holds_no_data() -> None:
    config = parse(MINIMAL.replace('12"]', '12"]\nkind = "sentinel"'))
    assert len(config.voters) == 3
    assert [node.name for node in config.redis_nodes] == ["redis-1", "redis-2"]


def of(redis: int, arbiters: int = 0) -> Config:
    kinds = ["redis"] * redis + ["sentinel"] * arbiters
    nodes = (
        f'[[node]]\nname = "n{number}"\naddresses = ["192.0.2.{number}"]\nkind = "{kind}"\n'
        for number, kind in enumerate(kinds, 1)
    )
    return parse('cluster = "orders"\n' + "".join(nodes))


@pytest.mark.parametrize(
    ("redis", "arbiters", "majority", "min_replicas"),
    [
        (1, 0, 1, 0), (2, 0, 2, 1), (3, 0, 2, 1), (4, 0, 3, 2), (5, 0, 3, 2), (7, 0, 4, 3),
        (1, 1, 2, 0), (2, 1, 2, 1), (3, 1, 3, 1), (4, 1, 3, 2), (4, 2, 4, 2), (5, 2, 4, 3), (5, 3, 5, 3),
    ],
)  # fmt: skip
def test_quorum_and_what_a_write_needs_follow_from_the_number_of_nodes(
    redis: int, arbiters: int, majority: int, min_replicas: int
) -> None:
    config = of(redis, arbiters)
    assert (config.majority, config.quorum, config.min_replicas_to_write) == (majority, majority, min_replicas)


@pytest.mark.parametrize(("redis", "arbiters"), [(2, 2), (2, 3), (3, 2), (3, 4), (4, 3), (1, 2)])
def test_arbiters_by_which_every_write_would_need_every_replica_are_refused(redis: int, arbiters: int) -> None:
    with pytest.raises(ConfigError, match=f"{arbiters} arbiters .* beside {redis} redis nodes"):
        of(redis, arbiters)


@pytest.mark.parametrize(("redis", "arbiters"), [(r, a) for r in range(1, 10) for a in range(r) if a < 2 or a < r - 1])
def test_a_primary_takes_no_write_beside_a_side_that_can_elect_another(redis: int, arbiters: int) -> None:
    """By redis' own fence alone: every way to cut the nodes in two, and one replica may be lost from three on."""
    config = of(redis, arbiters)
    for replicas_here, arbiters_here in itertools.product(range(redis), range(arbiters + 1)):
        others = redis - 1 - replicas_here
        can_elect = others > 0 and others + arbiters - arbiters_here >= config.majority
        assert not (can_elect and replicas_here >= config.min_replicas_to_write)
    assert config.min_replicas_to_write <= max(redis - 2, min(redis - 1, 1))


@pytest.mark.parametrize(
    ("redis", "arbiters", "advice"),
    [(1, 0, "nothing takes over"), (1, 1, "nothing takes over"), (2, 0, "an arbiter"), (2, 1, None), (3, 0, None)],
)
def test_too_few_nodes_are_advised_against(redis: int, arbiters: int, advice: str | None) -> None:
    said = " ".join(of(redis, arbiters).advice)
    assert advice in said if advice is not None else said == ""


@pytest.mark.parametrize(
    ("text", "key", "line", "reason"),
    [
        (MINIMAL + "\n[redis]\nprot = 1\n", "redis.prot", 17, "no such key"),
        (MINIMAL + "\n[rdis]\n", "rdis", 16, "no such key"),
        (MINIMAL.replace("205.11", "205.10"), "node[1].addresses", 10, "192.168.205.10 is node 'redis-1' already"),
        (MINIMAL.replace("redis-2", "redis-1"), "node[1].name", 9, "redis-1 is node 'redis-1' already"),
        (MINIMAL.replace('"192.168.205.12"', '"db3"'), "node[2].addresses", 14, "'db3' is not an IP address"),
        (MINIMAL.replace('"192.168.205.12"', '"127.0.0.1"'), "node[2].addresses", 14, "not an address that other"),
        (MINIMAL.replace('"192.168.205.12"', ""), "node[2].addresses", 14, "no address"),
        (MINIMAL.replace('"192.168.205.12"', '"fd00::1"'), "node[2].addresses", 14, "the same IP families"),
        (MINIMAL.replace('12"', '12", "10.0.0.1"'), "node[2].addresses", 14, "2 IPv4 addresses"),
        (MINIMAL + 'kind = "etcd"\n', "node[2].kind", 15, "invalid enum value"),
        (MINIMAL.replace("orders", "Orders"), "cluster", 2, "not a name"),
        (MINIMAL + "[sentinel]\nquorum = 4\n", "sentinel.quorum", 16, "cannot be reached: 3 nodes"),
        (MINIMAL + "[sentinel]\nquorum = 1\n", "sentinel.quorum", 16, "less than a majority"),
        (MINIMAL + "[sentinel]\ndown_after = 1\n", "sentinel.down_after", 16, "takes writes for up to 4 s"),
        (MINIMAL + "[redis]\nport = 26379\n", "redis.port", 16, "port 26379 is sentinel.port too"),
        (MINIMAL + "[http]\nport = 849\n", "http.port", 16, "port 849 is taken by the keying channel"),
        (MINIMAL + "[http]\nport = 8081\n", "http.port", 16, "port 8081 is haproxy_agent.port too"),
        (MINIMAL + "[haproxy_agent]\nhost = 1\n", "haproxy_agent.host", 16, "no such key"),
        (MINIMAL + "[tls]\nport = 0\n", "tls.port", 16, "expected int >= 1"),
        (MINIMAL + '[redis]\nport = "6379"\n', "redis.port", 16, "expected int, got str"),
        (MINIMAL + '[ipsec]\nbypass = ["tcp/6379"]\n', "ipsec.bypass", 16, "never in plaintext"),
        (MINIMAL + '[ipsec]\nbypass = ["ssh"]\n', "ipsec.bypass", 16, "not of the form tcp/22"),
        (MINIMAL + '[redis]\napp_channels = ["*"]\n', "redis.app_channels", 16, "would open __sentinel__:hello"),
        (MINIMAL + '[redis]\napp_channels = ["__[a-z]*"]\n', "redis.app_channels", 16, "would open"),
        (MINIMAL + '[redis.settings]\nbind = "0.0.0.0"\n', "redis.settings.bind", 16, "srd sets this itself"),
        (MINIMAL + '[redis.settings]\nmaxmemory = "1\\nuser x"\n', "redis.settings.maxmemory", 16, "one line"),
        ('cluster = "a"\n[node]\nname = "x"\n', "node", 2, "expected array, got table"),
        ('cluster = "a"\nnode = []\n', "node", 2, 'no node of kind = "redis"'),
        ('cluster = "a"\n[[node]]\nname = "x"\n', "node[0].addresses", 2, "missing"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_key_and_line(text: str, key: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.exit_status == EXIT_CONFIG
    assert caught.value.subject == f"cluster.toml:{line}"
    assert caught.value.reason.startswith(f"{key}: ")
    assert reason in caught.value.reason


def test_what_is_not_toml_is_named_by_line() -> None:
    with pytest.raises(ConfigError, match=r"not TOML: .*line 1"):
        parse("cluster = orders\n")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the bundle that srd init made"):
        load_config(tmp_path / "cluster.toml")


@given(st.text(max_size=200))
def test_no_text_makes_it_fail_in_any_other_way(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@given(st.sampled_from(MINIMAL.splitlines()), st.sampled_from(REFERENCE.splitlines()))
def test_a_line_put_elsewhere_is_refused_or_understood(line: str, other: str) -> None:
    with contextlib.suppress(ConfigError):
        parse(MINIMAL.replace(line, other, 1))
