"""The doctor against three real redis and three real sentinels: every trouble is made for real, found, and mended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis as RawRedis
from support.sentinels import SECRETS, Cluster, redis_client, sentinel_client, until, whole

from srd.actions import DutyActions
from srd.cluster import Node
from srd.control.server import ControlServer
from srd.duties import Duties
from srd.findings import Cure, Finding, Trouble
from srd.ha.doctor import Look, not_listed
from srd.ha.patient import Account, Patient
from srd.ha.repair import Doctor, Examination
from srd.ha.resp import RespError
from srd.ha.restart import patience_seconds
from srd.model import Body, NoAnswerError, NodeKind, Paths, RefusedError, Role, SrdError
from srd.reconcile import boottime
from srd.state import Situation, Store
from srd.systemd import FdStore, Notifier

NAMES = ("n1", "n2", "n3")
FOURTH = Node("n4", NodeKind.REDIS, (ip_address("127.0.1.4"),))


async def paced(cluster: Cluster) -> None:
    """Start everything, at the pace that srd sets."""
    await whole(cluster)
    for name in NAMES:
        async with sentinel_client(cluster, name) as client:
            await client.keep_pace()


def doctor_of(cluster: Cluster, published: list[tuple[Finding, ...]] | None = None, **options: float) -> Doctor:
    publish = published.append if published is not None else lambda _: None

    async def rebuild(node: Node, wish: Body) -> None:
        """Do what the srd of that node does; the primary is n1 here."""
        assert wish["primary"] == str(cluster.endpoint("n1"))
        cluster.kill(f"sentinel-{node.name}")
        conf(cluster, node.name).rename(conf(cluster, node.name).with_name("former"))
        await started_again(cluster, node.name)

    return Doctor(cluster.config, SECRETS, publish, rebuild=rebuild, **{"lasts": 1.0, **options})


def troubles(seen: Examination) -> set[tuple[str, Trouble]]:
    return {(finding.node, finding.trouble) for finding in seen.findings}


async def found(doctor: Doctor, wanted: set[tuple[str, Trouble]], seconds: float = 40) -> Examination:
    """Examine again until exactly this is found."""
    seen: list[Examination] = []

    async def so() -> bool:
        seen.append(await doctor.examine())
        return seen[-1].unsettled is None and troubles(seen[-1]) == wanted

    try:
        await until(so, seconds)
    except RespError:
        pytest.fail(f"found instead: {seen[-1].findings}, {seen[-1].unsettled}")
    return seen[-1]


def everywhere(trouble: Trouble, names: tuple[str, ...] = NAMES) -> set[tuple[str, Trouble]]:
    return {(name, trouble) for name in names}


async def account(cluster: Cluster, name: str) -> Account:
    patient = Patient(cluster.config, cluster.config.node(name), SECRETS)
    try:
        return await patient.account()
    finally:
        await patient.close()


async def identities(cluster: Cluster) -> dict[str, tuple[str, str | None, int]]:
    seen = [await account(cluster, name) for name in NAMES]
    return {each.node: (each.run_id, each.primary, each.epoch) for each in seen}


async def started_again(cluster: Cluster, name: str) -> None:
    """Start a sentinel again, at srd's pace."""
    cluster.sentinel(name)
    async with sentinel_client(cluster, name) as client:

        async def paced_again() -> bool:
            await client.keep_pace()
            return True

        await until(paced_again)


async def met(cluster: Cluster) -> None:
    """Start the third sentinel again, and wait until everyone lists everyone that is there."""
    await started_again(cluster, "n3")

    async def whole_lists() -> bool:
        seen = await doctor_of(cluster).look()
        lists = [not_listed(cluster.config, seen, each) for each in seen.accounts.values()]
        return len(lists) == len(NAMES) and not any(lists)

    await until(whole_lists)


async def tell(cluster: Cluster, name: str, *words: str) -> Any:
    address = str(cluster.config.node(name).address)
    async with RawRedis(host=address, port=cluster.config.sentinel.port, password="between-sentinels") as client:
        return await client.execute_command("SENTINEL", *words)


def conf(cluster: Cluster, name: str) -> Path:
    return cluster.root / f"sentinel-{name}" / "it.conf"


@contextlib.contextmanager
def with_fourth(cluster: Cluster) -> Iterator[None]:
    """Let a node be started that the doctor's file does not have."""
    config = cluster.config
    cluster.config = dataclasses.replace(config, nodes=(*config.nodes, FOURTH))
    try:
        yield
    finally:
        cluster.config = config


async def nothing_to_do(doctor: Doctor, cluster: Cluster) -> None:
    """What is mended stays so: a second repair finds nothing and changes nothing."""
    before = [await account(cluster, name) for name in NAMES]
    again = await doctor.repair(dry_run=False)
    assert (again.done, again.after.findings, again.after.unsettled) == ((), (), None)
    after = [await account(cluster, name) for name in NAMES]
    for one, other in zip(before, after, strict=True):
        assert {entry.run_id for entry in one.sentinels} == {entry.run_id for entry in other.sentinels}
        assert set(one.replicas) == set(other.replicas)
        assert one.settings == other.settings


async def stale_sentinel(cluster: Cluster, doctor: Doctor) -> None:
    """Have a fourth sentinel be known to all, and go."""
    with with_fourth(cluster):
        cluster.sentinel("n4")
    alive = await found(doctor, everywhere(Trouble.STRANGE_SENTINEL))
    assert {finding.cure for finding in alive.findings} == {Cure.BY_HAND}
    assert (await doctor.repair(dry_run=False)).done == (), "what is alive would only be found again"
    cluster.kill("sentinel-n4")
    await found(doctor, everywhere(Trouble.STALE_SENTINEL))


async def test_a_sentinel_that_once_was_is_forgotten_by_one_after_the_other(cluster: Cluster) -> None:
    await paced(cluster)
    published: list[tuple[Finding, ...]] = []
    doctor = doctor_of(cluster, published)
    assert (await doctor.examine()).findings == ()
    await stale_sentinel(cluster, doctor)
    await doctor.watch()
    assert published == [()], "what only one look has seen may pass"
    await doctor.watch()
    assert {finding.trouble for finding in published[-1]} == {Trouble.STALE_SENTINEL}
    before = await identities(cluster)
    planned = await doctor.repair(dry_run=True)
    assert [sentence[:9] for sentence in planned.done] == [f"reset {name}'" for name in NAMES]
    assert len(planned.after.findings) == 3
    mended = await doctor.repair(dry_run=False)
    assert [sentence[:9] for sentence in mended.done] == [f"reset {name}'" for name in NAMES]
    assert (mended.after.findings, published[-1]) == ((), ())
    assert await identities(cluster) == before, "a reset takes away no id, no address and no epoch"
    await nothing_to_do(doctor, cluster)
    cluster.kill("sentinel-n1")
    cluster.sentinel("n1")
    await found(doctor, set())
    assert "127.0.1.4" not in conf(cluster, "n1").read_text()


@contextlib.asynccontextmanager
async def nameless_replica(cluster: Cluster) -> AsyncIterator[None]:
    """Follow the primary as backup tools do that never say at which port they listen (redis-cli --rdb, --replica)."""
    address = str(cluster.config.node("n1").address)
    reader, writer = await asyncio.open_connection(address, cluster.config.redis.port)
    for command, reply in ((b"AUTH replica replication\r\n", b"+OK"), (b"PSYNC ? -1\r\n", b"+FULLRESYNC")):
        writer.write(command)
        async with asyncio.timeout(10):
            await reader.readuntil(reply)
    drain = asyncio.ensure_future(reader.read())
    try:
        yield
    finally:
        drain.cancel()
        writer.close()


async def test_a_replica_that_was_removed_and_one_without_a_port_are_forgotten(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    with with_fourth(cluster):
        cluster.redis("n4")

    async def both_listed() -> bool:
        lists = [(await account(cluster, name)).replicas for name in NAMES]
        return all(
            any(at.endswith(":0") for at in replicas) and any(at.startswith(f"{FOURTH.address}:") for at in replicas)
            for replicas in lists
        )

    async with nameless_replica(cluster):
        await until(both_listed)
        alive = await found(doctor, everywhere(Trouble.STRANGE_REPLICA))
        following = {finding.subject for finding in alive.findings}
        assert {place.partition(":")[2] for place in following} == {"0", str(cluster.config.redis.port)}
        assert (await doctor.repair(dry_run=False)).done == ()
    cluster.kill("redis-n4")
    gone = await found(doctor, everywhere(Trouble.STALE_REPLICA))
    assert {finding.subject for finding in gone.findings} == following
    mended = await doctor.repair(dry_run=False)
    assert (len(mended.done), mended.after.findings) == (3, ())
    await nothing_to_do(doctor, cluster)


async def test_settings_are_set_where_they_differ_and_nowhere_else(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    for setting in (
        ("quorum", "1"),
        ("failover-timeout", "9000"),
        ("parallel-syncs", "1"),
        ("down-after-milliseconds", "9"),
    ):
        await tell(cluster, "n2", "SET", "master", *setting)
    await tell(cluster, "n3", "CONFIG", "SET", "announce-port", "4")
    other = await account(cluster, "n1")

    async def misled() -> bool:
        listed = await account(cluster, "n1")
        return any(entry.port == 4 for entry in listed.sentinels)

    await until(misled)
    await tell(cluster, "n2", "SET", "master", "down-after-milliseconds", "4001")
    seen = await found(
        doctor,
        {
            ("n2", Trouble.SETTING),
            ("n3", Trouble.SETTING),
            ("n1", Trouble.STALE_SENTINEL),
            ("n2", Trouble.STALE_SENTINEL),
        },
    )
    assert {finding.subject for finding in seen.findings if finding.cure is Cure.SET} == {
        "quorum",
        "failover-timeout",
        "parallel-syncs",
        "down-after-milliseconds",
        "announce-port",
    }
    mended = await doctor.repair(dry_run=False)
    assert [sentence.partition(" ")[0] for sentence in mended.done] == ["set"] * 5, "a right address needs no reset"
    assert mended.after.findings == ()
    assert (await account(cluster, "n1")).settings == other.settings
    await nothing_to_do(doctor, cluster)


def without_id(text: str) -> str:
    return re.sub(r"(?m)^sentinel myid .*\n", "", text)


async def test_an_id_that_nobody_has_any_more_is_forgotten(cluster: Cluster) -> None:
    """At port 0, as sentinels before 7.0.15 leave it, and at an address that another id has."""
    await paced(cluster)
    doctor = doctor_of(cluster)
    ghosts = {"n1": ("a" * 40, 0), "n2": ("b" * 40, cluster.config.sentinel.port)}
    for name, (ghost, port) in ghosts.items():
        cluster.kill(f"sentinel-{name}")
        with conf(cluster, name).open("a") as file:
            file.write(f"sentinel known-sentinel master 127.0.1.3 {port} {ghost}\n")
        cluster.sentinel(name)
    seen = await found(doctor, everywhere(Trouble.GHOST_SENTINEL, ("n1", "n2")))
    assert [finding.subject for finding in seen.findings] == [
        f"{ghost}@127.0.1.3:{port}" for ghost, port in ghosts.values()
    ]
    mended = await doctor.repair(dry_run=False)
    assert (len(mended.done), mended.after.findings) == (2, ())
    await nothing_to_do(doctor, cluster)


async def test_a_lost_id_is_nothing_to_mend(cluster: Cluster) -> None:
    """Sentinel itself drops the former id when it hears another one from the same address."""
    await paced(cluster)
    former = (await account(cluster, "n3")).run_id
    cluster.kill("sentinel-n3")
    conf(cluster, "n3").write_text(without_id(conf(cluster, "n3").read_text()))
    await met(cluster)
    assert (await doctor_of(cluster).examine()).findings == ()
    assert (await account(cluster, "n3")).run_id != former


async def have_one_id(cluster: Cluster) -> str:
    """Have n3 come back with the id that n2 has, as if its files had been copied; return that."""
    second = await account(cluster, "n2")
    cluster.kill("sentinel-n3")
    text = re.sub(r"(?m)^sentinel myid .*$", f"sentinel myid {second.run_id}", conf(cluster, "n3").read_text())
    text = re.sub(r"(?m)^sentinel known-sentinel .*\n", "", text)
    conf(cluster, "n3").write_text(text)
    cluster.sentinel("n3")
    return second.run_id


async def test_of_two_with_one_id_the_later_one_gets_another_and_the_others_forget_what_it_had(
    cluster: Cluster,
) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    shared = await have_one_id(cluster)
    ghosts = everywhere(Trouble.GHOST_SENTINEL, ("n1", "n2"))  # the id that n3 had before
    await found(doctor, everywhere(Trouble.DUPLICATE_ID, ("n2", "n3")) | ghosts)
    planned = await doctor.repair(dry_run=True)
    assert [sentence.partition(":")[0] for sentence in planned.done] == [
        "put n3's sentinel.conf aside and have it begin anew",
        "look again then, and reset whoever still lists what is gone",
    ]
    assert (await account(cluster, "n3")).run_id == shared
    mended = await doctor.repair(dry_run=False)
    assert mended.done[0].startswith("put n3's sentinel.conf aside: its sentinel began anew")
    assert mended.after.findings == ()
    assert (await account(cluster, "n2")).run_id == shared
    assert (await account(cluster, "n3")).run_id != shared
    await nothing_to_do(doctor, cluster)


async def test_no_sentinel_is_rebuilt_that_a_majority_needs(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    shared = await have_one_id(cluster)
    cluster.kill("sentinel-n1")
    silent_and_ghost = {("n1", Trouble.SILENT), ("n2", Trouble.GHOST_SENTINEL)}
    await found(doctor, everywhere(Trouble.DUPLICATE_ID, ("n2", "n3")) | silent_and_ghost)
    for dry_run in (True, False):
        with pytest.raises(RefusedError, match="without the sentinel of n3 no majority would answer and monitor"):
            await doctor.repair(dry_run=dry_run)
    assert (await account(cluster, "n3")).run_id == shared


async def test_a_sentinel_that_monitors_nobody_begins_anew(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    await tell(cluster, "n3", "REMOVE", cluster.config.sentinel.master)
    await found(doctor, {("n3", Trouble.OTHER_PRIMARY)})
    assert (await doctor.repair(dry_run=False)).after.findings == ()
    await nothing_to_do(doctor, cluster)


async def test_a_sentinel_that_monitors_another_in_the_same_epoch_begins_anew(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    cluster.kill("sentinel-n3")
    text = conf(cluster, "n3").read_text()
    address, port = cluster.endpoint("n2").address, cluster.config.redis.port
    kept = re.sub(r"(?m)^sentinel known-.*\n", "", text)
    conf(cluster, "n3").write_text(
        re.sub(r"(?m)^sentinel monitor .*$", f"sentinel monitor master {address} {port} 2", kept)
    )
    cluster.sentinel("n3")
    seen = await found(doctor, {("n3", Trouble.EPOCH_TIE)})
    assert seen.findings[0].subject == f"{address}:{port}"
    assert (await doctor.repair(dry_run=False)).after.findings == ()
    await nothing_to_do(doctor, cluster)


async def test_what_is_only_said_is_left_alone(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    await tell(cluster, "n1", "MONITOR", "another", "127.0.1.2", str(cluster.config.redis.port), "2")
    await tell(cluster, "n2", "SET", "master", "auth-pass", "wrong")
    await tell(cluster, "n3", "SET", "master", "quorum", "3")
    seen = await found(doctor, {("n1", Trouble.FURTHER_MASTER), ("n2", Trouble.SEES_DOWN), ("n3", Trouble.SETTING)})
    assert seen.findings[0].subject == "another"
    mended = await doctor.repair(dry_run=False)
    assert mended.done == ("set quorum of n3's sentinel to 2",)
    assert troubles(mended.after) == {("n1", Trouble.FURTHER_MASTER), ("n2", Trouble.SEES_DOWN)}


async def test_nothing_is_reset_while_a_loss_more_would_be_the_majority(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    await stale_sentinel(cluster, doctor)
    await tell(cluster, "n1", "SET", "master", "quorum", "3")
    cluster.kill("sentinel-n3")
    ids = {entry.run_id for entry in (await account(cluster, "n1")).sentinels}
    with pytest.raises(SrdError, match="n3 does not answer, and without n1 there would be no majority") as refused:
        await doctor.repair(dry_run=False)
    assert "done before: set quorum of n1's sentinel to 2" in refused.value.reason, (
        "a setting needs no more than a majority"
    )
    assert {entry.run_id for entry in (await account(cluster, "n1")).sentinels} == ids
    cluster.kill("sentinel-n2")
    with pytest.raises(RefusedError, match="1 of 3 sentinels answer, and 2 are a majority"):
        await doctor.repair(dry_run=False)


async def test_nothing_is_touched_during_a_failover_nor_reset_before_everyone_is_back(cluster: Cluster) -> None:
    await paced(cluster)
    doctor = doctor_of(cluster)
    await stale_sentinel(cluster, doctor)
    cluster.kill("redis-n1")
    with pytest.raises(RefusedError, match=r"does not answer as primary|for down|a failover"):
        await doctor.repair(dry_run=False)
    settled = await found(doctor, everywhere(Trouble.STALE_SENTINEL), patience_seconds(cluster.config))
    assert settled.look.redis is not None
    with pytest.raises(RefusedError, match="n1 does not follow the primary"):
        await doctor.repair(dry_run=False)
    winner = next(name for name in NAMES if str(cluster.endpoint(name)) == settled.look.accounts["n1"].primary)
    cluster.redis("n1", primary=winner)
    async with redis_client(cluster, "n1") as client:

        async def linked() -> bool:
            seen = await client.observe()
            return seen.role is Role.REPLICA and seen.link_up

        await until(linked)
    epoch = (await account(cluster, "n1")).epoch
    assert epoch > 0
    mended = await doctor.repair(dry_run=False)
    assert (len(mended.done), mended.after.findings) == (3, ())
    assert (await account(cluster, "n1")).epoch == epoch


async def test_a_reset_that_does_not_end_well_stops_everything(cluster: Cluster) -> None:
    await paced(cluster)
    await stale_sentinel(cluster, doctor_of(cluster))
    with pytest.raises(SrdError, match=r"0\.1 s after its reset it has not found") as stopped:
        await doctor_of(cluster, found_again=0.1).repair(dry_run=False)
    assert stopped.value.subject == "the sentinel of n1"
    assert "done before: reset n1's sentinel; nothing else was touched" in stopped.value.reason
    await found(doctor_of(cluster), everywhere(Trouble.STALE_SENTINEL, ("n2", "n3")))


async def test_a_primary_that_dies_while_a_sentinel_is_being_reset_is_replaced_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await paced(cluster)
    await stale_sentinel(cluster, doctor_of(cluster))
    reset = Patient.reset

    async def reset_and_lose_the_primary(patient: Patient) -> None:
        await reset(patient)
        cluster.kill("redis-n1")

    monkeypatch.setattr(Patient, "reset", reset_and_lose_the_primary)
    with pytest.raises(SrdError, match="reset n1's sentinel; nothing else was touched"):
        await doctor_of(cluster).repair(dry_run=False)

    async def replaced() -> bool:
        seen = await doctor_of(cluster).look()
        primaries = {each.primary for each in seen.accounts.values()}
        return len(primaries) == 1 and str(cluster.endpoint("n1")) not in primaries and seen.redis is not None

    await until(replaced, patience_seconds(cluster.config))


async def test_of_two_repairs_at_once_no_two_sentinels_are_being_reset(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await paced(cluster)
    await stale_sentinel(cluster, doctor_of(cluster))
    away: list[str] = []
    together: list[set[str]] = []
    found_again = Doctor._found_again

    async def noted(self: Doctor, patient: Patient, look: Look, stale: Sequence[Finding]) -> float:
        away.append(patient.node)
        together.append(set(away))
        try:
            return await found_again(self, patient, look, stale)
        finally:
            away.remove(patient.node)

    monkeypatch.setattr(Doctor, "_found_again", noted)
    await asyncio.gather(*(doctor_of(cluster).repair(dry_run=False) for _ in range(2)), return_exceptions=True)
    assert together
    assert all(len(nodes) == 1 for nodes in together), together
    assert (await doctor_of(cluster).repair(dry_run=False)).after.findings == ()
    await nothing_to_do(doctor_of(cluster), cluster)


async def test_a_sentinel_that_hangs_is_silent_and_delays_a_look_by_its_bound_alone(cluster: Cluster) -> None:
    await paced(cluster)
    cluster.send("sentinel-n3", signal.SIGSTOP)
    seen = await doctor_of(cluster).examine()
    assert troubles(seen) == {("n3", Trouble.SILENT)}
    cluster.send("sentinel-n3", signal.SIGCONT)


async def srd(directory: Path, *arguments: str) -> tuple[int, str]:
    """Run the command as a user does, against the control socket in the directory."""
    environment = {"PATH": os.environ["PATH"], "SRD_RUN_DIR": str(directory)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "srd", *arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def nobody(_peer: str, _what: str, _body: Body, _seconds: float) -> Body:
    raise NoAnswerError("ask", "a peer", "there is none")


async def test_the_command_shows_plans_and_mends(cluster: Cluster, tmp_path: Path) -> None:
    await paced(cluster)
    node = cluster.config.node("n1")
    paths = Paths(tmp_path / "config", tmp_path / "state", tmp_path, tmp_path / "log")
    store = Store(boottime())
    duties = Duties(
        config=cluster.config,
        node=node,
        paths=paths,
        secrets=SECRETS,
        store=store,
        situation=lambda: Situation(cluster.config, node, store.view(), boottime()),
        fds=FdStore(Notifier(None)),
        ask_peer=nobody,
        begin_anew=lambda: None,
    )

    server = ControlServer(
        paths.control_socket, duties._situation, version="0", actions=DutyActions(node, duties).by_path()
    )
    await server.start()
    try:
        assert await srd(tmp_path, "doctor") == (0, "nothing is wrong\n")
        await tell(cluster, "n2", "SET", "master", "quorum", "1")
        await tell(cluster, "n3", "MONITOR", "another", "127.0.1.2", str(cluster.config.redis.port), "2")
        status, shown = await srd(tmp_path, "doctor")
        assert status == 10
        assert re.search(r"(?m)^n2 +setting +--repair +quorum is 1, not 2$", shown)
        assert re.search(r"(?m)^n3 +further_master +by hand +it monitors another too", shown)
        status, planned = await srd(tmp_path, "doctor", "--repair", "--dry-run")
        assert (status, planned.splitlines()[0]) == (10, "would set quorum of n2's sentinel to 2")
        assert (await account(cluster, "n2")).settings["quorum"] == "1"
        status, mended = await srd(tmp_path, "doctor", "--repair", "-o", "json")
        document = json.loads(mended)
        assert (status, document["done"]) == (10, ["set quorum of n2's sentinel to 2"])
        assert [each["trouble"] for each in document["findings"]] == ["further_master"]
        cluster.kill("sentinel-n1")
        cluster.kill("sentinel-n2")
        status, refused = await srd(tmp_path, "doctor", "--repair")
        assert status == 40
        assert "cannot repair the sentinels: 1 of 3 sentinels answer, and 2 are a majority" in refused
        assert (await srd(tmp_path, "doctor", "--dry-run"))[0] == 2
    finally:
        await server.stop()
