"""What ESP costs a TCP stream: run in the lab by tests/bench/esp.

The lab has one CPU, which does everything: both ends of the stream, their encryption in C, srd and redis on all nodes;
and the machine's other work takes from it. So the two sides of a comparison take turns, and the figure is the median of
the ratios of neighbours.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import pytest
from support.lab import Lab, edited, rekey
from support.namespace import run
from support.traffic import Way, queueing, streaming

# The bucket holds 40 ms or more, to make up for the moments at which the lab is not run; the queue holds all that a
# stream has under way.
LINK = ("tbf", "burst", "512kb", "limit", "4mb", "rate")
PACE_SECONDS = 2.0  # until TCP has found its pace
TURNS, WINDOW_SECONDS = 6, 5.0


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The cluster that boot has brought up."""
    lab = Lab()
    lab.wait_whole()
    return lab


@pytest.fixture
def way(lab: Lab) -> Way:
    """Between two nodes of which the first one leads."""
    return Way(lab.nodes[0], lab.nodes[1], lab.address(lab.nodes[1]))


def compare(turns: int, what: dict[str, Callable[[], float]]) -> float:
    """Measure one and the other in turn; return, and print, the median of second to first."""
    rates: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(turns):
        for name, measure in what.items():
            rates[name].append(measure() * 8 / 1e6)
    first, second = rates.values()
    ratios = sorted(after / before for before, after in zip(first, second, strict=True))
    found = "; ".join(f"{name} {median(each):.1f} ({min(each):.1f} to {max(each):.1f})" for name, each in rates.items())
    ratio = median(ratios)
    print(  # noqa: T201 - figures for people
        f"\nMbit/s {found}; ratio {ratio:.4f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {turns} turns)"
    )
    return ratio


def over(way: Way) -> float:
    """Return the throughput of a new connection that nothing limits but the CPU."""
    with streaming(way) as stream:
        stream.throughput(1)
        return stream.throughput(3)


@contextlib.contextmanager
def rekeying(way: Way, took: list[float]) -> Iterator[None]:
    """Begin a rekey each second meanwhile, and note what each took."""
    ended = threading.Event()

    def make() -> None:
        due = time.monotonic()
        while not ended.wait(max(0.0, due - time.monotonic())):
            started = time.monotonic()
            rekey(way.source, way.target)
            took.append(time.monotonic() - started)
            due += 1

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_rekey_each_second_takes_at_most_two_percent_of_a_links_throughput(way: Way) -> None:
    """On a link so slow that the CPU is none of the limits: the lab's one makes the handshakes of both ends too."""
    with queueing((f"w-{way.target}",), *LINK, "20mbit"), streaming(way) as stream:
        stream.throughput(PACE_SECONDS)
        took: list[float] = []

        def during() -> float:
            with rekeying(way, took):
                return stream.throughput(WINDOW_SECONDS)

        without = partial(stream.throughput, WINDOW_SECONDS)
        ratio = compare(TURNS, {"without rekeys": without, "with one a second": during})
        again = stream.retransmitted()
    print(  # noqa: T201 - as above
        f"{len(took)} rekeys in {TURNS * WINDOW_SECONDS:.0f} s, each {median(took):.2f} s; {again} segments sent again"
    )
    assert len(took) > TURNS * WINDOW_SECONDS / 2
    assert ratio >= 0.98


def carried(port: str) -> int:
    """The bytes that a port of the bridge has sent, as its queueing discipline counts them: frame by frame."""
    (queue,) = json.loads(run("tc", "-s", "-j", "qdisc", "show", "dev", port))
    return int(queue["bytes"])


def goodput(way: Way, by_clock: list[float]) -> float:
    """Return the bytes of a stream that a link of 100 Mbit/s carries in a second while it is full.

    By what the link carried: the clock, noted beside it, also measures whether the lab's CPU keeps the link full.
    """
    port = f"w-{way.target}"
    before = carried(port)
    with streaming(way) as stream:
        stream.throughput(PACE_SECONDS)
        by_clock.append(stream.throughput(WINDOW_SECONDS) * 8 / 1e6)
    return stream.received / (carried(port) - before) * 100e6 / 8


def test_goodput_of_a_link_within_esp_is_at_least_97_percent_of_plain(lab: Lab, way: Way) -> None:
    outside = Way("lb", "client", lab.address("client"))
    plain: list[float] = []
    esp: list[float] = []
    with queueing((f"w-{way.target}", f"w-{outside.target}"), *LINK, "100mbit"):
        ratio = compare(TURNS, {"plain": partial(goodput, outside, plain), "ESP": partial(goodput, way, esp)})
    print(f"by the clock: plain {median(plain):.1f}, ESP {median(esp):.1f}")  # noqa: T201 - as above
    assert ratio >= 0.97


def test_the_suite_chosen_without_aes_instructions_is_at_least_1_8_times_as_fast_as_aes_gcm(lab: Lab, way: Way) -> None:
    third = lab.nodes[2]
    other = Way(way.source, third, lab.address(third))
    whole = Path(f"/var/lab/{third}/etc/srd/cluster.toml").read_text()

    def suite(peer: str) -> str:
        (found,) = (link["suite"] for link in lab.srd(way.source, "links")["links"] if link["peer"] == peer)
        return str(found)

    # One end that is told so decides for its links; the link between the other two stays as it was chosen.
    edited(lab, (third,), f'{whole}\n[ipsec]\nsuites = ["aes-256-gcm"]\n')
    rekey(way.source, third)
    try:
        assert suite(way.target) == "rfc7539esp(chacha20,poly1305)"
        assert suite(third) == "rfc4106(gcm(aes))"
        ratio = compare(2 * TURNS, {"AES-GCM": partial(over, other), "ChaCha20-Poly1305": partial(over, way)})
    finally:
        edited(lab, (third,), whole)
    assert ratio >= 1.8
