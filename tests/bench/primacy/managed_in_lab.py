"""The lab's own cluster, whose nodes have srd."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from support.lab import Lab
from support.patience import wait

from bench.primacy.managed import IN_MEMORY, Managed
from srd.web import health


class ManagedInLab(Managed):
    """The lab's own cluster."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.password = Path("/run/lab/redis_password").read_text().strip()

    def wait_whole(self) -> None:
        self.lab.wait_whole()
        self.lab.wait(self._all_follow, "the others are in step")
        wait(lambda: self._refused("--dry-run"))  # until the sentinels are done with the last failover

    def _all_follow(self) -> bool:
        followers = [node for node in self.lab.nodes if self.lab.get(node, "/replica").status == health.OK]
        return len(followers) == len(self.lab.nodes) - 1

    def primary(self) -> str:
        return self.lab.primary()

    def kill(self, node: str) -> float:
        pid = self.lab.children(node)["redis"]["pid"]
        moment = time.monotonic()
        self.lab.on(node, "kill", "-KILL", str(pid))
        return moment

    def switch_over(self) -> None:
        """Move the primary; one that is refused, for sentinels that are slow on the lab's CPU, is asked for again."""
        wait(self._refused)

    def _refused(self, *options: str) -> str:
        done = self.lab.on(self.lab.nodes[0], "srd", "switchover", *options, check=False)
        return done.stderr if done.returncode else ""

    def without_persistence(self) -> None:
        """Have every redis keep nothing on disk from now on: one node after the other is stopped and started."""
        self.lab.lasting = frozenset({"no_persistence"})
        for node in self.lab.nodes:
            self.wait_whole()
            with Path(f"/var/lab/{node}/etc/srd/cluster.toml").open("a") as file:
                file.write(IN_MEMORY)
            pid = self.lab.srd_pid(node)
            os.kill(pid, signal.SIGTERM)
            self.lab.wait(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "srd has ended")
            self.lab.start_srd(node)
        self.wait_whole()
