"""`fedmerge certificate`: what it makes is what TLS takes, and nothing is replaced by accident."""

from __future__ import annotations

import socket
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedmerge.errors import FolderError, UserError
from fedmerge.federated.security.certificates import _write_pair, issue
from tests.front_door import fedmerge

ADDRESSES = ["head.example", "127.0.0.1", "::1"]


def spoken(server: Path, client: Path, name: str) -> str:
    """What a client, who has a certificate, too, gets over a real socket from a server that asks for it."""
    there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server.with_name("ca.crt")))
    there.verify_mode = ssl.CERT_REQUIRED
    here = ssl.create_default_context(cafile=str(client.with_name("ca.crt")))
    for context, certificate in ((there, server), (here, client)):
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    ends = socket.socketpair()

    def serve() -> None:
        with there.wrap_socket(ends[0], server_side=True) as line:
            line.sendall(b"hello")

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        with here.wrap_socket(ends[1], server_hostname=name) as line:
            said = line.recv(5).decode()
        served.result()
    return said


@pytest.mark.parametrize("name", ADDRESSES)
def test_both_ends_take_it(name: str, tmp_path: Path) -> None:
    head, _ = issue(tmp_path, "head", ADDRESSES)
    ward, _ = issue(tmp_path, "ward", ["10.0.0.7"])
    assert spoken(head, ward, name) == "hello"


def test_it_is_for_its_addresses_alone(tmp_path: Path) -> None:
    head, _ = issue(tmp_path, "head", ADDRESSES)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for '10\.0\.0\.7'"):
        spoken(head, head, "10.0.0.7")


def test_another_authority_is_not_taken(tmp_path: Path) -> None:
    head, _ = issue(tmp_path / "one", "head", ADDRESSES)
    ward, _ = issue(tmp_path / "other", "ward", ADDRESSES)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        spoken(head, ward, "head.example")


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    issue(tmp_path / "tls", "head", ADDRESSES)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "tls").iterdir()}
    assert set(modes) == {"ca.crt", "ca.key", "head.crt", "head.key"}
    assert modes["ca.key"] == modes["head.key"] == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


def test_it_is_valid_for_so_many_days(tmp_path: Path) -> None:
    certificate, _ = issue(tmp_path, "head", ADDRESSES, days=7)
    left = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=7) - timedelta(minutes=1) < left <= timedelta(days=7)


def test_nothing_is_replaced_unless_asked(tmp_path: Path) -> None:
    certificate, key = issue(tmp_path, "head", ADDRESSES)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FolderError, match=r"head\.crt: found one; expected none\. Give --renew"):
        issue(tmp_path, "head", ADDRESSES)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    issue(tmp_path, "head", ADDRESSES, renew=True)
    assert {file for file, content in before.items() if file.read_bytes() != content} == {certificate, key}


@pytest.mark.parametrize(
    ("name", "addresses", "said"),
    [
        ("ca", ADDRESSES, "NAME: found 'ca'; expected .* not 'ca'"),
        ("../head", ADDRESSES, r"NAME: found '\.\./head'"),
        ("head", [], "ADDRESS: found none"),
        ("head", ["10.0.0.5:8000"], "ADDRESS: found '10.0.0.5:8000'; expected .* without a port"),
        ("head", ["a b"], "ADDRESS: found 'a b'"),
        ("head", ["10.0.0.256"], "ADDRESS: found '10.0.0.256'; expected a host name or an IP address"),
        ("head", ["fe80::1%eth0"], "ADDRESS: found 'fe80::1%eth0'"),
        ("Ca", ADDRESSES, "NAME: found 'Ca'"),
        ("x" * 300, ADDRESSES, "NAME: found 'xxx.*; expected at most 64 letters"),
    ],
)
def test_what_is_no_name(name: str, addresses: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        issue(tmp_path, name, addresses)
    assert list(tmp_path.iterdir()) == []


def test_half_an_authority_signs_nothing(tmp_path: Path) -> None:
    issue(tmp_path, "head", ADDRESSES)
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FolderError, match=r"ca\.crt: found it without ca\.key"):
        issue(tmp_path, "ward", ADDRESSES)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "ca.key").write_bytes(key)
    with pytest.raises(FolderError, match=r"ca\.key: found it without ca\.crt.*or delete ca\.key for a new authority"):
        issue(tmp_path / "key", "ward", ADDRESSES)
    issue(tmp_path / "other", "head", ADDRESSES)
    (tmp_path / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(FolderError, match=r"ca\.key: found another key than that of ca\.crt"):
        issue(tmp_path, "ward", ADDRESSES)
    (tmp_path / "ca.key").write_bytes(key[:40])
    with pytest.raises(FolderError, match=r"found ca\.crt or ca\.key that is no PEM"):
        issue(tmp_path, "ward", ADDRESSES)
    assert not (tmp_path / "ward.crt").exists()


def test_what_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    _, key = issue(tmp_path, "head", ADDRESSES)
    before = key.read_bytes()
    (tmp_path / "head.crt").unlink()
    (tmp_path / "head.crt").mkdir()
    with pytest.raises(FolderError, match=r"head\.crt: found a folder; expected a file"):
        issue(tmp_path, "head", ADDRESSES, renew=True)
    assert key.read_bytes() == before
    with pytest.raises(FolderError, match="found a file; expected a folder"):
        issue(key, "head", ADDRESSES)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderError, match="link: found a file; expected a folder"):
        issue(tmp_path / "link", "head", ADDRESSES)
    with pytest.raises(FolderError, match=r"File name too long\); expected a folder"):
        issue(tmp_path / ("x" * 300), "head", ADDRESSES)
    (tmp_path / "other" / "ca.crt").mkdir(parents=True)
    with pytest.raises(FolderError, match=r"ca\.crt: found a folder; expected a file"):
        issue(tmp_path / "other", "head", ADDRESSES)


@pytest.mark.parametrize("renewed", [True, False])
def test_a_certificate_without_a_place_leaves_the_old_key(renewed: bool, tmp_path: Path) -> None:
    """A folder in its place stands for a disk that takes the key's new name and not the certificate's."""
    signed, secret = made(tmp_path / "made", ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), True)
    (tmp_path / "head.crt").mkdir()
    if renewed:
        (tmp_path / "head.key").write_bytes(b"the old one")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="directory"):
        _write_pair(tmp_path / "head.crt", signed, tmp_path / "head.key", secret)
    assert sorted(tmp_path.iterdir()) == before
    assert not renewed or (tmp_path / "head.key").read_bytes() == b"the old one"


def made(folder: Path, key: Any, begins: datetime, signs: bool) -> tuple[x509.Certificate, Any]:
    """An authority of 30 days that somebody else has made."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "elsewhere")])
    built = x509.CertificateBuilder(name, name, key.public_key(), 7, begins, begins + timedelta(days=30))
    signed = built.add_extension(x509.BasicConstraints(signs, None), True).sign(key, hashes.SHA256())
    folder.mkdir()
    (folder / "ca.crt").write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / "ca.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return signed, key


@pytest.mark.parametrize(
    ("begins", "signs", "said"),
    [
        (
            timedelta(days=-31),
            True,
            r"ca\.crt: found one that ran out on 20\d\d-\d\d-\d\d; expected a valid one. Name another folder",
        ),
        (timedelta(days=1), True, r"ca\.crt: found one that begins on 20\d\d-\d\d-\d\d; expected one that is valid today"),
        (timedelta(0), False, r"ca\.crt: found the certificate of a machine; expected that of an authority"),
    ],
)
def test_who_cannot_sign_today_signs_nothing(begins: timedelta, signs: bool, said: str, tmp_path: Path) -> None:
    made(tmp_path / "tls", ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC) + begins, signs)
    with pytest.raises(FolderError, match=said):
        issue(tmp_path / "tls", "head", ADDRESSES)
    assert {file.name for file in (tmp_path / "tls").iterdir()} == {"ca.crt", "ca.key"}


def test_an_authority_from_elsewhere_signs_until_its_end(tmp_path: Path) -> None:
    authority, _ = made(tmp_path / "tls", ec.generate_private_key(ec.SECP384R1()), datetime.now(UTC), True)
    certificate, _ = issue(tmp_path / "tls", "head", ADDRESSES)
    assert x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc == authority.not_valid_after_utc


def test_an_rsa_authority_is_called_one(tmp_path: Path) -> None:
    made(tmp_path / "tls", rsa.generate_private_key(65537, 2048), datetime.now(UTC), True)
    with pytest.raises(FolderError, match=r"ca\.key: found an RSA key; expected one of an elliptic curve"):
        issue(tmp_path / "tls", "head", ADDRESSES)


def test_a_key_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    _, key = made(tmp_path / "tls", ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), True)
    file = tmp_path / "tls" / "ca.key"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(FolderError, match=r"ca\.key: found one with a password; expected one without"):
        issue(tmp_path / "tls", "head", ADDRESSES)
    brainpool = (  # a curve that the library does not know
        "MHwCAQAwFAYHKoZIzj0CAQYJKyQDAwIIAQEFBGEwXwIBAQQcMyy9mIbYZ21/Cgek+u7VCstDjMHwuFf8BY5+Z6E8AzoA"
        "BDyBcukYvmA0wnOaVHLJWP06kbei+/3HuU56RbDN8eXPwETmbj7qzjrRMb9yI1A3crak7BkMb0h1"
    )
    file.write_text(f"-----BEGIN PRIVATE KEY-----\n{brainpool}\n-----END PRIVATE KEY-----\n")
    with pytest.raises(FolderError, match=r"found ca\.crt or ca\.key that is no PEM, or of an unknown kind"):
        issue(tmp_path / "tls", "head", ADDRESSES)


def test_a_machine_is_no_authority_and_none_outlives_its_own(tmp_path: Path) -> None:
    certificate, key = issue(tmp_path, "head", ADDRESSES, days=3650)
    (authority,) = (x509.load_pem_x509_certificate(file.read_bytes()) for file in [tmp_path / "ca.crt"])
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    assert found.not_valid_after_utc <= authority.not_valid_after_utc
    other = tmp_path / "other"
    other.mkdir()
    (other / "ca.crt").write_bytes(certificate.read_bytes())
    (other / "ca.key").write_bytes(key.read_bytes())
    with pytest.raises(FolderError, match=r"ca\.crt: found the certificate of a machine; expected that of an authority"):
        issue(other, "ward", ADDRESSES)


def test_by_the_front_door(tmp_path: Path) -> None:
    made = fedmerge(tmp_path, "certificate", "tls", "head", "127.0.0.1")
    assert (made.returncode, made.stdout.split(), made.stderr) == (0, ["tls/head.crt", "tls/head.key"], "")
    again = fedmerge(tmp_path, "certificate", "tls", "head", "127.0.0.1")
    assert again.returncode == 2
    assert "--renew" in again.stderr
    assert "Traceback" not in again.stderr
