"""Predictions where samples of a batch have coefficients of their own, by one of two exact ways.

mixture: one pass with mixed parameters (per_sample/mixture.py). rows: one merge and one forward for each distinct row of
coefficients; `samples` is an older name of it. They agree to rounding, and `auto` takes one by shapes alone, so that the same
batch gives the same bits on every machine: see `prefers_mixture`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedmerge.errors import PerSampleRefused
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import Add, weighted_sum
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.per_sample.merged_first import MERGE, can_merge_first
from fedmerge.merging.per_sample.mixture import Mixture, alike, merged_once

Way = Literal["auto", "mixture", "rows", "samples"]

EQUAL = {"cpu": 20.0, "cuda": 500.0}
"""Multiplications of a mixture, for each weight that merges by rows move, at which both took the same time: see below."""


def prefers_mixture(
    uses: float, experts: int, samples: int, distinct: int, device: str = "cpu", merges_layers: bool | None = None
) -> bool:
    """Whether the mixture is expected to be the faster way.

    For each of the model's P parameters the mixture multiplies N T (K - 1) times more than plain forwards do, or, where it merges
    a layer's weights first, as long as N 5 (K + 1) multiplications (`merged_first`). Merges of D distinct rows read and write
    D (K + 1) weights, which the mixture does not. It is taken where

        N min(T (K - 1), 5 (K + 1)) / (D (K + 1)) < 20.

    On a GPU no layer is merged first, and the bound is 500. Milliseconds of (mixture, rows) on an H200, bfloat16, K = 3, N = 32
    (benchmarks/gpu.py --parts ways; the rows of networks with BatchNorm take less since then):

        ViT-Tiny, 224 px            T = 227  D = 32: (7, 34)     D = 8: (7, 10)     D = 2: (7, 3)
        ViT-B/32, 224 px            T = 50   D = 32: (8, 95)     D = 8: (8, 25)     D = 2: (8, 7)
        ViT-B/16, 224 px            T = 204  D = 32: (21, 93)    D = 8: (21, 23)    D = 2: (20, 9)
        ConvNeXt-Tiny, 224 px       T = 160  D = 32: (19, 62)    D = 8: (19, 17)    D = 2: (19, 7)
        ResNet-18, 96 px            T = 30   D = 32: (17, 405)   D = 8: (18, 124)   D = 2: (19, 34)
        ResNet-50, 224 px           T = 174  D = 32: (41, 1183)  D = 8: (56, 330)   D = 2: (58, 84)
        EfficientNet-Lite0, 96 px   T = 21   D = 32: (29, 1059)  D = 8: (40, 224)   D = 2: (40, 69)

    For a CPU it was measured in November 2026, on one core that others used too. CPU milliseconds of (mixture, rows), N = 32, the
    better of two:

        shipped ViT, 32 px          T = 17   K = 2   D = 32: (25, 110)      D = 8: (26, 39)      D = 4: (25, 24)
        shipped ViT, 32 px          T = 17   K = 8   D = 32: (34, 148)      D = 8: (36, 49)      D = 4: (34, 30)
        EfficientNet-Lite0, 96 px   T = 21   K = 2   D = 32: (405, 861)     D = 8: (432, 399)    D = 4: (405, 342)
        EfficientNet-Lite0, 96 px   T = 21   K = 8   D = 32: (554, 1230)    D = 8: (473, 557)    D = 4: (554, 369)
        ResNet-18, 96 px            T = 30   K = 2   D = 32: (493, 1386)    D = 8: (517, 489)    D = 4: (493, 373)
        ResNet-18, 96 px            T = 30   K = 8   D = 32: (1135, 1890)   D = 8: (943, 600)    D = 4: (1135, 423)
        ConvNeXt-Atto, 96 px        T = 30   K = 2   D = 32: (227, 544)     D = 8: (223, 253)    D = 4: (227, 203)
        ConvNeXt-Atto, 96 px        T = 30   K = 8   D = 32: (330, 797)     D = 8: (338, 325)    D = 4: (330, 227)

    Both took the same time around D = 8, of ResNet-18 with K = 8 around D = 20; the rule changes at D = 8.

    Parameters
    ----------
    uses : float
        T, how often one sample's forward multiplies by a parameter, on average: tokens of a ViT, pixels of convolutions.
    experts : int
        K, rows of the bank with a coefficient in the batch.
    samples : int
        N, samples of the batch.
    distinct : int
        D, distinct rows of coefficients among them.
    device : str
        Kind of device, as torch names it.
    merges_layers : bool, optional
        Whether the mixture may merge a layer's weights first; default: on a CPU, where weights are float32 or wider.

    Returns
    -------
    bool
        True for the mixture, False for rows.

    Examples
    --------
    >>> from fedmerge.merging.per_sample.dispatch import prefers_mixture
    >>> prefers_mixture(uses=17, experts=2, samples=32, distinct=32)
    True
    >>> prefers_mixture(uses=17, experts=2, samples=32, distinct=4)
    False
    """
    more = uses * (experts - 1)
    if device == "cpu" if merges_layers is None else merges_layers:
        more = min(more, MERGE * (experts + 1))
    return samples * more < EQUAL.get(device, EQUAL["cpu"]) * distinct * (experts + 1)


@dataclass(frozen=True)
class PerSampleLogits:
    """Logits of a batch whose samples have models of their own, how they were found, and what it took.

    Attributes
    ----------
    logits : Tensor
        (N, C).
    way : str
        Rows, mixture or samples.
    forwards : int
        Of a batch through one model.
    merges : int
        Of the whole model.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.dispatch import PerSampleLogits
    >>> found = PerSampleLogits(logits=torch.zeros(4, 2), way="rows", forwards=1, merges=3)
    >>> found.way, found.merges
    ('rows', 3)
    """

    logits: Tensor
    way: str
    forwards: int
    merges: int


@dataclass
class PerSample:
    """How one bank predicts samples with coefficients of their own.

    Attributes
    ----------
    bank : Bank
        The experts.
    way : Way, default 'auto'
        Auto, or the one way that is taken.
    taken : dict[str, int], optional
        Batches by way.
    refusal : str, default ''
        Why the mixture cannot be used, or nothing.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.per_sample.dispatch import PerSample
    >>> from fedmerge.merging.coefficients import Coefficients
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> alpha = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # of two images
    >>> found = PerSample(bank, way="rows").predict(torch.ones(2, 1), Coefficients(alpha, alpha))
    >>> found.logits, found.merges
    (tensor([[ 2., -2.],
            [ 1.,  1.]]), 2)
    """

    bank: Bank
    way: Way = "auto"
    taken: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    _checked: bool = False
    _uses: float | None = None

    @cached_property
    def joined(self) -> PerSample:
        """The same with theta_0 as one more expert."""
        return PerSample(self.bank.joined, self.way, self.taken)

    def predict(self, batch: Tensor, coefficients: Coefficients, add: Add = weighted_sum) -> PerSampleLogits:
        """Logits of a batch (N, channels, H, W) under coefficients (N, K) or (N, K + A). add: as in `Bank.mix`.

        Raises PerSampleRefused if the mixture is asked for and the model cannot be run so.
        """
        both = torch.cat([coefficients.encoder, coefficients.head], 1)
        distinct, which = torch.unique(both, dim=0, return_inverse=True)
        mixed = len(distinct) > 1 and self._mixed(batch, coefficients, len(distinct))
        way = "mixture" if mixed else "rows"
        self.taken[way] = self.taken.get(way, 0) + 1
        if mixed:
            used = _taking_part(coefficients.encoder, coefficients.encoder)
            return PerSampleLogits(Mixture(self.bank).forward(batch, coefficients.encoder, coefficients.head, add), way, used, 0)
        return PerSampleLogits(self._by_groups(batch, distinct, which, add), way, 1, len(distinct))

    def _by_groups(self, batch: Tensor, rows: Tensor, which: Tensor, add: Add) -> Tensor:
        width, logits = rows.shape[1] // 2, None
        encoder, head = rows[:, :width], rows[:, width:]
        left, once = merged_once(self.bank, encoder, head, add) if len(rows) > 1 else (torch.ones_like(encoder[0]), None)
        for number, row in enumerate(rows):
            here = (which == number).to(batch.device)
            theta = self.bank.mix(row[:width] * left, row[width:] * left)
            theta = theta if once is None else theta.add_(once)
            part = self.bank.forward(theta, batch[here], row[:width])
            logits = part.new_empty(len(batch), part.shape[1]) if logits is None else logits
            logits[here] = part
        assert logits is not None
        return logits

    def _mixed(self, batch: Tensor, coefficients: Coefficients, distinct: int) -> bool:
        """Whether to take the mixture, as asked for or by shapes; never where `auto` has found that it cannot be used."""
        if self.way == "mixture":
            self._check(batch, coefficients)
            return True
        if self.way != "auto" or self.refusal:
            return False
        experts = _taking_part(coefficients.encoder, coefficients.head)
        device, like = batch.device.type, self.bank.like
        if not prefers_mixture(self._uses_of(batch), experts, len(batch), distinct, device, can_merge_first(like)):
            return False
        try:
            self._check(batch, coefficients)
        except PerSampleRefused as refusal:
            self.refusal = str(refusal)
        return not self.refusal

    def _check(self, batch: Tensor, coefficients: Coefficients) -> None:
        """Once: the mixture must agree with explicit merges, on real samples."""
        if not self._checked:
            Mixture(self.bank).verify(batch, coefficients.encoder, coefficients.head)
            self._checked = True

    def _uses_of(self, batch: Tensor) -> float:
        """T, counted once in a forward of one sample."""
        if self._uses is None:
            with torch.no_grad(), self.bank.recorded.off(), FlopCounterMode(display=False) as counter:
                self.bank.forward(torch.zeros_like(self.bank.blank()), batch[:1])
            self._uses = counter.get_total_flops() / (2 * self.bank.P)
        return self._uses


def _taking_part(encoder: Tensor, head: Tensor) -> int:
    """Models that a mixture is a sum of: rows that are alike in all samples are merged, and are one."""
    return int((encoder.any(0) | head.any(0)).sum()) - max(0, int(alike(encoder, head).sum()) - 1)
