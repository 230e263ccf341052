"""`srd haproxy-config` and `srd client-config`: complete files for the balancer and for clients, on standard output."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Final

import click

from srd.model import Endpoint, Paths

# The port that redis' own clients try first, on the balancer and on the client's loopback alike.
CLIENT_PORT: Final = 6379
READ_ONLY_PORT: Final = 6378

# 24 days: the largest number of seconds that stunnel can hand to poll(2), which takes an int of milliseconds.
IDLE_TIMEOUT_SECONDS: Final = (2**31 - 1) // 1000

_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PORT: Final = click.IntRange(1, 65535)
_FILE_OPTION: Final = click.option(
    "--file", type=click.Path(path_type=Path), help="The cluster.toml to read, instead of this node's own."
)


def _address(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Take `*` for every address, or an IP address; haproxy wants no brackets around IPv6."""
    if value == "*":
        return value
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        msg = f"{value!r} is neither an IP address nor *"
        raise click.BadParameter(msg) from None


def split_host(text: str) -> tuple[str, int]:
    """Return host and port of `balancer`, `balancer:6379`, `10.0.0.1:6379` or `[fd00::1]:6379`, or raise ValueError."""
    host, port = text, str(CLIENT_PORT)
    if text.startswith("["):
        host, end, rest = text[1:].partition("]")
        if not end or (rest and not rest.startswith(":")):
            raise ValueError(text)
        port = rest.removeprefix(":") if rest else port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not port.isdecimal() or not 1 <= int(port) <= 65535:  # noqa: PLR2004 - the largest TCP port
        raise ValueError(text)
    if not _HOST.fullmatch(host):
        host = str(ipaddress.IPv6Address(host))
    return host, int(port)


def _balancer(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, int]:
    try:
        return split_host(value)
    except ValueError:
        msg = f"{value!r} is not HOST or HOST:PORT"
        raise click.BadParameter(msg) from None


def _stunnel_address(host: str, port: int) -> str:
    try:
        return str(Endpoint(ipaddress.ip_address(host), port))
    except ValueError:
        return f"{host}:{port}"


def _render(template: str, **values: object) -> str:
    import jinja2  # noqa: PLC0415 - 40 ms that completion and --help go without

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("srd.cli", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


@click.command("haproxy-config")
@_FILE_OPTION
@click.option("--listen", default="*", show_default=True, callback=_address, help="The balancer's address.")
@click.option("--port", type=_PORT, default=CLIENT_PORT, show_default=True, help="Where clients connect.")
@click.option(
    "--read-only-port",
    type=click.IntRange(0, 65535),
    default=READ_ONLY_PORT,
    show_default=True,
    help="Where clients connect that only read; 0 leaves it out.",
)
@click.option(
    "--stats-socket",
    type=click.Path(path_type=Path),
    default=Path("/run/haproxy/admin.sock"),
    show_default=True,
    help="haproxy's runtime API.",
)
@click.pass_obj
def haproxy_config_command(
    paths: Paths, *, file: Path | None, listen: str, port: int, read_only_port: int, stats_socket: Path
) -> None:
    """Print a complete haproxy.cfg for the balancer of this cluster.

    srd haproxy-config > /etc/haproxy/haproxy.cfg && haproxy -c -f /etc/haproxy/haproxy.cfg
    """
    from srd.config import load_config  # noqa: PLC0415 - msgspec: --help goes without

    config = load_config(file or paths.cluster_file)
    text = _render(
        "haproxy.cfg.j2",
        cluster=config.cluster,
        nodes=config.redis_nodes,
        tls_port=config.tls.port,
        http_port=config.http.port,
        agent_port=config.haproxy_agent.port,
        listen=listen,
        port=port,
        read_only_port=read_only_port,
        stats_socket=stats_socket,
    )
    click.echo(text, nl=False)


@click.command("client-config")
@_FILE_OPTION
@click.option("--balancer", required=True, callback=_balancer, metavar="HOST[:PORT]", help="Where haproxy listens.")
@click.option("--port", type=_PORT, default=CLIENT_PORT, show_default=True, help="The port on the client's loopback.")
@click.option(
    "--read-only-port",
    type=_PORT,
    help=f"Add a second loopback port of that number for reading only; haproxy's is {READ_ONLY_PORT}.",
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    default=Path("/etc/srd/ca.crt"),
    show_default=True,
    help="The cluster's authority, from client/ of `srd init`.",
)
@click.option(
    "--pid-file",
    type=click.Path(path_type=Path),
    default=Path("/run/srd-client-stunnel.pid"),
    show_default=True,
    help="Where stunnel writes its process id.",
)
@click.pass_obj
def client_config_command(
    paths: Paths,
    *,
    file: Path | None,
    balancer: tuple[str, int],
    port: int,
    read_only_port: int | None,
    ca_file: Path,
    pid_file: Path,
) -> None:
    """Print a client's stunnel.conf.

    srd client-config --balancer lb.example.com > /etc/stunnel/redis.conf && stunnel4 /etc/stunnel/redis.conf
    """
    from srd.config import load_config  # noqa: PLC0415 - as above

    config = load_config(file or paths.cluster_file)
    host, balancer_port = balancer
    text = _render(
        "client-stunnel.conf.j2",
        cluster=config.cluster,
        host_name=f"{config.cluster}.srd",
        accept=f"127.0.0.1:{port}",
        balancer=_stunnel_address(host, balancer_port),
        read_only_accept=f"127.0.0.1:{read_only_port}" if read_only_port else None,
        read_only_balancer=_stunnel_address(host, READ_ONLY_PORT),
        ca_file=ca_file,
        pid=pid_file,
        idle_timeout=IDLE_TIMEOUT_SECONDS,
        delay=host[0] not in "0123456789" and ":" not in host,
    )
    click.echo(text, nl=False)
