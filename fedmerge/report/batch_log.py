"""The steps of a run, kept on disk: memory does not grow with the stream, and the report reads one method at a time.

A line for each step is in `batches.jsonl`. Probabilities are in `<number>.f32` beside the snapshots, one file for each method:
rows of C little-endian 32-bit floats, in the order of the stream, appended and never rewritten.

The record of one batch and one method, and its line in `batches.jsonl`.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.system.files import naming

Mark = dict[str, Any]
"""How much the ledger held at some moment: bytes of lines, classes, and bytes of probabilities by method."""

CELL = 4
"""Bytes of a probability."""

WRITTEN = ("t", "method", "n", "correct", "encoder", "head", "entropy", "forwards", "seconds", "notes", "merge_bytes")
"""What a line of `batches.jsonl` has of a step."""


class Ledger:
    """Steps by method. lines: the file of lines. folder: of the probabilities; it must exist when something is appended."""

    def __init__(self, lines: Path, folder: Path) -> None:
        self.lines, self.folder = lines, folder
        self.classes = 0
        self._bytes: dict[str, int] = {}
        self._places: dict[str, array[int]] | None = None
        self._latest: tuple[str, list[Step]] = ("", [])

    @property
    def methods(self) -> list[str]:
        """Those of whom there are steps."""
        return list(self._bytes)

    def append(self, steps: Iterable[Step]) -> None:
        """Keep some steps. What a full disk lets through is cut off when the run goes on."""
        fresh: dict[str, list[NDArray[np.float32]]] = {}
        text = []
        for step in steps:
            fresh.setdefault(step.method, []).append(step.probabilities)
            text.append(step.line() + "\n")
            self.classes = step.probabilities.shape[1]
        for method, found in fresh.items():
            content = np.concatenate(found).astype("<f4", copy=False).tobytes()
            self._bytes.setdefault(method, 0)
            probabilities = self._file(method)
            with naming(probabilities, probabilities), probabilities.open("ab") as file:
                file.write(content)
            self._bytes[method] += len(content)
        with naming(self.lines, self.lines), self.lines.open("a", encoding="utf-8") as file_of_lines:
            file_of_lines.writelines(text)
        self._forget()

    def mark(self) -> Mark:
        """How much is there now."""
        return {"lines": self.lines.stat().st_size, "classes": self.classes, "bytes": dict(self._bytes)}

    def cut(self, mark: Mark) -> bool:
        """Go back to a mark; whether everything that the mark says is still there."""
        self._forget()
        self.classes, self._bytes = mark["classes"], dict(mark["bytes"])
        sizes = {self.lines: mark["lines"]} | {self._file(method): size for method, size in self._bytes.items()}
        if any(not file.is_file() or file.stat().st_size < size for file, size in sizes.items()):
            return False
        for file, size in sizes.items():
            os.truncate(file, size)
        return True

    def clear(self) -> None:
        """Begin with nothing."""
        self._forget()
        self.classes, self._bytes = 0, {}
        for file in self.folder.glob("*.f32"):
            file.unlink()
        self.lines.write_text("", encoding="utf-8")

    def steps(self) -> Iterator[Step]:
        """Every step in the order of the stream, without its probabilities."""
        with self.lines.open(encoding="utf-8") as file:
            for line in file:
                yield self._parsed(line)

    def steps_of(self, method: str) -> list[Step]:
        """The steps of one method in the order of the stream, without their probabilities."""
        if self._latest[0] != method:
            with self.lines.open("rb") as file:
                found = []
                for place in self._index().get(method, ()):
                    file.seek(place)
                    found.append(self._parsed(file.readline().decode()))
            self._latest = (method, found)
        return self._latest[1]

    def probabilities(self, method: str) -> NDArray[np.float32]:
        """Class probabilities (samples, C) of one method, read from disk as they are used; what is written to them is lost."""
        shape = (self._bytes[method] // (CELL * self.classes), self.classes)
        return np.asarray(np.memmap(self._file(method), "<f4", "c", shape=shape))

    def _parsed(self, line: str) -> Step:
        return Step.parse(line, np.empty((0, self.classes), np.float32))

    def _index(self) -> dict[str, array[int]]:
        """Where the lines of each method begin."""
        if self._places is None:
            places: dict[str, array[int]] = {}
            place = 0
            with self.lines.open("rb") as file:
                for line in file:
                    places.setdefault(json.loads(line)["method"], array("q")).append(place)
                    place += len(line)
            self._places = places
        return self._places

    def _file(self, method: str) -> Path:
        return self.folder / f"{list(self._bytes).index(method)}.f32"

    def _forget(self) -> None:
        self._places, self._latest = None, ("", [])


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
        return json.dumps({name: getattr(self, name) for name in WRITTEN})

    @staticmethod
    def parse(line: str, probabilities: NDArray[np.float32]) -> Step:
        """The step of a line and its probabilities."""
        record = json.loads(line)
        shares = {name: None if record[name] is None else tuple(record[name]) for name in ("encoder", "head")}
        return Step(**{**record, **shares, "probabilities": probabilities})
