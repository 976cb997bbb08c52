"""The record of one batch and one method, and its line in `batches.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Step:
    """What one method did on one batch.

    t: number of the batch, from 0. n: its size. correct: predictions that were right, as marked by the answer sheet.
    probabilities: (n, C) float32. encoder, head: coefficients (K,), or their mean over samples, or None where there are none.
    entropy: mean entropy of the method's own predictions, nats. forwards: forwards of one batch through one model that this
    method would need alone. seconds: time of this method's own work. notes: per-expert values for the diagnostics.
    merge_bytes: memory traffic of the merges.
    """

    t: int
    method: str
    n: int
    correct: int
    probabilities: NDArray[np.float32]
    entropy: float
    forwards: int
    seconds: float
    encoder: tuple[float, ...] | None = None
    head: tuple[float, ...] | None = None
    notes: dict[str, list[float]] = field(default_factory=dict)
    merge_bytes: int = 0

    def line(self) -> str:
        """The line of `batches.jsonl`: everything but the probabilities."""
        record: dict[str, Any] = {
            "t": self.t,
            "method": self.method,
            "n": self.n,
            "correct": self.correct,
            "encoder": self.encoder,
            "head": self.head,
            "entropy": self.entropy,
            "forwards": self.forwards,
            "seconds": self.seconds,
            "notes": self.notes,
            "merge_bytes": self.merge_bytes,
        }
        return json.dumps(record)

    @staticmethod
    def parse(line: str, probabilities: NDArray[np.float32]) -> Step:
        """The step of a line and its probabilities."""
        record = json.loads(line)
        shares = {name: None if record[name] is None else tuple(record[name]) for name in ("encoder", "head")}
        return Step(**{**record, **shares, "probabilities": probabilities})
