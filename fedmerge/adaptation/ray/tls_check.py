"""Whether the head of a cluster speaks TLS as this process does: where they differ, Ray waits, and then ends the process.

Ray reads RAY_USE_TLS, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT. Both ends show a certificate.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedmerge.errors import Problem

SWITCH = "RAY_USE_TLS"
FILES = {
    "RAY_TLS_SERVER_CERT": "this machine's certificate",
    "RAY_TLS_SERVER_KEY": "its private key",
    "RAY_TLS_CA_CERT": "the authority's certificate",
}
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How a client of gRPC begins (RFC 9113, section 3.4): the preface and an empty SETTINGS frame."""

SETTINGS = 0x04
ANSWER_S = 5.0
"""Longest wait for a head's answer, seconds."""

NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
"""What OpenSSL says of an answer that is not TLS."""

LOCAL = ("localhost", "127.0.0.1", "::1")
MAKE = "'fedmerge certificate' makes them"


def disagreements(host: str, port: int) -> list[Problem]:
    """What this process and the head do not agree about: one of them is without TLS, or certificates do not fit.

    A head that says nothing, or is gone again, is left to Ray.
    """
    address = f"{host}:{port}"
    if switched_on() and (problems := list(_unusable_files())):
        return problems
    with suppress(TimeoutError, ConnectionRefusedError), socket.create_connection((host, port), ANSWER_S) as line:
        return list(_encrypted(line, host, address) if switched_on() else _plain(line, address))
    return []


def switched_on() -> bool:
    """Whether Ray uses TLS in this process."""
    return os.environ.get(SWITCH, "0").lower() in ("1", "true")


def _plain(line: socket.socket, address: str) -> Iterator[Problem]:
    try:
        line.sendall(GREETING)
        answer = line.recv(9)
    except ConnectionError:
        answer = b""
    if len(answer) < 4 or answer[3] != SETTINGS:
        expected = f"{SWITCH}=1 with {', '.join(FILES)}, as at every node"
        yield Problem("RAY_ADDRESS", "", f"'{address}', a head that speaks TLS or is no Ray", expected)


def _encrypted(line: socket.socket, host: str, address: str) -> Iterator[Problem]:
    certificate, key, authority = (os.environ[name] for name in FILES)
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(certificate, key)
    asked = _as_ray_asks(host)
    try:
        with context.wrap_socket(line, server_hostname=asked) as encrypted:
            encrypted.sendall(GREETING)
            refused = "" if encrypted.recv(9) else "it ended the connection"  # TLS 1.3 tells a client only now
    except ssl.SSLCertVerificationError as error:
        found = f"'{address}', whose certificate does not fit ({error.verify_message.rstrip('.')})"
        yield Problem("RAY_ADDRESS", "", found, f"one for {asked}, by the authority of RAY_TLS_CA_CERT ({authority})")
        return
    except ssl.SSLError as error:
        if error.reason in NO_TLS:
            yield Problem(SWITCH, "", f"1, but the head at {address} is without TLS", f"a head with TLS, or no {SWITCH}")
            return
        refused = error.reason or str(error)
    except ConnectionError:
        refused = "it ended the connection"
    if refused:
        expected = f"one by the authority that the head at {address} trusts"
        yield Problem("RAY_TLS_SERVER_CERT", "", f"'{certificate}', which the head does not take ({refused})", expected)


def _unusable_files() -> Iterator[Problem]:
    """Files that are not named, not there, or of another kind."""
    for name, what in FILES.items():
        file = os.environ.get(name, "")
        if not file:
            yield Problem(name, "", "nothing", f"the file of {what}, since {SWITCH} is on; {MAKE}")
        elif not os.access(file, os.R_OK) or not Path(file).is_file():
            yield Problem(name, "", f"'{file}', which cannot be read", f"the file of {what}; {MAKE}")
        elif not _fits(name, file):
            found = f"'{file}', which is none or does not belong to the certificate"
            yield Problem(name, "", found, f"{what}, PEM, without a password; {MAKE}")


def _fits(name: str, file: str) -> bool:
    """Whether OpenSSL takes it: an authority alone, a key with its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if name == "RAY_TLS_CA_CERT":
            context.load_verify_locations(file)
        elif name == "RAY_TLS_SERVER_KEY":
            # with a password of no letters OpenSSL does not ask for one at the terminal
            context.load_cert_chain(os.environ.get("RAY_TLS_SERVER_CERT", ""), file, password="")
    except OSError:  # ssl.SSLError is one
        return False
    return True


def _as_ray_asks(host: str) -> str:
    """The name that Ray compares the head's certificate with: in place of loopback it takes the machine's own address."""
    if host not in LOCAL:
        return host
    import ray

    return str(ray.util.get_node_ip_address())
