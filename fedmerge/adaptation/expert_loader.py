"""The experts as they come to the target, one at a time, within the memory that it may take: in memory, or on its disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedmerge.adaptation.shard import here
from fedmerge.adaptation.tasks import Arrays, Contribution, Precision, TargetTask, tensors
from fedmerge.data.cache import folder
from fedmerge.data.images import Images
from fedmerge.errors import FolderError, Problem, ScenarioError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.merging.bank.bank import Bank, Shards
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.bank.row_storage import MANY, Mapped, Shelf
from fedmerge.merging.bank.sharded import SpreadBank
from fedmerge.merging.bank.statistics import KINDS
from fedmerge.merging.curvature.gram import linear_layers
from fedmerge.merging.methods._base import Adaptive, Method, Online

PROCESS_BYTES = 480 * 2**20
"""What the target's process takes of its own before it holds an expert, as measured on Linux with a small model."""

MODELS = 8
"""Models that are in memory beside rows and static merges: theta_0 as it came, the skeleton, the merged one, temporaries."""

RESIDENT = (16 * 2**20, 256 * 2**20)
"""Least and most bytes of a bank on disk that are resident at a time."""

FLOAT = 4


@dataclass(frozen=True)
class Budget:
    """Whether rows of K experts and A anchors go into `limit` bytes with everything else. images: bytes of the target's
    pixels that are in memory.

    fixed: models that are rows of their own. width: bytes of a weight in a row.
    """

    limit: int | None
    sizes: Sizes
    anchors: int
    methods: tuple[Method, ...]
    images: int = 0
    fixed: int = 0
    width: int = FLOAT

    @property
    def rows(self) -> int:
        """Bytes of all rows."""
        return (self.sizes.experts + self.anchors) * self.sizes.parameters * self.width

    @property
    def beside(self) -> int:
        """Bytes that are needed whether rows are in memory or not."""
        held = MODELS + sum(method.merged_once is not None or isinstance(method, Online) for method in self.methods) + self.fixed
        held += (
            2 * sum(isinstance(method, Adaptive) for method in self.methods) if self.sizes.experts >= MANY else 0
        )  # running sums
        return PROCESS_BYTES + self.images + held * self.sizes.parameters * FLOAT

    @property
    def on_disk(self) -> bool:
        """Whether the rows have to stay on disk."""
        return self.limit is not None and self.beside + self.rows > self.limit

    @property
    def resident(self) -> int:
        """Bytes of rows on disk that may be resident."""
        least, most = RESIDENT
        return min(most, max(least, ((self.limit or 0) - self.beside) // 2))

    def check(self) -> None:
        """Raises ScenarioError, with all that does not go into the limit even with rows on disk."""
        if self.limit is None or not self.on_disk:
            return
        least = self.beside + RESIDENT[0]
        if least > self.limit:
            mend = f"The process with its images takes {_size(PROCESS_BYTES + self.images)}, models take the rest"
            raise ScenarioError([Problem("the scenario", "target.max_bytes", _size(self.limit), f"at least {_size(least)}", mend)])
        problems = []
        for number, method in enumerate(self.methods):
            needed = least + method.working_bytes(self.sizes)
            if needed > self.limit:
                found = f"'{method.key}', which needs {_size(needed)} for {self.sizes.experts} experts at once"
                expected, mend = f"at most target.max_bytes, {_size(self.limit)}", "Raise the limit, or remove the method"
                problems.append(Problem("the scenario", f"methods[{number}]", found, expected, mend))
        if problems:
            raise ScenarioError(problems)

    @staticmethod
    def of(task: TargetTask, experts: int, images: int = 0, model: torch.nn.Module | None = None) -> Budget:
        """The budget of a task for so many experts."""
        sizes = sizes_of(model or build(task.model, len(task.classes), seed=task.seed), experts)
        anchors, width = 1 + (task.generalist is not None), getattr(torch, task.precision).itemsize
        return Budget(task.max_bytes, sizes, anchors, task.methods, images, len(task.federated), width)


def check_limit(  # noqa: PLR0913 - all but the experts have defaults
    limit: int | None,
    experts: int,
    spec: ModelSpec,
    classes: int,
    methods: tuple[Method, ...],
    federated: int = 0,
    anchors: int = 1,
    precision: Precision = "float32",
) -> None:
    """Before anybody trains. federated: global models. anchors: theta_0 and the generalist, if there is one.

    Raises ScenarioError if a method does not go into the limit.
    """
    if limit is not None:
        width = getattr(torch, precision).itemsize
        Budget(limit, sizes_of(build(spec, classes), experts), anchors, methods, fixed=federated, width=width).check()


def sizes_of(model: torch.nn.Module, experts: int) -> Sizes:
    """What a bank of so many experts of a model would take."""
    tensors = [parameter.numel() for parameter in model.parameters()]
    gram = sum(layer.in_features**2 for layer in linear_layers(model).values())
    return Sizes(experts, sum(tensors), max(tensors), gram)


@dataclass
class Holding:
    """A target's images, and its experts as far as they have come; `bank` when all have. known: the images, if they are loaded.

    base: theta_0; empty where nobody knows it.

    shards: who has the experts' parameters; what comes here then is only what they have beside them.
    Raises ScenarioError if the limit is too small, FolderError if the disk is, and CheckpointError for an expert that does not fit.
    """

    task: TargetTask
    base: Arrays
    experts: int
    known: Images | None = None
    shards: Shards | None = None
    came: list[Contribution] = field(default_factory=list)

    def __post_init__(self) -> None:
        task = self.task
        torch.set_num_threads(task.threads)
        known = self.known or task.site.images(task.model.geometry, task.seed)
        self.images: Images = known.of_classes(task.classes)
        model = build(task.model, len(task.classes), seed=task.seed)
        self.budget = Budget.of(task, self.experts, self.images.held_bytes, model)
        self.budget.check()
        self.device = "cuda" if torch.cuda.is_available() and not self.budget.on_disk and task.gpus != 0 else "cpu"
        count = self.budget.anchors - (not self.base) + (0 if self.shards else self.experts)
        self.dtype: torch.dtype = getattr(torch, task.precision)
        mapped = self._mapped(count) if self.budget.on_disk else None
        self._shelf = Shelf(model, count, device=self.device, dtype=self.dtype, mapped=mapped)

    @staticmethod
    def of(task: TargetTask, experts: Sequence[Contribution], base: Arrays, known: Images | None = None) -> Holding:
        """All experts at once."""
        shards = here(task, experts, base) if task.shards > 1 else None
        holding = Holding(task, base, len(experts), known, shards)
        for expert in experts:
            holding.admit(expert)
        return holding

    def admit(self, expert: Contribution) -> None:
        """The next expert: its weights become a row, and are not kept otherwise."""
        if self.shards:
            self._shelf.add_beside(tensors(expert.weights))
        else:
            self._shelf.add(expert.site, tensors(expert.weights))
        spare = self.budget.on_disk or self.shards is not None
        asked = {*KINDS} & {kind for method in self.task.methods for kind in method.needed}
        kept = {kind: state for kind, state in expert.statistics.items() if not spare or kind in asked}
        copies = {kind: {name: np.array(array) for name, array in state.items()} for kind, state in kept.items()}
        self.came.append(Contribution(expert.site, {}, expert.n, expert.temperature, copies))

    def bank(self) -> Bank:
        """The bank of all experts, with theta_0 and the generalist if there is one."""
        task, came = self.task, self.came
        anchors = ({"theta_0": self.base} if self.base else {}) | ({"generalist": task.generalist} if task.generalist else {})
        for name, state in anchors.items():
            self._shelf.add(name, tensors(state))
        bank = self._bank([expert.site for expert in came], list(anchors))
        counts = [expert.n for expert in came if expert.n is not None]  # a noised upload tells none
        bank.counts = tuple(counts) if len(counts) == len(came) else None
        bank.temperatures = torch.tensor([expert.temperature for expert in came], dtype=torch.float32, device=self.device)
        bank.flips, bank.shared_head = self.images.flips, task.shared_head
        for kind in sorted(set.intersection(*(set(expert.statistics) for expert in came))) if came else ():
            bank.statistics.add(kind, [tensors(expert.statistics[kind]) for expert in came], bank.like.to(bank.wide))
        self.came = []
        return bank

    def told(self) -> dict[str, Any]:
        """Where the rows are, for the manifest."""
        where = {"rows": "on disk" if self.budget.on_disk else "in memory", "bytes": self.budget.rows, "limit": self.budget.limit}
        where |= {"precision": self.task.precision}
        return where | ({"rows": "in shards", "shards": list(self.shards.experts)} if self.shards else {})

    def _bank(self, names: Sequence[str], anchors: Sequence[str]) -> Bank:
        if self.shards:
            return SpreadBank.over(self.shards, self._shelf, names, anchors)
        return Bank.on(self._shelf, names, anchors)

    def _mapped(self, count: int) -> Mapped:
        place = folder() / "banks"
        try:
            return Mapped(count, self.budget.sizes.parameters, self.dtype, place, self.budget.resident)
        except OSError as error:
            place.mkdir(parents=True, exist_ok=True)
            free = _size(shutil.disk_usage(place).free)
            raise FolderError(
                f"{place}: found {free} free ({error.strerror or error}); expected room for {_size(self.budget.rows)} of experts, "
                "which are larger than target.max_bytes. Set FEDMERGE_CACHE to a folder with more room"
            ) from None


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
