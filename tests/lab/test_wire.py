"""The capture by which a whole run is judged, in the moment when it ends."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.namespace import run
from support.patience import wait

# Where the file could be torn in the middle of a packet, it was one end in six to ten under such traffic.
ENDS = 10
PACKETS = 1000
CLIENT_SENDS = Path("/sys/class/net/w-client/statistics/rx_packets")


@contextlib.contextmanager
def flood() -> Iterator[None]:
    """Send as much as goes between two stations that are no nodes: the capture of the whole run says nothing of it."""
    ping = subprocess.Popen(["on", "client", "ping", "-q", "-f", "-s", "1200", "lb"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        ping.terminate()
        ping.wait()


def test_a_capture_that_ends_under_traffic_holds_whole_packets_and_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_WIRE", "beside")
    for number in range(ENDS):
        capture = tmp_path / f"{number}.pcap"
        run("wire", "start", str(capture))
        before = int(CLIENT_SENDS.read_text())
        with flood():
            wait(lambda before=before: "" if int(CLIENT_SENDS.read_text()) > before + PACKETS else "too few")
            passed = int(CLIENT_SENDS.read_text()) - before
            run("wire", "stop")
        assert run("wire", "plaintext", str(capture)).split() == ["0"]  # it reads each packet, and fails at half a one
        held = int(run("tcpdump", "-nr", str(capture), "--count", "src", "client").split()[0])
        assert held >= passed
        capture.unlink()
