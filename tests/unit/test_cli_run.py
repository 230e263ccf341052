"""The daemon's own log."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

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
