"""The verb `fedmerge certificate`: an authority of one's own, and certificates that it signs, for TLS between machines.

For Ray clusters and Flower's SuperLink where no authority is at hand. Who has an authority takes certificates from there.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmerge.errors import FolderError, Problem, UserError
from fedmerge.system.files import atomic, write_secret

AUTHORITY = "ca"
AUTHORITY_VALID = timedelta(days=3650)

HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_NO_USE = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
_NO_USE |= dict.fromkeys(("encipher_only", "decipher_only"), False)


def issue(folder: Path, name: str, addresses: Sequence[str], days: int = 90, renew: bool = False) -> tuple[Path, Path]:
    """`<name>.crt` and `<name>.key` in `folder`, signed by the authority there, `ca.crt` and `ca.key`, or a new one.

    addresses: host names and IP addresses at which others reach the machine; TLS compares them. The certificate serves both ends
    of a connection, as Ray wants it. Keys have mode 600. Raises UserError for a name or address that is none, FolderError for
    a certificate that is there already unless `renew`, half an authority, or a folder that cannot be written to.
    """
    _check(name, addresses)
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    try:
        _see_to_places(folder, certificate, key, renew)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority, signer = _authority(folder)
        own = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        valid = min(timedelta(days=days), authority.not_valid_after_utc - datetime.now(UTC))  # nobody believes it any longer
        built = _builder(subject, authority.subject, own.public_key(), signer.public_key(), valid)
        built = built.add_extension(x509.BasicConstraints(False, None), True).add_extension(_use(signs=False), True)
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        built = built.add_extension(x509.ExtendedKeyUsage(both), False)
        built = built.add_extension(x509.SubjectAlternativeName([_named(address) for address in addresses]), False)
        _write_pair(certificate, built.sign(signer, hashes.SHA256()), key, own)
    except OSError as error:
        raise FolderError(
            f"{error.filename or folder}: found a place that cannot be written ({error.strerror}); expected a folder for this user"
        ) from None
    return certificate, key


def _see_to_places(folder: Path, certificate: Path, key: Path, renew: bool) -> None:
    """Before anything is made. Raises FolderError for what is in the way, OSError for what cannot be looked at."""
    if os.path.lexists(folder) and not folder.is_dir():  # a link to nothing is in the way, too
        raise FolderError(f"{folder}: found a file; expected a folder, or nothing")
    for file in (certificate, key):
        if file.exists() and not renew:
            raise FolderError(f"{file}: found one; expected none. Give --renew to replace it")
    for file in (certificate, key, folder / f"{AUTHORITY}.crt", folder / f"{AUTHORITY}.key"):
        if file.is_dir():
            raise FolderError(f"{file}: found a folder; expected a file, or nothing")


def _check(name: str, addresses: Sequence[str]) -> None:
    problems = []
    if not NAME.fullmatch(name) or name.lower() == AUTHORITY:  # on some disks CA.key is ca.key
        expected = f"at most 64 letters, digits, '-', '_' and '.', and not '{AUTHORITY}', which is the authority's"
        problems.append(Problem("NAME", "", f"'{name}'", expected))
    if not addresses:
        problems.append(Problem("ADDRESS", "", "none", "a host name or an IP address at which others reach the machine"))
    for address in addresses:
        if "%" in address or (not _is_ip(address) and not (HOST.fullmatch(address) and not address.rpartition(".")[2].isdigit())):
            problems.append(Problem("ADDRESS", "", f"'{address}'", "a host name or an IP address, without a port"))
    if problems:
        raise UserError("\n".join(map(str, problems)))


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The one of the folder, or a new one."""
    certificate, key = folder / f"{AUTHORITY}.crt", folder / f"{AUTHORITY}.key"
    if certificate.exists() != key.exists():
        there, gone = (certificate, key) if certificate.exists() else (key, certificate)
        mend = (
            f"Only who has both can sign: bring {gone.name} here, give another folder, or delete {there.name} for a new authority"
        )
        raise FolderError(f"{there}: found it without {gone.name}; expected both files. {mend}")
    if certificate.exists():
        return _found(certificate, key)
    signer = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge authority")])
    built = _builder(issuer, issuer, signer.public_key(), signer.public_key(), AUTHORITY_VALID)
    built = built.add_extension(x509.BasicConstraints(True, 0), True).add_extension(_use(signs=True), True)
    found = built.sign(signer, hashes.SHA256())
    _write_pair(certificate, found, key, signer)
    return found, signer


def _found(certificate: Path, key: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """An authority that can sign today. Raises FolderError: TLS would refuse later what another one has signed."""
    try:
        found, signer = x509.load_pem_x509_certificate(certificate.read_bytes()), load_pem_private_key(key.read_bytes(), None)
        fits = signer.public_key() == found.public_key()
    except TypeError:
        raise FolderError(f"{key}: found one with a password; expected one without") from None
    except (ValueError, UnsupportedAlgorithm):
        files = f"{certificate.name} or {key.name}"
        raise FolderError(f"{certificate.parent}: found {files} that is no PEM, or of an unknown kind; expected PEM") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        kind = "an RSA key" if isinstance(signer, rsa.RSAPrivateKey) else "a key of another kind"
        raise FolderError(f"{key}: found {kind}; expected one of an elliptic curve. Give another folder for a new authority")
    if not fits:
        raise FolderError(f"{key}: found another key than that of {certificate.name}; expected the pair that was made together")
    if not _is_authority(found):
        raise FolderError(f"{certificate}: found the certificate of a machine; expected that of an authority")
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if ends <= datetime.now(UTC):
        raise FolderError(f"{certificate}: found one that ran out on {ends:%Y-%m-%d}; expected a valid one. Name another folder")
    if begins > datetime.now(UTC):
        mend = "Look whether this machine's clock is right"
        raise FolderError(f"{certificate}: found one that begins on {begins:%Y-%m-%d}; expected one that is valid today. {mend}")
    return found, signer


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


def _write_pair(certificate: Path, signed: x509.Certificate, key: Path, secret: ec.EllipticCurvePrivateKey) -> None:
    """The certificate waits beside its place until the key is in its own: what cannot be written leaves the old pair."""
    before = key.read_bytes() if key.exists() else None
    try:
        with atomic(certificate) as draft:
            draft.write_bytes(signed.public_bytes(Encoding.PEM))
            write_secret(key, secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    except OSError:
        if before is None:
            key.unlink(missing_ok=True)
        elif key.read_bytes() != before:
            write_secret(key, before)
        raise


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    authority: ec.EllipticCurvePublicKey,
    valid: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)  # an hour back, because clocks of machines differ
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), now - timedelta(hours=1), now + valid)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), False)


def _use(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, **_NO_USE)


def _named(address: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(address)) if _is_ip(address) else x509.DNSName(address)


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True
