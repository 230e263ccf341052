"""The verbs by which a person has the daemon do something: rekey, reload, restart, stop."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from urllib.parse import urlencode

import click

from srd.control import client
from srd.model import PLAIN_ENVIRONMENT, Paths, Service, SrdError, TimedOutError

_ANSWER_SECONDS = 5.0
_RELOAD_SECONDS = 60.0
_STOP_SECONDS = 120.0
_POLL_SECONDS = 0.05
# What a reload has changed, in the daemon's words and in those for people.
_CHANGES = {
    "added": "added",
    "removed": "removed",
    "revoked": "ended the keys with",
    "trusted_no_more": "trusted no more",
    "trusted_again": "trusted again",
    "renewed": "new certificates",
}


def _timeout(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=seconds,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait.",
    )


@click.command("rekey")
@click.argument("peer", required=False)
@click.option("--wait", is_flag=True, help="Return when both ends use the new keys.")
@_timeout(30.0)
@click.pass_obj
def rekey_command(paths: Paths, peer: str | None, *, wait: bool, timeout: float) -> None:
    """Have new keys made with a peer, or with all: by a new TLS handshake each, and without losing a packet."""
    query = ({"peer": peer} if peer is not None else {}) | ({"wait": f"{timeout:g}"} if wait else {})
    seconds = _ANSWER_SECONDS + (timeout if wait else 0.0)
    answer = client.post(paths.control_socket, f"/v1/rekey?{urlencode(query)}", timeout=seconds)
    for name, link in sorted(answer["peers"].items()):
        click.echo(f"{name}: generation {link['generation']} is in use" if wait else f"{name}: asked for new keys")


@click.command("restart")
@click.argument("child", type=click.Choice([service.value for service in Service]))
@click.option("--force", is_flag=True, help="The redis of the primary too: the cluster fails over.")
@_timeout(60.0)
@click.pass_obj
def restart_command(paths: Paths, child: str, *, force: bool, timeout: float) -> None:
    """End a child with its grace and start it again; return when it is ready."""
    query = {"child": child, "wait": f"{timeout:g}"} | ({"force": "1"} if force else {})
    # Its grace comes first, and redis' may be long.
    answer = client.post(paths.control_socket, f"/v1/restart?{urlencode(query)}", timeout=timeout + _STOP_SECONDS)
    click.echo(f"{child} is ready, pid {answer['pid']}")


@click.command("stop")
@click.option("--keep-data-path", is_flag=True, help="Leave redis, sentinel and stunnel running, for the next srd.")
@_timeout(_STOP_SECONDS)
@click.pass_obj
def stop_command(paths: Paths, *, keep_data_path: bool, timeout: float) -> None:
    """Stop this node: stunnel, sentinel and redis in this order, then srd; return when all have ended.

    The encryption stays as it is. Under systemd this is `systemctl stop`, so that srd is not started again.
    """
    unit = client.post(paths.control_socket, f"/v1/stop{'?keep=1' if keep_data_path else ''}")["unit"]
    if unit is not None:
        _systemctl_stop(unit, timeout)
    deadline = time.monotonic() + timeout
    while client.is_answered(paths.control_socket):
        if time.monotonic() >= deadline:
            raise TimedOutError("stop", "srd", f"it still runs after {timeout:g} s", "its log says what it waits for")
        time.sleep(_POLL_SECONDS)
    click.echo("srd is stopped" + ("; its children run on" if keep_data_path else ""))


def _systemctl_stop(unit: str, seconds: float) -> None:
    command = ("systemctl", "stop", unit)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, env=PLAIN_ENVIRONMENT)
    except subprocess.TimeoutExpired:
        raise TimedOutError("stop", unit, f"not within {seconds:g} s", f"systemctl status {unit} says more") from None
    except subprocess.CalledProcessError as error:
        raise SrdError("stop", unit, error.stderr.strip() or f"systemctl ends with {error.returncode}") from error
    except OSError as error:
        raise SrdError("run", "systemctl", error.strerror or str(error)) from error


@click.command("reload")
@click.pass_obj
def reload_command(paths: Paths) -> None:
    """Take a changed bundle in without a restart: nodes, revoked certificates, new certificates, suites, exemptions.

    What is wrong, or cannot change while srd runs, is said in one sentence, and nothing is changed. So does SIGHUP.
    """
    done = client.post(paths.control_socket, "/v1/reload", timeout=_RELOAD_SECONDS)
    changes = [f"{word} {', '.join(done[what])}" for what, word in _CHANGES.items() if done[what]]
    changes += ["changed settings"] if done["settings"] else []
    click.echo(f"taken in: {'; '.join(changes) or 'nothing has changed'}")
