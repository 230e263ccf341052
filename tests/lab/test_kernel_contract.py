"""The SA table of a kernel with ESP does what the fake of the mesh's tests does."""

from __future__ import annotations

from support.contract import compare_sas
from support.namespace import in_namespace

from srd.ipsec.xfrm import XfrmSocket


@in_namespace
async def test_a_random_walk_over_sas_gives_the_same_on_both() -> None:
    async with XfrmSocket() as kernel:
        await compare_sas(kernel, seed=1)
