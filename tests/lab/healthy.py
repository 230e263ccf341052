"""Waits, as one process on the lab's client, until the cluster does its whole job; prints each stage as it is reached.

The last stage is what a user needs: a PONG from the primary through the client's stunnel and the balancer's haproxy.
One process that asks, because starting curl or redis-cli costs tens of milliseconds each in user-mode Linux.
"""

# ruff: noqa: T201 - printing is what this command does
from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

BOUND_SECONDS: Final = 120.0
BETWEEN_SECONDS: Final = 0.2
ANSWER_SECONDS: Final = 3.0


def _ask(address: str, port: int, request: bytes) -> bytes:
    """Return the answer's beginning; the socket's own words where there is none."""
    try:
        with socket.create_connection((address, port), ANSWER_SECONDS) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                return answer.read()  # until the other side closes, which every request here asks for
    except OSError as error:
        return str(error).encode()


def _get(node: str, path: str) -> str:
    """Return the status of a GET as text, "200", or what came instead of one."""
    answer = _ask(node, 8080, f"GET {path} HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n".encode())
    line = answer.split(b"\r\n", 1)[0].decode(errors="replace")
    return line.split(" ")[1] if line.startswith("HTTP/") else line


def _all_ok(nodes: list[str], path: str) -> str:
    """Return the empty string when every node answers 200, else who answered what."""
    answers = {node: _get(node, path) for node in nodes}
    return ", ".join(f"http://{node}:8080{path}: {answer}" for node, answer in answers.items() if answer != "200")


def _one_primary(nodes: list[str]) -> str:
    answers = {node: _get(node, "/primary") for node in nodes}
    if list(answers.values()).count("200") == 1:
        return ""
    return "not one /primary with 200: " + ", ".join(f"{node}: {answer}" for node, answer in answers.items())


def _no_conditions(nodes: list[str]) -> str:
    """Return what is not as it should be anywhere: a replica out of step, nobody who could take over, ..."""
    found = []
    for node in nodes:
        body = _ask(node, 8080, f"GET /srd HTTP/1.0\r\nHost: {node}\r\n\r\n".encode()).partition(b"\r\n\r\n")[2]
        conditions = json.loads(body)["conditions"] if body else [{"code": "no answer", "subject": "/srd"}]
        found += [f"{node}: {condition['code']} {condition['subject']}" for condition in conditions]
    return ", ".join(found)


def _pong() -> str:
    password = os.environ["REDISCLI_AUTH"]
    answer = _ask("127.0.0.1", 6379, f"AUTH {password}\r\nPING\r\nQUIT\r\n".encode())
    return "" if b"+PONG" in answer else f"no PONG from the client's 127.0.0.1:6379 but {answer!r}"


def _stages(nodes: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "srd runs on every node", lambda: _all_ok(nodes, "/liveness")
    yield "links protected, redis and sentinel up on every node", lambda: _all_ok(nodes, "/health")
    yield "one primary, proven by a majority", lambda: _one_primary(nodes)
    yield "replicas in step, a successor at hand", lambda: _no_conditions(nodes)
    yield "the client reaches it through TLS and haproxy", _pong


def main(nodes: list[str]) -> int:
    """Print a line for each stage; 1, and the condition that was not met, after two minutes."""
    deadline = time.monotonic() + BOUND_SECONDS
    for name, unmet in _stages(nodes):
        while reason := unmet():
            if time.monotonic() > deadline:
                print(f"lab: not healthy after {BOUND_SECONDS:.0f} s: {reason}", file=sys.stderr)
                return 1
            time.sleep(BETWEEN_SECONDS)
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
