"""`srd doctor`: what is wrong with what the sentinels keep, and its repair."""

from __future__ import annotations

import json
from typing import Final
from urllib.parse import urlencode

import click

from srd.cli.output import Document, print_table
from srd.control import client
from srd.model import Paths

EXIT_FOUND: Final = 10

# Both looks, then for each voter half a minute at most.
_SECONDS: Final = 300.0


@click.command("doctor")
@click.option("--repair", is_flag=True, help="Mend what can be mended, one sentinel at a time.")
@click.option("--dry-run", is_flag=True, help="With --repair: say what would be done, and do nothing.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people, or for programs: JSON, whose `schema` changes when a key's meaning does.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer; a repair goes on without.",
)
@click.pass_obj
def doctor_command(paths: Paths, *, repair: bool, dry_run: bool, output: str, timeout: float) -> None:
    """Say what is wrong with what the sentinels keep: nodes that have gone, ghosts, settings, epochs.

    Every sentinel is asked directly, twice where the first look finds something: what passes by itself is not shown.
    The exit status is 0 when nothing is (or is left) wrong, 10 otherwise, 40 when a repair would do harm now.
    """
    if dry_run and not repair:
        raise click.UsageError("--dry-run is for --repair")
    query = {name: "1" for name, wanted in (("repair", repair), ("dry_run", dry_run)) if wanted}
    document = client.post(paths.control_socket, f"/v1/doctor?{urlencode(query)}", timeout=timeout)
    if output == "json":
        click.echo(json.dumps(document))
    else:
        _show(document, dry_run=dry_run)
    click.get_current_context().exit(EXIT_FOUND if document["findings"] or document["unsettled"] else 0)


def _show(document: Document, *, dry_run: bool) -> None:
    findings = document["findings"]
    for sentence in document["done"]:
        click.echo(f"would {sentence}" if dry_run else sentence)
    if document["unsettled"]:
        click.echo(f"not everything can be judged now: {document['unsettled']}")
    if not findings:
        click.echo("nothing is wrong" if not document["unsettled"] else "nothing else is wrong")
        return
    rows = [[f["node"], f["trouble"], _CURES.get(f["cure"], "by hand"), f["text"]] for f in findings]
    print_table(["NODE", "TROUBLE", "MENDED BY", "WHAT"], rows)
    for remedy in dict.fromkeys(f["remedy"] for f in findings if f["remedy"]):
        click.echo(f"by hand: {remedy}")


_CURES: Final = {"set": "--repair", "reset": "--repair", "rebuild": "--repair"}
