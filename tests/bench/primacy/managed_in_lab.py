"""The lab's own cluster, whose nodes have srd."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from support.lab import Lab, bring_up, edited

from bench.primacy.managed import Managed


class ManagedInLab(Managed):
    """The lab's own cluster, brought up."""

    def __init__(self) -> None:
        bring_up()
        self.lab = Lab()
        self.password = Path("/run/lab/redis_password").read_text().strip()

    def wait_whole(self) -> None:
        self.lab.wait_whole()

    def primary(self) -> str:
        return self.lab.primary()

    def kill(self, node: str) -> float:
        pid = self.lab.children(node)["redis"]["pid"]
        moment = time.monotonic()
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        return moment

    def switch_over(self) -> None:
        self.lab.on(self.lab.nodes[0], "srd", "switchover")

    def without_persistence(self) -> None:
        """Have every redis keep nothing on disk from now on."""
        file = Path(f"/var/lab/{self.lab.nodes[0]}/etc/srd/cluster.toml")
        edited(self.lab, self.lab.nodes, f'{file.read_text()}\n[redis.settings]\nappendonly = "no"\nsave = ""\n')
        self.lab.on(self.lab.nodes[0], "srd", "rolling", "restart", "--only", "redis")
