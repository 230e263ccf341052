"""A certificate of the cluster is not enough: who is not let in, and which offers are not taken.

Each is refused as often as it is tried, counted each time, said once with who it was, and no SA that runs is touched.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from support.adversary import HONEST, LEADING, LED, TARGET, Adversary, Ground, Said, Saying, cast, emptied, framed

from srd.ipsec.protocol import KeyingError, Message, Prepare, Prepared
from srd.model import Credentials, Identity, NodeKind, Secret, Suite
from srd.trust.authority import Issued, issue_node
from srd.trust.bundle import Bundle

TRIES = 3
AT_ONCE_SECONDS = 5.0
# What is said instead, by step: made of what is due, and of the SPIs that the target sends under.
Change = Callable[[Message, tuple[int, ...]], Message]
Instead = Mapping[int, Change]


@pytest.fixture
def bundles(tmp_path: Path) -> dict[str, Bundle]:
    return cast(tmp_path)


@pytest.fixture
async def ground(bundles: dict[str, Bundle]) -> AsyncIterator[Ground]:
    """With keys between the target and all others, whose real ends are gone."""
    async with Ground(bundles).standing() as ground:
        for name in (LEADING, LED):
            await ground.keyed_with(name, AT_ONCE_SECONDS)
            await ground.store.wait_for(lambda view, name=name: not view.channels[name].connected, AT_ONCE_SECONDS)
        yield ground


Attempt = Callable[[Ground, Adversary, Instead], Awaitable[None]]


async def refused(ground: Ground, words: str, attempt: Attempt, evil: Adversary, instead: Instead) -> None:
    """See that each attempt is refused and counted, said once, and changes nothing; and that the real one gets in."""
    await ground.target.passes()
    running, failures = dict(ground.target.kernel._sas), ground.store.view().channels[evil.name].failures
    async with evil.listening():
        for tries in range(1, TRIES + 1):
            with pytest.raises(KeyingError):
                await attempt(ground, evil, instead)
            await ground.store.wait_for(
                lambda view, wanted=failures + tries: view.channels[evil.name].failures >= wanted, AT_ONCE_SECONDS
            )
        said = [(entry["peer"], entry["error"]) for entry in ground.journal.last_warnings if words in entry["error"]]
        assert said
        assert len(said) == len({(evil.name, error) for _, error in said}), said
        assert ground.target.kernel._sas == running
    await ground.target.passes()
    assert ground.target.kernel._sas == running
    await ground.keyed_with(evil.name, AT_ONCE_SECONDS)
    assert not ground.journal.faults


async def leads(ground: Ground, evil: Adversary, instead: Instead) -> None:
    """Connect to the target and make keys, saying something else at one step."""
    reader, writer = await evil.call()
    channel = Saying(reader, writer, evil.context, accepted=False, instead=await spoken(ground, evil, instead))
    try:
        await evil.make(channel, ground.of(evil.name))
    finally:
        await emptied(reader)
        writer.transport.abort()


async def is_led(ground: Ground, evil: Adversary, instead: Instead) -> None:
    """Be connected to by the target, and the same."""
    reader, writer = await evil.called()
    channel = Saying(reader, writer, evil.context, accepted=True, instead=await spoken(ground, evil, instead))
    try:
        await evil.make(channel, ground.of(evil.name))
    finally:
        await emptied(reader)
        writer.transport.abort()


async def spoken(ground: Ground, evil: Adversary, instead: Instead) -> dict[int, Callable[[Message], Said]]:
    in_use = await ground.of(TARGET).sends(evil.name)

    def said(change: Change, message: Message) -> Said:
        return [framed(msgspec.msgpack.encode(change(message, in_use)))], True

    return {step: partial(said, change) for step, change in instead.items()}


def issued(directory: Path, cluster: str, node: str, *addresses: str, kind: NodeKind = NodeKind.REDIS) -> Credentials:
    """Return a certificate that the cluster's own authority has signed."""
    certificate = (directory / "ca.crt").read_bytes()
    authority = Issued(certificate, Secret((directory / "ca.key").read_text()))
    identity = Identity(cluster, node, kind, tuple(ip_address(address) for address in addresses))
    made = issue_node(authority, identity, dt.datetime.now(dt.UTC))
    return Credentials(identity, made.certificate, made.key, certificate)


WRONG_CERTIFICATES = [
    (("lab", LED, "127.0.1.4"), f"cannot admit {LED}: it connects from 127.0.1.1, which is not its address"),
    (("lab", LEADING, "127.0.1.9"), f"cannot admit {LEADING}: it connects from 127.0.1.1, which is not its address"),
    (("lab", LEADING, "127.0.1.1", "127.0.1.9"), f"cannot admit {LEADING}: its certificate is for other addresses"),
    (("lab", "redis-9", "127.0.1.1"), "cannot admit redis-9: it is not a node of this cluster.toml"),
    (("other", LEADING, "127.0.1.1"), f"cannot admit other/{LEADING}: it is of another cluster"),
]


@pytest.mark.parametrize(("identity", "words"), WRONG_CERTIFICATES)
async def test_a_certificate_for_something_else_does_not_let_in(
    ground: Ground, tmp_path: Path, identity: tuple[str, ...], words: str
) -> None:
    evil = Adversary(ground, LEADING, issued(tmp_path / "bundles", *identity))
    await refused(ground, words, leads, evil, {})


async def test_a_clients_certificate_makes_nobody_a_node(ground: Ground, tmp_path: Path) -> None:
    credentials = issued(tmp_path / "bundles", "lab", LEADING, "127.0.1.1", kind=NodeKind.CLIENT)
    words = f"cannot admit {LEADING}: its certificate is for a client, not a redis"
    await refused(ground, words, leads, Adversary(ground, LEADING, credentials), {})


async def test_another_nodes_certificate_is_no_answer(ground: Ground, bundles: dict[str, Bundle]) -> None:
    evil = Adversary(ground, LED, bundles[LEADING].credentials)
    words = f"cannot admit {LEADING}: it connects from 127.0.1.4, which is not its address"
    await refused(ground, words, is_led, evil, {})


async def test_a_peer_that_is_let_in_stays_so_when_somebody_tries_at_its_address(
    ground: Ground, tmp_path: Path
) -> None:
    evil = Adversary(ground, HONEST, issued(tmp_path / "bundles", "lab", "redis-9", "127.0.1.2"))
    before = ground.store.view().channels[HONEST]
    for _ in range(TRIES):
        with pytest.raises(KeyingError):
            await leads(ground, evil, {})
    wanted = dataclasses.replace(before, failures=before.failures + TRIES)
    await ground.store.wait_for(lambda view: view.channels[HONEST] == wanted, AT_ONCE_SECONDS)
    said = [entry for entry in ground.journal.last_warnings if "redis-9" in entry["error"]]
    assert [entry["peer"] for entry in said] == [HONEST]


def prepare(message: Message, *, spis: tuple[int, ...] = (), older: int = 0, suite: str = "") -> Message:
    assert isinstance(message, Prepare)
    return Prepare(message.generation - older, suite or message.suite, list(spis) or message.spis)


def prepared(message: Message, *, spis: tuple[int, ...] = (), older: int = 0) -> Message:
    assert isinstance(message, Prepared)
    return Prepared(message.generation - older, list(spis) or message.spis)


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        (lambda message, _: prepare(message, suite=Suite.AES_256_GCM), "is what both run best"),
        (lambda message, _: prepare(message, older=1), "is due"),
        (lambda message, in_use: prepare(message, spis=in_use), "File exists"),
    ],
)
async def test_an_offer_that_is_weak_or_old_or_in_use_is_refused(ground: Ground, offer: Change, words: str) -> None:
    await refused(ground, words, leads, Adversary(ground, LEADING), {1: offer})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda message, _: prepared(message, older=1), "it prepared generation"),
        (lambda message, in_use: prepared(message, spis=in_use), "File exists"),
    ],
)
async def test_an_answer_that_is_old_or_in_use_is_refused(ground: Ground, answer: Change, words: str) -> None:
    await refused(ground, words, is_led, Adversary(ground, LED), {1: answer})
