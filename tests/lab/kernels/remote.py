"""Runs commands in another kernel of the lab, as ssh would: input, both outputs, signals, a terminal, exit status.

    remote.py serve ADDRESS                  takes one command for each connection
    remote.py run ADDRESS COMMAND...         is what `on` becomes

ssh itself is no part of a machine that the lab can count on, and a second of handshakes for each command here. Who may
connect is decided by the wire: there is none but the lab's own management network.

A connection carries a line of JSON, the request, and then frames both ways: one byte that says what it is, the length
in four, and the bytes. A request to connect, `{"connect": [HOST, PORT]}`, makes the rest of it a connection from that
machine to there (support/stations.py), with no process to start for it.
"""

# ruff: noqa: T201 - what it cannot do is said on standard error
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

PORT: Final = 1022
CONNECT_SECONDS: Final = 5.0
UNAVAILABLE: Final = 255  # ssh's
CHUNK: Final = 65536
HEADER: Final = struct.Struct("!cI")
# From the caller: input (none is its end), and a signal for the command. To the caller: outputs, exit status.
INPUT, SIGNAL, OUTPUT, ERROR, STATUS = b"i", b"s", b"o", b"e", b"x"
# A kernel whose power is cut says nothing any more.
KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, name, value)
        self._reader = connection.makefile("rb")

    def send(self, kind: bytes, content: bytes) -> None:
        with self._sending:
            self.connection.sendall(HEADER.pack(kind, len(content)) + content)

    def request(self) -> dict[str, Any]:
        return json.loads(self._reader.readline())

    def received(self, most: int) -> bytes:
        """Return what the other end has sent, no more than that; nothing at its end."""
        return self._reader.read1(most)

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield what the other end sends until it is gone."""
        with contextlib.suppress(OSError):
            while len(header := self._reader.read(HEADER.size)) == HEADER.size:
                kind, length = HEADER.unpack(header)
                yield kind, self._reader.read(length)


def serve(address: str) -> None:
    """Listen in the namespace that this was started in, and run what is asked for in that of PID 1."""
    listener = socket.create_server((address, PORT), backlog=64)
    with Path("/proc/1/ns/net").open() as machine:
        if ctypes.CDLL(None, use_errno=True).setns(machine.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(Channel(connection),), daemon=True).start()


def _answer(channel: Channel) -> None:
    with channel.connection:
        try:
            request = channel.request()
            if "connect" in request:
                _relay(channel, *request["connect"])
            else:
                _run(channel, request)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                channel.send(ERROR, f"on: {error}\n".encode())
                channel.send(STATUS, b"127")


def _relay(channel: Channel, host: str, port: int) -> None:
    """Be a connection to there; one that cannot be made has ended."""
    try:
        there = socket.create_connection((host, port), CONNECT_SECONDS)
    except OSError:
        return
    with there:
        there.settimeout(None)
        back = threading.Thread(target=_pass_on, args=(there.recv, channel.connection), daemon=True)
        back.start()
        _pass_on(channel.received, there)
        back.join()


def _pass_on(receive: Callable[[int], bytes], to: socket.socket) -> None:
    """Pass on what comes, and then its end."""
    with contextlib.suppress(OSError):
        while content := receive(CHUNK):
            to.sendall(content)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)


def _run(channel: Channel, request: dict[str, Any]) -> None:
    directory = request["directory"] if Path(request["directory"]).is_dir() else "/"
    ours: dict[int, bytes] = {}  # what is read from, and as what it is sent
    if request["terminal"]:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *request["terminal"], 0, 0))
        theirs = (slave, slave, slave)
        feed, ours[master] = os.dup(master), OUTPUT
    else:
        (source, feed), (output, out), (errors, err) = os.pipe(), os.pipe(), os.pipe()
        theirs = (source, out, err)
        ours |= {output: OUTPUT, errors: ERROR}
    process = subprocess.Popen(
        request["command"],
        stdin=theirs[0],
        stdout=theirs[1],
        stderr=theirs[2],
        cwd=directory,
        env=os.environ | request["environment"],
        start_new_session=True,
        preexec_fn=_take_terminal if request["terminal"] else None,  # noqa: PLW1509 - a person's shell
    )
    for descriptor in set(theirs):
        os.close(descriptor)
    threading.Thread(target=_obey, args=(channel, process, feed), daemon=True).start()
    while ours:
        for descriptor in select.select(list(ours), [], [])[0]:
            try:
                content = os.read(descriptor, CHUNK)
            except OSError:  # a terminal whose last user is gone
                content = b""
            if content:
                channel.send(ours[descriptor], content)
            else:
                del ours[descriptor]
                os.close(descriptor)
    status = process.wait()
    channel.send(STATUS, str(status if status >= 0 else 128 - status).encode())


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _obey(channel: Channel, process: subprocess.Popen[bytes], feed: int) -> None:
    """Pass on what the caller says; the command ends when the caller is gone."""
    open_ended = True
    for kind, content in channel.frames():
        if kind == SIGNAL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, int(content))
        elif content and open_ended:
            with contextlib.suppress(BrokenPipeError):
                os.write(feed, content)
        elif open_ended:
            os.close(feed)
            open_ended = False
    if open_ended:
        os.close(feed)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(address: str, command: list[str]) -> int:
    """Have a command run there; return its exit status."""
    try:
        connection = socket.create_connection((address, PORT), CONNECT_SECONDS)
    except OSError as error:
        print(f"on: {address}: {error.strerror or error}", file=sys.stderr)
        return UNAVAILABLE
    connection.settimeout(None)
    channel = Channel(connection)
    terminal = os.get_terminal_size(0) if not command and os.isatty(0) else None
    request = {
        "command": command or ["bash"],
        "environment": {name: os.environ[name] for name in ("REDISCLI_AUTH", "TERM") if name in os.environ},
        "directory": str(Path.cwd()),
        "terminal": (terminal.lines, terminal.columns) if terminal else None,
    }
    connection.sendall(json.dumps(request).encode() + b"\n")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: channel.send(SIGNAL, str(number).encode()))
    threading.Thread(target=_feed, args=(channel,), daemon=True).start()
    with _raw_terminal() if terminal else contextlib.nullcontext():
        for kind, content in channel.frames():
            if kind == STATUS:
                return int(content)
            _write(1 if kind == OUTPUT else 2, content)
    print(f"on: {address}: the connection has ended", file=sys.stderr)
    return UNAVAILABLE


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _feed(channel: Channel) -> None:
    with contextlib.suppress(OSError):
        while content := os.read(0, CHUNK):
            channel.send(INPUT, content)
        channel.send(INPUT, b"")


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    former = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, former)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(run(sys.argv[2], sys.argv[3:]))
