"""The verbs that move the primary."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import click

from srd.control import client
from srd.model import Paths, SrdError

ANSWER_SECONDS = 40.0  # for all steps of a switchover, each of which has a bound
_LONGEST_WAIT_SECONDS = 7 * 86400.0


def _moment(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Return a time of day, or a date and time, as Unix seconds; a time of day that has passed is tomorrow's."""
    if value is None:
        return None
    try:
        if len(value) <= len("23:59:59"):
            moment = dt.datetime.combine(dt.date.today(), dt.time.fromisoformat(value)).astimezone()  # noqa: DTZ011
            moment += dt.timedelta(days=1) if moment < dt.datetime.now().astimezone() else dt.timedelta()
        else:
            moment = dt.datetime.fromisoformat(value).astimezone()
    except ValueError:
        msg = f"{value!r} is neither 23:30 nor 2026-01-31T23:30"
        raise click.BadParameter(msg) from None
    seconds = moment.timestamp() - time.time()
    if not 0 <= seconds <= _LONGEST_WAIT_SECONDS:
        msg = f"{value!r} is past, or more than a week from now"
        raise click.BadParameter(msg)
    return moment.timestamp()


def moved(done: Mapping[str, Any]) -> str:
    """Return what a switchover came to, for people."""
    return (
        f"{done['to']} is primary instead of {done['from']}: no write was taken for {done['gap_seconds'] * 1000:.0f} ms"
        f" ({done['seconds']:.1f} s in all)"
    )


@click.command("switchover")
@click.option("--to", metavar="NODE", help="The node that shall be primary; the fittest one when left out.")
@click.option("--at", callback=_moment, metavar="TIME", help="Wait until then: 23:30, or 2026-01-31T23:30.")
@click.option("--dry-run", is_flag=True, help="Say whether it would be done, and whereto; change nothing.")
@click.pass_obj
def switchover_command(paths: Paths, *, to: str | None, at: float | None, dry_run: bool) -> None:
    """Move the primary to another node: no acknowledged write is lost, and writes wait for some ten milliseconds.

    On whichever node this is run, the primary's srd does it. Where something speaks against it nothing is changed, and
    the exit status is 40.
    """
    wanted = {"to": to} if to is not None else {}

    def ask(**more: str) -> dict[str, Any]:
        path = f"/v1/switchover?{urlencode(wanted | more)}"
        return client.post(paths.control_socket, path, timeout=ANSWER_SECONDS)

    planned = ask(dry_run="1")
    if dry_run:
        click.echo(f"the primary would move from {planned['from']} to {planned['to']}")
        return
    if at is not None:
        click.echo(f"waiting until {dt.datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S}")
        while (left := at - time.time()) > 0:
            time.sleep(min(left, 1.0))
        planned = ask(dry_run="1")
    click.echo(f"nothing speaks against it: the primary moves from {planned['from']} to {planned['to']}")
    done = ask()
    click.echo(moved(done))
    if not done["named"]:
        reason = "the sentinels do not name it yet"
        raise SrdError("complete", "the switchover", reason, "srd status shows what they name")
