"""What `srd init` hands to a node, and what a node accepts: one directory with everything that makes it a member.

    cluster.toml   the cluster, the same on every node
    ca.crt         the authority's certificate
    node.crt/.key  this node's membership of the mesh
    tls.crt/.key   what its stunnel shows to clients
    secrets.toml   the cluster's passwords

A client has neither of the last two: nobody connects to it, and it administers nothing. Files that hold a secret are
0600. The authority's key is in no bundle: it stays where `srd init` ran.

On the node, all but cluster.toml may come from the service manager instead (LoadCredential=, `Paths.credentials`).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from srd.cluster import Config, Node
from srd.config import load_config, parse_config
from srd.model import ConfigError, Credentials, Identity, NodeKind, Paths, Secret, Secrets
from srd.trust.authority import Issued, identify, issue_node, issue_tls, issued_by, make_authority

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
CLIENT_DIRECTORY: Final = "client"
CLUSTER_FILE: Final = "cluster.toml"
FILES: Final = (CLUSTER_FILE, "ca.crt", "node.crt", "node.key", "tls.crt", "tls.key", "secrets.toml")
# 32 random bytes: more than AES-256 asks of a key, and short enough for redis' and stunnel's configuration lines.
_PASSWORD_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Bundle:
    """A node's bundle, read and checked. `not_after` maps a file's name to its certificate's end (Unix seconds).

    `config` has the node itself in any case. A client has no `secrets`. `digests` are of its files as they were
    read, without cluster.toml where the one that srd last ran by was read in its place (`last_good`).
    """

    config: Config
    node: Node
    secrets: Secrets | None
    credentials: Credentials
    not_after: Mapping[str, float]
    digests: Mapping[str, bytes]
    last_good: bool = False


class _SecretsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    redis_password: str
    replication_password: str
    sentinel_password: str
    srd_password: str


def write_bundles(text: str, output: Path, now: datetime.datetime, *, origin: str = "cluster.toml") -> Config:
    """Make an authority and a bundle for every node of a cluster.toml's text, in a directory that must not exist.

    `origin` is how errors name the text. Nothing is left behind when it fails: the directory appears whole, by one
    rename.
    """
    config = parse_config(text, origin)
    if any(node.name == CLIENT_DIRECTORY for node in config.nodes):
        reason = f"no node may be called {CLIENT_DIRECTORY!r}: the bundle for clients bears that name"
        raise ConfigError("use", origin, reason, "choose another name")
    if output.exists():
        raise ConfigError("write the bundles to", str(output), "it exists already", "name a new directory")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError("write the bundles to", str(output), str(error.strerror)) from error
    try:
        _write_all(config, text, staging, now)
        staging.rename(output)
    except OSError as error:
        raise ConfigError("write the bundles to", str(output), str(error.strerror)) from error
    finally:
        if staging.exists():
            shutil.rmtree(staging)
    return config


def _write_all(config: Config, text: str, directory: Path, now: datetime.datetime) -> None:
    authority = make_authority(config.cluster, now)
    passwords = {name: secrets.token_urlsafe(_PASSWORD_BYTES) for name in _SecretsFile.__struct_fields__}
    secrets_toml = "".join(f'{name} = "{value}"\n' for name, value in passwords.items())
    write_file(directory / "cluster.toml", text, PUBLIC)
    write_file(directory / "ca.crt", authority.certificate, PUBLIC)
    write_file(directory / "ca.key", authority.key.reveal(), PRIVATE)
    for node in config.nodes:
        bundle = directory / node.name
        bundle.mkdir(mode=0o700)
        write_bundle(bundle, text, authority.certificate, None if node.kind is NodeKind.CLIENT else secrets_toml)
        write_certificates(bundle, config.cluster, node, authority, now)
    client = directory / CLIENT_DIRECTORY
    client.mkdir(mode=0o700)
    write_file(client / "ca.crt", authority.certificate, PUBLIC)
    write_file(client / "redis_password", passwords["redis_password"] + "\n", PRIVATE)


def write_bundle(bundle: Path, cluster_toml: str, authority: str | bytes, secrets_toml: str | None) -> None:
    """Write what a node shares with others; `secrets_toml` is None for a client."""
    write_file(bundle / "cluster.toml", cluster_toml, PUBLIC)
    write_file(bundle / "ca.crt", authority, PUBLIC)
    if secrets_toml is not None:
        write_file(bundle / "secrets.toml", secrets_toml, PRIVATE)


def write_certificates(bundle: Path, cluster: str, node: Node, authority: Issued, now: datetime.datetime) -> None:
    """Issue and write a node's own certificates and their keys."""
    identity = Identity(cluster, node.name, node.kind, node.addresses)
    issued = {"node": issue_node(authority, identity, now)}
    if node.kind is not NodeKind.CLIENT:
        issued["tls"] = issue_tls(authority, identity, now)
    for name, made in issued.items():
        write_file(bundle / f"{name}.crt", made.certificate, PUBLIC)
        write_file(bundle / f"{name}.key", made.key.reveal(), PRIVATE)


def write_file(path: Path, content: str | bytes, mode: int = PRIVATE) -> None:
    """Write a file that must not exist."""
    data = content.encode() if isinstance(content, str) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # the umask may only have taken bits away
        file.write(data)


def digests(paths: Paths) -> dict[str, bytes]:
    """Return a digest of each file of this node's bundle that can be read, by its name. Blocks."""
    found = {}
    for name in FILES:
        with contextlib.suppress(OSError):
            found[name] = hashlib.sha256(paths.bundle_file(name).read_bytes()).digest()
    return found


def load_bundle(paths: Paths, now: datetime.datetime, *, cluster_file: Path | None = None) -> Bundle:
    """Read this node's bundle and check that its parts belong together, are valid now and are private. Blocks.

    `cluster_file` is read in place of its cluster.toml. Raises `ConfigError` with the file, what is wrong with it and
    what to do.
    """
    read = digests(paths)  # before the files are read: what changes in between is not taken for read
    if cluster_file is not None:
        read.pop(CLUSTER_FILE, None)
    config = load_config(cluster_file if cluster_file is not None else paths.cluster_file)
    authority = _certificate(paths.bundle_file("ca.crt"))
    node_certificate, node_key = _pair(paths, "node", authority, now)
    certificates = {"ca": authority, "node": node_certificate}
    path = paths.bundle_file("node.crt")
    identity = _identity(node_certificate, path)
    config, node = _member(config, identity, str(path))
    passwords = None
    if node.kind is not NodeKind.CLIENT:
        passwords = _secrets(paths.bundle_file("secrets.toml"))
        certificates["tls"], _ = _pair(paths, "tls", authority, now)
    return Bundle(
        config=config,
        node=node,
        secrets=passwords,
        credentials=Credentials(
            identity=identity,
            certificate=node_certificate.public_bytes(serialization.Encoding.PEM),
            key=node_key,
            authority=authority.public_bytes(serialization.Encoding.PEM),
        ),
        not_after={name: certificate.not_valid_after_utc.timestamp() for name, certificate in certificates.items()},
        digests=read,
        last_good=cluster_file is not None,
    )


def load_member(paths: Paths, cluster_file: Path) -> tuple[Config, Node]:
    """Read a cluster.toml, and which of its nodes this is by the certificate, whether that is valid now or not."""
    path = paths.bundle_file("node.crt")
    return _member(load_config(cluster_file), _identity(_certificate(path), path), str(path))


def _identity(certificate: x509.Certificate, path: Path) -> Identity:
    try:
        return identify(certificate)
    except ValueError as error:
        raise ConfigError("use", str(path), str(error), "take the bundle that srd init made for this node") from error


def _member(config: Config, identity: Identity, path: str) -> tuple[Config, Node]:
    """Return the cluster with the node that the certificate names, if the file agrees with the certificate.

    A client need not be in the file.
    """
    remedy = "take the bundle that srd init made for this node"
    if identity.cluster != config.cluster:
        reason = f"it is of cluster {identity.cluster!r}, and cluster.toml is of {config.cluster!r}"
        raise ConfigError("use", path, reason, remedy)
    if identity.kind is NodeKind.CLIENT and not any(node.name == identity.node for node in config.nodes):
        node = Node(identity.node, identity.kind, identity.addresses)
        return config.joined_by(node), node
    try:
        node = config.node(identity.node)
    except KeyError:
        reason = f"it is for node {identity.node!r}, which cluster.toml does not have"
        raise ConfigError("use", path, reason, remedy) from None
    if set(identity.addresses) != set(node.addresses):
        has = ", ".join(map(str, identity.addresses)) or "none"
        wants = ", ".join(map(str, node.addresses))
        raise ConfigError("use", path, f"it is for the address {has}, and cluster.toml gives {wants}", remedy)
    if identity.kind is not node.kind:
        reason = f"it is for a node of kind {identity.kind}, and cluster.toml says {node.kind}"
        raise ConfigError("use", path, reason, remedy)
    return config, node


def _pair(
    paths: Paths, name: str, authority: x509.Certificate, now: datetime.datetime
) -> tuple[x509.Certificate, Secret]:
    file = paths.bundle_file(f"{name}.crt")
    certificate, path = _certificate(file), str(file)
    if not issued_by(certificate, authority):
        raise ConfigError("use", path, "another authority issued it, not ca.crt", "take all files of one bundle")
    if now < certificate.not_valid_before_utc:
        reason = f"it is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
        raise ConfigError("use", path, reason, "check this machine's clock")
    if now >= certificate.not_valid_after_utc:
        reason = f"it expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        raise ConfigError("use", path, reason, "issue a new one, or check this machine's clock")
    key_path = paths.bundle_file(f"{name}.key")
    pem = _private(key_path)
    try:
        secret = Secret(pem.decode("ascii"))
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Not chained: a UnicodeDecodeError quotes what it could not decode.
        raise ConfigError("read", str(key_path), "it is not an unencrypted PEM private key") from None
    encoding = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*encoding) != certificate.public_key().public_bytes(*encoding):
        raise ConfigError("use", str(key_path), f"it is not the key of {name}.crt", "take all files of one bundle")
    return certificate, secret


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise ConfigError("read", str(path), "it is not a PEM certificate") from error


def _secrets(path: Path) -> Secrets:
    try:
        raw = msgspec.convert(tomllib.loads(_private(path).decode()), type=_SecretsFile)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        # Neither error may be chained: both quote the text of the file.
        raise ConfigError("read", str(path), "it is not TOML", "take the one that srd init made") from None
    except msgspec.ValidationError as error:
        raise ConfigError("read", str(path), str(error).replace("`", "'")) from None
    values = {name: Secret(getattr(raw, name)) for name in _SecretsFile.__struct_fields__}
    return Secrets(**values)


def _private(path: Path) -> bytes:
    """Read a file that holds a secret, if nobody but its owner may read it."""
    data = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError("use", str(path), f"others may read it (mode {mode:04o})", f"chmod 600 {path}")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "copy this node's whole bundle there" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError("read", str(path), str(error.strerror).lower(), remedy) from error
