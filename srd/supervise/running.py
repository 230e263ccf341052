"""A live child, and the patience with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from srd.model import Service


@dataclass(frozen=True, slots=True)
class Timing:
    """The patience of supervision, in seconds but for the count."""

    start_timeout: float = 30.0
    probe_timeout: float = 2.0
    probe_interval: float = 2.0
    probe_failures: int = 3
    kill_timeout: float = 5.0
    launch_timeout: float = 30.0  # of a start that a stop meets: files are written, and redis' may be looked into
    hung_after: float = 30.0
    hung_grace: float = 2.0
    stop_again: float = 1.0
    slow_limit: float = 600.0
    hang_up: float = 10.0  # stunnel serves a new certificate 5 ms after SIGHUP; a loaded machine may take a while


@dataclass(frozen=True, slots=True)
class Running:
    """A live process, just started or found again."""

    pid: int
    pidfd: int
    started: float
    restarts: int
    adopted: bool
    outdated: bool = False  # it was started by another cluster.toml


@dataclass(frozen=True, slots=True)
class Former:
    """What is known of a child's processes when the next one is started.

    `refused_after`: the last one ended by itself, with status 1, before it was ready; for so many seconds it had run.
    `given_up` is set when the next one is not wanted any more, which may be while it is being started.
    """

    restarts: int
    refused_after: float | None = None
    given_up: threading.Event = field(default_factory=threading.Event)


def pidfd_name(service: Service) -> str:
    """Return under which name the service manager holds a child's descriptor."""
    return f"child-{service}"
