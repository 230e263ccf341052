"""Network namespaces for tests, as root: one of a test's own, in a forked child; or those that have a name."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
Body = Callable[[], Coroutine[object, object, None]]


def unshare(flags: int) -> None:
    call("unshare", flags)


def call(function: str, *arguments: int) -> None:
    """Call a function of libc that returns 0; `OSError` where it does not."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def ip(name: str, *words: str) -> str:
    """Run `ip` in a namespace that has a name."""
    return run("ip", "-n", name, *words)


@contextlib.contextmanager
def inside(name: str | Path) -> Iterator[None]:
    """Have this thread open sockets in a namespace, given by its name or its file; they stay in it."""
    with Path("/proc/thread-self/ns/net").open() as home, Path("/run/netns", name).open() as away:
        call("setns", away.fileno(), CLONE_NEWNET)
        try:
            yield
        finally:
            call("setns", home.fileno(), CLONE_NEWNET)


def run_child(body: Body, report: io.TextIOBase) -> int:
    """Run the test in the child; what nobody waits for (a socket that was not closed) fails it too."""
    unraisable: list[str] = []
    sys.unraisablehook = lambda args: unraisable.append(repr(args.exc_value))
    warnings.simplefilter("error")
    try:
        unshare(CLONE_NEWNET)
        asyncio.run(body(), debug=True)
        gc.collect()
        assert not unraisable, unraisable
    except BaseException:  # noqa: BLE001 - handed to the parent
        report.write(traceback.format_exc())
        return 1
    return 0


def in_namespace(body: Body) -> Callable[[], None]:
    """Make a test of a coroutine function, run in a forked child with a network of its own."""

    @functools.wraps(body)
    def test() -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with os.fdopen(writer, "w") as report:
                    status = run_child(body, report)
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as report:
            text = report.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            pytest.fail(text or f"the child ended with {status}", pytrace=False)

    return test
