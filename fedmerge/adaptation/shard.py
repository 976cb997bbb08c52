"""One shard of the target's bank: some of its experts, which come one at a time, and answers about them.

A shard is a process of the target's own hospital: it is shown every batch, which nobody else is but the target itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedmerge.adaptation.tasks import Arrays, Contribution, Precision, TargetTask, tensors
from fedmerge.errors import Problem, ScenarioError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import Shelf
from fedmerge.merging.bank.sharded import Here, answer_here
from fedmerge.merging.methods._base import Method


@dataclass(frozen=True)
class ShardTask:
    """What a shard must know to run its experts. site: the target's name, for its log. threads: for torch."""

    site: str
    model: ModelSpec
    classes: int
    seed: int
    threads: int
    precision: Precision = "float32"

    @staticmethod
    def of(task: TargetTask, threads: int) -> ShardTask:
        """The part of a target's task that concerns its shards."""
        return ShardTask(task.site.name, task.model, len(task.classes), task.seed, threads, task.precision)


class Shard:
    """Some of the experts as a bank of their own, with theta_0 beside them. Raises CheckpointError for one that does not fit."""

    def begin(self, task: ShardTask, base: Arrays, experts: int) -> None:
        """Make room for so many experts; those that are here go."""
        self.bank: Bank | None = None
        torch.set_num_threads(task.threads)
        self.base, self.names = base, list[str]()
        model, dtype = build(task.model, task.classes, seed=task.seed), getattr(torch, task.precision)
        self._shelf = Shelf(model, experts + 1, dtype=dtype)  # in memory: Ray has given it no GPU

    def admit(self, expert: Contribution) -> None:
        """Take the next expert; the bank is there as soon as the last has come."""
        self._shelf.add(expert.site, tensors(expert.weights))
        self.names.append(expert.site)
        if len(self.names) == len(self._shelf.rows) - 1:
            self._shelf.add("theta_0", tensors(self.base))
            self.bank = Bank.on(self._shelf, self.names, ["theta_0"])

    def answer(self, what: str, arguments: Sequence[Any]) -> Tensor:
        """One of `merging.bank.sharded.WORK`."""
        assert self.bank is not None
        return answer_here(self.bank, what, arguments)

    def process(self) -> int:
        """Number of this process."""
        return os.getpid()


def divided(experts: Sequence[Contribution], shards: int) -> list[Sequence[Contribution]]:
    """Neighbors together, as evenly as can be; as many groups as shards, or as experts if those are fewer."""
    count = min(shards, len(experts))
    edges = [number * len(experts) // count for number in range(count + 1)]
    return [experts[a:b] for a, b in pairwise(edges)]


def here(task: TargetTask, experts: Sequence[Contribution], base: Arrays) -> Here:
    """Shards in this process."""
    banks = []
    for group in divided(experts, task.shards):
        shard = Shard()
        shard.begin(ShardTask.of(task, task.threads), base, len(group))
        for expert in group:
            shard.admit(expert)
        assert shard.bank is not None
        banks.append(shard.bank)
    return Here(banks)


def check_shards(shards: int, sites: int, methods: Sequence[Method], per_sample: str, max_bytes: int | None) -> None:
    """Before anybody trains. Raises ScenarioError for all that cannot be done where experts lie in several shards."""
    if shards == 1:
        return
    where, problems = "the scenario", []
    if shards > sites:
        problems.append(Problem(where, "target.shards", str(shards), f"at most {sites}, the number of hospitals"))
    if max_bytes is not None:
        mend = "Remove one: experts are spread over processes by shards, or kept on a disk by max_bytes"
        problems.append(Problem(where, "target.max_bytes", f"it and target.shards: {shards}", "one of the two", mend))
    if per_sample == "mixture":
        mend = "A mixture needs all experts in one process, and target.shards spreads them over several"
        problems.append(Problem(where, "per_sample", "'mixture'", "auto, rows or samples", mend))
    for number, method in enumerate(methods):
        if method.whole:
            found = f"'{method.key}', which needs all experts in one process"
            expected, mend = f"a method that works with {shards} shards", "Remove 'target.shards', or the method"
            problems.append(Problem(where, f"methods[{number}]", found, expected, mend))
    if problems:
        raise ScenarioError(problems)
