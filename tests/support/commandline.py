"""The command line as a user runs it: in a process of its own, against whatever listens on the control socket."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PATIENCE_SECONDS: Final = 60


def environment(directory: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "SRD_RUN_DIR": str(directory), "SRD_LOG_DIR": str(directory), **more}


async def start(directory: Path, *arguments: str, **more: str) -> asyncio.subprocess.Process:
    """Start it with its files in a directory; `more` are further variables of its environment."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "srd", *arguments),
        env=environment(directory, **more),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def srd(directory: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Run it to its end; return its exit status, its output and what it said of errors."""
    process = await start(directory, *arguments, **more)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
