"""ESP in UDP (RFC 3948), for networks that drop IP protocol 50: the sockets that make the kernel take it off again.

An SA says by itself that its packets leave in UDP. To receive, the kernel wants a UDP socket on that port with
UDP_ENCAP set (include/uapi/linux/udp.h); without one it answers port unreachable, and the link is dead. The socket must
not die with srd, so for each port a program that does nothing (`sleep infinity`) holds a copy, and outlives srd as the
children do. It also holds a lock (flock(2) belongs to the open file, which it inherits), by which the next srd sees
that it is there. SO_REUSEPORT lets srd's own sockets stand beside those: any of them makes the kernel do the work.

What reaches the sockets and is not ESP stays in their buffers and is dropped: srd never reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from srd.cluster import Config, Node
from srd.model import PLAIN_ENVIRONMENT, SYSTEM_PATH, ConfigError, Endpoint, SrdError

log = structlog.get_logger(__name__)

_UDP_ENCAP: Final = 100
_UDP_ENCAP_ESPINUDP: Final = 2
# The kernel gives at least 2 KiB whatever is asked for: nothing of what is queued here is wanted.
_RECEIVE_BUFFER: Final = 1
# A process that sleeps ends at once when it is told to.
_END_SECONDS: Final = 2.0
_PROC: Final = Path("/proc")


def endpoints_of(config: Config, node: Node) -> tuple[Endpoint, ...]:
    """Return where ESP in UDP comes in; nowhere when it is not used."""
    return tuple(Endpoint(address, port) for port in config.udp_ports for address in node.addresses)


def open_socket(endpoint: Endpoint) -> socket.socket:
    """Open a socket by which the kernel takes ESP out of UDP; `ConfigError` when the port is somebody else's."""
    family = socket.AF_INET if endpoint.address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        made.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, _UDP_ENCAP_ESPINUDP)
        made.bind((str(endpoint.address), endpoint.port))
    except OSError as error:
        made.close()
        remedy = ""
        if error.errno == errno.EADDRINUSE:
            remedy = "another IPsec daemon has it: choose another ipsec.encap_port on every node"
        raise ConfigError("receive ESP in UDP on", str(endpoint), error.strerror or "refused", remedy) from error
    return made


def try_sockets(config: Config, node: Node) -> None:
    """Raise `ConfigError` if ESP in UDP could not come in; the sockets of srd itself are in nobody's way."""
    for endpoint in endpoints_of(config, node):
        open_socket(endpoint).close()


class Encapsulation:
    """Keeps the sockets open, here and in a holder for each port. `run_dir` is where the holders' files are."""

    def __init__(self, *, config: Config, node: Node, run_dir: Path) -> None:
        self._node = node
        self._run_dir = run_dir
        self._wanted = endpoints_of(config, node)
        self._sockets: dict[Endpoint, socket.socket] = {}
        self._children: set[int] = set()
        self._one_pass = asyncio.Lock()

    def adopt(self, config: Config) -> None:
        """Keep what this file asks for, from the next pass on."""
        self._wanted = endpoints_of(config, self._node)

    async def reconcile(self) -> None:
        """Open and close sockets, and see to it that a holder of each port has the same."""
        async with self._one_pass:
            for endpoint in self._wanted:
                if endpoint not in self._sockets:
                    self._sockets[endpoint] = open_socket(endpoint)
            await asyncio.to_thread(self._keep_holders, self._wanted)
            for endpoint in self._sockets.keys() - set(self._wanted):
                self._sockets.pop(endpoint).close()

    def close(self) -> None:
        """Close srd's own sockets; the holders' stay."""
        while self._sockets:
            self._sockets.popitem()[1].close()

    def _keep_holders(self, wanted: Sequence[Endpoint]) -> None:
        self._children = {pid for pid in self._children if _runs(pid)}
        by_port: dict[int, list[Endpoint]] = {}
        for endpoint in wanted:
            by_port.setdefault(endpoint.port, []).append(endpoint)
        for port, endpoints in by_port.items():
            pid = hold(holder_file(self._run_dir, port), [self._sockets[endpoint] for endpoint in endpoints])
            if pid is not None:
                self._children.add(pid)
                log.info("ESP in UDP", endpoints=[str(endpoint) for endpoint in endpoints], holder=pid)
        for path in holder_files(self._run_dir):
            if path not in {holder_file(self._run_dir, port) for port in by_port}:
                end_holder(path)
                path.unlink(missing_ok=True)


def _runs(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False  # as the first process of a container, srd may have collected it with the orphans


def holder_file(run_dir: Path, port: int) -> Path:
    """Return the file whose lock the holder of a port has; it says where its sockets are."""
    return run_dir / f"encap-{port}.json"


def holder_files(run_dir: Path) -> list[Path]:
    """Return the files of all holders that may be there."""
    return sorted(run_dir.glob("encap-*.json"))


def hold(path: Path, sockets: Sequence[socket.socket]) -> int | None:
    """Start a holder of these sockets, unless one has them already; return its pid. Blocks.

    One that has others (a node's address is another than it was) is ended first; srd's own sockets stand meanwhile.
    """
    names = sorted(str(opened.getsockname()[:2]) for opened in sockets)
    if is_held(path):
        with contextlib.suppress(OSError, ValueError):  # what is not UTF-8 is a ValueError, too
            if msgspec.json.decode(path.read_bytes(), type=list[str]) == names:
                return None
        end_holder(path)
    with _locked(path) as lock:
        if lock is None:
            return None  # it has not ended; the next pass tries again
        # Written first: should srd die before there is a holder, nobody has the lock.
        path.write_bytes(msgspec.json.encode(names))
        return _spawn((lock, *(opened.fileno() for opened in sockets)))


def _spawn(descriptors: Sequence[int]) -> int:
    program = shutil.which("sleep", path=SYSTEM_PATH)
    if program is None:
        raise SrdError("hold the sockets of ESP in UDP by", "sleep", "there is no such program")
    process = subprocess.Popen(
        (program, "infinity"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=PLAIN_ENVIRONMENT,
        start_new_session=True,
        pass_fds=tuple(descriptors),
    )
    # It is to live on; marked as ended, subprocess neither complains of that nor waits for it.
    process.returncode = 0
    return process.pid


def is_held(path: Path) -> bool:
    """Whether a holder lives."""
    with _locked(path) as lock:
        return lock is None


def holder_pids(path: Path) -> list[int]:
    """Return who has the file open, besides this process: the holder, whatever anybody has written about it."""
    found = []
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if process.name != str(os.getpid()) and any(file.samefile(path) for file in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def end_holder(path: Path) -> None:
    """End the holder, if there is one, and return when it has ended; what still comes in UDP is refused then."""
    if not path.exists() or not is_held(path):
        return
    for pid in holder_pids(path):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if pid in holder_pids(path):  # the number has not changed hands before it was pinned
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                    select.select([pidfd], [], [], _END_SECONDS)
            finally:
                os.close(pidfd)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Take the lock for the block; None when it is taken. A process that inherits the descriptor keeps it."""
    try:
        # Read-only: what inherits it cannot write there.
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SrdError("open", str(path), error.strerror or "refused") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)
