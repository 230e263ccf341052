"""The verbs for working on a node, or on the cluster: drain, undrain."""

from __future__ import annotations

import click

from srd.cli.primacy import moved
from srd.control import client
from srd.model import Paths

# A switchover, and then the second until redis has been told.
_DRAIN_SECONDS = 45.0
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
