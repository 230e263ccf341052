"""The verbs for working on a node, or on the cluster: drain, undrain, pause, resume."""

from __future__ import annotations

import datetime as dt
import re

import click

from srd.cli.primacy import moved
from srd.control import client
from srd.model import Paths

# A switchover, and then the second until redis has been told.
_DRAIN_SECONDS = 45.0
_PAUSE_SECONDS = 10.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_PAUSE_DAYS = 7
_LATER = "; its redis does not answer now and will be told"


@click.command("drain")
@click.pass_obj
def drain_command(paths: Paths) -> None:
    """Take this node out of service: the primary moves away, nobody new is led here, nobody makes it primary.

    Who reads from it goes on. It stays so, over restarts of srd and of the machine, until `srd undrain`. Where the
    primary cannot be moved away nothing is changed, and the exit status is 40.
    """
    done = client.post(paths.control_socket, "/v1/drain", timeout=_DRAIN_SECONDS)
    if done["moved"] is not None:
        click.echo(moved(done["moved"]))
    click.echo(f"drained{'' if done['known'] else _LATER}")


@click.command("undrain")
@click.pass_obj
def undrain_command(paths: Paths) -> None:
    """Take this node into service again, as a replica."""
    done = client.post(paths.control_socket, "/v1/undrain", timeout=_DRAIN_SECONDS)
    click.echo(f"in service{'' if done['known'] else _LATER}")


def _duration(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int:
    """Return the seconds of `90s`, `30m`, `4h` or `2d`."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", value)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_PAUSE_DAYS * _UNITS["d"]:
        msg = f"{value!r} is not a time such as 30m, 4h or 2d, of {_LONGEST_PAUSE_DAYS} days at most"
        raise click.BadParameter(msg)
    return seconds


@click.command("pause")
@click.option(
    "--for", "seconds", default="24h", show_default=True, callback=_duration, metavar="TIME", help="30m, 4h or 2d."
)
@click.pass_obj
def pause_command(paths: Paths, seconds: int) -> None:
    """Have every srd of the cluster do nothing by itself: no failover is hurried, nothing that ends is started again.

    The fence, the lease and the encryption go on, and so does Sentinel: it may still fail over. What is asked for by
    hand (switchover, restart, drain) is done.
    """
    done = client.post(paths.control_socket, f"/v1/pause?seconds={seconds}", timeout=_PAUSE_SECONDS)
    until = dt.datetime.fromtimestamp(done["until_timestamp"]).astimezone()
    click.echo(f"paused until {until:%Y-%m-%d %H:%M %Z}; srd resume ends that")
    _say_who_knows(done["missed"])


@click.command("resume")
@click.pass_obj
def resume_command(paths: Paths) -> None:
    """End a pause on every node of the cluster."""
    done = client.post(paths.control_socket, "/v1/pause?seconds=0", timeout=_PAUSE_SECONDS)
    click.echo("not paused")
    _say_who_knows(done["missed"])


def _say_who_knows(missed: dict[str, str]) -> None:
    for node, reason in sorted(missed.items()):
        click.echo(f"{node} does not know yet ({reason}); it learns of it from any other node")
