"""A node whose srd is a unit of a real service manager: what it says of itself, and a balancer's checks of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from support.clusters import cluster_toml, make_bundles
from support.machine import CHECKOUT, INSTALL, Machine, machine

# The unit's own file, but for where this checkout may lie: /tmp or a home directory.
DROP_IN = "[Service]\nPrivateTmp=no\nProtectHome=no\nWatchdogSec=5\n"
PORT = 8080
URL = f"http://127.0.1.1:{PORT}/health"


@contextlib.contextmanager
def unit_node(root: Path, extra: str = "") -> Iterator[Machine]:
    """A cluster of one, without IPsec, which not every kernel has; srd is enabled and up. `root` is for its bundle."""
    make_bundles(root, cluster_toml(nodes=1, extra=extra))
    with machine() as made:
        there = Path(f"/proc/{made.init}/root")
        shutil.copytree(root / "bundles" / "redis-1", there / "etc/srd")
        (there / "etc/srd").chmod(0o700)
        (there / "opt/srd").symlink_to(CHECKOUT / ".venv")
        made.write("/etc/systemd/system/srd.service.d/checkout.conf", DROP_IN)
        made.run(*INSTALL)
        made.run("systemctl", "start", "srd", check=False)
        journal = ("journalctl", "--no-pager", "--unit", "srd")
        assert made.show("srd", "ActiveState") == "active", made.run(*journal)
        made.wait(lambda: healthy(made), "it does its job")
        yield made


def conditions(node: Machine) -> dict[str, str]:
    """Return the conditions that hold: the text of each by its code. That of ipsec.mode "off" always does."""
    found = {found["code"]: found["text"] for found in srd(node, "status").get("conditions", ())}  # type: ignore[attr-defined]
    return {code: text for code, text in found.items() if code != "ipsec_off"}


def ask(node: Machine, *command: str) -> str:
    """Return what redis answers to the user srd."""
    password = tomllib.loads(node.run("cat", "/etc/srd/secrets.toml"))["srd_password"]
    cli = ("redis-cli", "-h", "127.0.1.1", "--user", "srd", *command)
    return node.run("env", f"REDISCLI_AUTH={password}", *cli, check=False).strip()


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
        self.answers: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _check(self) -> None:
        while not self._over.is_set():
            # 000 is curl's for no answer: refused, reset, or none within 10 s.
            said = "%{http_code} %{errormsg} after %{time_total} s"
            curl = ("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", said, URL)
            self.answers.append(self._node.run(*curl, check=False))

    def refused(self) -> list[str]:
        """Return of each check that had no answer what curl says of it."""
        return [answer for answer in self.answers if answer.startswith("000")]


def back(node: Machine, former: str) -> bool:
    """Whether another srd than the former one does the node's job."""
    active = node.show("srd", "ActiveState") == "active"
    return active and node.show("srd", "MainPID") not in (former, "0") and healthy(node)
