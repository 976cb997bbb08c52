"""A cluster with TLS and one without, and commands that do not speak as it does: one message each, before Ray waits."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key

from fedmerge.adaptation.ray.tls_check import disagreements
from fedmerge.federated.security.certificates import issue


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


def said(host: str, port: int) -> str:
    return "\n".join(map(str, disagreements(host, port)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_who_speaks_alike_gets_on(host: str, plain: int, encrypted: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    assert disagreements(host, plain) == []
    both(monkeypatch, tls / "ours" / "node.crt")
    assert disagreements(host, encrypted) == []


def test_a_command_without_tls(encrypted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    found = f"RAY_ADDRESS: found '127.0.0.1:{encrypted}', a head that speaks TLS or is no Ray; expected RAY_USE_TLS=1 with RAY_TLS"
    assert said("127.0.0.1", encrypted).startswith(found)


@pytest.mark.parametrize(
    ("server", "node", "authority", "words"),
    [
        ("plain", "ours", "ours", r"RAY_USE_TLS: found 1, but the head at 127\S* is without TLS"),
        ("encrypted", "other", "other", r"RAY_ADDRESS: .*whose certificate does not fit .*by the authority of RAY_TLS_CA_CERT"),
        ("misnamed", "ours", "ours", r"RAY_ADDRESS: .*certificate does not fit \(.*Hostname Verification.*expected one for"),
        ("encrypted", "other", "ours", r"RAY_TLS_SERVER_CERT: found '\S*node\.crt', which the head does not take"),
    ],
)
def test_who_does_not_is_told_why(
    server: str, node: str, authority: str, words: str, tls: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without TLS, one of another authority, one of another name, and one that does not take our certificate."""
    both(monkeypatch, tls / node / "node.crt", authority=tls / authority)
    (problem,) = disagreements("127.0.0.1", request.getfixturevalue(server))
    assert re.match(words, str(problem))


def test_files_that_are_not_there_or_do_not_belong_together(plain: int, tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, before anybody is asked."""
    monkeypatch.setenv("RAY_USE_TLS", "true")
    for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    assert len(disagreements("127.0.0.1", plain)) == 3
    assert "RAY_TLS_CA_CERT: found nothing; expected the file of the authority's certificate" in said("127.0.0.1", plain)
    speak(monkeypatch, tls / "ours" / "node.crt", tls / "other" / "node.key", tls / "nowhere")
    key, authority = disagreements("127.0.0.1", plain)
    assert "node.key', which is none or does not belong to the certificate" in str(key)
    assert "ca.crt', which cannot be read" in str(authority)


def test_a_head_that_breaks_off(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reset, as a proxy does that has nobody behind it."""

    def reset(server: socket.socket) -> None:
        line, _ = server.accept()
        line.recv(1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.close()

    both(monkeypatch, tls / "ours" / "node.crt")
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        for switch, words in (("1", "which the head does not take"), ("0", "speaks TLS or is no Ray")):
            monkeypatch.setenv("RAY_USE_TLS", switch)
            pool.submit(reset, server)
            assert words in said("127.0.0.1", server.getsockname()[1])


def test_a_key_with_a_password_asks_nobody(plain: int, tls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, tls / "ours" / "node.crt")
    key = load_pem_private_key((tls / "ours" / "node.key").read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "node.key").write_bytes(locked)
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(tmp_path / "node.key"))
    (problem,) = disagreements("127.0.0.1", plain)
    assert problem.where == "RAY_TLS_SERVER_KEY"
    assert problem.expected.startswith("its private key, PEM, without a password")


def test_a_head_that_says_nothing_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr("fedmerge.adaptation.ray.tls_check.ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert disagreements("127.0.0.1", silent.getsockname()[1]) == []
