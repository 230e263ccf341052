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

from srd.cluster import Config, Node
from srd.config import node_entry, parse_config
from srd.model import ConfigError, NodeKind, Secret
from srd.trust.authority import Issued, identify
from srd.trust.bundle import CLIENT_DIRECTORY, PUBLIC, write_bundle, write_certificates, write_file

_OPERATION = "add the node"
# The certificates that were replaced, of each name. Hidden: it is no bundle.
FORMER = ".former"


def add_node(
    directory: Path, name: str, addresses: Sequence[str], kind: NodeKind, now: datetime.datetime
) -> tuple[Config, Node]:
    """Make the bundle of one more node, and put it into cluster.toml, that of every other bundle too.

    A client's is left as it is: its certificate is enough for the others.
    """
    text, _ = _cluster(directory)
    changed = text + node_entry(name, addresses, kind)
    config = parse_config(changed, f"{directory / 'cluster.toml'} with {name}")
    if name == CLIENT_DIRECTORY or (directory / name).exists():
        raise ConfigError(_OPERATION, name, f"{directory / name} is taken", "choose another name")
    node = config.node(name)
    for other in holders(directory, parse_config(text, str(directory / "cluster.toml"))):
        if taken := set(other.addresses) & set(node.addresses):
            raise ConfigError(_OPERATION, name, f"{taken.pop()} is {other.name!r} already")
    authority = _authority(directory)
    client = kind is NodeKind.CLIENT
    secrets = None if client else _read(_some_bundle(directory, config, name) / "secrets.toml")
    with _staging(directory, name) as staging:
        write_bundle(staging, text if client else changed, authority.certificate, secrets)
        write_certificates(staging, config.cluster, node, authority, now)
        staging.rename(directory / name)
    return config if client else _distribute(directory, changed, lambda after: after == config), node


def renew_node(directory: Path, name: str, now: datetime.datetime) -> Node:
    """Issue new certificates, with new keys, for a node that there is."""
    _, config = _cluster(directory)
    node = next((node for node in holders(directory, config) if node.name == name), None)
    if node is None:
        raise ConfigError("renew the certificates of", name, f"{directory} has no such node")
    with _staging(directory, name) as staging:
        write_certificates(staging, config.cluster, node, _authority(directory), now)
        _put_by(directory, name)
        for file in sorted(staging.iterdir()):
            file.rename(directory / name / file.name)
    return node


def _put_by(directory: Path, name: str) -> None:
    """Keep the certificate that is about to be replaced: it goes on being valid, and may have to be revoked."""
    present = directory / name / "node.crt"
    if present.exists():
        former = directory / FORMER / name
        former.mkdir(mode=0o700, parents=True, exist_ok=True)
        present.rename(former / f"{_certificate(present).serial_number:x}.crt")


def remove_node(directory: Path, name: str) -> Config:
    """Take a node out of every cluster.toml; its bundle stays, for nobody."""
    text, config = _cluster(directory)
    wanted = tuple(node for node in config.nodes if node.name != name)
    if len(wanted) == len(config.nodes):
        remedy = f"srd node revoke {directory} {name} puts a client out"
        raise ConfigError("remove the node", name, f"the cluster.toml of {directory} has no such node", remedy)
    entry = re.compile(r"(?m)^[ \t]*\[\[\s*node\s*\]\](?:(?!^[ \t]*\[).*\n?)*")
    changed = entry.sub(lambda found: "" if _names(found[0], name) else found[0], text)
    return _distribute(directory, changed, lambda after: after.nodes == wanted)


def revoke(directory: Path, name: str) -> tuple[Config, tuple[str, ...]]:
    """Put all certificates that a name ever had on the list of those that are let in no more; name the new entries."""
    text, config = _cluster(directory)
    paths = [directory / name / "node.crt", *(directory / FORMER / name).glob("*.crt")]
    wanted = config.revoked | {_certificate(path).serial_number for path in paths}
    listed = ", ".join(f'"{number:x}"' for number in sorted(wanted))
    line = f"revoked = [{listed}]"
    changed, count = re.subn(r"(?m)^[ \t]*revoked[ \t]*=[ \t]*\[[^\]]*\].*$", line, text)
    if not count and re.search(r"(?m)^\s*\[\s*trust\s*\]", text):
        changed = re.sub(r"(?m)^(\s*\[\s*trust\s*\].*)$", rf"\1\n{line}", text)
    elif not count:
        changed = f"{text.rstrip()}\n\n[trust]\n{line}\n"
    new = tuple(f"{number:x}" for number in sorted(wanted - config.revoked))
    return _distribute(directory, changed, lambda after: after.revoked == wanted), new


def holders(directory: Path, config: Config) -> tuple[Node, ...]:
    """Return whom the directory has bundles for: the nodes of cluster.toml, and the clients that are not in it."""
    found = list(config.nodes)
    for path in sorted(directory.glob("*/node.crt")):
        if path.parent.name not in {node.name for node in config.nodes}:
            identity = identify(_certificate(path))
            if identity.kind is NodeKind.CLIENT:
                found.append(Node(identity.node, identity.kind, identity.addresses))
    return tuple(found)


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path).encode())
    except ValueError as error:
        raise ConfigError("read", str(path), "it is not a PEM certificate") from error


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
    for place in (directory, *(directory / node.name for node in holders(directory, config))):
        if (place / "cluster.toml").exists():
            _replace(place / "cluster.toml", text, PUBLIC)
    return config


def _authority(directory: Path) -> Issued:
    return Issued(_read(directory / "ca.crt").encode(), Secret(_read(directory / "ca.key")))


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
