"""The batches done so far, on disk: lines for people, chunks with snapshots for `--resume`. No batch is lost or counted twice."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedmerge.report.step import Step

Snapshot = dict[str, Any]
"""position, forwards_run, and states: method -> name -> array."""


@dataclass
class Progress:
    """`batches.jsonl` grows by one line per batch and method; `progress/` holds what a resumed run needs, until the run is done."""

    out: Path
    key: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    snapshot: Snapshot | None = None

    @classmethod
    def open(cls, out: Path, key: dict[str, Any], resume: bool) -> Self:
        """Start anew, or from the chunks of an interrupted run of the same stream and experts (`key`)."""
        progress = cls(out, key)
        steps: list[Step] = []
        chunks = sorted((out / "progress").glob("*.npz")) if resume else []
        for chunk in chunks:
            try:
                steps, snapshot = _read(chunk, key)
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # torn: the run goes on from the chunk before
                snapshot = None
            if snapshot is None:
                break
            progress.steps += steps
            progress.snapshot = snapshot
        if progress.snapshot is None:
            shutil.rmtree(out / "progress", ignore_errors=True)
        (out / "progress").mkdir(exist_ok=True)
        (out / "batches.jsonl").write_text("".join(step.line() + "\n" for step in progress.steps), encoding="utf-8")
        return progress

    def add(self, steps: list[Step], snapshot: Snapshot) -> None:
        """Keep the steps of some batches with the state after them."""
        chunk = self.out / "progress" / f"{snapshot['position']:08d}.npz"
        draft = chunk.with_suffix(".draft")
        states = {f"state {key}\t{name}": v for key, s in snapshot["states"].items() for name, v in s.items()}
        facts = {"key": self.key} | {name: value for name, value in snapshot.items() if name != "states"}
        arrays: dict[str, Any] = {f"p{i}": step.probabilities for i, step in enumerate(steps)}
        with draft.open("wb") as file:
            np.savez(file, facts=json.dumps(facts), lines=np.array([step.line() for step in steps]), **arrays, **states)
        draft.replace(chunk)
        with (self.out / "batches.jsonl").open("a", encoding="utf-8") as lines:
            lines.writelines(step.line() + "\n" for step in steps)
        self.steps += steps
        self.snapshot = snapshot

    def close(self) -> None:
        """The report is written: the chunks are no longer needed."""
        shutil.rmtree(self.out / "progress", ignore_errors=True)


def _read(chunk: Path, key: dict[str, Any]) -> tuple[list[Step], Snapshot | None]:
    """The steps and the snapshot of one chunk; nothing if it belongs to another stream or other experts."""
    with np.load(chunk) as stored:
        facts = json.loads(str(stored["facts"]))
        if facts["key"] != key:
            return [], None
        steps = [Step.parse(str(line), stored[f"p{i}"]) for i, line in enumerate(stored["lines"])]
        states: dict[str, dict[str, Any]] = {step.method: {} for step in steps}
        for name in stored.files:
            if name.startswith("state "):
                method, _, tensor = name.removeprefix("state ").partition("\t")
                states[method][tensor] = stored[name]
    return steps, {name: value for name, value in facts.items() if name != "key"} | {"states": states}
