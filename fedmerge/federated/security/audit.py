"""What may leave a site: declared arrays and scalars, nothing else; every item goes into the audit with bytes and digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import UploadRefused
from fedmerge.merging.bank.layout import negative_variances

SCALARS = ("n", "validation_accuracy", "temperature")
RUN_SCALARS = ("lr", "weight_decay", "dropout", "validation_accuracy")
SCALAR_BYTES = 8
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that a site may declare."""

RANGES = {"n": (1, 1e9), "validation_accuracy": (0, 1), "temperature": (LOWEST, HIGHEST)}
"""What these numbers can be; every other is not negative."""

PREFIX = b"fedmerge upload\n"
"""Before the text that is signed, so that no signature of anything else can pass for one of an upload."""


@dataclass(frozen=True)
class Seal:
    """A site's statement as it was sent, letter by letter, and its signature as base64: empty where a site has no key."""

    text: str = ""
    signature: str = ""

    @property
    def signed_text(self) -> bytes:
        """What the signature is of."""
        return PREFIX + self.text.encode()


@dataclass(frozen=True)
class Upload:
    """What a site sends: one expert's whole state, a few numbers, and sample images if its site file grants them.

    statistics: what the scenario's `uploads` ask for, by kind. An upload of statistics alone has no weights and no scalars.
    classes: of the site's images, in the order of their labels. seal: what the site says of all this.
    """

    site: str
    weights: dict[str, Tensor]
    scalars: dict[str, float]
    samples: Tensor | None = None
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    seal: Seal = Seal()

    @cached_property
    def sha256(self) -> str:
        """The digest of the weights, computed once in each process: it is not pickled, for nobody's word is taken for it."""
        return state_digest(self.weights)

    @cached_property
    def statistics_sha256(self) -> dict[str, str]:
        """The digest of every statistic, by kind, computed once as that of the weights."""
        return {kind: state_digest(state) for kind, state in self.statistics.items()}

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        tensors = [tensor for state in (self.weights, *self.statistics.values()) for tensor in state.values()]
        tensors += [] if self.samples is None else [self.samples]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Item:
    """One line of the audit. reason: why it was refused. round: of which strategy it was sent in which round."""

    site: str
    item: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str
    direction: str = "up"
    verdict: str = "admitted"
    reason: str = ""
    round: str = ""

    def as_line(self) -> dict[str, Any]:
        """Its keys and values; no reason and no round where there is none."""
        return {key: value for key, value in asdict(self).items() if key not in ("reason", "round") or value}


@dataclass(frozen=True)
class DeclaredStatistic:
    """Arrays of one kind of statistic, float32, by name and shape. refuses: says why one cannot be right, or nothing."""

    shapes: dict[str, tuple[int, ...]]
    refuses: Callable[[str, Tensor], str]


@dataclass(frozen=True)
class Declaration:
    """What a site may send: arrays by name, shape and dtype, scalars by name, sample images by number, statistics by kind."""

    site: str
    arrays: dict[str, tuple[tuple[int, ...], torch.dtype]]
    scalars: frozenset[str]
    samples: int = 0
    image_shape: tuple[int, ...] = field(default=())
    statistics: dict[str, DeclaredStatistic] = field(default_factory=dict)

    @staticmethod
    def of(site: str, state: Mapping[str, Tensor], runs: int, samples: int, image_shape: tuple[int, ...]) -> Declaration:
        """The declaration of one trained expert: the layout of theta_0, the site's numbers, and one row for each run."""
        rows = {f"runs.{run}.{name}" for run in range(runs) for name in RUN_SCALARS}
        arrays = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return Declaration(site, arrays, frozenset({*SCALARS, *rows}), samples, image_shape)


def inspect(upload: Upload, declaration: Declaration) -> list[Item]:
    """Every item of an upload as a line of the audit. Raises UploadRefused at the first that was not declared so."""
    site = declaration.site
    _same(site, "site", upload.site, site)
    _same(site, "arrays", sorted(upload.weights), sorted(declaration.arrays))
    _same(site, "scalars", sorted(upload.scalars), sorted(declaration.scalars))
    items = [_array(site, name, upload.weights[name], *declaration.arrays[name]) for name in declaration.arrays]
    items += [_scalar(site, name, upload.scalars[name]) for name in sorted(upload.scalars)]
    if upload.samples is not None or declaration.samples:
        shown = upload.samples if upload.samples is not None else torch.empty(0)
        if not 0 < len(shown) <= declaration.samples:
            granted = f"1 to {declaration.samples}" if declaration.samples else "none, which is what its file grants"
            raise UploadRefused(f"site '{site}': number of sample images: found {len(shown)}; expected {granted}")
        items.append(_array(site, "samples", shown, (len(shown), *declaration.image_shape), torch.uint8, "samples"))
    _same(site, "statistics", sorted(upload.statistics), sorted(declaration.statistics))
    for kind, declared in declaration.statistics.items():
        items += _statistic(site, kind, upload.statistics[kind], declared)
    return items


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in memory order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def scalar_digest(value: float) -> str:
    """sha256 of a number's eight bytes."""
    return digest(torch.tensor(float(value), dtype=torch.float64))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over the names, shapes, dtypes and bytes of a state dict, in order of names."""
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}\n".encode())
        whole.update(_bytes(state[name]))
    return whole.hexdigest()


def audit_shown(site: str, images: Tensor, places: Sequence[int], granted: int, shape: tuple[int, ...]) -> Item:
    """Images of a target that methods disagree on. Raises UploadRefused for any but those that were asked for and are granted."""
    if len(places) > granted:
        raise UploadRefused(
            f"site '{site}': disagreements: found {len(places)} images; expected at most {granted}, as its file grants"
        )
    return _array(site, "disagreements", images, (len(places), *shape), torch.uint8, "samples")


def write_audit(path: Path, items: list[Item]) -> None:
    """Append one line for each item."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"time": now, **item.as_line()}) + "\n" for item in items)


def _array(site: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, kind: str = "weights") -> Item:
    _same(site, f"shape of {name}", tuple(tensor.shape), shape)
    _same(site, f"dtype of {name}", tensor.dtype, dtype)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UploadRefused(f"site '{site}': {name}: found NaN or infinity; expected finite numbers")
    if kind == "weights" and negative_variances({name: tensor}):
        raise UploadRefused(f"site '{site}': {name}: found a negative variance; expected 0 or more")
    size = tensor.numel() * tensor.element_size()
    return Item(site, name, kind, shape, str(dtype).removeprefix("torch."), size, digest(tensor))


def _statistic(site: str, kind: str, found: Mapping[str, Tensor], declared: DeclaredStatistic) -> list[Item]:
    _same(site, kind, sorted(found), sorted(declared.shapes))
    items = [_array(site, f"{kind}.{name}", found[name], shape, torch.float32, kind) for name, shape in declared.shapes.items()]
    for name in declared.shapes:
        if wrong := declared.refuses(name, found[name]):
            raise UploadRefused(f"site '{site}': {kind}.{name}: {wrong}")
    return items


def _scalar(site: str, name: str, value: float) -> Item:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UploadRefused(f"site '{site}': scalar {name}: found {value!r}; expected a finite number")
    low, high = RANGES.get(name.rpartition(".")[2], (0, math.inf))
    if not low <= value <= high:
        raise UploadRefused(f"site '{site}': scalar {name}: found {value:g}; expected {low:g} to {high:g}")
    return Item(site, name, "scalar", (), "float64", SCALAR_BYTES, scalar_digest(value))


def _same(site: str, what: str, found: object, expected: object) -> None:
    if found == expected:
        return
    if isinstance(found, list) and isinstance(expected, list):
        extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
        raise UploadRefused(f"site '{site}': {what}: found undeclared {extra or 'none'}; missing {missing or 'none'}")
    raise UploadRefused(f"site '{site}': {what}: found {found}; expected {expected}")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
