"""What the experts say about one batch: computed once, when first asked for, and shared by all methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import MethodError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.scoring.divergence import entropy, log_probabilities
from fedmerge.merging.scoring.features import with_embedding
from fedmerge.merging.scoring.views import VIEWS, View, resolve


@dataclass
class Bill:
    """What one method asked for, and what it would have cost alone.

    Attributes
    ----------
    views : dict[str, set[int]], optional
        Views of the batch, and the experts that have seen each, by row.
    single : set[str], optional
        Other models by name, seen once.
    own : int, default 0
        Forwards of a batch that the method ran itself.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.evidence import Evidence
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), [{"weight": torch.ones(2, 1)}, {"weight": torch.zeros(2, 1)}])
    >>> evidence = Evidence(bank, torch.ones(3, 1))
    >>> with evidence.billed() as bill:
    ...     entropies = evidence.entropies()
    >>> bill.forwards  # one for each expert
    2
    """

    views: dict[str, set[int]] = field(default_factory=dict)
    single: set[str] = field(default_factory=set)
    own: int = 0

    @property
    def forwards(self) -> int:
        """Forwards of the batch through one model."""
        return sum(len(rows) for rows in self.views.values()) + len(self.single) + self.own


@dataclass(frozen=True)
class Answer:
    """The truth about a batch, for oracles alone.

    Attributes
    ----------
    labels : Tensor
        (N,) int64, from 0.
    domains : Tensor
        (N,) int64, from 0.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.evidence import Answer, Evidence
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), [{"weight": torch.ones(2, 1)}])
    >>> evidence = Evidence(bank, torch.ones(1, 1))
    >>> with evidence.opened(Answer(labels=torch.tensor([1]), domains=torch.tensor([0]))):
    ...     evidence.answer.labels
    tensor([1])
    """

    labels: Tensor
    domains: Tensor


class Evidence:
    """The experts' logits on a batch (N, channels, H, W) and on its augmented views.

    An expert whose logits are not all finite is not valid: its entropy counts as infinite, so that it gets no weight.

    Parameters
    ----------
    bank : Bank
        The experts.
    batch : Tensor
        Normalized images (N, channels, H, W), on the bank's device.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.evidence import Evidence
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> bank = Bank.of(model, [{"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2])])
    >>> evidence = Evidence(bank, torch.tensor([[1.0], [0.0]]))
    >>> evidence.logits.shape  # (K, N, C)
    torch.Size([2, 2, 2])
    >>> evidence.entropies()  # of each expert on each image, nats
    tensor([[0.0901, 0.6931],
            [0.6919, 0.6931]])
    >>> evidence.batch_entropies()
    tensor([0.3916, 0.6925])
    """

    def __init__(self, bank: Bank, batch: Tensor) -> None:
        self.bank, self.batch = bank, batch
        self._logits: dict[str, Tensor] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}
        self._rows: tuple[int, ...] | None = None
        self._single: dict[str, Tensor] = {}
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._embedding: dict[str, Tensor] = {}
        self._bill = Bill()
        self._own = 0
        self._answer: Answer | None = None

    @cached_property
    def joined(self) -> Evidence:
        """The same batch with theta_0 as one more expert, the last."""
        return Evidence(self.bank.joined, self.batch)

    def only(self, rows: Sequence[int]) -> Evidence:
        """What some of the experts say of the batch, by their rows, so that the others see nothing of it: K is their number.

        It is billed here, and what is known here is known there. Parameters are those of all experts: the bank stays.
        """
        some = copy.copy(self)
        some._rows = tuple(rows)
        return some

    @contextmanager
    def billed(self) -> Iterator[Bill]:
        """Note what is asked for inside the block, whether or not it had been computed before."""
        outer, self._bill = self._bill, Bill()
        try:
            yield self._bill
        finally:
            self._bill = outer

    @contextmanager
    def opened(self, answer: Answer) -> Iterator[None]:
        """Show the truth inside the block: for a method that declares that it needs labels, and is never ranked."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    @property
    def answer(self) -> Answer:
        """The truth. Raises PermissionError outside of `opened`."""
        if self._answer is None:
            raise PermissionError("labels are sealed: only an oracle, which declares that it needs them, may see them")
        return self._answer

    def recall(self, logits: Mapping[str, Tensor]) -> None:
        """Take logits (K, N, C) of views as known, from before: where one set of images is looked at in many orders."""
        self._logits.update(logits)

    def charge(self, forwards: int) -> None:
        """Note forwards that a method ran itself; a backward counts as two."""
        self._bill.own += forwards
        self._own += forwards

    @property
    def forwards_run(self) -> int:
        """Forwards through one model that were really run, whoever asked."""
        more = self.joined.forwards_run if "joined" in vars(self) else 0
        some = sum(len(rows) for rows in self._parts.values())
        return self.bank.K * len(self._logits) + some + len(self._single) + self._own + more

    @property
    def K(self) -> int:  # noqa: N802 - the number of experts is K everywhere
        """How many experts are asked."""
        return self.bank.K if self._rows is None else len(self._rows)

    @property
    def asked(self) -> list[int]:
        """Rows of the experts that are asked."""
        return [*(range(self.bank.K) if self._rows is None else self._rows)]

    @property
    def logits(self) -> Tensor:
        """Logits (K, N, C) of the batch as it is."""
        return self.view_logits("none")

    @property
    def valid(self) -> Tensor:
        """(K,) bool: all logits of the expert are finite."""
        return self._once("valid", self.logits, lambda logits: torch.isfinite(logits).flatten(1).all(1))

    @property
    def classes(self) -> int:
        """C."""
        return self.logits.shape[-1]

    def view_logits(self, view: View) -> Tensor:
        """Logits (K, N, C) of an augmented view of the batch. Raises MethodError if the batch is not one of images."""
        name, rows = resolve(view, self.bank.flips), self._rows
        if name != "none" and self.batch.ndim != 4:
            found = f"found shape {tuple(self.batch.shape)}; expected images (N, channels, H, W)"
            raise MethodError(f"batch: {found}. The method compares views of them ('{name}'); choose one without, such as dcs")
        self._bill.views.setdefault(name, set()).update(range(self.bank.K) if rows is None else rows)
        if rows is not None and name not in self._logits:
            return self._part(name, rows)
        if name not in self._logits:
            self._logits[name] = self.bank.expert_logits(VIEWS[name](self.batch))
        return self._logits[name] if rows is None else self._logits[name][list(rows)]

    def _part(self, name: str, rows: Sequence[int]) -> Tensor:
        known = self._parts.setdefault(name, {})
        if lacking := [row for row in rows if row not in known]:
            known.update(zip(lacking, self.bank.expert_logits(VIEWS[name](self.batch), lacking), strict=True))
        return torch.stack([known[row] for row in rows])

    def anchor_log_p(self, name: str) -> Tensor:
        """log p (N, C) of an anchor of the bank, or of "mean", the uniform mean of the valid experts' weights; uniform where its
        logits are not finite.

        Raises CheckpointError if the bank was made without that anchor.
        """
        self._bill.single.add(name)
        if name not in self._single:
            if name == "mean":
                valid = self.valid.double() if bool(self.valid.any()) else torch.ones(self.bank.K, dtype=torch.float64)
                uniform = valid.cpu() / valid.cpu().sum()
                self._single[name] = self.bank.forward(self._mean(uniform), self.batch, uniform)
            else:
                self._single[name] = self.bank.row_logits(self.bank.anchor(name), self.batch)
        return self._finite(self._single[name])

    def _mean(self, uniform: Tensor) -> Tensor:
        """The mean (P,); that of all experts is merged once, where there is room for it."""
        if not bool((uniform > 0).all()) or self.bank.shards or self.bank.mapped:
            return self.bank.mix(uniform)
        if "mean" not in self.bank.kept:
            self.bank.kept["mean"] = self.bank.mix(uniform, out=self.bank.blank())
        return self.bank.kept["mean"]

    def embedding(self) -> Tensor:
        """What theta_0's head is given of the batch, (N, D) float64. Raises CheckpointError without theta_0."""
        self._bill.single.add("theta_0")
        if not self._embedding:
            bank, row = self.bank, self.bank.anchor("theta_0")
            with bank.recorded.off():
                logits, features = with_embedding(bank.model, lambda: bank.row_logits(row, self.batch), bank.parts.head)
            self._single["theta_0"], self._embedding["theta_0"] = logits, features
        return self._embedding["theta_0"]

    def merged_log_p(self, name: str, merge: Callable[[Bank], Tensor]) -> Tensor:
        """log p (N, C) of a model that is merged once for these experts, and kept with the bank under this name; uniform where its
        logits are not finite."""
        self._bill.single.add(name)
        if name not in self._single:
            if name not in self.bank.kept:
                self.bank.kept[name] = merge(self.bank)
            self._single[name] = self.bank.forward(self.bank.kept[name], self.batch)
        return self._finite(self._single[name])

    def _once(self, key: str, given: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """rule(given), computed when first asked for."""
        if (key, self._rows) not in self._kept:
            self._kept[key, self._rows] = rule(given)
        return self._kept[key, self._rows]

    def foresee(self, before: Evidence) -> None:
        """Begin with what was asked of the batch before, all views in one pass: a GPU works on it while the CPU decides."""
        if before._logits:
            names = sorted(before._logits)
            logits = self.bank.expert_logits(torch.cat([VIEWS[name](self.batch) for name in names]))
            self._logits = dict(zip(names, logits.chunk(len(names), 1), strict=True))
        for name in before._single:
            if name in self.bank.kept:
                self._single[name] = self.bank.forward(self.bank.kept[name], self.batch)

    def _finite(self, logits: Tensor) -> Tensor:
        finite = torch.isfinite(logits).all(1, keepdim=True)
        return torch.where(finite, log_probabilities(logits), -math.log(logits.shape[-1]))

    def log_p(self, view: View = "none", calibrated: bool = False) -> Tensor:
        """log p_k (K, N, C); `calibrated` divides logits by each site's temperature T_k first."""
        temperatures = self.bank.temperatures[:, None, None] if calibrated else 1.0
        key = f"log p, {view}{', calibrated' if calibrated else ''}"
        return self._once(key, self.view_logits(view), lambda logits: log_probabilities(logits, temperatures))

    def scaled_log_p(self, scale: Tensor | None) -> Tensor:
        """log p_k (K, N, C) with each expert's logits divided by `scale` (K,) first; None for 1."""
        return self.log_p() if scale is None else log_probabilities(self.logits, scale.to(self.logits)[:, None, None])

    def entropies(self, calibrated: bool = False) -> Tensor:
        """H_k(x_i) (K, N) in [0, ln C] nats; infinite for an expert that is not valid."""
        h = entropy(self.log_p(calibrated=calibrated))
        return torch.where(self.valid[:, None], h, torch.inf)

    def batch_entropies(self, calibrated: bool = False) -> Tensor:
        """Hbar_k (K,) = (1/N) sum_i H_k(x_i): the mean of entropies, never the entropy of the mean prediction."""
        return self.entropies(calibrated).mean(1)

    def mixture(self, alpha: Tensor, scale: Tensor | None = None) -> Tensor:
        """log p (N, C) = log sum_k alpha_ik p_k(. | x_i): the experts' predictions, mixed by alpha (N, K) or (K,).

        Where not all experts have been asked of this batch, only those with a coefficient are. Logits are divided by `scale` (K,).
        """
        used = torch.nonzero(alpha.reshape(-1, self.K).any(0)).flatten().tolist()
        if self._rows is None and "none" not in self._logits and len(used) < self.K:
            return self.only(used).mixture(alpha[..., used], None if scale is None else scale[used])
        p = self.scaled_log_p(scale).double().cpu().exp()
        return torch.einsum("...k,k...c->...c", alpha.double().cpu().expand(p.shape[1], -1), p.nan_to_num()).log()
