"""What the machine with the authority's key does after `srd init`: nodes and certificates, more of them and fewer.

The cluster.toml there is the one from which all others are made: what was revoked or removed stays so. All of it works
on the directory that `srd init` made; what it changes is written beside it, and put in place by a rename.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography import x509

from srd.config import Config, Node, node_entry, parse_config
from srd.model import ConfigError, Identity, NodeKind, Secret
from srd.trust.authority import Issued, issue_node, issue_tls
from srd.trust.bundle import CLIENT_DIRECTORY, PUBLIC, write_file, write_issued

_OPERATION = "add the node"


def add_node(
    directory: Path, name: str, addresses: Sequence[str], kind: NodeKind, now: datetime.datetime
) -> tuple[Config, Node]:
    """Put one more node into cluster.toml and make its bundle; the other bundles get the new cluster.toml."""
    text = _read(directory / "cluster.toml") + node_entry(name, addresses, kind)
    config = parse_config(text, f"{directory / 'cluster.toml'} with {name}")
    if name == CLIENT_DIRECTORY or (directory / name).exists():
        raise ConfigError(_OPERATION, name, f"{directory / name} is taken", "choose another name")
    node = config.node(name)
    secrets = _read(_some_bundle(directory, config, name) / "secrets.toml")
    with _staging(directory, name) as staging:
        write_file(staging / "cluster.toml", text, PUBLIC)
        write_file(staging / "ca.crt", _read(directory / "ca.crt"), PUBLIC)
        write_file(staging / "secrets.toml", secrets)
        _issue(directory, config, node, staging, now)
        staging.rename(directory / name)
    return _distribute(directory, text, lambda after: after == config), node


def renew_node(directory: Path, name: str, now: datetime.datetime) -> Node:
    """Issue new certificates, with new keys, for a node that there is."""
    _, config = _cluster(directory)
    try:
        node = config.node(name)
    except KeyError:
        raise ConfigError("renew the certificates of", name, f"{directory} has no such node") from None
    with _staging(directory, name) as staging:
        _issue(directory, config, node, staging, now)
        for file in sorted(staging.iterdir()):
            file.rename(directory / name / file.name)
    return node


def remove_node(directory: Path, name: str) -> Config:
    """Take a node out of every cluster.toml; its bundle stays, for nobody."""
    text, config = _cluster(directory)
    wanted = tuple(node for node in config.nodes if node.name != name)
    if len(wanted) == len(config.nodes):
        raise ConfigError("remove the node", name, f"{directory} has no such node")
    entry = re.compile(r"(?m)^[ \t]*\[\[\s*node\s*\]\](?:(?!^[ \t]*\[).*\n?)*")
    changed = entry.sub(lambda found: "" if _names(found[0], name) else found[0], text)
    return _distribute(directory, changed, lambda after: after.nodes == wanted)


def revoke(directory: Path, name: str) -> tuple[Config, str]:
    """Put the certificate that a node's bundle has on the list of those that are let in no more; name its serial."""
    text, config = _cluster(directory)
    certificate = x509.load_pem_x509_certificate(_read(directory / name / "node.crt").encode())
    serial = f"{certificate.serial_number:x}"
    listed = ", ".join(f'"{number:x}"' for number in sorted({*config.revoked, certificate.serial_number}))
    line = f"revoked = [{listed}]"
    changed, count = re.subn(r"(?m)^[ \t]*revoked[ \t]*=[ \t]*\[[^\]]*\].*$", line, text)
    if not count and re.search(r"(?m)^\s*\[\s*trust\s*\]", text):
        changed = re.sub(r"(?m)^(\s*\[\s*trust\s*\].*)$", rf"\1\n{line}", text)
    elif not count:
        changed = f"{text.rstrip()}\n\n[trust]\n{line}\n"
    wanted = config.revoked | {certificate.serial_number}
    return _distribute(directory, changed, lambda after: after.revoked == wanted), serial


def _names(entry: str, name: str) -> bool:
    return re.search(rf"(?m)^[ \t]*name[ \t]*=[ \t]*[\"']{re.escape(name)}[\"']", entry) is not None


def _cluster(directory: Path) -> tuple[str, Config]:
    text = _read(directory / "cluster.toml")
    return text, parse_config(text, str(directory / "cluster.toml"))


def _distribute(directory: Path, text: str, is_meant: Callable[[Config], bool]) -> Config:
    """Put a changed cluster.toml beside the authority and into every bundle, if it says what it is meant to."""
    path = directory / "cluster.toml"
    config = parse_config(text, f"{path}, changed")
    if not is_meant(config):
        raise ConfigError("change", str(path), "its lines are not as srd init writes them", "edit it by hand")
    for place in (directory, *(directory / node.name for node in config.nodes)):
        if (place / "cluster.toml").exists():
            _replace(place / "cluster.toml", text, PUBLIC)
    return config


def _issue(directory: Path, config: Config, node: Node, into: Path, now: datetime.datetime) -> None:
    authority = Issued(_read(directory / "ca.crt").encode(), Secret(_read(directory / "ca.key")))
    identity = Identity(config.cluster, node.name, node.kind, node.addresses)
    write_issued(into, "node", issue_node(authority, identity, now))
    write_issued(into, "tls", issue_tls(authority, identity, now))


@contextlib.contextmanager
def _staging(directory: Path, name: str) -> Iterator[Path]:
    """A private directory beside the bundles, gone at the end unless it was renamed."""
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=directory))
    except OSError as error:
        raise ConfigError("write to", str(directory), str(error.strerror).lower()) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _some_bundle(directory: Path, config: Config, but: str) -> Path:
    for node in config.nodes:
        if node.name != but and (directory / node.name / "secrets.toml").exists():
            return directory / node.name
    raise ConfigError(_OPERATION, but, f"{directory} has no other node's bundle, so no passwords", "keep one there")


def _replace(path: Path, text: str, mode: int) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    write_file(beside, text, mode)
    beside.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
        raise ConfigError("read", str(path), reason.lower(), "give the directory that srd init made") from error
