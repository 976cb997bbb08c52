"""A key for a SuperNode, as `ssh-keygen -t ecdsa -b 384 -N '' -f node.key` makes it."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedmerge.system.files import write_secret


def node_key(file: Path) -> Path:
    """A SuperNode's private key in `file`, and beside it the public half for the coordinator, which is returned."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = file.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public
