"""`srd close` and `srd teardown`: protection without the daemon, put in place and taken away."""

from __future__ import annotations

import asyncio

import click

from srd.cluster import KEYING_PORT
from srd.control.client import is_answered
from srd.model import Paths, RefusedError

_OPERATION = "remove the protection"


@click.command("close")
@click.pass_obj
def close_command(paths: Paths) -> None:
    """Put the IPsec policies and the second net in place, without a daemon: from then on nothing passes unprotected.

    What has keys goes on under them, everything else between the nodes is dropped until srd runs. For the boot, before
    the network: srd-failclosed.service does this.
    """
    from srd.closing import close  # noqa: PLC0415 - pyroute2 takes 0.2 s to import

    _refuse_beside_srd(paths, "close the node")
    click.echo(asyncio.run(close(paths)))


@click.command("teardown")
@click.confirmation_option(prompt="This machine and its peers will speak in plaintext. Remove the protection?")
@click.pass_obj
def teardown_command(paths: Paths) -> None:
    """Remove srd's IPsec policies and keys, and the second net: nothing else does, neither a stop nor a crash.

    Refused while srd runs here, or a program that listens where redis or sentinel would. What is not srd's stays.
    """
    click.echo(asyncio.run(_teardown(paths)))


def _refuse_beside_srd(paths: Paths, operation: str) -> None:
    from srd.supervise.listener import listener_of  # noqa: PLC0415 - as above, for msgspec

    if is_answered(paths.control_socket) or listener_of(KEYING_PORT) is not None:
        raise RefusedError(operation, "", "srd is running", "stop it first: systemctl stop srd")


async def _teardown(paths: Paths) -> str:
    from srd.ipsec import backstop, encap, teardown, xfrm  # noqa: PLC0415 - as above
    from srd.supervise.listener import listener_of  # noqa: PLC0415 - as above, for msgspec

    _refuse_beside_srd(paths, _OPERATION)
    async with xfrm.XfrmSocket() as kernel:
        for port in sorted(teardown.protected_ports(await teardown.owned(kernel))):
            if (listener := listener_of(port, for_others=True)) is not None:
                raise RefusedError(
                    _OPERATION,
                    "",
                    f"{listener} listens on port {port} and would go on in plaintext",
                    "start srd, which adopts its children, and stop it",
                )
        removed = await teardown.teardown(kernel)
    # The second net last: it drops what the policies no longer cover.
    for keeper in await backstop.usable_keepers():
        await keeper.remove()
    for path in encap.holder_files(paths.run_dir):
        encap.end_holder(path)
    return f"removed {len(removed.policies)} policies and {len(removed.sas)} SAs"
