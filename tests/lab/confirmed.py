"""A client that writes, has each write confirmed by a replica (WAIT 1), and says afterwards whether all are there.

Runs until its standard input ends, and obeys what it reads there, a word a line, with a line of JSON each:

    count      how many writes are acknowledged: redis took them, and a replica said that it has them
    missing    which of those are not in redis now; asked until redis answers
    end        it writes no more; what it counted

A write that failed is not tried again, the next one is another: whether it was done nobody can say.
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

TARGET: Final = ("127.0.0.1", 6379)
# For an answer. The lab's nodes share two CPUs: what is late there is no failure.
ANSWER_SECONDS: Final = 15.0
CONFIRM_MILLISECONDS: Final = 5000
PAUSE_SECONDS: Final = 0.02
PATIENCE_SECONDS: Final = 60.0
REPORTED: Final = 10
CHUNK: Final = 200


class Client:
    """One connection at a time, opened anew after every error, as client libraries do."""

    def __init__(self, password: str, seconds: float = ANSWER_SECONDS) -> None:
        self._password = password
        self._seconds = seconds  # for an answer
        self._socket: socket.socket | None = None
        self._answers = None

    def ask(self, *words: str) -> object:
        """Send a command and return its answer; `OSError` where there is none, or redis refuses."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(TARGET, self._seconds)
                self._answers = self._socket.makefile("rb")
                self._command("AUTH", self._password)
            return self._command(*words)
        except OSError:
            self.close()
            raise

    def _command(self, *words: str) -> object:
        assert self._socket is not None
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        self._socket.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        return self._answer()

    def _answer(self) -> object:
        line = self._answers.readline()  # type: ignore[union-attr]
        if not line.endswith(b"\r\n"):
            raise ConnectionError("it closed the connection")
        kind, text = line[:1], line[1:-2].decode()
        if kind == b"-":
            raise ConnectionError(text)
        if kind == b":":
            return int(text)
        if kind == b"$":
            return self._answers.read(int(text) + 2)[:-2].decode() if int(text) >= 0 else None  # type: ignore[union-attr]
        return [self._answer() for _ in range(int(text))] if kind == b"*" else text

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Writer:
    """Writes one key after the other and keeps what became of them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = f"confirmed:{os.getpid()}"
        self._number = 0
        self._acknowledged: list[int] = []
        self._errors: list[str] = []
        self.failed = 0
        self._unconfirmed = 0
        self._slowest = 0.0
        self._longest_gap = 0.0
        self._last = time.monotonic()

    def write(self) -> None:
        self._number += 1
        began = time.monotonic()
        try:
            self._client.ask("SET", f"{self._prefix}:{self._number}", str(self._number))
            confirmed = self._client.ask("WAIT", "1", str(CONFIRM_MILLISECONDS))
        except OSError as error:
            self.failed += 1
            if len(self._errors) < REPORTED:
                self._errors.append(f"{self._number}: {error}")
            return
        now = time.monotonic()
        self._slowest = max(self._slowest, now - began)
        if confirmed == 0:
            self._unconfirmed += 1
            return
        self._acknowledged.append(self._number)
        self._longest_gap, self._last = max(self._longest_gap, now - self._last), now

    def count(self) -> int:
        return len(self._acknowledged)

    def missing(self) -> list[int]:
        found: list[int] = []
        for start in range(0, len(self._acknowledged), CHUNK):
            numbers = self._acknowledged[start : start + CHUNK]
            values = self._client.ask("MGET", *(f"{self._prefix}:{number}" for number in numbers))
            assert isinstance(values, list)
            found += [number for number, value in zip(numbers, values, strict=True) if value != str(number)]
        return found

    def figures(self) -> dict[str, object]:
        return {
            "acknowledged": self.count(),
            "failed": self.failed,
            "unconfirmed": self._unconfirmed,
            "slowest_seconds": round(self._slowest, 2),
            "longest_gap_seconds": round(self._longest_gap, 2),
            "errors": self._errors,
        }


def persistently(ask: Callable[[], T]) -> T:
    """Ask until redis answers: the balancer has to find the primary first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_SECONDS)


def main() -> int:
    """Write until standard input ends."""
    client = Client(os.environ["REDISCLI_AUTH"])
    persistently(lambda: client.ask("PING"))
    writer = Writer(client)
    writes = True
    print("writing", flush=True)
    while True:
        if select.select([sys.stdin], [], [], PAUSE_SECONDS if writes else None)[0]:
            word = sys.stdin.readline().strip()
            if not word:
                return 0
            writes = writes and word != "end"
            answers = {"count": writer.count, "missing": lambda: persistently(writer.missing), "end": writer.figures}
            print(json.dumps(answers[word]()), flush=True)
        elif writes:
            writer.write()


if __name__ == "__main__":
    sys.exit(main())
