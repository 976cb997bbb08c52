"""A cluster with TLS and one without, and commands that do not speak as it does: one message each, before Ray waits."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key

from fedmerge.certificates import issue
from fedmerge.errors import ScenarioError
from fedmerge.target.ray.encryption import see_to_encryption


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities: ours, with certificates of the head and of elsewhere, and another."""
    folder = tmp_path_factory.mktemp("tls")
    for authority in ("ours", "other"):
        issue(folder / authority, "node", ["127.0.0.1", ray.util.get_node_ip_address()])
    issue(folder / "ours", "elsewhere", ["10.0.0.7"])
    return folder


def head(certificate: Path | None) -> Iterator[int]:
    """A gRPC server, as Ray's head is one; with a certificate it asks for that of the client. Its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    if certificate:
        pair = (certificate.with_suffix(".key").read_bytes(), certificate.read_bytes())
        roots = certificate.with_name("ca.crt").read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], roots, require_client_auth=True))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.fixture(scope="module")
def plain() -> Iterator[int]:
    yield from head(None)


@pytest.fixture(scope="module")
def encrypted(tls: Path) -> Iterator[int]:
    yield from head(tls / "ours" / "node.crt")


@pytest.fixture(scope="module")
def misnamed(tls: Path) -> Iterator[int]:
    yield from head(tls / "ours" / "elsewhere.crt")


def speak(monkeypatch: pytest.MonkeyPatch, certificate: Path, key: Path, authority: Path) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(certificate))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(key))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(authority / "ca.crt"))


def both(monkeypatch: pytest.MonkeyPatch, node: Path, authority: Path | None = None) -> None:
    speak(monkeypatch, node, node.with_suffix(".key"), authority or node.parent)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_who_speaks_alike_gets_on(host: str, plain: int, encrypted: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    see_to_encryption(host, plain)
    both(monkeypatch, tls / "ours" / "node.crt")
    see_to_encryption(host, encrypted)


def test_a_command_without_tls(encrypted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ScenarioError, match=r"RAY_ADDRESS: found '127.*speaks TLS.*; expected RAY_USE_TLS=1 with RAY_TLS"):
        see_to_encryption("127.0.0.1", encrypted)


def test_a_head_without_tls(plain: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "ours" / "node.crt")
    with pytest.raises(ScenarioError, match=r"RAY_USE_TLS: found 1, but the head at 127.* is without TLS"):
        see_to_encryption("127.0.0.1", plain)


def test_a_head_of_another_authority(encrypted: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "other" / "node.crt")
    with pytest.raises(ScenarioError, match=r"RAY_ADDRESS.*certificate does not fit"):
        see_to_encryption("127.0.0.1", encrypted)


def test_a_head_of_another_name(misnamed: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "ours" / "node.crt")
    with pytest.raises(ScenarioError, match=r"RAY_ADDRESS.*certificate does not fit \(IP address mismatch.*expected one for"):
        see_to_encryption("127.0.0.1", misnamed)


def test_a_certificate_that_the_head_does_not_take(encrypted: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "other" / "node.crt", authority=tls / "ours")
    with pytest.raises(ScenarioError, match=r"RAY_TLS_SERVER_CERT: found '.*node\.crt', which the head does not take"):
        see_to_encryption("127.0.0.1", encrypted)


def test_files_that_are_not_there_or_do_not_belong_together(plain: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, before anybody is asked."""
    monkeypatch.setenv("RAY_USE_TLS", "true")
    for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ScenarioError, match="3 problems") as error:
        see_to_encryption("127.0.0.1", plain)
    assert "RAY_TLS_CA_CERT: found nothing; expected the file of the authority's certificate" in str(error.value)
    speak(monkeypatch, tls / "ours" / "node.crt", tls / "other" / "node.key", tls / "nowhere")
    with pytest.raises(ScenarioError, match="2 problems") as error:
        see_to_encryption("127.0.0.1", plain)
    assert "node.key', which is none or does not belong to the certificate" in str(error.value)
    assert "ca.crt', which cannot be read" in str(error.value)


def test_a_head_that_breaks_off(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reset, as a proxy does that has nobody behind it."""

    def reset(server: socket.socket) -> None:
        line, _ = server.accept()
        line.recv(1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.close()

    both(monkeypatch, tls / "ours" / "node.crt")
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        for switch, said in (("1", "which the head does not take"), ("0", "speaks TLS or is no Ray")):
            monkeypatch.setenv("RAY_USE_TLS", switch)
            pool.submit(reset, server)
            with pytest.raises(ScenarioError, match=said):
                see_to_encryption("127.0.0.1", server.getsockname()[1])


def test_a_key_with_a_password_asks_nobody(plain: int, tls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "ours" / "node.crt")
    key = load_pem_private_key((tls / "ours" / "node.key").read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "node.key").write_bytes(locked)
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(tmp_path / "node.key"))
    with pytest.raises(ScenarioError, match=r"RAY_TLS_SERVER_KEY: found .*; expected its private key, PEM, without a password"):
        see_to_encryption("127.0.0.1", plain)


def test_a_head_that_says_nothing_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr("fedmerge.target.ray.encryption.ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        see_to_encryption("127.0.0.1", silent.getsockname()[1])
