"""What redis and sentinel reply is read strictly: no default for what is missing, no number for what is a name."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from srd.ha.redis import _redis
from srd.ha.resp import Fields, UnexpectedReplyError, checked
from srd.ha.sentinel import _set_back
from srd.model import Endpoint, Role
from srd.state import Redis, ReplicaOf

# 40 hexadecimal digits that int() or float() would take for a number.
REPLID = "1234567890123456789012345678901234567e12"
RUN_ID = "0" * 39 + "1"
PRIMARY = f"""# Server\r
redis_version:7.2.4\r
run_id:{RUN_ID}\r
uptime_in_seconds:12\r
# Replication\r
role:master\r
slave0:ip=fd00::2,port=6379,state=online,offset=41,lag=1,type=main-channel\r
slave1:ip=10.0.0.3,port=6380,state=wait_bgsave,offset=0,lag=0\r
master_replid:{REPLID}\r
master_repl_offset:42\r
second_repl_offset:-1\r
slave_expires_tracked_keys:0\r
# Persistence\r
loading:0\r
aof_enabled:0\r
# Keyspace\r
db0:keys=3,expires=0,avg_ttl=0\r
db11:keys=4,expires=0,avg_ttl=0\r
"""
REPLICA = PRIMARY.replace("role:master", "role:slave") + (
    "master_host:10.0.0.1\r\nmaster_port:6379\r\nmaster_link_status:down\r\nmaster_sync_in_progress:1\r\n"
    "slave_repl_offset:40\r\n"
)


def read(text: str, save: str = "") -> Redis:
    info = Fields.of_info("redis at x", [text])
    return _redis(
        info,
        [
            Fields.of_list("redis at x", ["min-replicas-to-write", "1"]),
            Fields.of_list("redis at x", ["save", save]),
            Fields.of_list("redis at x", ["replica-priority", "100"]),
        ],
        asked=1.0,
        took=0.5,
    )


@pytest.mark.parametrize(("text", "offset"), [(PRIMARY, None), (PRIMARY.replace("offset:-1", "offset:31"), 30)])
def test_a_promoted_redis_knows_up_to_where_it_had_followed(text: str, offset: int | None) -> None:
    assert read(text).promoted_at_offset == offset


def test_a_primary() -> None:
    seen = read(PRIMARY, save="3600 1")
    assert (seen.role, seen.primary, seen.link_up, seen.sync_in_progress) == (Role.PRIMARY, None, False, False)
    assert (seen.run_id, seen.replid, seen.offset, seen.dbsize) == (RUN_ID, REPLID, 42, 7)
    assert (seen.version, seen.uptime_seconds, seen.persistence) == ("7.2.4", 12, True)
    assert seen.replicas == (
        ReplicaOf(Endpoint(ip_address("fd00::2"), 6379), "online", 41, 1),
        ReplicaOf(Endpoint(ip_address("10.0.0.3"), 6380), "wait_bgsave", 0, 0),
    )


def test_a_replica_counts_by_its_own_offset() -> None:
    seen = read(REPLICA)
    assert (seen.role, seen.primary) == (Role.REPLICA, Endpoint(ip_address("10.0.0.1"), 6379))
    assert (seen.link_up, seen.sync_in_progress, seen.offset, seen.persistence) == (False, True, 40, False)


@pytest.mark.parametrize(
    ("lines", "unsaved"),
    [
        ("", None),
        ("aof_last_write_status:ok\r\nrdb_last_bgsave_status:ok\r\n", None),
        ("aof_last_write_status:err\r\nrdb_last_bgsave_status:ok\r\n", "append-only file"),
        ("aof_last_write_status:ok\r\nrdb_last_bgsave_status:err\r\n", "snapshot (RDB)"),
    ],
)
def test_what_it_could_not_save(lines: str, unsaved: str | None) -> None:
    assert read(PRIMARY + lines).unsaved == unsaved


def test_valkey_says_its_own_version() -> None:
    assert read("valkey_version:8.1.0\r\n" + PRIMARY).version == "valkey 8.1.0"


@pytest.mark.parametrize(
    ("found", "instead", "complaint"),
    [
        ("loading:0\r\n", "", "loading is missing"),
        ("loading:0", "loading:2", "loading is '2'"),
        ("role:master", "role:sentinel", "role is 'sentinel'"),
        ("master_repl_offset:42", "master_repl_offset:", "master_repl_offset is ''"),
        ("offset=41", "offset=many", "offset is 'many'"),
        ("ip=10.0.0.3", "ip=redis-3", "ip is 'redis-3'"),
        ("keys=3", "keys=", "keys is ''"),
    ],
)
def test_what_is_missing_or_wrong_is_named(found: str, instead: str, complaint: str) -> None:
    assert found in PRIMARY
    with pytest.raises(UnexpectedReplyError, match="cannot understand redis at x: ") as raised:
        read(PRIMARY.replace(found, instead))
    assert complaint in str(raised.value)


def test_how_often_its_append_only_file_was_written_anew() -> None:
    assert read(PRIMARY).rewrites == 0
    assert read(PRIMARY + "aof_rewrites:3\r\n").rewrites == 3


@pytest.mark.parametrize(
    ("lines", "rewriting", "rewritten"),
    [
        ("", False, True),
        ("aof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0\r\naof_last_bgrewrite_status:ok\r\n", False, True),
        ("aof_rewrite_in_progress:1\r\naof_rewrite_scheduled:0\r\naof_last_bgrewrite_status:ok\r\n", True, True),
        ("aof_rewrite_in_progress:0\r\naof_rewrite_scheduled:1\r\naof_last_bgrewrite_status:err\r\n", True, False),
    ],
)
def test_whether_its_append_only_file_is_written_anew(lines: str, rewriting: bool, rewritten: bool) -> None:  # noqa: FBT001
    seen = read(PRIMARY + lines)
    assert (seen.rewriting, seen.rewritten) == (rewriting, rewritten)


@pytest.mark.parametrize(
    ("ping", "info", "seconds"),
    [("120", "900", 0.0), ("0", "0", 0.0), ("-3599880", "900", 3599.88), ("120", "-29000", 29.0), ("-1", "-5000", 5.0)],
)
def test_by_how_much_the_clock_of_a_sentinel_has_gone_back(ping: str, info: str, seconds: float) -> None:
    assert _set_back(Fields("sentinel at x", {"last-ping-reply": ping, "info-refresh": info})) == seconds


def test_a_reply_of_another_kind_is_refused() -> None:
    with pytest.raises(UnexpectedReplyError, match="the reply is a int"):
        checked("redis at x", 1, str)
