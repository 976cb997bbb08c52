"""Many streams of one target in one process: what every expert says of every image is computed once, whatever the order.

A method's prediction for an image may depend on the batch, or on batches before it; then the method runs on every stream. Where it
cannot, it runs once, and a stream only chooses among its images. Hospitals train by the plain loop, which gives the same bits as
Flower (`tests/integration/test_flower.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.data.corrupted_images import Gallery
from fedmerge.data.images import to_batch
from fedmerge.experiment.experiment import Experiment, RunOptions
from fedmerge.experiment.stream_phase import contributions, usable
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, site_task
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Method, Static
from fedmerge.merging.predict import Row, rows_of
from fedmerge.merging.scoring.views import VIEWS, resolve
from fedmerge.report.terminal import Terminal
from fedmerge.stream.schedules._base import SCHEDULES, Schedule
from fedmerge.stream.stream import Stream

OF_ONE_IMAGE = {"expert", "ensemble", "dcs", "doe", "t3", "dawin_sample"}
"""Methods, beside those that merge once, whose prediction for an image depends on that image alone."""
CHUNK = 128


class Streams:
    """A target with the experts of one federation. Accuracy of methods on as many orders of its images as one likes."""

    def __init__(self, plan: Experiment, pool: Path, out: Path, threads: int = 1) -> None:
        out.mkdir(parents=True, exist_ok=True)
        request = RunOptions(out=out, pool=pool, quiet=True)
        initial = make_theta_0(plan, request, Terminal(quiet=True))
        tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
        failed = [
            one
            for one in LocalBackend().gather(job_of(plan, tuple(tasks), initial, request), lambda _: None).values()
            if one.reason
        ]
        if failed:
            raise RuntimeError("; ".join(f"site '{one.site}': {one.reason}" for one in failed))
        self.experts = load_experts(tasks, request)
        given, base = contributions(plan, initial, self.experts)
        methods = usable(plan, self.experts)  # under the stream's shares of labels, where the scenario estimates them
        task = TargetTask(plan.target, plan.scenario.model, plan.classes, plan.scenario.stream, methods[:1],
                          plan.scenario.seed, threads, shared_head=initial.head_init != "per_site_random")  # fmt: skip
        self.site = _Remembering(task, list(given.values()), base)
        rows = [single for method in methods for single in method.expand(self.site.bank.names)]
        alone = [method for method in rows if method.label_prior == "none"]
        self.fixed = [method for method in alone if isinstance(method, Static) or method.kind() in OF_ONE_IMAGE]
        self.fixed += [method for method in rows if method.kind() == "oracle" and not method.transductive]
        self.others = [method for method in rows if method not in self.fixed]
        self.forwards: dict[str, float] = {}  # of the dearest batch, for each method alone
        self.right = self._right_of_each_image()

    def accuracies(self, schedule: Schedule, without: Collection[str] = ()) -> dict[str, float]:
        """Every method's accuracy on the stream that the schedule makes of the target's images; `without` some that are dear."""
        self.site.turn_to(schedule, [method for method in self.others if method.key not in without])
        order = np.concatenate(self.site.stream.batches)
        found = {key: float(right[order].mean()) for key, right in self.right.items()}
        hits: dict[str, int] = {}
        while steps := self.site.advance(CHUNK):
            for step in steps:
                hits[step.method] = hits.get(step.method, 0) + step.correct
                self.forwards[step.method] = max(self.forwards.get(step.method, 0), step.forwards)
        return found | {key: count / len(order) for key, count in hits.items()}

    def _right_of_each_image(self) -> dict[str, NDArray[np.bool_]]:
        """For the methods that look at one image at a time, whether they are right, image by image."""
        self.site.turn_to(SCHEDULES.load("iid")(batch_size=CHUNK), self.fixed)
        labels, found = self.site.gallery.labels, {key: np.zeros(len(self.site.gallery), bool) for key in self.site.rows}
        while steps := self.site.advance(1):
            for step in steps:
                batch = self.site.stream.batches[step.t]
                found[step.method][batch] = step.probabilities.argmax(1) == labels[batch]
                self.forwards[step.method] = max(self.forwards.get(step.method, 0), step.forwards)
        return found


class _Remembering(TargetSite):
    """A target site that has asked every expert about every image and its views before the first stream."""

    known: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def remember(self, views: Sequence[str]) -> None:
        """Fill `known`: logits (K, images, C) by view."""
        everything = np.arange(len(self.gallery))
        parts: dict[str, list[Tensor]] = {view: [] for view in views}
        for chunk in np.array_split(everything, max(1, len(everything) // CHUNK)):
            x = to_batch(self.gallery.pixels(chunk), *self.normalization).to(self.device)
            for view in views:
                parts[view].append(self.bank.expert_logits(VIEWS[view](x)))
        self.known = {view: torch.cat(found, 1) for view, found in parts.items()}

    def turn_to(self, schedule: Schedule, methods: Sequence[Method]) -> None:
        """Begin another stream of the same images with other methods."""
        if not self.known:
            self.remember(["none", resolve("flip_or_shift", self.images.flips), "contrast"])
        self.task = replace(self.task, schedule=schedule)
        self.gallery = Gallery(self.images, schedule.conditions(), self.task.site.name, self.task.seed)
        self.stream = Stream(self.gallery, schedule, self.task.site.name, self.task.seed)
        self.rows: dict[str, Row] = rows_of(methods, self.bank)
        self.position, self.surveyed = 0, False

    def _evidence(self, t: int) -> Evidence:
        evidence = super()._evidence(t)
        index = torch.from_numpy(self.stream.batches[t])
        evidence.recall({view: logits[:, index] for view, logits in self.known.items()})
        return evidence


def schedule_of(spec: Mapping[str, Any]) -> Schedule:
    """A schedule from its mapping in YAML."""
    fields = dict(spec)
    return SCHEDULES.load(fields["kind"]).model_validate(fields)
