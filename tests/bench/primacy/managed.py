"""A cluster whose nodes have srd, on loopback."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, Protocol

from support.clusters import cluster_toml
from support.patience import wait

from bench.primacy.places import BALANCER, CLIENT, Place
from srd.trust.bundle import write_bundles
from srd.web import health

DIRECTORIES: Final = {"CONFIG": "etc", "STATE": "state", "RUN": "run", "LOG": "log"}
SRD: Final = str(Path(__file__).parents[3] / ".venv/bin/srd")
ANSWER_SECONDS: Final = 5
# What makes redis keep nothing on disk.
IN_MEMORY: Final = '\n[redis.settings]\nappendonly = "no"\nsave = ""\n'
# What srd says for good where there is no IPsec, and for two minutes of a child that is killed again and again.
LASTING: Final = frozenset({"ipsec_off", "child_flapping", "no_persistence"})


class Arrangement(Protocol):
    """A cluster that is up, by whatever means, with a balancer and a client in front of it."""

    name: str
    password: str

    def wait_whole(self) -> None: ...
    def primary(self) -> str: ...
    def kill(self, node: str) -> float: ...
    def changed(self) -> None: ...
    def revive(self, node: str) -> None: ...
    def switch_over(self) -> None: ...


class Managed:
    """What both have in common: srd is asked, and nobody else does anything."""

    name = "srd"

    def changed(self) -> None:
        """Take note that a failover has just been: nothing follows from it."""

    def revive(self, node: str) -> None:
        """Leave it to srd."""


class ManagedOnLoopback(Managed):
    """Three srds, as processes, and the haproxy and stunnel that they print the files of."""

    def __init__(self, place: Place, extra: str = "") -> None:
        self._place = place
        root = place.root / "srd"
        root.mkdir(mode=0o711)
        write_bundles(cluster_toml(nodes=len(place.nodes), extra=extra), root / "bundles", dt.datetime.now(dt.UTC))
        self.password = (root / "bundles/client/redis_password").read_text().strip()
        self._environments = {}
        for node in place.nodes:
            (root / node).mkdir(mode=0o711)
            (root / "bundles" / node).rename(root / node / "etc")
            directories = {f"SRD_{name}_DIR": str(root / node / path) for name, path in DIRECTORIES.items()}
            self._environments[node] = directories
            place.start(f"srd-{node}", node, SRD, "run", environment=directories)
        toml = ("--file", str(root / place.nodes[0] / "etc/cluster.toml"))
        balancer = place.address(BALANCER)
        files = {
            "haproxy.cfg": ("haproxy-config", *toml, "--listen", balancer, "--stats-socket", str(root / "admin.sock")),
            "client.conf": (
                *("client-config", *toml, "--balancer", balancer, "--pid-file", str(root / "client.pid")),
                *("--ca-file", str(root / "bundles/client/ca.crt")),
            ),
        }
        for name, command in files.items():
            (root / name).write_text(subprocess.run([SRD, *command], check=True, capture_output=True, text=True).stdout)
        client = (root / "client.conf").read_text().replace("foreground = no", "foreground = yes")
        (root / "client.conf").write_text(client)
        place.start("srd-haproxy", BALANCER, "haproxy", "-db", "-f", str(root / "haproxy.cfg"))
        place.start("srd-client", CLIENT, "stunnel4", str(root / "client.conf"))

    def _get(self, node: str, path: str) -> tuple[int, str]:
        url = f"http://{self._place.address(node)}:8080{path}"
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError as error:
            return 0, str(error)

    def _lacks(self) -> str:
        for node in self._place.nodes:
            status, said = self._get(node, "/srd")
            if status != health.OK:
                return f"{node}: {status} {said}"
            if codes := {condition["code"] for condition in json.loads(said)["conditions"]} - LASTING:
                return f"{node}: {codes}"
        leading = self._leading()
        following = [node for node in self._place.nodes if self._get(node, "/replica")[0] == health.OK]
        whole = len(leading) == 1 and len(following) == len(self._place.nodes) - 1
        return "" if whole else f"primaries: {leading}, replicas in step: {following}"

    def _leading(self) -> list[str]:
        return [node for node in self._place.nodes if self._get(node, "/primary")[0] == health.OK]

    def wait_whole(self) -> None:
        wait(self._lacks)
        wait(lambda: self._refused("--dry-run"))  # until the sentinels are done with the last failover

    def primary(self) -> str:
        (node,) = self._leading()
        return node

    def _srd(self, node: str, *words: str) -> str:
        environment = {"PATH": "/usr/bin:/bin", **self._environments[node]}
        return subprocess.run([SRD, *words], check=True, capture_output=True, text=True, env=environment).stdout

    def kill(self, node: str) -> float:
        children: list[dict[str, Any]] = json.loads(self._srd(node, "children", "-o", "json"))["children"]
        pid = next(child["pid"] for child in children if child["service"] == "redis")
        moment = time.monotonic()
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        return moment

    def switch_over(self) -> None:
        """Move the primary; one that is refused, for a failover that has not ended say, is asked for again."""
        wait(self._refused)

    def _refused(self, *options: str) -> str:
        try:
            self._srd(self._place.nodes[0], "switchover", *options)
        except subprocess.CalledProcessError as error:
            return str(error.stderr)
        return ""
