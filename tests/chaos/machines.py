"""The lab with a kernel for each node, as faults find it: systemd has srd as a unit, and power is really cut."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

from chaos.world import COMMAND_SECONDS, FILLER, STATE, STOP_SECONDS, NotNowError, World, run, wait
from lab.kernels.remote import ERROR, INPUT, OUTPUT, STATUS, Channel
from support.stations import asked

from srd.supervise.adopt import REGISTER_NAME

BOOT_SECONDS: Final = 150.0
LOGS: Final = ("redis", "sentinel", "stunnel")


class Machines(World):
    """Nodes that are machines. What is done to one starts a process there, which takes tenths of a second."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        super().__init__(nodes)
        # What is to be undone on a machine whose power is cut, once it is on again.
        self._off: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)

    def on(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command there, by what answers `on`, which would cost a process here as well."""
        try:
            status, said, errors = _ask(node, command)
        except OSError as error:
            if check:
                raise NotNowError(f"{node} does not answer: {error}") from error
            return ""
        if check and status:
            raise NotNowError(f"on {node} {' '.join(command)}: {errors.strip() or status}")
        return said

    def register(self, node: str) -> str:
        return self.on(node, "cat", f"/run/srd/{REGISTER_NAME}", check=False)

    def srd(self, node: str) -> int:
        pid = int(self.on(node, "systemctl", "show", "--property", "MainPID", "--value", "srd"))
        if not pid:
            raise NotNowError(f"no srd runs on {node}")
        return pid

    def alive(self, node: str, pid: int) -> bool:
        return self.on(node, "sh", "-c", f"kill -0 {pid} && echo yes", check=False) == "yes\n"

    def send(self, node: str, pid: int, number: signal.Signals) -> None:
        self.on(node, "kill", "-s", str(int(number)), str(pid), check=False)

    def revive(self, node: str) -> None:
        del node  # systemd has done so at once

    def upgrade(self, node: str) -> None:
        self.on(node, "systemctl", "restart", "--no-block", "srd")

    def power_off(self, node: str) -> None:
        run("power", "cut", node)
        self._off[node] = []

    def power_on(self, node: str) -> None:
        self._wait_up(node)
        for command in self._off.pop(node):
            self.undo(node, *command)

    def reboot(self, node: str) -> None:
        self.on(node, "systemctl", "reboot", check=False)
        # From here on it is not what it was, and the cluster not whole.
        wait(lambda: [node] if self.get(node, "/liveness")[0] else [], STOP_SECONDS)

    def jump(self, nodes: tuple[str, ...], seconds: int) -> None:
        for node in nodes:
            self.on(node, "date", f"--set={seconds:+d} seconds")

    def jump_back(self, nodes: tuple[str, ...], seconds: int) -> None:
        """Set it right; one that has booted since is, and so is the lab's own."""
        del seconds
        for node in nodes:
            if node not in self._off:
                self._wait_up(node)
                self.on(node, "date", f"--set=@{time.time():.3f}")

    def fill(self, node: str) -> None:
        """Take what is left at once, without writing it."""
        left = f"$(df --output=avail -B1 {STATE} | tail -n 1)"
        self.on(node, "sh", "-c", f"fallocate -l {left} {FILLER}")

    def undo(self, node: str, *command: str) -> None:
        if node in self._off:
            self._off[node].append(command)
            return
        self._wait_up(node)
        super().undo(node, *command)

    def keep_logs(self, where: Path) -> None:
        super().keep_logs(where)
        for node in self.nodes:
            said = self.on(node, "journalctl", "--output", "cat", "--unit", "srd", check=False)
            (where / f"lab-srd-{node}.log").write_text(said)
            for log in LOGS:
                said = self.on(node, "cat", f"/var/log/srd/{log}.log", check=False)
                (where / f"{node}-{log}.log").write_text(said)

    def _wait_up(self, node: str) -> None:
        """Wait until a machine answers, which may be booting; it is switched on if it is off."""
        run("power", "on", node, seconds=BOOT_SECONDS)


def _ask(node: str, command: tuple[str, ...]) -> tuple[int, str, str]:
    """Have a command run on a machine; return its exit status and outputs. `OSError` where nothing comes of it."""
    request = {"command": command, "environment": {}, "directory": "/", "terminal": None}
    found: dict[bytes, bytes] = {OUTPUT: b"", ERROR: b"", STATUS: b""}
    with asked(node, request, COMMAND_SECONDS) as connection:
        channel = Channel(connection)
        channel.send(INPUT, b"")
        for kind, content in channel.frames():
            found[kind] += content
            if kind == STATUS:
                break
    if not found[STATUS]:
        raise ConnectionError("the connection has ended")
    return int(found[STATUS]), found[OUTPUT].decode(errors="replace"), found[ERROR].decode(errors="replace")
