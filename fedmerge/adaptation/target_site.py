"""The target site: owns its images, consumes its stream batch by batch, and lets every method predict each batch.

The experts' logits are computed once per batch and shared; static methods merge once; labels reach no method. Global models that
strategies have made in rounds are rows too: one forward for each batch, and nothing is merged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmerge.adaptation.expert_loader import Holding
from fedmerge.adaptation.tasks import Arrays, Contribution, Description, Federated, TargetTask, tensors
from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.images import numbered, to_batch
from fedmerge.errors import SiteError
from fedmerge.federated.model import build, normalization
from fedmerge.merging.evidence import Answer, Evidence
from fedmerge.merging.methods._base import Adaptive, Method
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import Fixed, Row, RowInfo, carry, evidence_of, infos, predict, rows_of
from fedmerge.merging.scoring.divergence import entropy
from fedmerge.report.batch_log import Step
from fedmerge.report.records import StreamFacts
from fedmerge.stream.stream import Answers, Stream


@dataclass(frozen=True)
class Past:
    """Who was here, what methods remember of them, and how rows of coefficients were merged."""

    names: tuple[str, ...]
    rows: dict[str, Row]
    taken: dict[str, int]


class TargetSite:
    """The target in this process. `advance` consumes the next batches; `answers` opens the labels when all is done.

    experts: all of them, or a holding to which they have come one at a time.
    Raises DataError or CheckpointError if images or experts cannot be used.
    """

    def __init__(self, task: TargetTask, experts: Sequence[Contribution] | Holding, base: Arrays) -> None:
        holding = experts if isinstance(experts, Holding) else Holding.of(task, experts, base)
        self.task, self.device, self.images = task, holding.device, holding.images
        self.gallery = Gallery(self.images, task.schedule.conditions(), task.site.name, task.seed)
        self.stream = Stream(self.gallery, task.schedule, task.site.name, task.seed)
        self.normalization = normalization(task.model)
        self.fixed = {one.key: Row(Fixed(label=one.key), model=fixed_model(one, task, self.device)) for one in task.federated}
        self.base, self.experts = base, [] if isinstance(experts, Holding) else list(experts)
        self._reader = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[int, Future[Tensor]] = {}
        self.position = 0
        self.deaths: list[int] = []  # of this process nothing would be told
        self.forwards_run = 0
        self.given: set[int] = set()
        self._settle(holding)
        self._past: Past | None = None

    def _settle(self, holding: Holding, taken: dict[str, int] | None = None) -> None:
        self.bank, self.held = holding.bank(), holding.told()
        self.per_sample = PerSample(self.bank, self.task.per_sample, taken=taken or {})
        self.rows = rows_of(self.task.methods, self.bank, self.task.cap) | self.fixed
        self.surveyed = False
        self._before: Evidence | None = None
        self._foreseen: dict[int, Evidence] = {}

    def change(self, names: Sequence[str], arriving: Sequence[Contribution]) -> None:
        """Go on with the experts of these names, in this order; those who are not here yet are among the arriving."""
        known = {expert.site: expert for expert in [*self.experts, *arriving]}
        self.experts = [known[name] for name in names]
        self.leave()
        self.adopt(Holding.of(self.task, self.experts, self.base, self.images))

    def leave(self) -> None:
        """Let the experts go, but for what methods remember of them: two banks at once would be twice the memory."""
        if self._past is None:
            rows = {key: replace(row, theta=None, statistics=None) for key, row in self.rows.items()}
            self._past = Past(self.bank.names, rows, self.per_sample.taken)
            self._before, self._foreseen = None, {}
            del self.bank, self.per_sample, self.rows

    def adopt(self, holding: Holding) -> None:
        """Go on with these experts: static methods merge again, and what others remember is carried over.

        Before the first batch everybody starts.
        """
        past, self._past = self._past, None
        assert past is not None
        self._settle(holding, past.taken)
        if self.position > 0:
            carry(self.rows, past.rows, past.names, self.bank)

    def describe(self) -> Description:
        """What a reader of the report may know of the stream and the methods."""
        shown = np.array(self.images.pixels[: self.task.site.samples]) if self.task.site.samples else None
        facts = StreamFacts(
            kind=self.task.schedule.kind(),
            batches=len(self.stream),
            samples=self.stream.samples,
            unused=self.stream.unused,
            index_sha256=self.stream.index_sha256,
            truth=self.stream.truth,
            domain_names=self.gallery.domain_names,
            conditions=tuple((one.kind(), one.severity) for one in self.gallery.conditions),
        )
        return Description(
            stream=facts,
            shown=shown,
            device=self.device,
            rows=infos(self.task.methods, self.task.experts or self.bank.names) | {o.key: info(o) for o in self.task.federated},
            bank=self.held,
        )

    @torch.no_grad()
    def advance(self, batches: int) -> list[Step]:
        """Every method's step on each of the next batches; empty when the stream is over."""
        steps: list[Step] = []
        if not self.surveyed and self.position < len(self.stream):
            self._survey()
        for t in range(self.position, min(self.position + batches, len(self.stream))):
            evidence = self._begun(t)
            steps += [self._step(t, key, row, evidence_of(row.method, evidence)) for key, row in self.rows.items()]
            self.forwards_run += evidence.forwards_run
            self.position, self._before = t + 1, evidence
        return steps

    def forwards_so_far(self) -> int:
        """Forwards through one model that were really run."""
        return self.forwards_run

    def per_sample_ways(self) -> dict[str, Any]:
        """How rows of coefficients were merged, for the manifest: batches by way, and why not the mixture."""
        return {"taken": self.per_sample.taken, "refusal": self.per_sample.refusal}

    def answers(self) -> Answers:
        """Labels, domains and patients of the whole stream, for the report."""
        answers = self.stream.answers()
        if not self.task.site.source.knows_patients:
            return answers
        places = [batch % len(self.images) for batch in self.stream.batches]  # an image under several conditions
        return replace(answers, patients=numbered([self.images.groups[place] for place in places]))

    def disputed(self, places: Sequence[int]) -> NDArray[np.uint8]:
        """Images at these places of the stream, counted from its first: uint8 (n, H, W, C), as the models saw them.

        Raises SiteError for more than the site's own file grants, whoever asks, and however often.
        """
        asked, granted = self.given | set(places), self.task.site.disagreements
        if len(asked) > granted:
            found = f"found {len(asked)} images asked for; expected at most {granted}, as its file grants"
            raise SiteError(f"target '{self.task.site.name}': disagreements: {found}")
        self.given = asked
        order = np.concatenate(self.stream.batches)
        return np.asarray(self.gallery.pixels(order[np.asarray(places, dtype=np.int64)]))

    def snapshot(self) -> dict[str, Any]:
        """The position, the experts, every method's state as numpy arrays, and how rows of coefficients are merged."""
        states = {key: {name: value.cpu().numpy().copy() for name, value in row.state.items()} for key, row in self.rows.items()}
        ways = self.per_sample_ways()
        where = {"position": self.position, "surveyed": self.surveyed, "experts": list(self.bank.names)}
        return {**where, "forwards_run": self.forwards_run, "states": states, "per_sample": ways}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot, taken with the experts that are here: the steps that follow are those of an undisturbed run."""
        if snapshot["experts"] != list(self.bank.names):
            raise ValueError(f"a snapshot with {snapshot['experts']} does not fit {list(self.bank.names)}")
        self.position, self.forwards_run = snapshot["position"], snapshot["forwards_run"]
        self.surveyed = snapshot["surveyed"]
        self.per_sample.taken = dict(snapshot["per_sample"]["taken"])
        self.per_sample.refusal = snapshot["per_sample"]["refusal"]
        for key, state in snapshot["states"].items():
            self.rows[key].state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}

    def _step(self, t: int, key: str, row: Row, evidence: Evidence) -> Step:
        began = time.perf_counter()
        with evidence.billed() as bill, self._told(row.method, t, evidence):
            found = predict(row, evidence, self.per_sample)
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
            forwards=row.method.forwards_alone(bill.forwards, evidence.bank.K) + found.forwards,
            seconds=time.perf_counter() - began,
            encoder=_shares(used.encoder) if used else None,
            head=_shares(used.head) if used else None,
            notes=found.notes,
            merge_bytes=found.merges * self.bank.merge_bytes,
        )

    def _evidence(self, t: int) -> Evidence:
        return Evidence(self.bank, to_batch(self._pixels(t), *self.normalization, device=self.device))

    def _begun(self, t: int) -> Evidence:
        """Evidence of a batch; with a GPU, that of the next has been begun, too."""
        evidence = self._foreseen.pop(t, None) or self._evidence(t)
        self._foreseen = {}
        if self.device != "cpu" and self._before is not None and t + 1 < len(self.stream):
            upcoming = self._foreseen[t + 1] = self._evidence(t + 1)
            upcoming.foresee(self._before)
        return evidence

    def _pixels(self, t: int) -> NDArray[np.uint8] | Tensor:
        """Images of a batch (N, H, W, C); with a GPU, those of the next are read while it works, to where it copies from."""
        if self.device == "cpu":
            return self.gallery.pixels(self.stream.batches[t])
        now = self._ahead.pop(t, None) or self._reader.submit(self._pinned, t)
        self._ahead = {t + 1: self._reader.submit(self._pinned, t + 1)} if t + 1 < len(self.stream) else {}
        return now.result()

    def _pinned(self, t: int) -> Tensor:
        return torch.from_numpy(self.gallery.pixels(self.stream.batches[t])).pin_memory()

    def _told(self, method: Method, t: int, evidence: Evidence) -> AbstractContextManager[None]:
        """The truth, for oracles, which say that they need labels; nothing for anybody else."""
        if "labels" not in method.needed:
            return nullcontext()
        labels, domains = self.stream.truth_of(t)
        device = evidence.batch.device
        return evidence.opened(Answer(torch.from_numpy(labels).to(device), torch.from_numpy(domains).to(device)))

    def _survey(self) -> None:
        """The first pass over the stream, for methods that are transductive; what it costs is counted as run."""
        self.surveyed = True
        first = [row for row in self.rows.values() if isinstance(row.method, Adaptive) and row.method.transductive]
        for t in range(len(self.stream)) if first else ():
            evidence = self._evidence(t)
            for row in first:
                assert isinstance(row.method, Adaptive)
                seen = evidence_of(row.method, evidence)
                with self._told(row.method, t, seen):
                    row.state = row.method.survey(row.state, seen)
            self.forwards_run += evidence.forwards_run


def _shares(coefficients: Tensor) -> tuple[float, ...]:
    """(K,) as it is, (N, K) as its mean over the batch."""
    return tuple(coefficients.mean(0).tolist() if coefficients.ndim == 2 else coefficients.tolist())


def info(model: Federated) -> RowInfo:
    """What the report says of it."""
    return RowInfo(model.paper, "federated", (), False, True, model.hyper_parameters, model.remark)


def fixed_model(federated: Federated, task: TargetTask, device: str) -> nn.Module:
    """The model in evaluation mode."""
    model = build(task.model, len(task.classes), seed=task.seed)
    model.load_state_dict(tensors(federated.weights))
    return model.to(device).eval()
