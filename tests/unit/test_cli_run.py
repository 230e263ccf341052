"""The daemon's own log, and its end before it has begun."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from srd.cli.run import configure_logging


class Screen(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_traceback_shows_where_and_no_local_variables(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    configure_logging()

    def key_in_hand() -> None:
        key = bytes(range(20)).hex()
        raise ValueError(len(key))

    try:
        key_in_hand()
    except ValueError:
        structlog.get_logger().exception("failed")
    said = screen.getvalue()
    assert "0a0b0c" not in said
    assert "in key_in_hand" in said
    assert "ValueError: 40" in said


def test_off_a_terminal_every_event_is_one_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", screen)
    configure_logging()
    structlog.get_logger().info("two\nlines", node="redis-1")
    (line,) = screen.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["node"], entry["level"]) == ("two\nlines", "redis-1", "info")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = re.findall(r"^SigCgt:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) & 1 << (number - 1))


def test_a_stop_before_anything_was_started_is_a_stop(tmp_path: Path) -> None:
    """By a handler: the kernel gives process 1 of a container no signal that it has none for."""
    os.mkfifo(tmp_path / "cluster.toml")  # srd reads it until it is stopped
    command = [sys.executable, "-m", "srd", "--config-dir", str(tmp_path), "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as srd:
        deadline = time.monotonic() + 20
        while not catches(srd.pid, signal.SIGTERM):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        srd.send_signal(signal.SIGTERM)
        said = srd.communicate(timeout=20)[1]
    assert (srd.returncode, said) == (0, "")
