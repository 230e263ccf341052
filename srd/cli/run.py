"""`srd run` is the daemon."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading

import click
import structlog

from srd.model import Paths


@click.command("run")
@click.pass_obj
def run_command(paths: Paths) -> None:
    """Run this node: protect its traffic, start redis, sentinel and stunnel, and keep it all true until SIGTERM."""
    early_stop = threading.Event()

    def stop(*_: object) -> None:
        # Children of an earlier srd are to be stopped in order: the daemon does it, once it has found them.
        if not _children_recorded(paths):
            sys.exit(0)
        early_stop.set()

    # Until the daemon takes the signals over. Without a handler the first process of a container would not even notice
    # a SIGTERM, and be killed when its time is up.
    signal.signal(signal.SIGTERM, stop)
    from srd.daemon import run  # noqa: PLC0415 - the whole program: 0.5 s, and every other verb goes without

    configure_logging()
    asyncio.run(run(paths, early_stop))


def _children_recorded(paths: Paths) -> bool:
    """Whether an earlier srd may have left children: a signal's handler has to say so, without an import."""
    if os.getpid() == 1:
        return False  # none has outlived the first process before this one
    try:
        return b'"pid"' in (paths.run_dir / "children.json").read_bytes()
    except OSError:
        return False


def configure_logging() -> None:
    """Log to standard error: for people on a terminal, as JSON lines anywhere else (the journal)."""
    terminal = sys.stderr.isatty()
    # Never rich tracebacks: they print local variables, keys among them.
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if not terminal else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
