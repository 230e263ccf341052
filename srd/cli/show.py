"""The verbs that show what the daemon knows: status, list, links, children, events."""

from __future__ import annotations

import time
from typing import Final

import click

from srd.cli.output import Document, Reading, cell, duration, print_table, reading, show, size, word
from srd.model import Paths

# Stable: what monitoring compares with. 1 is "could not ask", 2 is click's for a wrong usage.
EXIT_BY_HEALTH: Final = {"ok": 0, "degraded": 10, "critical": 20}

_SUITES: Final = {"rfc4106(gcm(aes))": "aes-256-gcm", "rfc7539esp(chacha20,poly1305)": "chacha20-poly1305"}


@click.command("status")
@reading
def status_command(paths: Paths, options: Reading) -> None:
    """Show this node on one screen.

    The exit status is its health: 0 ok, 10 degraded, 20 critical, 1 the daemon could not be asked.
    """
    show(paths, "/v1/status", _status, options, lambda document: EXIT_BY_HEALTH[document["health"]])


@click.command("list")
@reading
def list_command(paths: Paths, options: Reading) -> None:
    """Show every node of the cluster as this one knows it."""
    show(paths, "/v1/list", _list, options)


@click.command("links")
@reading
def links_command(paths: Paths, options: Reading) -> None:
    """Show the protection of every link between this node and the others."""
    show(paths, "/v1/links", _links, options)


@click.command("children")
@reading
def children_command(paths: Paths, options: Reading) -> None:
    """Show redis, sentinel and stunnel as this node runs them."""
    show(paths, "/v1/children", _children, options)


@click.command("events")
@click.option("-n", "--count", type=click.IntRange(min=0), default=20, show_default=True, help="How many last ones.")
@reading
def events_command(paths: Paths, options: Reading, *, count: int) -> None:
    """Show the last changes of primary, the oldest first: why, how long they took, and what was lost."""

    def last(document: Document) -> Document:
        return document | {"events": document["events"][-count:] if count else []}

    show(paths, "/v1/events", _events, options, pick=last)


def _status(document: Document) -> None:
    lease, links = document["lease"], document["links"]
    click.echo(f"{document['node']} ({document['address']}) of {document['cluster']}: {word(document['role'])}")
    primary = document["primary"]
    named = f"{primary['node'] or 'unknown node'} {primary['address']}" if primary else "not known"
    held = f", lease for {lease['expires_in_seconds']:.1f}s more" if lease["held"] else ""
    votes = f"{lease['agree']} of {lease['sentinels']} sentinels agree"
    children = ", ".join(
        f"{child['service']} {word(child['state'])}" + (f" ({child['restarts']} restarts)" if child["restarts"] else "")
        for child in document["children"]
    )
    protection = f"{links['protected']}/{links['total']} protected by ESP" if links["required"] else "ipsec is off"
    for name, text in (
        ("health", word(document["health"])),
        ("primary", f"{named}, {votes}{held}"),
        ("links", protection),
        ("children", children or "none"),
        ("running", f"srd {document['version']} for {duration(document['uptime_seconds'])}"),
    ):
        click.echo(f"  {name:<10} {text}")
    if kept := document.get("kept_data"):  # an older daemon does not say it
        click.echo(f"  {'kept':<10} {kept}")
    for item in document["conditions"]:
        click.echo(f"  {word(item['severity']):<10} {item['code']} {item['subject']}: {item['text']}")


def _list(document: Document) -> None:
    rows = []
    for member in document["members"]:
        link = member["link"]
        protection = "-" if link is None else _link_word(link)
        lag = size(member["lag_bytes"])
        rows.append(
            [
                member["node"],
                member["address"],
                member["role"],
                member["state"] + (", drained" if member["drained"] else ""),
                lag,
                protection,
                cell(member["version"]),
                _tags(member.get("tags", {})),  # an older daemon does not say it
            ]
        )
    columns = ["NODE", "ADDRESS", "ROLE", "STATE", "LAG", "LINK", "SRD", "TAGS"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    if document["paused_until_timestamp"] is not None:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(document["paused_until_timestamp"]))
        click.echo(f"paused until {until}")


def _tags(tags: Document) -> str:
    return ", ".join(name if value is True else f"{name} {value}" for name, value in tags.items())


def _link_word(link: Document) -> str:
    if not link["protected"]:
        return "blocked"
    return _SUITES.get(link["suite"], link["suite"]) or "protected"


def _links(document: Document) -> None:
    if not document["required"]:
        click.echo("ipsec.mode is off: everything between the nodes is in plaintext")
        return
    rows = [_leg_row(link, leg) for link in document["links"] for leg in link["legs"] or [{}]]
    columns = ["PEER", "ADDRESS", "STATE", "SUITE", "KEY EXCHANGE", "AGE", "NEXT", "SPI IN/OUT", "IN / OUT", "PACKETS"]
    print_table([*columns, "DROPS"], rows)
    for link in document["links"]:
        if link["suite_reason"]:
            click.echo(f"{link['peer']}: {_SUITES.get(link['suite'], link['suite'])}, because {link['suite_reason']}")
    for link in document["links"]:
        error = (link["channel"] or {}).get("last_error")
        if error:
            click.echo(f"{link['peer']}: {error}")
    for counter, number in ((document["kernel"] or {}).get("xfrm_errors") or {}).items():
        click.echo(f"{counter}: {number}")


def _leg_row(link: Document, leg: Document) -> list[str]:
    channel = link["channel"] or {}
    return [
        link["peer"],
        cell(leg.get("remote", link["address"])),
        "protected" if link["protected"] else "blocked",
        cell(_SUITES.get(link["suite"], link["suite"])),
        cell(channel.get("key_exchange")),
        duration(channel.get("key_age_seconds")),
        duration(channel.get("next_rekey_seconds")),
        f"{cell(leg.get('spi_in'))}/{cell(leg.get('spi_out'))}",
        f"{size(leg.get('bytes_in'))} / {size(leg.get('bytes_out'))}",
        f"{cell(leg.get('packets_in'))} / {cell(leg.get('packets_out'))}",
        cell(leg["replay_drops"] + leg["integrity_failures"] if leg else None),
    ]


def _children(document: Document) -> None:
    rows = [
        [
            child["service"],
            child["state"],
            cell(child["pid"]),
            duration(child.get("uptime_seconds")),
            cell(child["restarts"]),
            cell(child.get("adopted")),
            cell(", ".join(f"{number} {cause}" for cause, number in child.get("exits", {}).items())),
            cell(child.get("last_exit")),
            cell(child.get("waiting_for") or child.get("complaint")),
        ]
        for child in document["children"]
    ]
    print_table(["CHILD", "STATE", "PID", "UPTIME", "RESTARTS", "ADOPTED", "ENDS", "LAST END", "WAITS FOR"], rows)


def _events(document: Document) -> None:
    rows = [
        [
            _when(event),
            cell(event["epoch"]),
            _who(event["from"]),
            _who(event["to"]),
            event["kind"],
            _span(event["duration_seconds"]),
            _span(event["write_gap_seconds"]),
            _lost(event),
            cell(", ".join(filter(None, [event["cause"], _by(event["by"])])) or None),
        ]
        for event in document["events"]
    ]
    print_table(["TIME", "EPOCH", "FROM", "TO", "KIND", "DURATION", "NO WRITES", "LOST", "CAUSE"], rows)


def _when(event: Document) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at_timestamp"]))
    return f"before {moment}" if event["before"] else moment


def _who(endpoint: Document | None) -> str:
    return "-" if endpoint is None else endpoint["node"] or endpoint["address"]


def _by(names: list[str]) -> str:
    return f"by {', '.join(names)}" if names else ""


def _span(seconds: float | None) -> str:
    """Return a span that may be some milliseconds."""
    return f"{seconds * 1000:.0f}ms" if seconds is not None and seconds < 1 else duration(seconds)


def _lost(event: Document) -> str:
    """Return how much of the old primary's stream is lost; what it wrote last may not be known."""
    if event["lost_bytes"] is None:
        return "-"
    return size(event["lost_bytes"]) if event["lost_exactly"] else f">= {size(event['lost_bytes'])}"
