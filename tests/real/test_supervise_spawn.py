"""What a started program is given, and what it is not: read from the kernel."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from srd.model import ConfigError, SrdError
from srd.supervise.adopt import start_time_of
from srd.supervise.files import Owner, find_owner, make_service_directory
from srd.supervise.spawn import Command, Started, spawn

SLEEP = ("a-name-of-its-own", "60")


def me() -> Owner:
    return Owner("me", os.geteuid(), os.getegid(), switch=False)


@contextmanager
def started(command: Command) -> Iterator[Started]:
    child = spawn(command)
    try:
        settle(child.pid)
        yield child
    finally:
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
        os.close(child.pidfd)


def settle(pid: int, seconds: float = 10.0) -> None:
    """Wait until the program sleeps: execve, and the loader with its files, come after what spawn waits for."""
    deadline = time.monotonic() + seconds
    while start_time_of(pid)[0] != "S":
        assert time.monotonic() < deadline
        os.sched_yield()


def run_to_end(command: Command) -> int:
    child = spawn(command)
    result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    os.close(child.pidfd)
    assert result is not None
    return result.si_status


def sleeper(tmp_path: Path, owner: Owner) -> Command:
    return Command(Path("/bin/sleep"), SLEEP, owner, Path("/"), tmp_path / "log" / "sleep.log")


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("name", ["root", "redis"])
def test_a_child_has_no_capability_and_no_way_to_one(tmp_path: Path, name: str) -> None:
    owner = find_owner(name, "redis.user")
    with started(sleeper(tmp_path, owner)) as child:
        status = status_of(child.pid)
        assert {status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["Uid"].split() == [str(owner.uid)] * 4
        assert status["Gid"].split() == [str(owner.gid)] * 4
        assert not owner.switch or status["Groups"] == ""


def test_a_directory_that_its_user_cannot_reach_is_an_error_that_names_the_parent(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    stranger = Owner("stranger", 54321, 54321, switch=True)
    with pytest.raises(ConfigError, match=f"may not pass {closed}"):
        make_service_directory(closed / "state" / "redis", stranger)


def test_srd_itself_keeps_its_rights(tmp_path: Path) -> None:
    before = status_of(os.getpid())
    with started(sleeper(tmp_path, me())):
        after = status_of(os.getpid())
    assert [after[key] for key in ("CapEff", "CapBnd", "NoNewPrivs")] == [
        before[key] for key in ("CapEff", "CapBnd", "NoNewPrivs")
    ]


def test_a_child_leads_its_own_session_and_has_three_descriptors(tmp_path: Path) -> None:
    command = sleeper(tmp_path, me())
    with started(command) as child:
        assert os.getsid(child.pid) == child.pid
        links = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{child.pid}/fd").iterdir()}
        assert links == {"0": "/dev/null", "1": str(command.log), "2": str(command.log)}
        for name in ("1", "2"):
            flags = Path(f"/proc/{child.pid}/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
            assert int(flags, 8) & os.O_APPEND
        assert Path(f"/proc/{child.pid}/cmdline").read_bytes() == b"a-name-of-its-own\x0060\x00"


def test_nothing_of_srds_environment_reaches_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "REDISCLI_AUTH"):
        monkeypatch.setenv(name, "of srd")
    with started(sleeper(tmp_path, me())) as child:
        environment = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
    assert {entry.partition(b"=")[0] for entry in environment if entry} == {b"PATH", b"LC_ALL"}


def test_what_a_child_writes_is_private_and_what_it_says_is_logged(tmp_path: Path) -> None:
    script = "umask; echo out; echo err >&2; : > made"
    command = Command(Path("/bin/sh"), ("sh", "-c", script), me(), tmp_path, tmp_path / "log")
    assert run_to_end(command) == 0
    assert run_to_end(command) == 0
    assert (tmp_path / "log").read_text() == "0077\nout\nerr\n" * 2
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o600


@pytest.mark.parametrize("program", ["/nonexistent/program", "/etc/passwd", "/"])
def test_a_program_that_cannot_run_is_an_error_that_names_it(tmp_path: Path, program: str) -> None:
    command = Command(Path(program), ("x",), me(), tmp_path, tmp_path / "log")
    with pytest.raises(SrdError, match=f"cannot start {program}"):
        spawn(command)
