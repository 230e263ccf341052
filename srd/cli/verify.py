"""`srd verify`: proves on the kernel and the wire what the daemon says of its links."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import click

from srd.cli.output import Document, print_table
from srd.control import client
from srd.model import Paths, RefusedError

# Which promise is broken; the worst one when there are several. Not of sysexits.h.
EXIT_UNPROVEN: Final = 21
EXIT_ANSWERED: Final = 22
EXIT_PLAINTEXT: Final = 23

_AT_A_TIME: Final = 16


@click.command("verify")
@click.option("--wire", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Watch the wire for so long, too.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def verify_command(paths: Paths, wire: float | None, output: str) -> None:
    """Prove that traffic with the peers is inside ESP, and that they refuse what is not.

    Every peer gets echo requests, by which the counters of its SAs must rise, and a connection attempt in plaintext
    below IPsec, which it must not answer. --wire counts what passes on the wire in plaintext, whoever sends it.

    The exit status says which promise is broken: 21 a link could not be proven, 22 a peer answers plaintext, 23 there
    is plaintext on the wire.
    """
    links = client.get(paths.control_socket, "/v1/links")
    if not links["required"]:
        raise RefusedError("verify", "", "ipsec.mode is off: everything between the nodes is in plaintext")
    found = asyncio.run(_verify(links, wire))
    if output == "json":
        click.echo(json.dumps(found))
    else:
        _show(found)
    click.get_current_context().exit(found["exit_status"])


async def _verify(links: Document, wire: float | None) -> Document:
    from srd.ipsec import xfrm  # noqa: PLC0415 - pyroute2 takes 0.2 s to import

    together, exemptions = asyncio.Semaphore(_AT_A_TIME), _exemptions(links)
    # A client that is away is nobody's concern.
    wanted = [link for link in links["links"] if link["kind"] != "client" or (link["channel"] or {}).get("connected")]
    async with xfrm.XfrmSocket() as kernel:

        async def prove(link: Document, leg: Document) -> Document:
            async with together:
                return await _prove(kernel, exemptions, _probed_port(links, link), link["peer"], leg)

        proofs = await asyncio.gather(*(prove(link, leg) for link in wanted for leg in link["legs"]))
        seen = None
        if wire is not None:
            peers = [_pair(leg)[1] for link in links["links"] for leg in link["legs"]]
            pairs = [_pair(leg) for link in wanted for leg in link["legs"]]
            seen = await _watch(kernel, exemptions, peers, pairs, wire)
    silent = [link["peer"] for link in wanted if not all(leg["spi_out"] for leg in link["legs"]) or not link["legs"]]
    found: Document = {"schema": 1, "node": links["node"], "proofs": list(proofs), "without_keys": silent, "wire": seen}
    return found | {"exit_status": _status(found)}


async def _prove(kernel: Any, exemptions: Any, port: int, peer: str, leg: Document) -> Document:
    from srd.verify import probes  # noqa: PLC0415 - as above

    pair = _pair(leg)
    encrypted = await probes.encrypted(kernel, pair, exemptions)
    refusal = await probes.plaintext(pair, port)
    return {
        "peer": peer,
        "local": leg["local"],
        "remote": leg["remote"],
        "encrypted": encrypted.proven,
        **asdict(encrypted),
        "plaintext": refusal.outcome,
        "reason": refusal.reason,
    }


async def _watch(kernel: Any, exemptions: Any, peers: list[Any], pairs: list[Any], seconds: float) -> Document:
    """Watch the wire with all peers while echo requests are under way to those that are there, to have some to see."""
    from srd.verify import probes  # noqa: PLC0415 - as above
    from srd.verify.packets import Kind  # noqa: PLC0415 - as above

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(probes.watch(peers, exemptions, seconds))
        for pair in pairs:
            group.create_task(probes.encrypted(kernel, pair, exemptions))
    seen = watching.result()
    return {
        "seconds": seconds,
        "plaintext": seen.counts[Kind.PLAINTEXT],
        "exempt": seen.counts[Kind.EXEMPT],
        "probes": seen.counts[Kind.PROBE],
        "lost": seen.lost,
        "examples": seen.examples,
    }


def _probed_port(links: Document, link: Document) -> int:
    """Return the protected port that a peer of this kind would answer at."""
    redis, sentinel = links["protected_ports"]
    port: int = sentinel if link["kind"] == "sentinel" else redis
    return port


def _pair(leg: Document) -> Any:
    from ipaddress import ip_address  # noqa: PLC0415 - as above

    return ip_address(leg["local"]), ip_address(leg["remote"])


def _exemptions(links: Document) -> Any:
    from srd.desired import TCP, UDP  # noqa: PLC0415 - as above
    from srd.verify.packets import Exemptions  # noqa: PLC0415 - as above

    numbers = {"tcp": TCP, "udp": UDP}
    entries = (entry.split("/") for entry in links["bypass"])
    return Exemptions(
        protected=frozenset(links["protected_ports"]),
        bypass=frozenset((numbers[protocol], int(port)) for protocol, port in entries),
        udp_ports=frozenset(links["udp_ports"]),
    )


def _status(found: Document) -> int:
    wire = found["wire"]
    if wire is not None and wire["plaintext"]:
        return EXIT_PLAINTEXT
    if any(proof["plaintext"] == "answered" for proof in found["proofs"]):
        return EXIT_ANSWERED
    # Without any proof nothing is proven.
    proven = [proof["encrypted"] and proof["plaintext"] == "refused" for proof in found["proofs"]] or [False]
    return EXIT_UNPROVEN if not all(proven) or found["without_keys"] or (wire is not None and wire["lost"]) else 0


def _show(found: Document) -> None:
    rows = [
        [
            proof["peer"],
            proof["remote"],
            "proven" if proof["encrypted"] else "not proven",
            f"{proof['sent']} / {proof['answered']}",
            f"{proof['carried_out']} / {proof['carried_in']}",
            proof["plaintext"],
        ]
        for proof in found["proofs"]
    ]
    print_table(["PEER", "ADDRESS", "ESP", "SENT / ANSWERED", "SAS CARRIED OUT / IN", "PLAINTEXT PROBE"], rows)
    for line in _remarks(found):
        click.echo(line)


def _remarks(found: Document) -> Iterator[str]:
    for proof in found["proofs"]:
        if proof["seen"]:
            yield f"{proof['peer']} {proof['remote']}: {proof['seen']} packets in plaintext were on the wire meanwhile"
        if proof["reason"]:
            yield f"{proof['peer']} {proof['remote']}: {proof['reason']}"
    for peer in found["without_keys"]:
        yield f"{peer}: no keys"
    wire = found["wire"]
    if wire is not None:
        yield (
            f"on the wire for {wire['seconds']:g} s: {wire['plaintext']} packets in plaintext, {wire['exempt']} exempt"
            + (f", {wire['probes']} probes of another node" if wire["probes"] else "")
            + (f", {wire['lost']} not seen" if wire["lost"] else "")
        )
        yield from (f"  {example}" for example in wire["examples"])
