"""A node whose srd is a unit of a real service manager: what it says of itself, and a balancer's checks of it."""

from __future__ import annotations

import json
import threading
from typing import Self

from support.machine import Machine

URL = "http://127.0.1.1:8080/health"


def healthy(node: Machine) -> bool:
    return node.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", URL, check=False) == "200"


def srd(node: Machine, verb: str) -> dict[str, object]:
    return json.loads(node.run("srd", verb, "-o", "json", check=False) or "{}")


def pids(node: Machine) -> dict[str, int]:
    return {child["service"]: child["pid"] for child in srd(node, "children").get("children", ())}  # type: ignore[union-attr]


def lives(node: Machine, pid: int) -> bool:
    return node.run("cat", f"/proc/{pid}/comm", check=False) != ""


class Checks:
    """A balancer's checks, one after the other, while something happens."""

    def __init__(self, node: Machine) -> None:
        self._node = node
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._check)
        self.statuses: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _check(self) -> None:
        while not self._over.is_set():
            # 000 is curl's for no answer: refused, reset, or none within 10 s.
            self.statuses.append(
                self._node.run("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", URL, check=False)
            )

    def refused(self) -> int:
        return self.statuses.count("000")


def back(node: Machine, former: str) -> bool:
    """Whether another srd than the former one does the node's job."""
    active = node.show("srd", "ActiveState") == "active"
    return active and node.show("srd", "MainPID") not in (former, "0") and healthy(node)
