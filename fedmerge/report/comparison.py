"""Two runs side by side, on the same images: accuracy of the methods that both have, image by image, and what else differs.

Differences are paired: both runs have predicted every image, so that an image that is hard for both says nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fedmerge.errors import FolderError
from fedmerge.report.metrics.decisions import kept_arrays
from fedmerge.report.metrics.significance import Difference, holm, paired
from fedmerge.system.files import reading

SAME = "two runs of one target, one seed and one stream, so that both have predicted the same images in the same order"

SEEN = ("scanner", "shifts")
"""Keys of the target that change its images."""

RECORDED = ("backend", "versions", "machine", "device", "inputs", "experts", "absent", "per_sample", "bank", "initial_sha256")
"""Of a manifest, what may explain a difference."""

FINISHED_RUN = "expected the folder of a finished run, e.g. runs/organs-0"

LONGEST = 72
"""Characters of a value."""


@dataclass(frozen=True)
class KeptRun:
    """A finished run, as its folder has it. stored: arrays of `predictions.npz`, by name."""

    path: Path
    scenario: dict[str, Any]
    manifest: dict[str, Any]
    summary: dict[str, Any]
    stored: dict[str, NDArray[Any]]

    @property
    def methods(self) -> list[str]:
        """Rows of the run, in its order."""
        return [name.removeprefix("p:") for name in self.stored if name.startswith("p:")]

    @property
    def units(self) -> tuple[str, NDArray[np.int64], int | None]:
        """What intervals are over, as for a run's own report: patients where two or more are known, and otherwise batches."""
        patients = self.stored.get("patients")
        if patients is not None and len(np.unique(patients)) > 1:
            return "patients", patients, 1
        return "batches", self.stored["batch"], None


@dataclass(frozen=True)
class Beside:
    """One method in both runs, on the images that both have predicted. difference: of the second less the first."""

    method: str
    first: float
    second: float
    images: int
    difference: Difference
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Two runs. units: what intervals are over, and how many. changed: key, value in the first, value in the second."""

    first: KeptRun
    second: KeptRun
    units: tuple[str, int]
    rows: list[Beside]
    changed: list[tuple[str, str, str]]

    @property
    def alone(self) -> list[str]:
        """Methods of one run alone, in words."""
        pairs = ((self.first, self.second), (self.second, self.first))
        found = [(one, [name for name in one.methods if name not in other.methods]) for one, other in pairs]
        return [f"only in {one.path}: {', '.join(names)}" for one, names in found if names]


def kept_run(path: Path) -> KeptRun:
    """The run of a folder. Raises FolderError if it is no finished one."""
    with reading(path, "no run", FINISHED_RUN):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        refuse_unfinished(path, manifest)
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        scenario = yaml.safe_load((path / "scenario.yaml").read_text(encoding="utf-8"))
        found = KeptRun(path, scenario, manifest, summary, kept_arrays(path))
        compared = found.stored["batch"], found.units, int(summary["seed"]), list(_of_the_stream(found, found)), _facts(found)
        del compared  # all of it is there
    return found


def refuse_unfinished(path: Path, manifest: dict[str, Any]) -> None:
    """Raises FolderError if the run of a folder is not done, by its manifest."""
    if manifest.get("status") != "done":
        mend = "Give its command again, with --resume"
        raise FolderError(f"{path}: found a run that is {manifest.get('status', 'not finished')}; {FINISHED_RUN}. {mend}")


def compare(first: KeptRun, second: KeptRun) -> Comparison:
    """Set them side by side. Raises FolderError where they have not seen the same images in the same order."""
    _refuse_other_stream(first, second)
    over, units, length = first.units
    hits = {name: (_right(first, name), _right(second, name)) for name in first.methods if name in second.methods}
    found = []
    for name, ((there, right), (also, other)) in hits.items():
        if (common := there & also).any():
            seed = int(first.summary["seed"])
            one = paired(other[common], right[common], units[common], seed, length)
            found.append((name, float(right[common].mean()), float(other[common].mean()), int(common.sum()), one))
    adjusted = holm([one.p for *_, one in found]) if found else []
    rows = [Beside(*row, p) for row, p in zip(found, adjusted, strict=True)]
    if not rows:
        raise FolderError(
            f"{first.path} and {second.path}: found no method in both that has predicted the same images; expected one or more. "
            f"The first has {', '.join(first.methods)}; the second has {', '.join(second.methods)}"
        )
    return Comparison(first, second, (over, len(np.unique(units))), rows, _changed(first, second))


def _right(run: KeptRun, method: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(samples,): whether the method has predicted an image, and whether rightly."""
    p = run.stored[f"p:{method}"]
    return np.isfinite(p).all(1), p.argmax(1) == run.stored["labels"]


def _refuse_other_stream(first: KeptRun, second: KeptRun) -> None:
    """Raises FolderError with the first thing in which the streams differ."""
    for what, one, other in _of_the_stream(first, second):
        if one != other:
            said = f"another {what}: {_short(one)} in the first, {_short(other)} in the second"
            raise FolderError(f"{first.path} and {second.path}: found {said}; expected {SAME}")
    for name in ("labels", "batch"):
        if not np.array_equal(first.stored[name], second.stored[name]):
            raise FolderError(f"{first.path} and {second.path}: found other {name} in predictions.npz; expected {SAME}")


def _of_the_stream(*runs: KeptRun) -> Iterator[tuple[str, Any, Any]]:
    """What makes a stream, the plainest first: words, and what both runs have."""

    def of(what: str, *values: Any) -> tuple[str, Any, Any]:
        return what, values[0], values[1]

    names = [run.scenario["target"]["name"] for run in runs]
    yield of("target", *names)
    yield of("seed", *(run.summary["seed"] for run in runs))
    yield of("list of classes", *(run.manifest["classes"] for run in runs))
    inputs = [str(run.manifest.get("inputs", {}).get(f"site {name}"))[:12] for run, name in zip(runs, names, strict=True)]
    yield of("set of images at the target (by its digest)", *inputs)
    for key in SEEN:
        yield of(f"{key} of the target", *(run.scenario["target"].get(key) for run in runs))
    streams = [{key: value for key, value in run.scenario["stream"].items() if key != "max_batches"} for run in runs]
    for key in dict.fromkeys(key for stream in streams for key in stream):
        yield of(f"stream.{key}", *(stream.get(key) for stream in streams))
    yield of("number of images in the stream", *(run.summary["stream"]["samples"] for run in runs))
    yield of("order of the images (by its digest)", *(run.summary["stream"]["index_sha256"][:12] for run in runs))


def _changed(first: KeptRun, second: KeptRun) -> list[tuple[str, str, str]]:
    """Keys of the scenarios, and of what the manifests record, whose values differ."""
    return [(key, _short(one), _short(other)) for key, one, other in _differing(_facts(first), _facts(second), "")]


def _facts(run: KeptRun) -> dict[str, Any]:
    recorded = {key: run.manifest[key] for key in RECORDED if key in run.manifest}
    return {**{key: value for key, value in run.scenario.items() if key not in ("backend", "jobs")}, **recorded}


def _differing(one: Any, other: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Values that differ by their path of keys; items of lists by their names, where they have some."""
    pair = _named(one), _named(other)
    if one == other:
        return
    if pair[0] is None or pair[1] is None:
        yield key, one, other
        return
    for name in dict.fromkeys([*pair[0], *pair[1]]):
        yield from _differing(pair[0].get(name), pair[1].get(name), f"{key}.{name}" if key else name)


def _named(value: Any) -> dict[str, Any] | None:
    """A mapping, or a list of mappings by their names, and by numbers where they share one; None for what has no parts."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    found, times = {}, Counter[str]()
    for number, item in enumerate(value):
        only = next(iter(item)) if len(item) == 1 else None  # a plug-in by its name, as methods are
        inner = item[only] if only else item
        label = inner.get("label") if isinstance(inner, dict) else None
        name = str(label or only or item.get("name") or number)
        times[name] += 1
        found[name if times[name] == 1 else f"{name} ({times[name]})"] = inner
    return found


def _short(value: Any) -> str:
    """A value as a cell has it: nothing for none, and the beginning of a digest."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
