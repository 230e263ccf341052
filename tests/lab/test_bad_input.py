"""What is wrong with a node is said in one sentence and by the exit status, and the node is left as it was."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.lab import Lab

BUNDLES = Path("/tmp/bad-input")
STATION = "redis-1"
ADDRESSES = {"redis-1": "192.168.205.10", "redis-2": "192.168.205.11", "redis-3": "192.168.205.12"}


def srd(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["srd", *arguments], check=False, capture_output=True, text=True)


def init(name: str, addresses: dict[str, str]) -> Path:
    nodes = [word for node, address in addresses.items() for word in ("--node", f"{node}={address}")]
    done = srd("init", name, *nodes, "-o", str(BUNDLES / name))
    assert done.returncode == 0, done.stderr
    return BUNDLES / name


@pytest.fixture(scope="module")
def clusters(wire: Path) -> Iterator[dict[str, Path]]:  # noqa: ARG001 - in namespaces where nothing runs
    BUNDLES.mkdir()
    yield {name: init(name, ADDRESSES) for name in ("mine", "other")}
    shutil.rmtree(BUNDLES)


@pytest.fixture
def bundle(clusters: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(clusters["mine"] / "redis-1", tmp_path / "bundle")


def run(bundle: Path, verb: str, *prefix: str, after: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = ["on", STATION, *prefix, "srd", "--config-dir", str(bundle), verb, *after]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def world() -> tuple[str, list[Path]]:
    """Everything that a failed start could have left on the node."""
    kernel = subprocess.run(
        ["on", STATION, "sh", "-c", "ip xfrm policy; ip xfrm state"], check=True, capture_output=True, text=True
    ).stdout
    return kernel, sorted(path for path in Path(f"/var/lab/{STATION}").rglob("*") if path.is_file())


def refused(bundle: Path, status: int, *words: str, prefix: tuple[str, ...] = ()) -> None:
    """Both verbs refuse, with one sentence that has these words, and leave the node as it was."""
    before = world()
    for verb in ("check", "run"):
        done = run(bundle, verb, *prefix)
        sentences = done.stderr.strip().splitlines()
        assert done.returncode == status, (verb, done)
        assert len(sentences) == 1, done.stderr
        assert sentences[0].startswith("srd: cannot "), done.stderr
        assert not [word for word in words if word not in sentences[0]], sentences[0]
    assert world() == before


def replace(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.before_the_cluster
def test_a_whole_node_passes_and_is_left_as_it_was(bundle: Path) -> None:
    before = world()
    done = run(bundle, "check")
    assert (done.returncode, done.stdout) == (0, "this node can run\n"), done.stderr
    assert world() == before


@pytest.mark.before_the_cluster
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('name = "redis-2"', 'nmae = "redis-2"', ("cluster.toml:8", "node[1].nmae", "no such key")),
        ("205.11", "205.10", ("cluster.toml:9", "192.168.205.10 is node 'redis-1' already")),
        ('cluster = "mine"', 'cluster = "mine"\nlisten_localhost = 1', ("listen_localhost", "expected bool")),
        ('["192.168.205.12"]', '["192.168.205.12"]\n[sentinel]\nquorum = 4', ("sentinel.quorum", "cannot be reached")),
        ('["192.168.205.12"]', '["192.168.205.12"]\n[redis]\nport = 8080', ("redis.port", "http.port too")),
        ("205.10", "205.99", ("node.crt", "192.168.205.10", "192.168.205.99")),
    ],
)
def test_a_wrong_cluster_toml(bundle: Path, before: str, after: str, words: tuple[str, ...]) -> None:
    replace(bundle / "cluster.toml", before, after)
    refused(bundle, 78, *words)


@pytest.mark.before_the_cluster
def test_the_bundle_of_another_machine(clusters: dict[str, Path]) -> None:
    refused(clusters["mine"] / "redis-2", 78, "192.168.205.11", "this machine")


def other_cluster(bundle: Path, other: Path) -> None:
    shutil.copy(other / "redis-1" / "cluster.toml", bundle)


def other_authority(bundle: Path, other: Path) -> None:
    shutil.copy(other / "redis-1" / "node.crt", bundle)


def other_key(bundle: Path, other: Path) -> None:
    shutil.copy(other / "redis-1" / "node.key", bundle)


def readable_key(bundle: Path, _other: Path) -> None:
    (bundle / "node.key").chmod(0o644)


def no_secrets(bundle: Path, _other: Path) -> None:
    (bundle / "secrets.toml").unlink()


@pytest.mark.before_the_cluster
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_cluster, ("node.crt", "of cluster 'mine'", "cluster.toml is of 'other'")),
        (other_authority, ("node.crt", "another authority issued it")),
        (other_key, ("node.key", "not the key of node.crt")),
        (readable_key, ("node.key", "others may read it", "chmod 600")),
        (no_secrets, ("secrets.toml", "no such file", "copy this node's whole bundle")),
    ],
)
def test_a_wrong_bundle(
    bundle: Path, clusters: dict[str, Path], spoil: Callable[[Path, Path], None], words: tuple[str, ...]
) -> None:
    spoil(bundle, clusters["other"])
    refused(bundle, 78, *words)


@contextlib.contextmanager
def clock_at(text: str) -> Iterator[None]:
    """Set the lab's clock, as `date -d` understands it, and back as it was."""
    moved, now = (
        subprocess.run(["date", "-d", when, "+%s"], check=True, capture_output=True, text=True).stdout.strip()
        for when in (text, "now")
    )
    subprocess.run(["date", "-s", f"@{moved}"], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["date", "-s", f"@{now}"], check=True, capture_output=True)


@pytest.mark.before_the_cluster
@pytest.mark.parametrize(("clock", "words"), [("+3 years", ("expired on",)), ("-2 days", ("valid only from", "clock"))])
def test_a_certificate_out_of_its_time(bundle: Path, clock: str, words: tuple[str, ...]) -> None:
    with clock_at(clock):
        refused(bundle, 78, "node.crt", *words)


@pytest.mark.before_the_cluster
def test_a_missing_program(bundle: Path) -> None:
    with (bundle / "cluster.toml").open("a") as file:
        file.write('[tls]\nprogram = "stunnel9"\n')
    refused(bundle, 78, "stunnel9", "apt install stunnel4")


@pytest.mark.before_the_cluster
@pytest.mark.parametrize(
    ("address", "port"),
    [("192.168.205.10", 6379), ("192.168.205.10", 849), ("192.168.205.10", 8080), ("127.0.0.1", 8081)],
)
def test_a_port_that_another_program_holds(bundle: Path, address: str, port: int) -> None:
    code = f"import socket, sys; s = socket.create_server(('{address}', {port})); print(flush=True); sys.stdin.read()"
    squatter = subprocess.Popen(
        ["on", STATION, "python3", "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert squatter.stdout is not None
    squatter.stdout.readline()
    try:
        refused(bundle, 78, f"{address}:{port}", "srd did not start it")
    finally:
        squatter.communicate(b"")


@pytest.mark.before_the_cluster
@pytest.mark.parametrize("spoil", ["nothing", "expired", "wrong file"])
def test_a_node_can_be_closed_before_srd_runs_whatever_is_wrong_with_its_bundle(bundle: Path, spoil: str) -> None:
    last = Path(f"/var/lab/{STATION}/var/lib/srd/cluster.toml")
    if spoil == "wrong file":
        shutil.copy(bundle / "cluster.toml", last)
        (bundle / "cluster.toml").write_text("cluster = ")
    try:
        with clock_at("+4 years" if spoil == "expired" else "now"):
            done = run(bundle, "close")
            assert done.returncode == 0, done.stderr
            assert "redis-1 is closed to plaintext with 2 peers (second net: iptables-legacy)" in done.stdout
            ping = ["on", STATION, "ping", "-c", "1", "-W", "1", "192.168.205.11"]
            assert subprocess.run(ping, check=False, capture_output=True).returncode != 0
    finally:
        last.unlink(missing_ok=True)
        assert run(bundle, "teardown", after=("--yes",)).returncode == 0
    assert world()[0] == ""
    rules = subprocess.run(["on", STATION, "iptables-legacy-save"], check=True, capture_output=True, text=True).stdout
    assert "SRD" not in rules


@pytest.mark.before_the_cluster
def test_without_cap_net_admin(bundle: Path) -> None:
    without = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--")
    refused(bundle, 77, "CAP_NET_ADMIN", prefix=without)


@pytest.mark.before_the_cluster
def test_a_kernel_without_esp(bundle: Path) -> None:
    modprobe = Path("/proc/sys/kernel/modprobe")
    before = modprobe.read_text()
    modprobe.write_text("/bin/false")
    subprocess.run(["rmmod", "esp4", "esp6"], check=True)
    try:
        refused(bundle, 78, "no ESP", "modprobe esp4")
    finally:
        modprobe.write_text(before)
        subprocess.run(["modprobe", "-a", "esp4", "esp6"], check=True)


def test_a_second_srd_is_refused_and_the_first_goes_on(lab: Lab) -> None:
    done = lab.on("redis-1", "srd", "run", check=False)
    assert done.returncode == 78
    assert "another program" in done.stderr or "already" in done.stderr
    assert lab.srd("redis-1", "status")["health"] == "ok"


def test_a_node_that_runs_can_be_checked(lab: Lab) -> None:
    lab.wait_whole()
    assert lab.on("redis-1", "srd", "check").stdout == "this node can run\n"
