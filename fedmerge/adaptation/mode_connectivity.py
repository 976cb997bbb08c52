"""Losses along lines between experts, on the target's images, in a process that owns them and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Arrays, Contribution, TargetTask
from fedmerge.data.images import to_batch
from fedmerge.merging.geometry.barrier import Part, barrier, between, line
from fedmerge.rng import generator
from fedmerge.system.process import owners

BATCH = 128


@dataclass(frozen=True)
class Landscape:
    """Between two experts on the target's images: cross-entropy (nats) and error along the line, from the second to the first.

    part: what moves along the line. images: how many were looked at.
    """

    pair: tuple[str, str]
    part: Part
    images: int
    at: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    error: tuple[float, ...]

    def as_row(self) -> dict[str, Any]:
        """A plain record with the barriers in both forms."""
        found: dict[str, Any] = asdict(self)
        for name in ("cross_entropy", "error"):
            losses = torch.tensor(getattr(self, name), dtype=torch.float64)
            found[f"{name}_barrier"] = float(barrier(losses))
            found[f"{name}_barrier_mean_form"] = float(barrier(losses, "mean"))
        return found


def landscapes(
    task: TargetTask, experts: Sequence[Contribution], base: Arrays, images: int, tick: Callable[[int, int], None]
) -> list[Landscape]:
    """For every pair of experts and every part, on at most `images` of the target's images. tick: pairs done, and of how many.

    Raises DataError or CheckpointError if images or experts cannot be used.
    """
    pairs = list(combinations(range(len(experts)), 2))
    found: list[Landscape] = []
    with owners(1, _open, (task, experts, base, images)) as owner:
        for done, pair in enumerate(pairs):
            tick(done, len(pairs))
            found += owner.submit(_of_pair, *pair).result()
    tick(len(pairs), len(pairs))
    return found


@dataclass
class _Held:
    """What the owner's process holds."""

    site: TargetSite
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


_held: list[_Held] = []


def _open(task: TargetTask, experts: Sequence[Contribution], base: Arrays, images: int) -> None:
    site = TargetSite(task, experts, base)
    rng = generator(task.seed, "landscape", task.site.name)
    chosen = np.sort(rng.permutation(len(site.images))[:images])
    _held[:] = [_Held(site, site.images.pixels[chosen], site.images.labels[chosen])]


def _of_pair(i: int, j: int) -> list[Landscape]:
    return [_along(_held[0], i, j, part) for part in get_args(Part)]


@torch.no_grad()
def _along(held: _Held, i: int, j: int, part: Part) -> Landscape:
    bank, losses, errors = held.site.bank, [], []
    for encoder, head in between(bank, i, j, part):
        theta, loss, wrong = bank.mix(encoder, head), 0.0, 0
        for start in range(0, len(held.labels), BATCH):
            x = to_batch(held.pixels[start : start + BATCH], *held.site.normalization).to(held.site.device)
            y = torch.from_numpy(held.labels[start : start + BATCH]).to(held.site.device)
            logits = bank.forward(theta, x, encoder).double()
            loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            wrong += int((logits.argmax(1) != y).sum())
        losses.append(loss / len(held.labels))
        errors.append(wrong / len(held.labels))
    at = tuple(line().tolist())
    return Landscape((bank.names[i], bank.names[j]), part, len(held.labels), at, tuple(losses), tuple(errors))
