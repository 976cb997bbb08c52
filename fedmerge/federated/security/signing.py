"""Site keys, Ed25519 (RFC 8032): a hospital signs with a private key that only it can read; everybody can check with its site file.

The private key is one PEM file, `<folder>/<site>.pem`, mode 0600. The folder is `keys/`, or what FEDMERGE_KEYS names.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.errors import FolderError, SiteError
from fedmerge.federated.site import Site, public_bytes
from fedmerge.system.files import at_home, write_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

VARIABLE = "FEDMERGE_KEYS"


def keys_folder() -> Path:
    """Where this site's process keeps private keys."""
    return at_home(os.environ.get(VARIABLE) or "keys")


def key_file(site: str, folder: Path | None = None) -> Path:
    """The file of a site's private key, whether it exists or not."""
    return (folder or keys_folder()) / f"{site}.pem"


def make(file: Path, renew: bool) -> str:
    """A new private key in `file`, and its public key as base64. Raises FolderError rather than replace one, unless `renew`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if file.exists() and not renew:
        raise FolderError(f"{file}: found a private key; expected none. Give --renew to replace it: what it signed is void then")
    key = Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    try:
        write_secret(file, pem)
    except OSError as error:
        raise FolderError(
            f"{file}: found a place that cannot be written ({error.strerror}); expected one for a key. Choose another --keys"
        ) from None
    return _public(key)


def private_key(site: Site) -> Ed25519PrivateKey | None:
    """The key of a site whose file has a public key; None if it has none.

    Raises SiteError if the private key is missing, readable by others, no Ed25519 key, or not the one of the site file.
    """
    if site.public_key is None:
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    file, mend = key_file(site.name), f"make a new pair with 'fedmerge keys sites/{site.name}.yaml --renew'"
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        content = file.read_bytes()
    except OSError as error:
        where = f"let {VARIABLE} name the folder that has it, or {mend}"
        told = f"its file has a public key, but its private key cannot be read; {where}"
        full = f"its file has a public key, but the private key {file} cannot be read ({error.strerror}); {where}"
        raise SiteError(full, told) from None
    if os.name == "posix" and mode & 0o077:
        full = f"{file}: found a private key that others may read (mode {mode:o}); expected 600: chmod 600 {file}"
        raise SiteError(full, "its private key may be read by others; expected mode 600")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        wrong = f"found something else than an Ed25519 private key in PEM without password; {mend}"
        raise SiteError(f"{file}: {wrong}", f"its private key: {wrong}")
    if public_bytes(_public(key)) != public_bytes(site.public_key):
        wrong = f"found another key than 'public_key' in its site file says; give it the right one, or {mend}"
        raise SiteError(f"{file}: {wrong}", f"its private key: {wrong}")
    return key


def sign(key: Ed25519PrivateKey | None, text: bytes) -> str:
    """The signature as base64; nothing without a key."""
    return base64.b64encode(key.sign(text)).decode() if key else ""


def signed_by(public_key: str, text: bytes, signature: str) -> bool:
    """Whether `signature` is of exactly this text, by the private half of this key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_bytes(public_key)).verify(base64.b64decode(signature, validate=True), text)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _public(key: Ed25519PrivateKey) -> str:
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()
