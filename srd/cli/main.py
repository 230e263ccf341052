"""The `srd` command: one verb, one module, imported when that verb is used and not before."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Final, NamedTuple

import click

from srd.model import BUNDLE_FILES, Paths, SrdError


class Verb(NamedTuple):
    """Where a verb's command is, as `module:attribute`, and its line in `srd --help`."""

    target: str
    summary: str


VERBS: Final[dict[str, Verb]] = {
    "init": Verb("srd.cli.setup:init_command", "Make a cluster: its authority, cluster.toml and one bundle per node."),
    "node": Verb("srd.cli.setup:node_command", "Add, remove or renew a node, or revoke its certificate."),
    "check": Verb("srd.cli.setup:check_command", "Say whether this node could run, and change nothing."),
    "run": Verb("srd.cli.run:run_command", "Run this node until SIGTERM: the daemon."),
    "status": Verb("srd.cli.show:status_command", "Show this node on one screen; the exit status is its health."),
    "list": Verb("srd.cli.show:list_command", "Show every node of the cluster."),
    "links": Verb("srd.cli.show:links_command", "Show the protection of every link between nodes."),
    "verify": Verb("srd.cli.verify:verify_command", "Prove that what passes between the nodes is inside ESP."),
    "children": Verb("srd.cli.show:children_command", "Show redis, sentinel and stunnel as this node runs them."),
    "rekey": Verb("srd.cli.act:rekey_command", "Have new keys made with a peer, or with all."),
    "reload": Verb("srd.cli.act:reload_command", "Take a changed bundle in, without a restart."),
    "restart": Verb("srd.cli.act:restart_command", "End a child and start it again."),
    "rolling": Verb("srd.cli.rolling:rolling_command", "Restart programs on every node, one node after another."),
    "switchover": Verb("srd.cli.primacy:switchover_command", "Move the primary to another node; no write is lost."),
    "drain": Verb("srd.cli.maintenance:drain_command", "Take this node out of service; the primary moves away first."),
    "undrain": Verb("srd.cli.maintenance:undrain_command", "Take this node into service again."),
    "pause": Verb("srd.cli.maintenance:pause_command", "Have no srd do anything by itself, for a time."),
    "resume": Verb("srd.cli.maintenance:resume_command", "End a pause."),
    "stop": Verb("srd.cli.act:stop_command", "Stop this node, or srd alone and leave its children running."),
    "events": Verb("srd.cli.show:events_command", "Show the changes of primary."),
    "logs": Verb("srd.cli.logs:logs_command", "Show what the child programs wrote."),
    "doctor": Verb("srd.cli.doctor:doctor_command", "Say what is wrong with what the sentinels keep, and mend it."),
    "install": Verb("srd.cli.install:install_command", "Install the units and what belongs to them on this machine."),
    "uninstall": Verb("srd.cli.install:uninstall_command", "Remove what `srd install` has installed."),
    "close": Verb("srd.cli.protection:close_command", "Close this node to plaintext with its peers, without a daemon."),
    "teardown": Verb("srd.cli.protection:teardown_command", "Remove this node's IPsec protection from the kernel."),
    "haproxy-config": Verb("srd.cli.balancer:haproxy_config_command", "Print a complete haproxy.cfg for the cluster."),
    "client-config": Verb("srd.cli.balancer:client_config_command", "Print a client's stunnel.conf."),
    "completion": Verb("srd.cli.about:completion_command", "Print the completion script of a shell."),
    "version": Verb("srd.cli.about:version_command", "Print the version."),
}


class LazyGroup(click.Group):
    """A group whose help needs none of its verbs' modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the verbs in the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Import a verb."""
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module, _, attribute = verb.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        """Write the verbs and their summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])


def _directory(name: str, default: str, text: str) -> click.Option:
    return click.Option(
        [f"--{name}-dir"],
        type=click.Path(path_type=Path),
        default=Path(default),
        show_default=True,
        envvar=f"SRD_{name.upper()}_DIR",
        show_envvar=True,
        help=text,
    )


def _remember_paths(config_dir: Path, state_dir: Path, run_dir: Path, log_dir: Path) -> None:
    click.get_current_context().obj = Paths(config_dir, state_dir, run_dir, log_dir, _credentials())


def _credentials() -> dict[str, Path]:
    """Return the files of the bundle that the service manager hands over (systemd.exec(5), LoadCredential=)."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return {}
    return {name: path for name in BUNDLE_FILES if (path := Path(directory) / name).exists()}


srd = click.version_option(package_name="srd", message="srd %(version)s")(
    LazyGroup(
        name="srd",
        callback=_remember_paths,
        help="Secure Redis: an encrypted, highly available Redis, one daemon per node.",
        params=[
            _directory("config", "/etc/srd", "This node's bundle."),
            _directory("state", "/var/lib/srd", "What srd and its children keep."),
            _directory("run", "/run/srd", "The control socket, and what a boot forgets."),
            _directory("log", "/var/log/srd", "What the children write."),
        ],
        context_settings={"help_option_names": ["-h", "--help"]},
    )
)


def main() -> None:
    """Run a command; an error is one sentence on standard error and an exit status that says what kind it is."""
    try:
        srd(prog_name="srd")
    except SrdError as error:
        click.echo(f"srd: {error}", err=True)
        sys.exit(error.exit_status)
