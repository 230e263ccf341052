"""`srd teardown` takes this node's protection out of the kernel."""

from __future__ import annotations

import asyncio

import click

from srd.control.client import is_answered
from srd.model import Paths, RefusedError

_OPERATION = "remove the protection"


@click.command("teardown")
@click.confirmation_option(prompt="This machine and its peers will speak in plaintext. Remove the protection?")
@click.pass_obj
def teardown_command(paths: Paths) -> None:
    """Remove srd's IPsec policies and keys from the kernel: nothing else does, neither a stop nor a crash.

    Refused while srd or one of its children runs here. What is not srd's stays.
    """
    from srd.ipsec import teardown, xfrm  # noqa: PLC0415 - pyroute2 takes 0.2 s to import
    from srd.supervise.programs import running_children  # noqa: PLC0415 - as above, for msgspec

    if is_answered(paths.control_socket):
        raise RefusedError(_OPERATION, "", "srd is running", "stop it first: systemctl stop srd")
    if children := running_children(paths):
        raise RefusedError(
            _OPERATION,
            "",
            f"{', '.join(sorted(children))} run on without srd, and would go on in plaintext",
            "start srd, which adopts them, and stop it",
        )

    async def remove() -> teardown.Owned:
        async with xfrm.XfrmSocket() as kernel:
            return await teardown.teardown(kernel)

    removed = asyncio.run(remove())
    click.echo(f"removed {len(removed.policies)} policies and {len(removed.sas)} SAs")
