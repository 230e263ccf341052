"""The cluster loses its power, disks lose what they lose, nodes come back in any order: no key on a disk is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.whole import Whole, whole

from srd.control import client
from srd.model import Service


@pytest.fixture
def cluster() -> Iterator[Whole]:
    """Three nodes that are well, n1 the primary, with 200 keys that every disk has."""
    with whole() as made:
        begin(made)
        yield made


def begin(cluster: Whole) -> None:
    """Have the cluster come up, and every node know that it is part of it."""
    cluster.power_on(*cluster.names)
    cluster.wait_whole()
    assert cluster.wait_primary() == "n1"
    write(cluster, "n1", 200)
    states = [cluster.paths(name).state_dir for name in cluster.redises]
    cluster.wait(lambda: all((state / "initialized").exists() for state in states), "it is noted that they have joined")
    # A primary that led before anybody followed it has noted a stream that ended with the first who did; a replica that
    # was sent everything has noted how long its files were before they were written anew.
    cluster.wait(lambda: is_noted(cluster), "it is noted what they have")


def is_noted(cluster: Whole) -> bool:
    """Whether each node has noted one and the same stream, and the file that its redis appends to."""
    try:
        notes = {n: json.loads((cluster.paths(n).state_dir / "progress.json").read_text()) for n in cluster.redises}
    except FileNotFoundError:
        return False
    logs = {name: log.name if (log := log_of(cluster, name)) is not None else "" for name in notes}
    of_one_stream = len({note["replid"] for note in notes.values()}) == 1
    return of_one_stream and all(note["log"] == logs[name] for name, note in notes.items())


def write(cluster: Whole, primary: str, count: int) -> None:
    """Write keys that all nodes have, in memory and in their files."""
    first = cluster.ask(primary, "DBSIZE")
    with cluster.redis(primary) as client:
        for number in range(first, first + count):
            client.set(f"key:{number}", "value " * (number % 7))
        assert client.execute_command("WAIT", len(cluster.redises) - 1, 5000) == len(cluster.redises) - 1
    cluster.wait(lambda: all(len(cluster.keys(name)) == first + count for name in cluster.redises), "all have them")


def log_of(cluster: Whole, name: str) -> Path | None:
    return max((cluster.data(name) / "appendonlydir").glob("*.incr.aof"), default=None)


def own_log(cluster: Whole, name: str) -> Path:
    log = log_of(cluster, name)
    assert log is not None
    return log


def cut_short(cluster: Whole, name: str, lost: int) -> None:
    """Take the last bytes from a node's append-only file, as a power cut does."""
    log = own_log(cluster, name)
    os.truncate(log, max(0, log.stat().st_size - lost))


def append_zeros(cluster: Whole, name: str) -> None:
    """Let a node's append-only file be as long as it was to become, and zeros where nothing was written in time."""
    log = own_log(cluster, name)
    os.truncate(log, log.stat().st_size + 1000)


def leave_a_hole(cluster: Whole, name: str) -> None:
    """Have a node's append-only file say everything twice, with zeros between: it is long, and redis cannot read it."""
    log = own_log(cluster, name)
    content = log.read_bytes()
    log.write_bytes(content + bytes(100) + content)


def leads_with_all(cluster: Whole, name: str, count: int) -> None:
    """Wait until that node leads a whole cluster with all the keys."""
    assert cluster.wait_primary() == name, cluster.logs()
    if cluster.running.keys() == set(cluster.names):
        cluster.wait_whole()
    assert len(cluster.keys(name)) == count
    cluster.wait(lambda: cluster.in_step(*(set(cluster.running) & set(cluster.redises))), "the others have it")


def one_of_the_others_leads_with_all(cluster: Whole) -> None:
    leader = cluster.wait_primary("n2", "n3")
    cluster.wait_whole()
    assert len(cluster.keys(leader)) == 200
    cluster.wait(cluster.in_step, "the others have it")


@pytest.mark.parametrize(
    ("order", "most"),
    [
        (("n1", "n2", "n3"), "n3"),
        (("n1", "n2", "n3"), "n1"),
        (("n3", "n2", "n1"), "n3"),
        (("n3", "n2", "n1"), "n1"),
        (("n2", "n3", "n1"), "n2"),
    ],
)
def test_who_has_most_leads_in_whatever_order_the_nodes_come_up(
    cluster: Whole, order: tuple[str, ...], most: str
) -> None:
    cluster.power_off(*cluster.names)
    for number, name in enumerate(cluster.names):
        if name != most:
            cut_short(cluster, name, 37 + 400 * number)
    for name in order:
        cluster.power_on(name)
        time.sleep(2)
    leads_with_all(cluster, most, 200)


def test_whose_disk_is_complete_leads_where_the_primarys_lost_all_that_it_had_appended(cluster: Whole) -> None:
    cluster.power_off(*cluster.names)
    os.truncate(own_log(cluster, "n1"), 0)
    cut_short(cluster, "n2", 10)
    cluster.power_on(*cluster.names)
    leads_with_all(cluster, "n3", 200)


def test_zeros_that_a_power_cut_leaves_at_the_end_of_a_file_cost_nothing_and_count_for_nothing(cluster: Whole) -> None:
    cluster.power_off(*cluster.names)
    cut_short(cluster, "n1", 100)
    for name in cluster.redises:
        append_zeros(cluster, name)
    cut_short(cluster, "n2", 1050)
    append_zeros(cluster, "n2")
    (unfinished := cluster.data("n1") / "temp-1764532800.4711.rdb").write_bytes(b"REDIS0010")
    cluster.power_on(*cluster.names)
    leads_with_all(cluster, "n3", 200)
    assert not unfinished.exists()
    assert "child_flapping" not in set().union(*(cluster.codes(name) for name in cluster.names)), "each started at once"


@pytest.mark.parametrize("lost", ["data", "manifest", "all"])
def test_a_primary_that_comes_back_empty_is_replaced_by_who_has_the_data(cluster: Whole, lost: str) -> None:
    cluster.power_off(*cluster.names)
    if lost == "manifest":
        (cluster.data("n1") / "appendonlydir" / "appendonly.aof.manifest").unlink()
    else:
        shutil.rmtree(cluster.data("n1") if lost == "data" else cluster.paths("n1").state_dir)
    cut_short(cluster, "n3", 100)
    cluster.power_on(*cluster.names)
    leads_with_all(cluster, "n2", 200)


def test_a_primary_put_back_from_a_backup_does_not_lead(cluster: Whole) -> None:
    backup = cluster.root / "backup"
    cluster.power_off(*cluster.names)
    shutil.copytree(cluster.data("n1"), backup)
    for path in (backup, *backup.rglob("*")):
        shutil.chown(path, "redis", "redis")
    cluster.power_on(*cluster.names)
    assert cluster.wait_primary() == "n1"
    cluster.wait_whole()
    write(cluster, "n1", 50)
    for name in cluster.names:  # then no file has the end of another's
        cluster.ask(name, "BGREWRITEAOF")
        cluster.wait(lambda name=name: not cluster.ask(name, "INFO", "persistence")["aof_rewrite_in_progress"], "done")  # type: ignore[misc]
    write(cluster, "n1", 50)
    time.sleep(12)  # longer than a note may be old
    cluster.power_off(*cluster.names)
    shutil.rmtree(cluster.data("n1"))
    backup.rename(cluster.data("n1"))
    cluster.power_on(*cluster.names)
    assert cluster.wait_primary() in ("n2", "n3")
    assert len(cluster.keys(cluster.wait_primary())) == 300


def test_without_the_primarys_node_the_one_with_most_of_the_others_is_elected(cluster: Whole) -> None:
    cluster.power_off(*cluster.names)
    cut_short(cluster, "n2", 500)
    cluster.power_on("n2", "n3")
    leads_with_all(cluster, "n3", 200)
    cluster.power_on("n1")
    cluster.wait_whole()
    assert cluster.wait_primary() == "n3"


def test_what_a_node_has_that_comes_too_late_is_kept(cluster: Whole) -> None:
    """n3 was a replica in step, and nobody else's disk has as much."""
    cluster.power_off(*cluster.names)
    for name in ("n1", "n2"):
        cut_short(cluster, name, 500)
    cluster.power_on("n1", "n2")
    assert cluster.wait_primary() == "n1"
    cluster.power_on("n3")
    cluster.wait(cluster.in_step, "n3 follows")
    assert len(cluster.keys("n3")) < 200
    kept = max((cluster.data("n3") / "kept").glob("[0-9]*Z"))
    assert b"key:199\r\n" in b"".join(log.read_bytes() for log in kept.rglob("*.incr.aof"))


def test_a_primary_that_lost_its_power_for_a_moment_does_not_replace_what_the_others_have(cluster: Whole) -> None:
    cluster.power_off("n1")
    cut_short(cluster, "n1", 1000)
    cluster.power_on("n1")
    one_of_the_others_leads_with_all(cluster)


def test_a_primary_whose_redis_cannot_load_its_files_is_replaced(cluster: Whole) -> None:
    cluster.power_off(*cluster.names)
    leave_a_hole(cluster, "n1")
    cut_short(cluster, "n2", 100)
    cluster.power_on(*cluster.names)
    assert cluster.wait_primary("n3") == "n3"
    assert len(cluster.keys("n3")) == 200


def test_a_replica_that_begins_anew_because_it_cannot_read_its_files_is_not_taken_for_one_with_data(
    cluster: Whole,
) -> None:
    cluster.power_off(*cluster.names)
    cut_short(cluster, "n1", 100)
    leave_a_hole(cluster, "n2")
    cluster.power_on("n2", "n1")
    said = cluster.root / "n2.log"
    cluster.wait(lambda: '"child ended"' in said.read_text() or cluster.primaries(), "n2 tries")
    assert "begins_anew" not in said.read_text(), "as long as nobody leads it keeps what it has"
    cluster.power_on("n3")
    assert cluster.wait_primary() == "n3"
    cluster.wait_whole("n1", "n3")
    assert len(cluster.keys("n3")) == 200
    cluster.wait(cluster.in_step, "the others have it")
    assert "begins_anew" in said.read_text()
    # How often it ended until then is said for two minutes.
    cluster.wait(lambda: cluster.codes("n2") <= {"ipsec_off", "child_flapping"}, "n2 is well")


def test_a_snapshot_beside_which_the_cluster_begins_empty_is_kept(cluster: Whole) -> None:
    cluster.ask("n1", "SAVE")
    cluster.power_off(*cluster.names)
    snapshot = (cluster.data("n1") / "dump.rdb").read_bytes()
    for name in cluster.redises:
        shutil.rmtree(cluster.data(name) / "appendonlydir")
    cluster.power_on(*cluster.names)
    cluster.wait_whole()
    assert cluster.ask(cluster.wait_primary(), "DBSIZE") == 0
    assert snapshot in [copy.read_bytes() for copy in cluster.data("n1").glob("kept/*/dump.rdb")]


def test_a_file_that_grew_by_more_than_its_redis_wrote_is_written_anew(cluster: Whole) -> None:
    log = own_log(cluster, "n2")
    with log.open("ab") as file:
        file.write(b"nothing that redis knows of" * 100)
    write(cluster, "n1", 1)
    cluster.wait(lambda: own_log(cluster, "n2").name != log.name, "there is another file")
    cluster.kill("n2", Service.REDIS)
    cluster.wait(lambda: len(cluster.keys("n2")) == 201, "it has loaded that")


def test_where_no_file_can_be_read_the_one_that_is_mended_by_hand_is_what_the_cluster_goes_on_with(
    cluster: Whole,
) -> None:
    cluster.power_off(*cluster.names)
    for name in cluster.redises:
        leave_a_hole(cluster, name)
    cluster.power_on(*cluster.names)
    for name in cluster.redises:
        cluster.wait(lambda name=name: "child_flapping" in cluster.codes(name), f"{name} tries again and again")  # type: ignore[misc]
    assert cluster.primaries() == []
    socket = cluster.paths("n2").control_socket
    client.post(socket, "/v1/pause?seconds=60")
    mend = ["redis-check-aof", "--fix", "appendonlydir/appendonly.aof.manifest"]
    subprocess.run(mend, cwd=cluster.data("n2"), input=b"y\n", check=True, capture_output=True, timeout=10)
    client.post(socket, "/v1/pause?seconds=0")
    assert cluster.wait_primary() == "n2"
    assert len(cluster.keys("n2")) == 200
    cluster.wait(cluster.in_step, "the others have it")


def test_a_primary_whose_replicas_died_before_it_is_back_sooner_than_an_election_takes(cluster: Whole) -> None:
    cluster.freeze("n1", Service.REDIS)
    for name in ("n2", "n3"):
        cluster.kill(name, Service.REDIS)
        cluster.wait(lambda name=name: cluster.ask(name, "ROLE")[3] != "connected", f"{name}'s redis is back")  # type: ignore[misc]
    cluster.kill("n1", Service.REDIS)
    assert cluster.wait_primary(seconds=20) == "n1"
    leads_with_all(cluster, "n1", 200)


@pytest.fixture
def forgetful() -> Iterator[Whole]:
    """Three nodes whose redises save nothing, n1 the primary, with 200 keys in memory."""
    with whole(extra='settings = { appendonly = "no", save = "" }') as made:
        begin(made)
        yield made


def test_a_primary_that_dies_without_persistence_empties_nobody(forgetful: Whole) -> None:
    """The second one has an old snapshot on its disk, from when it was a replica that was sent everything."""
    for _ in range(2):
        former = forgetful.wait_primary()
        forgetful.kill(former, Service.REDIS)
        forgetful.wait(lambda former=former: set(forgetful.primaries()) - {former}, "another one")  # type: ignore[misc]
        forgetful.wait_whole()
        leader = forgetful.wait_primary()
        assert len(forgetful.keys(leader)) == 200
        forgetful.wait(forgetful.in_step, "the others have it")


def test_a_primarys_node_that_is_back_at_once_without_persistence_empties_nobody(forgetful: Whole) -> None:
    forgetful.power_off("n1")
    forgetful.power_on("n1")
    one_of_the_others_leads_with_all(forgetful)


def test_that_a_cluster_without_persistence_forgets_everything_is_said_before_and_after(forgetful: Whole) -> None:
    said = {condition["code"]: condition["text"] for condition in forgetful.state("n2")["conditions"]}
    assert "no_persistence" in said
    forgetful.power_off(*forgetful.names)
    forgetful.power_on(*forgetful.names)
    leader = forgetful.wait_primary()
    forgetful.wait_whole()
    assert forgetful.keys(leader) == set()
    assert "no_persistence" in forgetful.codes(leader)


def test_of_nodes_that_keep_snapshots_alone_the_one_with_the_latest_leads() -> None:
    with whole(extra='settings = { appendonly = "no", save = "3600 1" }') as cluster:
        begin(cluster)
        for name, more in (("n1", 0), ("n2", 100), ("n3", 50)):
            cluster.ask(name, "SAVE")
            write(cluster, "n1", more)
        cluster.ask("n2", "SAVE")
        write(cluster, "n1", 10)
        cluster.power_off(*cluster.names)
        cluster.power_on(*cluster.names)
        cluster.wait_primary("n2")
        began = time.monotonic()
        while time.monotonic() - began < 3:
            assert cluster.primaries() == ["n2"], "nobody is led to it and away again"
        leads_with_all(cluster, "n2", 350)
