"""A run's record made by hand: three methods on a stream of known answers."""

from __future__ import annotations

import numpy as np
import pytest

from fedmerge.merging.predict import RowInfo
from fedmerge.report.batch_log import Step
from fedmerge.report.records import RunRecord, SiteRow, StreamFacts

CLASSES = ("bladder", "heart", "liver")
BATCHES, SIZE = 20, 10


def info(kind: str) -> RowInfo:
    return RowInfo("A. Author, 2020", kind, (), False, True, {}, "")


def site(name: str, samples: np.ndarray | None) -> SiteRow:
    return SiteRow(name, name.title(), True, "cd" * 32, 40, 0.9, 1.1, [{"lr": 1e-3, "validation_accuracy": 0.9}], samples)


def steps_of(method: str, labels: list[np.ndarray], accuracy: float, adaptive: bool, seed: int) -> list[Step]:
    """Predictions that are right with probability `accuracy`."""
    rng = np.random.default_rng(seed)
    steps = []
    for t, y in enumerate(labels):
        guess = np.where(rng.random(len(y)) < accuracy, y, (y + 1) % 3)
        p = np.full((len(y), 3), 0.1, np.float32)
        p[np.arange(len(y)), guess] = 0.8
        shares = (t / BATCHES, 1 - t / BATCHES) if adaptive else None
        steps.append(Step(t, method, len(y), int((guess == y).sum()), p, 0.6, 1, 0.01, shares, shares))
    return steps


@pytest.fixture
def record() -> RunRecord:
    return a_record()


def a_record() -> RunRecord:
    rng = np.random.default_rng(0)
    labels = [rng.integers(3, size=SIZE) for _ in range(BATCHES)]
    share = np.linspace(1, 0, BATCHES)
    truth = np.stack([share, 1 - share], 1)
    steps = (
        steps_of("mean", labels, 0.6, False, 1)
        + steps_of("eam", labels, 0.9, True, 2)
        + steps_of("ensemble", labels, 0.6, False, 1)
    )
    item = {
        "site": "north",
        "item": "head.bias",
        "kind": "weights",
        "shape": [3],
        "dtype": "float32",
        "bytes": 12,
        "sha256": "ab" * 32,
    }
    return RunRecord(
        scenario="toy",
        question="Is <b>this</b> escaped?",
        seed=0,
        classes=CLASSES,
        sites=[site("north", np.zeros((1, 8, 8, 1), np.uint8)), site("south", None)],
        target="mercy",
        target_title="Mercy",
        target_samples=np.zeros((2, 8, 8, 3), np.uint8),
        initialization="proxy",
        stream=StreamFacts("mixture_drift", BATCHES, BATCHES * SIZE, 7, "12" * 32, truth, ("axial", "coronal")),
        labels=labels,
        domains=[(np.arange(SIZE) >= round(SIZE * s)).astype(np.int64) for s in share],
        steps=steps,
        methods={"mean": info("static"), "eam": info("adaptive"), "ensemble": info("output")},
        forwards_run=4.0,
        audit=[item],
        manifest={"device": "cpu", "machine": {"cores": 2}, "versions": {"torch": "2.9"}},
        yaml="name: toy\n",
        seconds={"stream": 1.0},
    )
