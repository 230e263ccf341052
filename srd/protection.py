"""What keeps a node's links inside ESP: policies and SAs, the second net, the sockets of ESP in UDP.

Wires the reconcilers of that wing to one another and to the kernel's events. With ipsec.mode off there is none of this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from srd.cluster import Config, Node
from srd.ipsec import xfrm
from srd.ipsec.backstop import SecondNet
from srd.ipsec.encap import Encapsulation
from srd.ipsec.mesh import Mesh, watch
from srd.reconcile import Loop
from srd.state import Store

# A pass over the kernel's tables that finds nothing to do costs two dumps; events wake it in between.
MESH_RESYNC_SECONDS: Final = 2.0
# A look at netfilter's rules costs two to four processes.
NET_RESYNC_SECONDS: Final = 30.0
ENCAPSULATION_RESYNC_SECONDS: Final = 5.0
PASS_SECONDS: Final = 60.0

Body = Callable[[], Coroutine[Any, Any, None]]


class Protection:
    """The reconcilers of the kernel's state; the daemon runs `bodies` side by side after `stand`."""

    def __init__(self, *, config: Config, node: Node, store: Store, kernel: xfrm.XfrmSocket, run_dir: Path) -> None:
        self._config = config
        self._view = store.view
        self._one_change = asyncio.Lock()
        self.mesh = Mesh(config=config, node=node, socket=kernel, store=store, wake=self._wake)
        self._net = SecondNet(config=config, node=node, store=store)
        self._encapsulation = Encapsulation(config=config, node=node, run_dir=run_dir)
        self._mesh_loop = Loop("mesh", self.mesh.reconcile, resync=MESH_RESYNC_SECONDS, timeout=PASS_SECONDS)
        self._net_loop = Loop("second net", self._net.reconcile, resync=NET_RESYNC_SECONDS, timeout=PASS_SECONDS)
        self.loops = (
            self._mesh_loop,
            self._net_loop,
            Loop("ESP in UDP", self._keep_udp, resync=ENCAPSULATION_RESYNC_SECONDS, timeout=PASS_SECONDS),
        )
        self.bodies: tuple[Body, ...] = (
            *(loop.run for loop in self.loops),
            partial(watch, kernel, xfrm.XfrmEvents(), self._mesh_loop.wake),
        )

    def _wake(self) -> None:
        self._mesh_loop.wake()

    async def stand(self) -> None:
        """Put every policy in place: before this node speaks to a peer or answers one for the first time."""
        await self.mesh.reconcile()
        await self._encapsulation.reconcile()

    async def adopt(self, config: Config) -> None:
        """Protect the links of a changed file; when this returns, the policies stand and ESP in UDP can come in."""
        async with self._one_change:
            parting = frozenset(self._config.udp_ports) - {config.udp_port}
            await self._adopt(replace(config, parting_udp_ports=parting))

    async def _adopt(self, config: Config) -> None:
        former, self._config = self._config, config
        self._encapsulation.adopt(config)
        if former.udp_ports != config.udp_ports:
            await self._encapsulation.reconcile()
        await self.mesh.adopt(config)
        self._net.adopt(config)
        if former.udp_ports == config.udp_ports:
            self._net_loop.wake()
        else:  # keys that are made from now on are used in UDP, which must find its way
            await self._net.reconcile()

    async def _keep_udp(self) -> None:
        """Keep the sockets; close a port of a former file when no SA is for it any more."""
        async with self._one_change:
            kernel, parting = self._view().kernel, self._config.parting_udp_ports
            if kernel is not None and parting - kernel.udp_ports:
                await self._adopt(replace(self._config, parting_udp_ports=parting & kernel.udp_ports))
        await self._encapsulation.reconcile()

    async def forget(self, peers: Iterable[str]) -> None:
        """Give up the keys with peers whose certificate is revoked."""
        for peer in peers:
            await self.mesh.forget(peer)

    def release(self) -> None:
        """Let go of srd's own sockets; what the kernel has stays."""
        self._encapsulation.close()
