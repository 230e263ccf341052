"""The cluster's own certificate authority, and the two kinds of certificate that it issues.

A node certificate proves membership of the mesh: SAN URI `srd://CLUSTER/NODE` and the node's IP addresses. A TLS
certificate is what clients see: SAN DNS `CLUSTER.srd`, the same on every node, so that a client that is led to another
node by a balancer goes on checking one name. The latter has no URI and is refused as a member of the mesh.
All keys are ECDSA P-256 with SHA-256 (NIST SP 800-52r2, 3.3).
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from srd.model import ConfigError, Identity, NodeKind, Secret

AUTHORITY_DAYS: Final = 3650
# Longer than a year, so that a yearly renewal has slack; the longest that public authorities may issue was 825 days.
CERTIFICATE_DAYS: Final = 825
# A node whose clock is a little behind the machine where `srd init` ran must not refuse a fresh certificate.
CLOCK_SKEW: Final = datetime.timedelta(minutes=10)

_SCHEME: Final = "srd"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: Secret


def tls_name(cluster: str) -> str:
    """Return the DNS name that every node's TLS certificate bears and that clients check."""
    return f"{cluster}.srd"


def make_authority(cluster: str, now: datetime.datetime) -> Issued:
    """Make the authority of a cluster: it may issue end certificates only (path length 0)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(cluster, "authority", "srd authority")
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Issued(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))


def issue_node(authority: Issued, identity: Identity, now: datetime.datetime) -> Issued:
    """Issue the certificate by which a node is let into the mesh; it serves and connects."""
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"{_SCHEME}://{identity.cluster}/{identity.node}"),
        *(x509.IPAddress(address) for address in identity.addresses),
    ]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    subject = _name(identity.cluster, identity.kind, identity.node)
    return _issue(authority, subject, names, usages, now)


def issue_tls(authority: Issued, identity: Identity, now: datetime.datetime) -> Issued:
    """Issue the certificate that the node's stunnel shows to clients."""
    shared = tls_name(identity.cluster)
    names: list[x509.GeneralName] = [
        x509.DNSName(shared),
        x509.DNSName(f"{identity.node}.{shared}"),
        *(x509.IPAddress(address) for address in identity.addresses),
    ]
    subject = _name(identity.cluster, "tls", identity.node)
    return _issue(authority, subject, names, [ExtendedKeyUsageOID.SERVER_AUTH], now)


def identify(certificate: x509.Certificate) -> Identity:
    """Read who a certificate belongs to; `ValueError` when it is not a node's. It does not check the signature."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        msg = "the certificate has no subject alternative name"
        raise ValueError(msg) from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    scheme, _, rest = uris[0].partition("://") if len(uris) == 1 else ("", "", "")
    cluster, _, node = rest.partition("/")
    if scheme != _SCHEME or not cluster or not node or "/" in node:
        msg = "the certificate names no srd node"
        raise ValueError(msg)
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    kind = NodeKind(str(units[0].value)) if units else NodeKind.REDIS
    addresses = tuple(names.get_values_for_type(x509.IPAddress))
    return Identity(
        cluster,
        node,
        kind,
        addresses,  # type: ignore[arg-type]  # the stubs allow for networks, which only a name constraint has
        certificate.serial_number,
        certificate.not_valid_after_utc.timestamp(),
    )


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether the authority signed this certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _issue(
    authority: Issued,
    subject: x509.Name,
    names: list[x509.GeneralName],
    usages: list[x509.ObjectIdentifier],
    now: datetime.datetime,
) -> Issued:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key.reveal().encode(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError("use the authority's key", "ca.key", "it is not an EC key", "use the one that srd init made")
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + datetime.timedelta(days=CERTIFICATE_DAYS), issuer.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    )
    return Issued(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def _name(cluster: str, unit: str, common: str) -> x509.Name:
    # Each attribute holds at most 64 characters (RFC 5280 appendix A.1), and a cluster's name may have 63.
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        x509.NameAttribute(NameOID.COMMON_NAME, common),
    ])  # fmt: skip


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> Secret:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Secret(pem.decode())
