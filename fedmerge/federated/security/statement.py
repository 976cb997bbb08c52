"""What a site says of its upload: what it was asked, and what it sent. This text is what a site signs, and nothing else is."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ValidationError

from fedmerge.errors import UploadRefused
from fedmerge.federated.security.audit import Seal, Upload, state_digest
from fedmerge.registry import Spec

LONGEST = 1 << 20
"""Bytes of a statement's text."""

WORDS = {
    "site": "site",
    "what": "request",
    "layers": "layers",
    "task": "task",
    "initial": "initialization",
    "classes": "classes",
    "size": "bytes",
    "weights": "digest of the weights",
    "scalars": "numbers",
    "samples": "digest of the sample images",
    "statistics": "digests of the statistics",
}


class Statement(Spec):
    """Asked: what, layers, task (a fingerprint), initial (sha256 of the weights that the site was sent), classes in order.

    Sent: size (bytes of all arrays), weights and samples (sha256, or empty), scalars, statistics (sha256 by kind).
    """

    fedmerge: Literal[1] = 1
    site: str
    what: str
    layers: tuple[str, ...]
    task: str
    initial: str
    classes: tuple[str, ...]
    size: int
    weights: str
    scalars: dict[str, float]
    samples: str
    statistics: dict[str, str]

    def text(self) -> str:
        """Canonical: the same statement is the same text."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def differences(self, facts: dict[str, Any]) -> list[str]:
        """The names of the facts that the statement puts otherwise, in their order."""
        return [name for name, fact in facts.items() if getattr(self, name) != fact]


def contents(upload: Upload) -> dict[str, Any]:
    """The part of a statement that follows from what was sent."""
    return {
        "size": upload.size,
        "weights": upload.sha256 if upload.weights else "",
        "scalars": dict(upload.scalars),
        "samples": state_digest({"samples": upload.samples}) if upload.samples is not None else "",
        "statistics": upload.statistics_sha256,
    }


def parsed(seal: Seal, site: str) -> Statement:
    """The statement of a seal. Raises UploadRefused if its text is none."""
    try:
        if len(seal.text) > LONGEST:
            raise ValueError(f"{len(seal.text)} characters")
        return Statement.model_validate_json(seal.text)
    except ValidationError as error:
        first = error.errors()[0]
        found = ": ".join([*map(str, first["loc"]), first["msg"]])[:200]
    except ValueError as error:
        found = str(error)
    raise UploadRefused(f"site '{site}': statement: found none that can be read ({found}); expected one of fedmerge")


def shown(value: Any) -> str:
    """A fact in a message: digests by their beginning, long lists shortened."""
    if isinstance(value, tuple | list):
        value = ", ".join(str(item) for item in value)
    text = str(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:16]
    return (text if len(text) <= 120 else text[:117] + "...") or "nothing"
