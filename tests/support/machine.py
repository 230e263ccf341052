"""A machine with systemd as PID 1, in namespaces of its own, for tests of srd as a unit; as root."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0
# /opt/srd is a link to this checkout's environment, wherever that is.
INSTALL = ("/opt/srd/bin/srd", "install", "--program", "/opt/srd/bin/srd")


@dataclass(frozen=True)
class Machine:
    """A machine that is up: `init` is its PID 1 as this machine sees it."""

    init: int

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command there and return what it prints."""
        done = self._inside(command)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def fails(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command that must fail; return how it did."""
        done = self._inside(command)
        assert done.returncode != 0, (command, done.stdout)
        return done

    def inside(self, *command: str) -> tuple[str, ...]:
        """Return what runs a command there."""
        return ("nsenter", "--target", str(self.init), "--all", "--wdns=/", *command)

    def _inside(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(*command), check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )

    def write(self, path: str, text: str) -> None:
        target = Path(f"/proc/{self.init}/root{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit).strip()

    def wait(self, what: Callable[[], bool], why: str) -> float:
        """Wait for a condition; return how long it took."""
        started = time.monotonic()
        while not what():
            assert time.monotonic() - started < PATIENCE_SECONDS, f"not in time: {why}"
            time.sleep(0.05)
        return time.monotonic() - started


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """Boot a machine; in the end everything that ran on it is killed."""
    with tempfile.TemporaryDirectory() as root:
        spaces = ("--mount", "--pid", "--fork", "--ipc", "--uts", "--net", "--cgroup", "--kill-child")
        command = ("unshare", *spaces, str(CHECKOUT / "tests/support/boot-machine"), root)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as outer:
            try:
                found = Machine(_first_process(outer))
                booted = ("systemctl", "is-active", "basic.target")
                found.wait(lambda: found.run(*booted, check=False) == "active\n", "it boots")
                yield found
            finally:
                outer.send_signal(signal.SIGKILL)


def _first_process(outer: subprocess.Popen[str]) -> int:
    """Return the pid of the child of unshare, which becomes systemd."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert outer.poll() is None, outer.communicate()[1]
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/exe").readlink().name == "systemd":
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("systemd does not start")
