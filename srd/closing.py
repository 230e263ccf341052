"""Fail closed without the daemon: what `srd close` puts in place before the network is up.

The mesh's first pass does exactly this: policies whose keys are there go on, all others drop what they cover. It needs
neither addresses nor peers, and no valid certificate: an expired one keeps srd from starting, and must not open a node.
"""

from __future__ import annotations

import time

import structlog

from srd.cluster import Config, Node
from srd.config import parse_config
from srd.ipsec import xfrm
from srd.ipsec.backstop import SecondNet
from srd.ipsec.mesh import Mesh
from srd.model import IpsecMode, Paths, SrdError
from srd.roster import Roster
from srd.state import Store
from srd.supervise.files import write_private
from srd.trust.bundle import load_member

log = structlog.get_logger(__name__)


def remember(paths: Paths) -> None:
    """Keep the cluster.toml that srd runs by, for a boot at which the operator's is wrong. Blocks; never raises.

    A full disk must not keep srd from running, and what was kept before stays then.
    """
    try:
        text = paths.cluster_file.read_bytes()
        parse_config(text.decode(), str(paths.cluster_file))
        write_private(paths.last_good_file, text)
    except (OSError, UnicodeDecodeError, SrdError) as error:
        log.warning("cluster.toml is not kept for the next boot", reason=str(error))


async def close(paths: Paths) -> str:
    """Put policies and second net in place; return what was done, in one sentence."""
    config, node, note = _member(paths)
    config = Roster(paths).extend(config, time.time())
    if config.ipsec.mode is IpsecMode.OFF:
        return "ipsec.mode is off: nothing is protected"
    store = Store(0.0)
    async with xfrm.XfrmSocket() as kernel:
        try:
            await Mesh(config=config, node=node, socket=kernel, store=store, wake=_nobody).reconcile()
        finally:  # the one net does not wait for the other
            await SecondNet(config=config, node=node, store=store).reconcile()
    view = store.view()
    keeper = view.backstop.keeper if view.backstop is not None else None
    return f"{node.name} is closed to plaintext with {len(view.links)} peers (second net: {keeper or 'none'}){note}"


def _nobody() -> None:
    """Wake no loop: there is one pass."""


def _member(paths: Paths) -> tuple[Config, Node, str]:
    """Read who this node is; by the file of the last start, if the present one is wrong."""
    try:
        return *load_member(paths, paths.cluster_file), ""
    except SrdError as error:
        try:
            return *load_member(paths, paths.last_good_file), f", by the cluster.toml of the last start: {error}"
        except SrdError:
            raise error from None
