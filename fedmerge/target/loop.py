"""The target site: owns its images, consumes its stream batch by batch, and lets every method predict each batch.

The experts' logits are computed once per batch and shared; static methods merge once; labels reach no method.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.data.images import to_batch
from fedmerge.experts.backbone import build, normalisation
from fedmerge.merge.bank import Bank
from fedmerge.merge.entropy import entropy
from fedmerge.merge.evidence import Evidence
from fedmerge.merge.method import Adaptive, Coefficients, Method, Online, Output, State, Static
from fedmerge.report.step import Step
from fedmerge.stream.stream import Answers, Stream
from fedmerge.target.task import Arrays, Contribution, Description, RowInfo, TargetTask


@dataclass
class Row:
    """One row of the table: a method and what it keeps between batches."""

    method: Method
    state: State = field(default_factory=dict)
    theta: Tensor | None = None
    statistics: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Log-probabilities (N, C), the coefficients behind them if any, and forwards of merged models that they took."""

    log_p: Tensor
    coefficients: Coefficients | None = None
    forwards: int = 0


class TargetSite:
    """The target in this process. `advance` consumes the next batches; `answers` opens the labels when all is done.

    Raises DataError or CheckpointError if images or experts cannot be used.
    """

    def __init__(self, task: TargetTask, experts: Sequence[Contribution], base: Arrays) -> None:
        torch.set_num_threads(task.threads)
        self.task = task
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        raw = task.site.source.load(task.model.geometry, task.site.name, task.seed)
        self.images = task.site.scanner.scan(raw, task.site.name, task.seed)
        self.stream = Stream(self.images, task.schedule, task.site.name, task.seed)
        self.normalisation = normalisation(task.model)
        self.bank = Bank.of(
            build(task.model, len(task.classes), seed=task.seed),
            {expert.site: _tensors(expert.weights) for expert in experts},
            _tensors(base),
            counts=[expert.n for expert in experts],
            temperatures=[expert.temperature for expert in experts],
            flips=self.images.flips,
            device=self.device,
        )
        self.rows = self._rows()
        self.position = 0
        self.forwards_run = 0

    def describe(self) -> Description:
        """What a reader of the report may know of the stream and the methods."""
        shown = self.images.pixels[: self.task.site.samples] if self.task.site.samples else None
        return Description(
            kind=self.task.schedule.kind(),
            batches=len(self.stream),
            samples=self.stream.samples,
            unused=self.stream.unused,
            index_sha256=self.stream.index_sha256,
            truth=self.stream.truth,
            domain_names=self.images.domain_names,
            shown=shown,
            device=self.device,
            rows={key: self._info(row.method) for key, row in self.rows.items()},
        )

    @torch.no_grad()
    def advance(self, batches: int) -> list[Step]:
        """Every method's step on each of the next batches; empty when the stream is over."""
        steps: list[Step] = []
        for t in range(self.position, min(self.position + batches, len(self.stream))):
            x = to_batch(self.images.pixels[self.stream.batches[t]], *self.normalisation).to(self.device)
            evidence = Evidence.of(self.bank, x)
            steps += [self._step(t, key, row, evidence) for key, row in self.rows.items()]
            self.forwards_run += evidence.forwards_run
            self.position = t + 1
        return steps

    def forwards_so_far(self) -> int:
        """Forwards through one model that were really run."""
        return self.forwards_run

    def answers(self) -> Answers:
        """Labels and domains of the whole stream, for the report."""
        return self.stream.answers()

    def snapshot(self) -> dict[str, Any]:
        """The position and every method's state: numpy arrays and integers only."""
        states = {key: {name: value.cpu().numpy().copy() for name, value in row.state.items()} for key, row in self.rows.items()}
        return {"position": self.position, "forwards_run": self.forwards_run, "states": states}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot: the steps that follow are those of an undisturbed run."""
        self.position, self.forwards_run = snapshot["position"], snapshot["forwards_run"]
        for key, state in snapshot["states"].items():
            self.rows[key].state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}

    def _rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for method in self.task.methods:
            for single in method.expand(self.bank.names) if isinstance(method, Output) else (method,):
                rows[single.key] = Row(single)
        for row in rows.values():
            if isinstance(row.method, Static):
                row.theta, row.statistics = row.method.merge(self.bank), row.method.statistics(self.bank)
            elif isinstance(row.method, Adaptive | Online):
                row.state = row.method.start(self.bank)
        return rows

    def _step(self, t: int, key: str, row: Row, evidence: Evidence) -> Step:
        began = time.perf_counter()
        with evidence.billed() as bill:
            found = self._predict(row, evidence)
        probabilities = found.log_p.exp().float().cpu().numpy()
        used = found.coefficients
        self.forwards_run += found.forwards
        return Step(
            t=t,
            method=key,
            n=len(probabilities),
            correct=self.stream.mark(t, probabilities),
            probabilities=probabilities,
            entropy=float(entropy(found.log_p).mean()),
            forwards=row.method.forwards_alone(bill.forwards, self.bank.K) + found.forwards,
            seconds=time.perf_counter() - began,
            encoder=_shares(used.encoder) if used else None,
            head=_shares(used.head) if used else None,
            notes=used.notes if used else {},
        )

    def _predict(self, row: Row, evidence: Evidence) -> Prediction:
        method = row.method
        match method:
            case Output():
                return Prediction(method.predict(evidence).log())
            case Static():
                return self._merged(row.theta, evidence, row.statistics)
            case Adaptive():
                row.state, coefficients = method.step(row.state, evidence)
                return self._mixed(coefficients, evidence)
            case Online():
                row.state, theta = method.step(row.state, evidence)
                return self._merged(theta, evidence)
        raise TypeError(f"{type(method).__name__} is of no known kind")

    def _merged(self, theta: Tensor | None, evidence: Evidence, statistics: Tensor | None = None) -> Prediction:
        assert theta is not None
        logits = self.bank.forward(theta, evidence.batch, statistics)
        return Prediction(torch.log_softmax(logits.float(), -1), None, 1)

    def _mixed(self, coefficients: Coefficients, evidence: Evidence) -> Prediction:
        """One merge for each distinct row of coefficients; predictions go back to their places in the batch."""
        if coefficients.encoder.ndim == 1:
            theta = self.bank.mix(coefficients.encoder, coefficients.head)
            merged = self._merged(theta, evidence, coefficients.encoder)
            return Prediction(merged.log_p, coefficients, 1)
        both = torch.cat([coefficients.encoder, coefficients.head], 1)  # (N, 2K)
        distinct, which = torch.unique(both, dim=0, return_inverse=True)
        log_p = torch.empty(len(both), len(self.task.classes), device=evidence.batch.device)
        for number, row in enumerate(distinct):
            here = (which == number).to(evidence.batch.device)
            theta = self.bank.mix(row[: self.bank.K], row[self.bank.K :])
            logits = self.bank.forward(theta, evidence.batch[here], row[: self.bank.K])
            log_p[here] = torch.log_softmax(logits.float(), -1)
        return Prediction(log_p, coefficients, 1)

    def _info(self, method: Method) -> RowInfo:
        kind = next(kind for kind in (Static, Adaptive, Online, Output) if isinstance(method, kind))
        per_batch = {Static: 0, Output: 0}.get(kind, self.bank.merge_bytes)
        return RowInfo(
            paper=method.paper,
            kind=kind.__name__.lower(),
            needs=tuple(sorted(method.needs)),
            gradient=method.gradient,
            ranked=method.ranked,
            hyper_parameters=method.model_dump(mode="json", exclude={"label", "kind"}),
            merge_bytes=per_batch,
        )


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Copies: what comes from shared memory must not be written to."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _shares(coefficients: Tensor) -> tuple[float, ...]:
    """(K,) as it is, (N, K) as its mean over the batch."""
    return tuple(coefficients.mean(0).tolist() if coefficients.ndim == 2 else coefficients.tolist())
