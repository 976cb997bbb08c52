"""The batches done so far, on disk: what `--resume` needs. No batch is lost or counted twice."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedmerge.report.batch_log import Ledger, Step
from fedmerge.system.files import atomic

Snapshot = dict[str, Any]
"""position, forwards_run, and states: method -> name -> array."""

KEPT = 2
"""Snapshots on disk: the newest, and the one before it in case the newest is torn."""


@dataclass
class Progress:
    """`batches.jsonl` grows by one line per batch and method; `progress/` holds probabilities and the last two snapshots."""

    out: Path
    key: dict[str, Any]
    ledger: Ledger
    snapshot: Snapshot | None = None

    @classmethod
    def open(cls, out: Path, key: dict[str, Any], resume: bool) -> Self:
        """Start anew, or from the newest whole snapshot of an interrupted run of the same stream and experts (`key`)."""
        progress = cls(out, key, Ledger(out / "batches.jsonl", out / "progress"))
        for file in sorted((out / "progress").glob("*.npz"), reverse=True) if resume else ():
            try:
                progress.snapshot = _read(file, key, progress.ledger)
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # torn: the run goes on from the one before
                continue
            if progress.snapshot is not None:
                return progress
        shutil.rmtree(out / "progress", ignore_errors=True)
        (out / "progress").mkdir()
        progress.ledger.clear()
        return progress

    def add(self, steps: list[Step], snapshot: Snapshot) -> None:
        """Keep the steps of some batches with the state after them; a snapshot is there only when its steps are."""
        self.ledger.append(steps)
        states = {f"state {key}\t{name}": v for key, s in snapshot["states"].items() for name, v in s.items()}
        facts = {name: value for name, value in snapshot.items() if name != "states"}
        facts |= {"key": self.key, "ledger": self.ledger.mark(), "methods": list(snapshot["states"])}
        file = self.out / "progress" / f"{snapshot['position']:08d}.npz"
        with atomic(file) as draft, draft.open("wb") as opened:
            np.savez(opened, facts=json.dumps(facts), **states)
        for older in sorted(self.out.glob("progress/*.npz"))[:-KEPT]:
            older.unlink()
        self.snapshot = snapshot

    def close(self) -> None:
        """The report is written: what a resumed run needs is no longer needed."""
        shutil.rmtree(self.out / "progress", ignore_errors=True)


def _read(file: Path, key: dict[str, Any], ledger: Ledger) -> Snapshot | None:
    """A snapshot, with the ledger as it was then; nothing if it belongs to other experts or streams, or the ledger holds less."""
    with np.load(file) as stored:
        facts = json.loads(str(stored["facts"]))
        states: dict[str, dict[str, Any]] = {method: {} for method in facts.pop("methods")}
        for name in stored.files:
            if name.startswith("state "):
                method, _, tensor = name.removeprefix("state ").partition("\t")
                states[method][tensor] = stored[name]
    same, mark = facts.pop("key") == key, facts.pop("ledger")
    return {**facts, "states": states} if same and ledger.cut(mark) else None
