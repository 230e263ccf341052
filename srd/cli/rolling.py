"""The verb that restarts a program on every node of the cluster, one node after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode

import click

from srd.cli.primacy import ANSWER_SECONDS, moved
from srd.control import client
from srd.model import Paths, RefusedError, Service, SrdError

SRD: Final = "srd"
# Each is ready before the next is ended. redis comes last, which may take long to read its data.
ORDER: Final = (Service.SENTINEL, Service.STUNNEL, Service.REDIS, SRD)
DEFAULT: Final = frozenset({Service.SENTINEL, Service.STUNNEL, Service.REDIS})
# Of the primary's programs, those without which nobody can write.
SERVING: Final = frozenset({Service.REDIS, Service.STUNNEL})
KINDS: Final = {"redis": frozenset(ORDER), "sentinel": frozenset({Service.SENTINEL, SRD})}
POLL_SECONDS: Final = 0.3
# A heartbeat that is late, a sentinel that is busy: what passes by itself.
BRIEFLY_SECONDS: Final = 10.0

State = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One node's turn: what is restarted there, in this order."""

    node: str
    programs: tuple[str, ...]

    def leaves(self, primary: str | None) -> bool:
        """Whether the primary has to move away from it first."""
        return self.node == primary and not SERVING.isdisjoint(self.programs)


def turns(members: Sequence[State], wanted: Collection[str]) -> list[Turn]:
    """Return the nodes at which there is anything to do, in the order of the file."""
    found = []
    for member in members:
        programs = tuple(str(each) for each in ORDER if each in wanted and each in KINDS.get(member["kind"], ()))
        if programs:
            found.append(Turn(member["node"], programs))
    return found


def next_turn(pending: Sequence[Turn], primary: str | None) -> Turn:
    """Return whose turn it is: the primary's comes last."""
    return next((turn for turn in pending if turn.node != primary), pending[0])


class Rolling:
    """Drives it, by way of the local srd. Whatever goes wrong ends it, with `SrdError`."""

    def __init__(self, paths: Paths, seconds: float) -> None:
        self._socket = paths.control_socket
        self._seconds = seconds
        self.members: list[State] = client.get(self._socket, "/v1/list")["members"]
        self._voters = [member["node"] for member in self.members if member["kind"] in KINDS]

    def state(self, node: str) -> State:
        """Ask a node how it is."""
        return client.get(self._socket, f"/v1/node?{urlencode({'node': node})}", timeout=ANSWER_SECONDS)

    def primary(self) -> str | None:
        """Return which node says that it is primary, or is named."""
        return next((node for node in self._voters if self.state(node)["primary"]), None)

    def missing(self) -> list[str]:
        """Return what the cluster lacks to be whole, by the word of every node."""
        found = []
        for node in self._voters:
            try:
                said = self.state(node)["missing"]
            except SrdError as error:
                said = str(error)
            if said:
                found.append(f"{node}: {said}")
        return found

    def take(self, turn: Turn, primary: str | None) -> None:
        """Restart a node's programs, and wait until it and the cluster are whole."""
        if turn.leaves(primary):
            self._move_away()
            self._until_whole(turn.node)
        for program in turn.programs:
            before, began = self.state(turn.node)[program], time.monotonic()
            asked = {"node": turn.node, "child": program}
            client.post(self._socket, f"/v1/node/restart?{urlencode(asked)}", timeout=ANSWER_SECONDS)
            self._until(turn.node, partial(self._not_back, turn.node, program, before))
            click.echo(f"{turn.node}: {program} is back after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        self._until_whole(turn.node)
        click.echo(f"{turn.node}: it is whole, and so is the cluster, after {time.monotonic() - began:.1f} s more")

    def _not_back(self, node: str, program: str, before: object) -> list[str]:
        try:
            now = self.state(node)[program]
        except SrdError as error:  # a srd that is started again answers nobody for a moment
            return [str(error)]
        return [f"{program} is not back"] if now in (None, before) else []

    def _until_whole(self, node: str) -> None:
        self._until(node, self.missing)

    def _until(self, node: str, question: Callable[[], list[str]]) -> None:
        if reasons := _within(self._seconds, question):
            why = f"not within {self._seconds:g} s: {'; '.join(reasons)}"
            raise SrdError("go on after", node, why, "nothing else was touched; srd status there says more")

    def begin(self) -> None:
        """Return when the cluster is whole; `RefusedError` says what it lacks for longer than a moment."""
        if reasons := _within(BRIEFLY_SECONDS, self.missing):
            raise RefusedError("begin with", "a cluster that is not whole", "; ".join(reasons), "srd status says more")

    def _move_away(self) -> None:
        """Move the primary; what speaks against it may be over in a moment, and nothing is changed while it does."""
        deadline = time.monotonic() + BRIEFLY_SECONDS
        while True:
            try:
                click.echo(moved(client.post(self._socket, "/v1/switchover", timeout=ANSWER_SECONDS)))
            except SrdError as error:
                if error.exit_status != RefusedError.exit_status or time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return


def _within(seconds: float, question: Callable[[], list[str]]) -> list[str]:
    """Ask again until nothing is missing; return what is missing when the time is up."""
    deadline = time.monotonic() + seconds
    while (reasons := question()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return reasons


@click.group("rolling")
def rolling_command() -> None:
    """Do something on every node of the cluster, one node after another."""


@rolling_command.command("restart")
@click.option(
    "--only", type=click.Choice([str(each) for each in ORDER]), multiple=True, help="This one; may be repeated."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and whether it can be begun; change nothing.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a program may take to be back, and a node to be whole again.",
)
@click.pass_obj
def restart_command(paths: Paths, only: tuple[str, ...], *, dry_run: bool, timeout: float) -> None:
    """Restart sentinel, stunnel and redis on every node: replicas and arbiters first, the primary after a switchover.

    On whichever node this is run. It begins with a whole cluster only, and stops at the first node that does not come
    back whole. srd itself is restarted with --only srd, by the service manager; its children run on.
    """
    rolling = Rolling(paths, timeout)
    pending = turns(rolling.members, frozenset(only) or DEFAULT)
    rolling.begin()
    while pending:
        primary = rolling.primary()
        turn = next_turn(pending, primary)
        if dry_run:
            first = ["the primary moves away"] if turn.leaves(primary) else []
            click.echo(f"{turn.node}: {', '.join([*first, *turn.programs])}")
        else:
            rolling.take(turn, primary)
        pending.remove(turn)
