"""A client that is running before anything is broken: it writes on one connection, opened anew after an error, at once.

    python -m bench.primacy.writer PREFIX PAUSE_SECONDS WAIT COUNT

Writes PREFIX0, PREFIX1, ... to the stunnel on 127.0.0.1, COUNT of them (0: until it is told), so far apart; with WAIT
each is confirmed by so many replicas before it counts. Says `writing` at its first acknowledged write and `back` at
each one that comes after a failure; obeys what it reads on standard input, a word a line, with a line of JSON each:

    end        it writes no more: [number, CLOCK_MONOTONIC] of each acknowledged write, and the last error
    tried      how many writes it has tried
    cut        it closes its connection, and says at what CLOCK_MONOTONIC; the next write opens another one
    missing    the numbers of those that redis has not now; asked until redis answers
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Final

from lab.confirmed import Client, persistently

# For an answer, and from the second failure in a row on until it tries again; client libraries do it so or slower.
ANSWER_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.02
CONFIRM_MILLISECONDS: Final = 500
CHUNK: Final = 200


class Writer:
    """What was tried, and what was acknowledged when."""

    def __init__(self, prefix: str, confirmations: int) -> None:
        self._client = Client(os.environ["REDISCLI_AUTH"], ANSWER_SECONDS)
        self._prefix = prefix
        self._confirmations = confirmations
        self.failures = 0  # in a row
        self._last_error = ""
        self.tried = 0
        self.acknowledged: list[tuple[int, float]] = []

    def write(self) -> bool:
        """Write once; return whether redis took it."""
        number = self.tried
        self.tried += 1
        try:
            self._client.ask("SET", f"{self._prefix}{number}", str(number))
            enough = self._confirm()
        except OSError as error:
            self._last_error = str(error)
            self.failures += 1
            return False
        if enough:
            self.acknowledged.append((number, time.monotonic()))
            if self.failures:
                print("back", flush=True)
        self.failures = 0
        return True

    def _confirm(self) -> bool:
        if not self._confirmations:
            return True
        replicas = self._client.ask("WAIT", str(self._confirmations), str(CONFIRM_MILLISECONDS))
        return isinstance(replicas, int) and replicas >= self._confirmations

    def cut(self) -> float:
        moment = time.monotonic()
        self._client.close()
        return moment

    def end(self) -> dict[str, object]:
        return {"tried": self.tried, "acknowledged": self.acknowledged, "last_error": self._last_error}

    def missing(self) -> list[int]:
        found: list[int] = []
        for start in range(0, len(self.acknowledged), CHUNK):
            numbers = [number for number, _ in self.acknowledged[start : start + CHUNK]]
            keys = [f"{self._prefix}{number}" for number in numbers]
            values = persistently(lambda keys=keys: self._client.ask("MGET", *keys))
            assert isinstance(values, list)
            found += [number for number, value in zip(numbers, values, strict=True) if value != str(number)]
        return found


def main(prefix: str, pause: float, confirmations: int, count: int) -> int:
    """Write until standard input says so, or ends."""
    writer = Writer(prefix, confirmations)
    while not writer.write():
        time.sleep(RETRY_SECONDS)
    print("writing", flush=True)
    ended = False
    due = time.monotonic()
    while True:
        writes = not ended and (count == 0 or writer.tried < count)
        wait = max(0.0, due - time.monotonic()) if writes else None
        if select.select([sys.stdin], [], [], wait)[0]:
            word = sys.stdin.readline().strip()
            if not word:
                return 0
            ended = ended or word == "end"
            answers = {"end": writer.end, "missing": writer.missing, "cut": writer.cut, "tried": lambda: writer.tried}
            print(json.dumps(answers[word]()), flush=True)
        elif writes:
            due = max(due + pause, time.monotonic() - pause)
            if not writer.write():
                due = time.monotonic() + (RETRY_SECONDS if writer.failures > 1 else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
