"""How verbs show a document: JSON for programs, an aligned table for people, colour on a terminal that wants it."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from srd.control import client
from srd.model import Paths, SrdError

Document = dict[str, Any]

# Severities and states, in the colours of a traffic light; a word that is not here stays as it is.
_COLOURS: Final = {
    "ok": "green",
    "ready": "green",
    "running": "green",
    "protected": "green",
    "primary": "cyan",
    "degraded": "yellow",
    "warning": "yellow",
    "starting": "yellow",
    "backoff": "red",
    "blocked": "red",
    "critical": "red",
    "unreachable": "red",
    "stopped": "red",
}
_CLEAR: Final = "\x1b[H\x1b[2J"
_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86400


def colourful() -> bool:
    """Whether standard output is a terminal whose user has not asked for plain text (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def word(text: str) -> str:
    """Return a state or severity, in its colour where colours are wanted."""
    colour = _COLOURS.get(text)
    return click.style(text, fg=colour) if colour is not None and colourful() else text


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns; `-` stands for what is not known."""
    if colourful():
        _print_rich(columns, rows)
        return
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Twice the start-up time of everything else together, so only where a person looks at it.
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def cell(value: object) -> str:
    """Return what a table shows for a value."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def duration(seconds: float | None) -> str:
    """Return seconds as people say them, in the two largest units: `3d 4h`, `12m 5s`, `0.4s`."""
    if seconds is None:
        return "-"
    if seconds < _MINUTE:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE}m {whole % _MINUTE}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h {whole % _HOUR // _MINUTE}m"
    return f"{whole // _DAY}d {whole % _DAY // _HOUR}h"


def size(count: int | None) -> str:
    """Return bytes in units of 1024."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:  # noqa: PLR2004 - the unit
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Reading:
    """The options of a verb that shows something of the daemon; `watch` and `timeout` are seconds."""

    output: str
    watch: float | None
    timeout: float


def show(
    paths: Paths,
    path: str,
    table: Callable[[Document], None],
    options: Reading,
    exit_status: Callable[[Document], int] = lambda _: 0,
    *,
    pick: Callable[[Document], Document] = lambda document: document,
) -> None:
    """Ask the daemon for `path` and show what `pick` takes of the answer, once or, with `--watch`, until Ctrl-C."""
    output, watch, timeout = options.output, options.watch, options.timeout
    status = 0
    interrupted = False

    def interrupt(*_: object) -> None:
        # Python ignores what is raised while it finalizes an object, so the raising alone may be lost.
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            try:
                document = client.get(paths.control_socket, path, timeout=timeout)
            except SrdError as error:
                if watch is None:
                    raise
                status = error.exit_status
                click.echo(f"srd: {error}", err=True)
            else:
                status = exit_status(document)
                _print(pick(document), output, table, clear=watch is not None and sys.stdout.isatty())
            if watch is None:
                break
            time.sleep(watch)
    except KeyboardInterrupt:
        click.echo("", err=True)
    click.get_current_context().exit(status)


def _print(document: Document, output: str, table: Callable[[Document], None], *, clear: bool) -> None:
    if output == "json":
        # One document on one line when watched, so that a reader knows where it ends.
        click.echo(json.dumps(document))
        return
    if clear:
        click.echo(_CLEAR, nl=False)
    table(document)


def reading(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every verb has which shows something of the daemon, and hand them over as `Reading`.

    The verb gets `Paths`, `Reading`, and its own options by name.
    """

    @functools.wraps(command)
    def verb(*, output: str, watch: float | None, timeout: float, **own: Any) -> None:
        command(click.get_current_context().obj, Reading(output, watch, timeout), **own)

    decorated: Callable[..., None] = verb
    for option in (
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=client.DEFAULT_TIMEOUT_SECONDS,
            show_default=True,
            metavar="SECONDS",
            help="How long the daemon may take to answer.",
        ),
        click.option(
            "--watch",
            is_flag=False,
            flag_value=1.0,
            default=None,
            type=click.FloatRange(min=0.1),
            metavar="[SECONDS]",
            help="Show it again and again, every second unless said otherwise.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Choice(["table", "json"]),
            default="table",
            show_default=True,
            help="For people, or for programs: JSON, whose `schema` changes when a key's meaning does.",
        ),
    ):
        decorated = option(decorated)
    return decorated
