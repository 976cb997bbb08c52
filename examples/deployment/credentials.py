"""What a deployment needs beside site keys: a certificate authority with one server certificate, and a key for each SuperNode.

For loopback and for trying out. A real federation takes its server certificate from its own authority, and each hospital makes its
node key itself and sends the public half alone.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

VALID = timedelta(days=30)


def certificates(folder: Path, name: str = "fedmerge loopback") -> None:
    """`ca.crt`, `server.crt` and `server.key` in a folder: a certificate for 127.0.0.1, signed by an authority of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = {"content_commitment": False, "key_encipherment": False, "data_encipherment": False, "key_agreement": False}
    usage |= {"encipher_only": False, "decipher_only": False}
    root = _builder(issuer, issuer, authority.public_key(), authority).add_extension(x509.BasicConstraints(True, 0), True)
    root = root.add_extension(x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = _builder(subject, issuer, server.public_key(), authority).add_extension(x509.BasicConstraints(False, None), True)
    leaf = leaf.add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), True)
    leaf = leaf.add_extension(names, False)
    for file, builder in (("ca.crt", root), ("server.crt", leaf)):
        (folder / file).write_bytes(builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    _secret(folder / "server.key", server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def node_key(file: Path) -> Path:
    """A SuperNode's private key in `file`, and beside it the public half for the coordinator, which is returned."""
    key = ec.generate_private_key(ec.SECP384R1())
    _secret(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = file.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, authority: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), now - timedelta(hours=1), now + VALID)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)


def _secret(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
        opened.write(content)
