"""Writes to redis as a client does, one connection at a time, and measures the time without an acknowledged write.

    writer.py until-gap [SECONDS]    runs until writes failed and are back, at most SECONDS (60)
    writer.py for SECONDS [PAUSE]    with so many seconds between two writes (0.02)

Prints one JSON object: acknowledged and failed writes, and the longest time between two acknowledged ones in seconds.
The acknowledged ones are the keys PREFIX0, PREFIX1 and so on.
It is running before anything is broken: starting a process takes 0.1 to 0.3 s in user-mode Linux.
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from typing import Final

TARGET: Final = ("127.0.0.1", 6379)
ANSWER_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 0.02
# Shorter pauses are a busy machine's, not a failover's.
GAP_SECONDS: Final = 0.3


class Writer:
    """One client: it reconnects at every error, as client libraries do."""

    def __init__(self, password: str) -> None:
        self._password = password
        self._connection: socket.socket | None = None
        self.acknowledged = 0
        self.failed = 0
        self.longest_gap = 0.0
        self.last_error = ""
        self.prefix = f"writer:{os.getpid()}:"
        self._last = time.monotonic()

    def write(self) -> bool:
        """Write once; return whether redis acknowledged it."""
        try:
            if self._connection is None:
                self._connection = socket.create_connection(TARGET, ANSWER_SECONDS)
                self._ask(f"AUTH {self._password}\r\n")
            self._ask(f"SET {self.prefix}{self.acknowledged} {time.time()}\r\n")
        except OSError as error:
            self.failed += 1
            self.last_error = str(error)
            self.close()
            return False
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now
        self.acknowledged += 1
        return True

    def _ask(self, command: str) -> None:
        if self._connection is None:
            raise ConnectionError("not connected")
        self._connection.settimeout(ANSWER_SECONDS)
        self._connection.sendall(command.encode())
        answer = self._connection.recv(256)
        if answer != b"+OK\r\n":
            raise ConnectionError(answer.decode(errors="replace").strip() or "it closed the connection")

    def close(self) -> None:
        """Close the connection; the next write opens another."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def summary(self) -> str:
        """Return what was counted, as JSON."""
        return json.dumps(
            {
                "acknowledged": self.acknowledged,
                "failed": self.failed,
                "longest_gap_seconds": round(self.longest_gap, 3),
                "last_error": self.last_error,
                "prefix": self.prefix,
            }
        )


def main() -> int:
    """Write until the end that the arguments name."""
    mode, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else PAUSE_SECONDS
    writer = Writer(os.environ["REDISCLI_AUTH"])
    while not writer.write():
        time.sleep(PAUSE_SECONDS)
    writer.failed = 0
    print("writing", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        acknowledged = writer.write()
        if mode == "until-gap" and acknowledged and writer.failed and writer.longest_gap > GAP_SECONDS:
            break
        time.sleep(pause)
    writer.close()
    print(writer.summary(), flush=True)
    return 0 if mode == "for" or writer.longest_gap > GAP_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
