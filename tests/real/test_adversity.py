"""What goes wrong on a machine: each is a condition with its cause, kills nothing, and is over when its cause is."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from support.machine import Machine
from support.unit import ask, conditions, healthy, lives, pids, srd, unit_node

REGISTER = "/run/srd/children.json"
STATE = "/var/lib/srd"
# A primary that has died waits until nobody else can have been promoted: here for 18 s.
IMPATIENT = "[sentinel]\ndown_after = 4.0\nfailover_timeout = 2.0\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with unit_node(tmp_path_factory.mktemp("bundles"), IMPATIENT) as made:
        yield made


@pytest.fixture(autouse=True)
def whole(node: Machine) -> Iterator[None]:
    """Each begins with a node that is well, and leaves one; the manager never has to start srd anew meanwhile."""
    node.wait(lambda: healthy(node) and not conditions(node), "nothing is wrong")
    restarts = node.show("srd", "NRestarts")
    yield
    node.wait(lambda: healthy(node) and not conditions(node), "nothing is wrong any more")
    assert node.show("srd", "NRestarts") == restarts


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A node whose state is on a file system of its own, of 64 MB."""
    with unit_node(tmp_path_factory.mktemp("bundles"), IMPATIENT) as made:
        made.run("systemctl", "stop", "srd")
        made.run("mount", "-t", "tmpfs", "-o", "size=64m,mode=0711", "small", STATE)
        made.run("systemctl", "start", "srd")
        made.wait(lambda: healthy(made) and not conditions(made), "nothing is wrong")
        yield made


def without_srd(node: Machine) -> None:
    """End srd alone, so that the next one finds its children by the register: a stop closes the manager's store."""
    node.run("srd", "stop", "--keep-data-path")


def test_a_full_disk_stops_writes_and_no_process_and_room_is_all_that_it_takes(small_disk: Machine) -> None:
    node = small_disk
    before, former = pids(node), node.show("srd", "MainPID")
    assert ask(node, "SET", "early", "1") == "OK"
    node.run("sh", "-c", f"cat /dev/zero > {STATE}/ballast", check=False)
    node.wait(lambda: conditions(node).get("disk_trouble", "").startswith("its file system is full"), "srd notices")
    node.wait(lambda: "MISCONF" in ask(node, "SET", "late", "1" * 65536), "redis refuses")
    node.wait(lambda: "saving_fails" in conditions(node), "srd says what redis does not do")
    # srd itself, started while nothing can be written.
    node.run("systemctl", "restart", "srd")
    node.wait(lambda: "disk_trouble" in conditions(node), "the next one notices, too")
    assert pids(node) == before
    node.run("rm", f"{STATE}/ballast")
    node.wait(lambda: healthy(node) and not conditions(node), "nothing is wrong any more")
    assert ask(node, "SET", "late", "1") == "OK"
    assert ask(node, "GET", "early") == "1"
    assert pids(node) == before
    assert node.show("srd", "NRestarts") == "0"
    assert node.show("srd", "MainPID") != former


def test_the_hole_that_a_full_disk_leaves_while_no_srd_looks_is_found_by_the_next_one(small_disk: Machine) -> None:
    node = small_disk
    assert "started" in ask(node, "BGREWRITEAOF")
    node.wait(
        lambda: saving(node)["aof_rewrite_in_progress"] == "0", "redis goes on with a file that it has made itself"
    )
    assert ask(node, "SET", "early", "1") == "OK"  # the file has a page, so that part of what follows is written
    without_srd(node)
    node.run("sh", "-c", f"cat /dev/zero > {STATE}/ballast", check=False)
    ask(node, "SET", "late", "1" * 10000)
    node.wait(lambda: saving(node)["aof_last_write_status"] == "err", "redis cannot write its file")
    node.run("rm", f"{STATE}/ballast")
    node.wait(lambda: saving(node)["aof_last_write_status"] == "ok", "redis has written the rest")
    assert "is not valid" in checked(node)
    rewrites = saving(node)["aof_rewrites"]
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node) and ask(node, "SET", "late", "1") == "OK", "it is written to")
    node.wait(lambda: saving(node)["aof_rewrites"] != rewrites, "srd has it written anew")
    node.wait(lambda: saving(node)["aof_rewrite_in_progress"] == "0", "that is done")
    assert "All AOF files and manifest are valid" in checked(node)


def saving(node: Machine) -> dict[str, str]:
    """Return what redis says of its files."""
    return dict(line.split(":", 1) for line in ask(node, "INFO", "persistence").splitlines() if ":" in line)


def checked(node: Machine) -> str:
    """Return what redis' checker says of the append-only files."""
    return node.run("redis-check-aof", f"{STATE}/redis/appendonlydir/appendonly.aof.manifest", check=False)


def test_on_a_read_only_disk_what_ended_comes_back_when_it_can_be_written_to(small_disk: Machine) -> None:
    node, daemon = small_disk, small_disk.show("srd", "MainPID")
    assert ask(node, "SET", "early", "1") == "OK"
    # As an error of the disk would: the kernel refuses it while anybody has a file open for writing.
    node.run("kill", "-STOP", daemon)
    node.run("kill", *(str(entry["pid"]) for entry in json.loads(node.run("cat", REGISTER))["children"]))
    node.wait(lambda: mounted(node, "ro"), "nobody has a file open any more")
    node.run("kill", "-CONT", daemon)
    node.wait(lambda: "read-only" in conditions(node).get("disk_trouble", ""), "srd notices")
    node.wait(lambda: "read-only" in conditions(node).get("child_down", "").lower(), "nothing can be started")
    assert mounted(node, "rw")
    node.wait(lambda: healthy(node) and not conditions(node), "nothing is wrong any more")
    assert ask(node, "GET", "early") == "1"
    assert node.show("srd", "NRestarts") == "0"


def test_a_srd_that_is_started_again_on_a_disk_that_takes_nothing_supervises_what_runs(small_disk: Machine) -> None:
    node, before = small_disk, pids(small_disk)
    # redis has its files open for writing, so the disk stays what it is, and srd sees it read-only.
    node.write("/etc/systemd/system/srd.service.d/read-only.conf", f"[Service]\nReadOnlyPaths={STATE}\n")
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "restart", "srd")
    node.wait(lambda: "read-only" in conditions(node).get("disk_trouble", ""), "srd notices")
    assert healthy(node)
    assert pids(node) == before
    assert node.show("srd", "ActiveState") == "active"
    node.run("rm", "/etc/systemd/system/srd.service.d/read-only.conf")
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "restart", "srd")
    node.wait(lambda: healthy(node) and not conditions(node), "nothing is wrong any more")
    assert pids(node) == before
    assert node.show("srd", "NRestarts") == "0"


def mounted(node: Machine, how: str) -> bool:
    remount = ("mount", "-o", f"remount,{how}", STATE)
    return node.run("sh", "-c", f"{shlex.join(remount)} 2>&1 && echo done", check=False).endswith("done\n")


@pytest.mark.parametrize("service", ["redis", "stunnel"])
def test_a_program_that_vanishes_is_named_and_started_when_it_is_there_again(node: Machine, service: str) -> None:
    program = node.run("readlink", "-f", f"/proc/{pids(node)[service]}/exe").strip()
    links = node.run("sh", "-c", "ls /usr/bin/redis-* /usr/bin/stunnel*").split()
    gone = [name for name in links if node.run("readlink", "-f", name).strip() == program]
    for name in gone:
        node.run("mv", name, f"{name}.away")
    node.run("kill", "-KILL", str(pids(node)[service]))
    node.wait(lambda: "there is no such program" in conditions(node).get("child_down", ""), "srd says so")
    assert "apt install" in conditions(node)["child_down"]
    for name in gone:
        node.run("mv", f"{name}.away", name)


def limited(node: Machine, pid: int, *limits: str) -> None:
    """Set limits of a redis as its own user: root may not, where it lacks CAP_SYS_RESOURCE."""
    user = ("setpriv", "--reuid=redis", "--regid=redis", "--clear-groups")
    node.run(*user, "prlimit", "--pid", str(pid), *limits)


def test_a_redis_that_gets_no_memory_ends_and_comes_back_with_its_data(node: Machine) -> None:
    before = pids(node)
    assert ask(node, "SET", "kept", "1") == "OK"
    limited(node, before["redis"], f"--as={64 << 20}")
    assert ask(node, "SETRANGE", "large", str(200 << 20), "x") == "", "no answer: it has ended"
    node.wait(lambda: healthy(node) and pids(node)["redis"] != before["redis"], "another one runs")
    (child,) = (each for each in srd(node, "children")["children"] if each["service"] == "redis")  # type: ignore[attr-defined]
    # By its own hand, or in the attempt to write a report, for which there is no memory either.
    assert child["last_exit"] in ("killed by SIGABRT", "killed by SIGSEGV")
    after = pids(node)
    assert {service for service in before if after[service] != before[service]} == {"redis"}
    assert ask(node, "GET", "kept") == "1"


def test_a_redis_that_cannot_fork_to_save_says_so_and_takes_writes_again_once_it_can(node: Machine) -> None:
    """As without memory for the copy: what fails is fork(2)."""
    before = pids(node)
    limited(node, before["redis"], "--nproc=1:")
    assert ask(node, "BGSAVE") == "ERR"
    node.wait(lambda: "srd logs redis" in conditions(node).get("saving_fails", ""), "srd says so")
    assert "MISCONF" in ask(node, "SET", "refused", "1")
    limited(node, before["redis"], "--nproc=1000:")
    assert ask(node, "BGSAVE") == "Background saving started"
    node.wait(lambda: "saving_fails" not in conditions(node), "it has saved")
    assert ask(node, "SET", "taken", "1") == "OK"
    assert pids(node) == before


def test_a_foreign_redis_on_the_port_is_named_and_ours_is_back_when_it_is_gone(node: Machine) -> None:
    before = pids(node)
    without_srd(node)
    node.run("kill", "-KILL", str(before["redis"]))
    node.wait(lambda: not lives(node, before["redis"]), "redis has ended")
    command = "exec -a redis-server redis-check-rdb --bind 127.0.1.1 --port 6379 --save ''"
    with subprocess.Popen(node.inside("bash", "-c", command), stdout=subprocess.DEVNULL) as stranger:
        node.wait(lambda: ask(node, "PING") != "", "the foreign redis is up")
        node.run("systemctl", "start", "srd")
        node.wait(lambda: "srd did not start it" in conditions(node).get("child_down", ""), "srd says so")
        assert stranger.poll() is None
        node.run("redis-cli", "-h", "127.0.1.1", "SHUTDOWN", "NOSAVE", check=False)
    node.wait(lambda: healthy(node), "redis is back")
    after = pids(node)
    assert {service for service in before if after[service] != before[service]} == {"redis"}


def test_a_register_of_another_boot_adopts_nothing_that_it_names(node: Machine) -> None:
    node.run("systemctl", "stop", "srd")
    text = json.dumps({"schema": 1, "children": [record("redis", 1), record("stunnel", 2)]})
    node.write(REGISTER, text)
    node.run("systemctl", "start", "srd")
    node.wait(lambda: healthy(node), "it does its job")
    assert all(not child["adopted"] for child in srd(node, "children")["children"])  # type: ignore[attr-defined]


def record(service: str, pid: int) -> dict[str, object]:
    boot = "00000000-0000-0000-0000-000000000000"
    return {"service": service, "pid": pid, "start_time": 1, "boot_id": boot, "argv_hash": "", "started": 1.0}


def test_a_register_with_the_pid_of_somebody_else_harms_nobody(node: Machine) -> None:
    before = pids(node)
    without_srd(node)
    with subprocess.Popen(node.inside("sleep", "600"), stdout=subprocess.DEVNULL) as bystander:
        try:
            (theirs,) = node.run("pgrep", "-x", "sleep").split()
            node.write(REGISTER, node.run("cat", REGISTER).replace(str(before["sentinel"]), theirs))
            node.run("kill", "-KILL", str(before["sentinel"]))
            node.run("systemctl", "start", "srd")
            node.wait(lambda: healthy(node), "it does its job")
            after = pids(node)
            assert {service for service in before if after[service] != before[service]} == {"sentinel"}
            assert lives(node, int(theirs))
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_truncated_register_ends_nothing_and_srd_waits_for_the_ports(node: Machine) -> None:
    before = pids(node)
    without_srd(node)
    node.run("truncate", "--size=100", REGISTER)
    node.run("systemctl", "start", "srd", check=False)
    node.wait(lambda: "srd did not start it" in conditions(node).get("child_down", ""), "it says who holds the ports")
    assert all(lives(node, pid) for pid in before.values())
    # As the message says: end them, and they are started as children again.
    for pid in before.values():
        node.run("kill", str(pid))


SILENT = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
clients = []
for index in range(10000):
    client = socket.socket()
    client.bind((f"127.1.{index // 250}.{index % 250 + 1}", 0))
    client.settimeout(30)
    client.connect(("127.0.1.1", 8080))
    clients.append(client)
print("connected", flush=True)
sys.stdin.read()
"""


def test_ten_thousand_silent_clients_keep_no_balancer_out(node: Machine) -> None:
    silent = node.inside("python3", "-c", SILENT)
    with subprocess.Popen(silent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "connected\n"
        node.wait(lambda: healthy(node), "a balancer is answered")
        assert set(conditions(node)) == set()
        crowd.communicate()
