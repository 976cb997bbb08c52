"""Whether the head of a cluster speaks TLS as this process does: where they differ, Ray waits, and then ends the process.

Ray reads RAY_USE_TLS, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT. Both ends show a certificate.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmerge.errors import Problem

SWITCH = "RAY_USE_TLS"
FILES = {
    "RAY_TLS_SERVER_CERT": "this machine's certificate",
    "RAY_TLS_SERVER_KEY": "its private key",
    "RAY_TLS_CA_CERT": "the authority's certificate",
}
ANSWER_S = 5.0
"""Longest wait for a head's answer, seconds."""

NO_TLS = "WRONG_VERSION_NUMBER"
"""What gRPC says of an answer that is not TLS."""

DOUBTED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification")
"""What gRPC says of a certificate that it does not believe."""

LOCAL = ("localhost", "127.0.0.1", "::1")
MAKE = "'fedmerge certificate' makes them"


def disagreements(host: str, port: int) -> list[Problem]:
    """What this process and the head do not agree about: one of them is without TLS, or certificates do not fit.

    A head that says nothing, or is gone again, is left to Ray.
    """
    if switched_on() and (problems := list(_unusable_files())):
        return problems
    said = _refusal(host, port)
    if not said or "Connection refused" in said:
        return []
    return [_encrypted(said, host, f"{host}:{port}") if switched_on() else _plain(f"{host}:{port}")]


def switched_on() -> bool:
    """Whether Ray uses TLS in this process."""
    return os.environ.get(SWITCH, "0").lower() in ("1", "true")


def _refusal(host: str, port: int) -> str:
    """Why gRPC cannot speak with the head, in its own words; nothing if it can, or if the head says nothing."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would print what we tell
    import grpc  # type: ignore[import-untyped]

    with _channel(grpc, host, port) as channel:
        try:
            channel.unary_unary("/fedmerge/hello")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:  # a head that can be spoken with says that it has no such method
            return str(error.details()) if error.code() is grpc.StatusCode.UNAVAILABLE else ""
    return ""


def _channel(grpc: Any, host: str, port: int) -> Any:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if not switched_on():
        return grpc.insecure_channel(address, options)
    certificate, key, authority = (Path(os.environ[name]).read_bytes() for name in FILES)
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", _as_ray_asks(host))])


def _plain(address: str) -> Problem:
    expected = f"{SWITCH}=1 with {', '.join(FILES)}, as at every node"
    return Problem("RAY_ADDRESS", "", f"'{address}', a head that speaks TLS or is no Ray", expected)


def _encrypted(said: str, host: str, address: str) -> Problem:
    certificate, _, authority = (os.environ[name] for name in FILES)
    if NO_TLS in said:
        return Problem(SWITCH, "", f"1, but the head at {address} is without TLS", f"a head with TLS, or no {SWITCH}")
    why = said.rpartition(f"{address.rpartition(':')[2]}: ")[2].removesuffix(": OK").rstrip(".")  # without the address
    why = why.rpartition("OPENSSL_internal:")[2]
    if any(words in said for words in DOUBTED):
        expected = f"one for {_as_ray_asks(host)}, by the authority of RAY_TLS_CA_CERT ({authority})"
        return Problem("RAY_ADDRESS", "", f"'{address}', whose certificate does not fit ({why})", expected)
    expected = f"one by the authority that the head at {address} trusts"
    return Problem("RAY_TLS_SERVER_CERT", "", f"'{certificate}', which the head does not take ({why})", expected)


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
