"""Directories for tests whose services run as users of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def passable() -> Iterator[Path]:
    """Make a directory that every user may pass through, which those of pytest are not; it is removed in the end."""
    root = Path(tempfile.mkdtemp(prefix="srd-test-"))
    root.chmod(0o711)
    try:
        yield root
    finally:
        shutil.rmtree(root)
