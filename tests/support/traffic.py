"""Traffic between stations of the lab, made and counted in the test's own process, and what is put in its way.

A socket that is opened `inside` a station stays in it, so that nothing has to be started there: starting a process
takes 0.3 to 3 s in the lab.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from support.namespace import inside

PORT: Final = 5201
SILENCE_SECONDS: Final = 3.0  # after which nothing more is under way
STALL_SECONDS: Final = 30.0
RECEIVE_BUFFER: Final = 32 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
# What a stream has under way: 80 ms of a link of 100 Mbit/s. A queue that holds it never drops, so that what is
# measured is the link and not how TCP gets over its losses.
SEND_BUFFER: Final = 1 << 20
CHUNK: Final = bytes(256 << 10)
# System calls are dear in the lab: the receiver of a stream is woken when it is worth it, not for each packet.
WORTH_WAKING: Final = 64 << 10
# Fields of struct tcp_info (linux/tcp.h): format and offset.
PATH_MTU: Final = ("I", 60)
RETRANSMITTED: Final = ("I", 100)
BYTES_RECEIVED: Final = ("Q", 128)


@dataclass(frozen=True)
class Way:
    """From a station to another one that has this address."""

    source: str
    target: str
    address: str

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def socket_at(self, station: str, kind: socket.SocketKind) -> socket.socket:
        with inside(station):
            return socket.socket(self.family, kind)


@contextlib.contextmanager
def queueing(ports: tuple[str, ...], *discipline: str) -> Iterator[None]:
    """Put a queueing discipline, in tc's words, on ports of the lab's bridge meanwhile."""
    with contextlib.ExitStack() as undo:
        for port in ports:
            subprocess.run(["tc", "qdisc", "add", "dev", port, "root", *discipline], check=True)
            undo.callback(subprocess.run, ["tc", "qdisc", "delete", "dev", port, "root"], check=True)
        yield


@dataclass
class Datagrams:
    """A flow of numbered UDP datagrams; what became of it is known once it has ended."""

    way: Way
    rate: int  # a second
    size: int = 64
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        return self.sent - self.received

    @property
    def rate_reached(self) -> float:
        return self.sent / self.seconds

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        sender = self.way.socket_at(self.way.source, socket.SOCK_DGRAM)
        receiver = self.way.socket_at(self.way.target, socket.SOCK_DGRAM)
        over = threading.Event()
        with sender, receiver:
            # Or a burst that waits for the one CPU would be lost in the receiver's own buffer.
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            receiver.bind(("", PORT))
            receiver.settimeout(SILENCE_SECONDS)
            sender.connect((self.way.address, PORT))
            threads = [
                threading.Thread(target=self._send, args=(sender, over)),
                threading.Thread(target=self._receive, args=(receiver, over)),
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                over.set()
                for thread in threads:
                    thread.join()

    def _send(self, sender: socket.socket, over: threading.Event) -> None:
        started = time.monotonic()
        padding = bytes(self.size - 8)
        while not over.wait(0.005):
            due = int((time.monotonic() - started) * self.rate)
            while self.sent < due:
                sender.send(struct.pack("!Q", self.sent) + padding)
                self.sent += 1
        self.seconds = time.monotonic() - started

    def _receive(self, receiver: socket.socket, over: threading.Event) -> None:
        numbers: set[bytes] = set()
        with contextlib.suppress(TimeoutError):
            while not (over.is_set() and self.seconds and len(numbers) == self.sent):
                numbers.add(receiver.recv(self.size)[:8])
                self.received = len(numbers)


def tcp_info(connection: socket.socket, what: tuple[str, int]) -> int:
    """Return a field of struct tcp_info."""
    form, offset = what
    (found,) = struct.unpack_from(form, connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), offset)
    return int(found)


@dataclass
class Stream:
    """A TCP connection that carries as much as it can."""

    sender: socket.socket
    receiver: socket.socket
    received: int = 0

    def throughput(self, seconds: float) -> float:
        """Return the bytes a second that arrive in the next so many seconds.

        As the kernel counts them: the reader, who waits for his turn of the one CPU, is late when there is other work.
        """
        before, started = tcp_info(self.receiver, BYTES_RECEIVED), time.monotonic()
        time.sleep(seconds)
        return (tcp_info(self.receiver, BYTES_RECEIVED) - before) / (time.monotonic() - started)

    def path_mtu(self) -> int:
        """Return what TCP takes for the path's MTU, within ESP."""
        return tcp_info(self.sender, PATH_MTU)

    def retransmitted(self) -> int:
        """Return how many segments TCP has sent again."""
        return tcp_info(self.sender, RETRANSMITTED)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the receiver has closed
            while True:
                self.sender.sendall(CHUNK)

    def _receive(self) -> None:
        buffer = bytearray(1 << 20)
        while count := self.receiver.recv_into(buffer):
            self.received += count


@contextlib.contextmanager
def streaming(way: Way) -> Iterator[Stream]:
    """Have a TCP connection carry as much as it can meanwhile; it fails if nothing arrives for STALL_SECONDS."""
    listener = way.socket_at(way.target, socket.SOCK_STREAM)
    sender = way.socket_at(way.source, socket.SOCK_STREAM)
    with listener, sender:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WORTH_WAKING)  # its connections inherit it
        listener.bind(("", PORT))
        listener.listen()
        sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
        sender.settimeout(STALL_SECONDS)
        sender.connect((way.address, PORT))
        receiver, _ = listener.accept()
        receiver.settimeout(STALL_SECONDS)
        with receiver:
            stream = Stream(sender, receiver)
            threads = [threading.Thread(target=target) for target in (stream._send, stream._receive)]
            for thread in threads:
                thread.start()
            try:
                yield stream
            finally:
                sender.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join()
