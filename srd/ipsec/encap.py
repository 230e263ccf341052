"""ESP in UDP (RFC 3948), for networks that drop IP protocol 50: the sockets that make the kernel take it off again.

An SA says by itself that its packets leave in UDP. To receive, the kernel wants a UDP socket on that port with
UDP_ENCAP set (include/uapi/linux/udp.h); without one it answers port unreachable, and the link is dead. The socket must
not die with srd, so a program that does nothing (`sleep infinity`) holds a copy: it has no rights and outlives srd as
the children do. It also holds a lock (flock(2) belongs to the open file, which it inherits), by which the next srd sees
that it is there. SO_REUSEPORT lets srd's own sockets stand beside those: any of them makes the kernel do the work.

What reaches the sockets and is not ESP stays in their buffers and is dropped: srd never reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import structlog

from srd.cluster import Config, Node
from srd.model import PLAIN_ENVIRONMENT, SYSTEM_PATH, ConfigError, Endpoint, SrdError

log = structlog.get_logger(__name__)

FILE_NAME: Final = "encap.json"
_UDP_ENCAP: Final = 100
_UDP_ENCAP_ESPINUDP: Final = 2
_NOBODY: Final = 65534
# The kernel gives at least 2 KiB whatever is asked for: nothing of what is queued here is wanted.
_RECEIVE_BUFFER: Final = 1


class _Holder(msgspec.Struct, frozen=True):
    """The process that holds the lock, and where its sockets are, as the lock's file says it."""

    pid: int
    endpoints: tuple[str, ...]


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


class Encapsulation:
    """Keeps the sockets open, here and in their holder. `run_dir` is where the lock's file is."""

    def __init__(self, *, config: Config, node: Node, run_dir: Path) -> None:
        self._node = node
        self._path = run_dir / FILE_NAME
        self._wanted = endpoints_of(config, node)
        self._sockets: dict[Endpoint, socket.socket] = {}
        self._child: int | None = None
        self._one_pass = asyncio.Lock()

    def adopt(self, config: Config) -> None:
        """Keep what this file asks for, from the next pass on."""
        self._wanted = endpoints_of(config, self._node)

    async def reconcile(self) -> None:
        """Open and close sockets, and see to it that a holder has the same."""
        async with self._one_pass:
            for endpoint in self._sockets.keys() - set(self._wanted):
                self._sockets.pop(endpoint).close()
            for endpoint in self._wanted:
                if endpoint not in self._sockets:
                    self._sockets[endpoint] = open_socket(endpoint)
            await self._hold(tuple(map(str, self._wanted)))

    def close(self) -> None:
        """Close srd's own sockets; the holder's stay."""
        while self._sockets:
            self._sockets.popitem()[1].close()

    async def _hold(self, endpoints: tuple[str, ...]) -> None:
        self._collect()
        holder = await asyncio.to_thread(find_holder, self._path)
        if holder is not None and holder.endpoints != endpoints:
            await asyncio.to_thread(end_holder, self._path)
        elif holder is not None:
            return
        if not endpoints:
            return
        with _locked(self._path) as lock:
            if lock is None:
                return  # the former one has not ended yet: the next pass comes soon
            pid = self._child = await asyncio.to_thread(self._spawn, lock)
            os.pwrite(lock, msgspec.json.encode(_Holder(pid, endpoints)), 0)
        log.info("ESP in UDP", endpoints=list(endpoints), holder=pid)

    def _spawn(self, lock: int) -> int:
        program = shutil.which("sleep", path=SYSTEM_PATH)
        if program is None:
            raise SrdError("hold the sockets of ESP in UDP by", "sleep", "there is no such program")
        root = os.geteuid() == 0
        process = subprocess.Popen(
            (program, "infinity"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=PLAIN_ENVIRONMENT,
            start_new_session=True,
            pass_fds=(lock, *(opened.fileno() for opened in self._sockets.values())),
            user=_NOBODY if root else None,
            group=_NOBODY if root else None,
            extra_groups=() if root else None,
        )
        # It is to live on; marked as ended, subprocess neither complains of that nor waits for it.
        process.returncode = 0
        return process.pid

    def _collect(self) -> None:
        """Collect the status of a holder of this srd's own that has ended."""
        if self._child is not None and os.waitpid(self._child, os.WNOHANG) != (0, 0):
            self._child = None


def find_holder(path: Path) -> _Holder | None:
    """Return the holder that lives, None if there is none. It reads files, and /proc in a rare case: for a thread."""
    with _locked(path) as lock:
        if lock is not None:
            return None
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=_Holder)
    # A srd that died as soon as it had started the holder has not written that down.
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if process.name != str(os.getpid()) and any(file.samefile(path) for file in (process / "fd").iterdir()):
                return _Holder(int(process.name), ())
    return None


def end_holder(path: Path) -> bool:
    """End the holder, if there is one; what still comes in UDP is refused from then on."""
    holder = find_holder(path)
    if holder is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Take the lock for the block; None when it is taken. A process that inherits the descriptor keeps it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SrdError("open", str(path), error.strerror or "refused") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            os.ftruncate(descriptor, 0)
            yield descriptor
    finally:
        os.close(descriptor)
