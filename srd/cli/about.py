"""`srd version` and `srd completion`."""

from __future__ import annotations

from importlib.metadata import version

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command("version")
def version_command() -> None:
    """Print the version."""
    click.echo(f"srd {version('srd')}")


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
def completion_command(shell: str) -> None:
    """Print the completion script of a shell.

    bash: srd completion bash > /etc/bash_completion.d/srd
    """
    root = click.get_current_context().find_root()
    completion = get_completion_class(shell)
    if completion is None:
        msg = f"click knows no completion for {shell}"
        raise click.UsageError(msg)
    click.echo(completion(root.command, {}, "srd", "_SRD_COMPLETE").source())
