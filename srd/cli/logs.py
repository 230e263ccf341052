"""`srd logs`: what the child programs wrote, from their files; the daemon need not run."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO, Final

import click

from srd.model import Paths, Service, SrdError

_POLL_SECONDS: Final = 0.2
_BLOCK: Final = 65536


@click.command("logs")
@click.argument("child", required=False, type=click.Choice([service.value for service in Service]))
@click.option("-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="How many last lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is written, until Ctrl-C.")
@click.pass_obj
def logs_command(paths: Paths, child: str | None, lines: int, *, follow: bool) -> None:
    """Show the last lines of a child's log, or of all of them."""
    services = [Service(child)] if child is not None else list(Service)
    tails = [Tail(paths.log_file(service), f"{service}: " if child is None else "") for service in services]
    if not follow and not any(tail.path.exists() for tail in tails):
        raise SrdError("read the logs in", str(paths.log_dir), "there are none", "has srd run here? --log-dir")
    with contextlib.ExitStack() as opened:
        for tail in tails:
            opened.callback(tail.close)
            _echo(tail.last(lines))
        try:
            while follow:
                for tail in tails:
                    _echo(tail.new())
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            click.echo("", err=True)


def _echo(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


class Tail:
    """The end of one file, which may be rotated or truncated while it is read."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self._prefix = prefix
        self._file: BinaryIO | None = None
        self._rest = b""

    def close(self) -> None:
        """Close the file; the next call opens it again at its start."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def last(self, count: int) -> list[str]:
        """Return the last `count` lines, and stand at the end of the file."""
        file = self._opened()
        if file is None:
            return []
        end = start = file.seek(0, os.SEEK_END)
        lines: list[bytes] = []
        while start > 0 and len(lines) <= count:
            start = max(0, start - _BLOCK)
            file.seek(start)
            lines = file.read(end - start).splitlines()
        file.seek(end)
        return [self._shown(line) for line in lines[max(0, len(lines) - count) :]]

    def new(self) -> list[str]:
        """Return the whole lines that were written since the last call."""
        file = self._opened()
        if file is None:
            return []
        *whole, self._rest = (self._rest + file.read()).split(b"\n")
        if self._replaced(file):
            self.close()
        return [self._shown(line) for line in whole]

    def _opened(self) -> BinaryIO | None:
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except FileNotFoundError:
                return None
            except OSError as error:
                raise SrdError("read", str(self.path), (error.strerror or str(error)).lower()) from error
        return self._file

    def _replaced(self, file: BinaryIO) -> bool:
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return True
        return now.st_size < file.tell() or now.st_ino != os.fstat(file.fileno()).st_ino

    def _shown(self, line: bytes) -> str:
        """Decode, and take the sting out of control characters: a client's words can end up in a log."""
        text = line.rstrip(b"\r").decode("utf-8", "replace")
        return self._prefix + "".join(char if char.isprintable() or char == "\t" else "?" for char in text)
