import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from support.situations import (
    NOW,
    WALL,
    at,
    config,
    link,
    primary_redis,
    primary_situation,
    replica_situation,
    with_child,
)

from srd.changes import ChangeKind, RoleChange
from srd.conditions import Code, Severity
from srd.model import Pause, Service
from srd.reconcile import Loop
from srd.state import Kernel, Situation, View
from srd.web import health
from srd.web.catalogue import FAMILIES
from srd.web.metrics import TELLING_SECONDS, HttpCounts, Metrics

ROOT = Path(__file__).parents[2]
EVERYTHING_COUNTED = HttpCounts(requests={("/primary", 200): 7}, connections=2, refused={"timeout": 1})
ANSWERS = {("primary", "up"): 3}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def nothing() -> None:
    return


def loop_at(tick: float) -> Loop:
    loop = Loop("links", nothing, resync=1, timeout=1)
    loop.last_tick = tick
    return loop


def rendered(situation: Situation, http: HttpCounts = EVERYTHING_COUNTED) -> str:
    metrics = Metrics(lambda: situation, lambda: http, lambda: (loop_at(NOW - 1),), "0.1.0", agent_answers=ANSWERS)
    metrics.observe_request("/primary", 0.0007)
    metrics.observe_request("/primary", 5.0)
    return metrics.render().decode()


def samples(text: str) -> Samples:
    return {
        (
            sample.name,
            frozenset((name, value) for name, value in sample.labels.items() if name not in ("cluster", "node")),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def loaded() -> Iterator[Situation]:
    """Situations in which, together, everything is known that can be known."""
    kernel = Kernel(True, ("foreign",), 3, {"XfrmInNoPols": 2})
    busy = primary_situation(kernel=kernel, links={"redis-2": link("redis-2", 2)}, pause=Pause(1, WALL + 60))
    yield with_child(busy, Service.STUNNEL, exits={"1": 2}, restarts=2, retry_at=NOW + 1)
    yield replica_situation()


def exported() -> dict[str, tuple[str, frozenset[str]]]:
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for situation in loaded():
        for family in text_string_to_metric_families(rendered(situation)):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = frozenset(family.samples[0].labels) - {"le"}
            found[name] = (family.type, labels)
    return found


def test_everything_in_the_catalogue_is_exported_and_nothing_else() -> None:
    catalogue = {family.name: (family.kind, frozenset({"cluster", "node", *family.labels})) for family in FAMILIES}
    assert exported() == catalogue


def test_the_document_lists_exactly_what_is_exported() -> None:
    rows = re.findall(
        r"^\| `(srd_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    assert len(rows) == len(documented)
    assert documented == {family.name: (family.kind, frozenset(family.labels), family.help) for family in FAMILIES}


def test_names_follow_prometheus() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"srd_[a-z_]+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.help.endswith(".")
        assert not re.search(r"_(ms|us|kb|mb|age)(_|$)", family.name)


def test_what_is_not_known_is_absent() -> None:
    found = samples(rendered(replace(primary_situation(), view=View(started=NOW)), HttpCounts({}, 0, {})))
    names = {name for name, _ in found}
    assert value(found, "srd_redis_up") == 0
    assert value(found, "srd_primary") == 0
    for absent in ("srd_redis_loading", "srd_sentinel_reachable", "srd_ipsec_peer_protected", "srd_child_up"):
        assert absent not in names
    stale = samples(rendered(primary_situation(redis=primary_redis(answered=NOW - 60))))
    assert value(stale, "srd_redis_up") == 0
    assert value(stale, "srd_redis_keys") is None


def test_values_of_a_primary() -> None:
    found = samples(rendered(primary_situation()))
    assert value(found, "srd_primary") == 1
    assert value(found, "srd_role", role="primary") == 1
    assert value(found, "srd_role", role="replica") == 0
    assert value(found, "srd_primary_lease_expires_timestamp_seconds") == WALL + 3.5
    assert value(found, "srd_start_timestamp_seconds") == WALL - 700
    assert value(found, "srd_loop_last_tick_timestamp_seconds", loop="links") == WALL - 1
    assert value(found, "srd_redis_replication_lag_bytes", peer="redis-3") == 100
    assert value(found, "srd_ipsec_sa_bytes_total", peer="redis-2", direction="out") == 20
    assert value(found, "srd_child_state", service="redis", state="ready") == 1
    assert value(found, "srd_health_status", check="primary") == 1
    assert value(found, "srd_health_status", check="replica") == 0
    assert value(found, "srd_http_requests_total", path="/primary", code="200") == 7
    assert value(found, "srd_haproxy_agent_answers_total", question="primary", word="up") == 3
    assert value(found, "srd_http_request_duration_seconds_bucket", path="/primary", le="0.001") == 1
    assert value(found, "srd_http_request_duration_seconds_bucket", path="/primary", le="+Inf") == 2
    assert value(found, "srd_http_request_duration_seconds_count", path="/primary") == 2


def test_changes_of_primary_are_counted_by_kind_since_srd_started_and_once_they_are_settled() -> None:
    started, kinds = 700, (ChangeKind.CRASH, ChangeKind.SILENT, ChangeKind.CRASH, ChangeKind.SWITCHOVER)
    ages = (started + 1, started - 1, TELLING_SECONDS, TELLING_SECONDS - 1)
    history = tuple(
        RoleChange(WALL - age, epoch, at(1), at(2), kind=kind)
        for epoch, (age, kind) in enumerate(zip(ages, kinds, strict=True))
    )
    found = samples(rendered(primary_situation(history=history, started=NOW - started)))
    counted = {kind: value(found, "srd_primary_changes_total", kind=kind) for kind in ChangeKind}
    assert {kind: number for kind, number in counted.items() if number} == {ChangeKind.SILENT: 1, ChangeKind.CRASH: 1}
    assert None not in counted.values()
    assert value(found, "srd_primary_last_change_timestamp_seconds") == WALL - ages[-1]
    assert value(found, "srd_primary_last_change_duration_seconds", kind="switchover") is None


def test_every_sample_bears_cluster_and_node() -> None:
    for family in text_string_to_metric_families(rendered(primary_situation())):
        for sample in family.samples:
            assert sample.labels["cluster"] == "orders"
            assert sample.labels["node"] == "redis-1"


def test_conditions_are_counted_by_code_and_severity() -> None:
    found = samples(rendered(primary_situation(links={})))
    assert value(found, "srd_condition", code=Code.LINK_UNPROTECTED, severity=Severity.WARNING.name.lower()) == 2


def test_ipsec_off_has_no_peers() -> None:
    off = replace(primary_situation(), config=config('ipsec = { mode = "off" }'))
    found = samples(rendered(off))
    assert value(found, "srd_ipsec_required") == 0
    assert value(found, "srd_ipsec_protected") == 0
    assert not any(dict(labels).get("peer") for name, labels in found if name.startswith("srd_ipsec"))


def test_an_unknown_replica_has_no_label_of_its_own() -> None:
    stranger = replace(primary_redis().replicas[0], endpoint=at(90))
    text = rendered(primary_situation(redis=primary_redis(replicas=(stranger,))))
    assert "192.168.205.99" not in text


def test_a_start_time_does_not_move_when_the_clock_is_read_again() -> None:
    now = [primary_situation()]
    metrics = Metrics(
        lambda: now[0], lambda: EVERYTHING_COUNTED, tuple, "0.1.0", agent_answers=ANSWERS, cache_seconds=0
    )
    first = samples(metrics.render().decode())
    now[0] = replace(now[0], now=NOW + 10, wall_clock=WALL + 10.003)
    second = samples(metrics.render().decode())
    for name, labels in (
        ("srd_start_timestamp_seconds", {}),
        ("srd_child_start_timestamp_seconds", {"service": "redis"}),
    ):
        assert value(first, name, **labels) == value(second, name, **labels)


def test_a_scrape_is_made_once_a_second() -> None:
    now = [primary_situation()]
    metrics = Metrics(lambda: now[0], lambda: EVERYTHING_COUNTED, tuple, "0.1.0", agent_answers=ANSWERS)
    first = metrics.render()
    now[0] = replace(now[0], view=View(started=0.0), now=NOW + 0.9)
    assert metrics.render() is first
    now[0] = replace(now[0], now=NOW + 1.0)
    assert metrics.render() != first


def test_every_condition_is_explained() -> None:
    text = (ROOT / "docs/conditions.md").read_text()
    assert re.findall(r"^## `(\w+)`$", text, re.MULTILINE) == [code.value for code in Code]
    for section in text.split("\n## ")[1:]:
        assert "**What to do.**" in section


def test_every_error_code_and_path_of_http_is_documented() -> None:
    text = (ROOT / "docs/http.md").read_text()
    for code in health.ErrorCode:
        assert f"| `{code}` |" in text, code
    for path in health.CHECK_PATHS | {"/liveness", "/srd", "/cluster", "/history", "/metrics"}:
        assert f"`{path}`" in text, path
