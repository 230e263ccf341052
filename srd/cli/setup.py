"""`srd init` and `srd node` make bundles; `srd check` says whether a node could run, and changes nothing."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import click

from srd.cluster import Config
from srd.config import load_config, node_entry, quoted, read_text
from srd.model import EXIT_CONFIG, NodeKind, Paths


@click.command("init")
@click.argument("cluster", required=False)
@click.option("--node", "nodes", multiple=True, metavar="NAME=ADDRESS[,ADDRESS]", help="A node; give one for each.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="A cluster.toml of your own instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The directory to make.")
def init_command(cluster: str | None, nodes: tuple[str, ...], file: Path | None, output: Path) -> None:
    """Make a cluster: its certificate authority, cluster.toml, and one bundle for each node.

    srd init orders --node redis-1=192.168.205.10 --node redis-2=192.168.205.11 --node redis-3=192.168.205.12 -o orders
    """
    from srd.trust.bundle import write_bundles  # noqa: PLC0415 - cryptography takes 0.1 s to import, 1 s in a slow lab

    if (file is None) == (cluster is None) or (file is not None and nodes):
        msg = "give a cluster's name and its nodes, or --file"
        raise click.UsageError(msg)
    if file is not None:
        text, origin = read_text(file), str(file)
    else:
        text, origin = _cluster_toml(cluster or "", nodes), "the cluster.toml of these arguments"
    config = write_bundles(text, output, dt.datetime.now(dt.UTC), origin=origin)
    click.echo(f"{output}/ca.key is the authority's key: keep it off the nodes, and safe.")
    for node in config.nodes:
        click.echo(f"{output}/{node.name}/ is the bundle of {node.name} ({node.address}): copy it there as /etc/srd")
    click.echo(f"{output}/client/ is for clients: the authority's certificate, and the application's password")
    _advise(config)


def _advise(config: Config) -> None:
    for advice in config.advice:
        click.echo(f"srd: {advice}", err=True)


def _cluster_toml(cluster: str, nodes: tuple[str, ...]) -> str:
    if not nodes:
        msg = "no --node given"
        raise click.UsageError(msg)
    return f"cluster = {quoted(cluster)}\n" + "".join(node_entry(*_node(text, "--node ")) for text in nodes)


def _node(text: str, option: str = "") -> tuple[str, list[str]]:
    """Take NAME=ADDRESS[,ADDRESS] apart."""
    name, equals, addresses = text.partition("=")
    if not equals:
        msg = f"{option}{text}: it is not NAME=ADDRESS"
        raise click.UsageError(msg)
    return name, addresses.split(",")


@click.group("node")
def node_command() -> None:
    """Add, remove and renew nodes, and revoke certificates: in the directory that `srd init` made."""


_DIRECTORY = click.argument("directory", type=click.Path(path_type=Path, file_okay=False))


@node_command.command("add")
@_DIRECTORY
@click.argument("node", metavar="NAME=ADDRESS[,ADDRESS]")
@click.option("--kind", type=click.Choice([kind.value for kind in NodeKind]), default=NodeKind.REDIS.value)
def add_command(directory: Path, node: str, kind: str) -> None:
    """Make the bundle of one more node and put it into cluster.toml.

    The other nodes take it in when they get the new cluster.toml: copy it to /etc/srd and run `srd reload`. A client is
    not put there: its certificate alone lets it in, live, and `srd node revoke` puts it out.
    """
    from srd.trust.issuing import add_node  # noqa: PLC0415 - as above

    name, addresses = _node(node)
    config, made = add_node(directory, name, addresses, NodeKind(kind), dt.datetime.now(dt.UTC))
    click.echo(f"{directory}/{made.name}/ is the bundle of {made.name} ({made.address}): copy it there as /etc/srd")
    if made.kind is not NodeKind.CLIENT:
        _say_where(directory, config)


@node_command.command("renew")
@_DIRECTORY
@click.argument("name")
def renew_command(directory: Path, name: str) -> None:
    """Issue new certificates for a node, with new keys; the old ones go on being valid until they end."""
    from srd.trust.issuing import renew_node  # noqa: PLC0415 - as above

    node = renew_node(directory, name, dt.datetime.now(dt.UTC))
    files = "node.*" if node.kind is NodeKind.CLIENT else "node.* and tls.*"
    click.echo(f"{directory}/{node.name}/ has new certificates: copy {files} to /etc/srd, then srd reload")


@node_command.command("remove")
@_DIRECTORY
@click.argument("name")
def remove_command(directory: Path, name: str) -> None:
    """Take a node out of every cluster.toml."""
    from srd.trust.issuing import remove_node  # noqa: PLC0415 - as above

    _say_where(directory, remove_node(directory, name))


@node_command.command("revoke")
@_DIRECTORY
@click.argument("name")
def revoke_command(directory: Path, name: str) -> None:
    """Revoke every certificate that a node or client ever had; for a new one, `srd node renew` after that."""
    from srd.trust.issuing import revoke  # noqa: PLC0415 - as above

    config, serials = revoke(directory, name)
    click.echo(f"{', '.join(serials) or 'nothing new'} is let in no more, once every node has the new cluster.toml")
    _say_where(directory, config)


def _say_where(directory: Path, config: Config) -> None:
    from srd.trust.issuing import holders  # noqa: PLC0415 - as above

    for node in holders(directory, config):
        click.echo(f"{directory}/{node.name}/cluster.toml is for {node.name}: copy it to /etc/srd, then srd reload")


@click.command("check")
@click.pass_obj
def check_command(paths: Paths) -> None:
    """Check the bundle, the programs, the ports and the kernel of this node, without starting or changing anything."""
    from srd.preflight import problems  # noqa: PLC0415 - as above

    found = asyncio.run(problems(paths))
    for problem in found:
        click.echo(f"srd: {problem}", err=True)
    if found:
        statuses = {problem.exit_status for problem in found}
        raise SystemExit(statuses.pop() if len(statuses) == 1 else EXIT_CONFIG)
    _advise(load_config(paths.cluster_file))
    click.echo("this node can run")
