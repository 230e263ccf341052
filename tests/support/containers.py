"""The lab's cluster with each node in a container, for the tests of the image."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.lab import Lab

PODMAN = Path(__file__).parents[1] / "image" / "podman"


class Containers(Lab):
    """The lab's cluster, with each node in a container; `run-node` starts one, podman is asked on the node."""

    def podman(self, node: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.on(node, str(PODMAN), node, *arguments, check=check)

    def inside(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command in the node's container and return what it prints."""
        return self.podman(node, "exec", "srd", *command, check=check).stdout

    def inspect(self, node: str, what: str) -> str:
        return self.podman(node, "container", "inspect", "--format", f"{{{{{what}}}}}", "srd").stdout.strip()

    def healthy(self, node: str) -> bool:
        """Whether the image's own HEALTHCHECK says so."""
        return self.podman(node, "healthcheck", "run", "srd", check=False).returncode == 0
