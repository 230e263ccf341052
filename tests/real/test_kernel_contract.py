"""The kernel's policy table does what the fake of the mesh's tests does. SAs need ESP: tests/lab has their half."""

from __future__ import annotations

from support.contract import compare_policies
from support.namespace import in_namespace

from srd.ipsec.xfrm import XfrmSocket


@in_namespace
async def test_a_random_walk_over_policies_gives_the_same_on_both() -> None:
    for seed in range(10):
        async with XfrmSocket() as kernel:
            for info in await kernel.policies():
                await kernel.delete_policy(info.policy)
            await compare_policies(kernel, seed)
