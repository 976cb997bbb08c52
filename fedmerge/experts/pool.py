"""Experts on disk: safetensors and a manifest each, keyed by a fingerprint of all that determined them. None is trained twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import FolderError
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Item, Upload, state_digest

TRAINER_VERSION = 1
"""Raise it whenever the same task would train another expert."""


@dataclass(frozen=True)
class Expert:
    """One site's expert as the target gets it. runs: hyper-parameters and accuracy of every run. statistics: by kind."""

    site: str
    fingerprint: str
    weights: dict[str, Tensor]
    sha256: str
    n: int
    validation_accuracy: float
    temperature: float
    runs: list[dict[str, float]]
    samples: Tensor | None
    audit: list[dict[str, Any]]
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def fingerprint(task: SiteTask) -> str:
    """A sha256 of all that determines the expert of a task; what a site is called in prose, or shows, does not."""
    site = task.site
    determined: dict[str, Any] = {
        "trainer": TRAINER_VERSION,
        "site": site.name,
        "images": site.source.identity(site.name, task.seed),
        "scanner": site.scanner.model_dump(mode="json"),
        "validation": site.validation,
        "samples": site.samples,
        "model": task.model.model_dump(mode="json"),
        "training": task.training.model_dump(mode="json", exclude={"deadline_s"}),
        "classes": task.classes,
        "seed": task.seed,
        "initial": task.initial_sha256,
        "head_init": task.head_init,
    }
    if site.shifts:  # an expert of a time when there were no shifts is as good as ever
        determined["shifts"] = site.model_dump(mode="json")["shifts"]
    if site.attack:  # nor has an honest expert changed since some sites attack
        determined["attack"] = site.model_dump(mode="json")["attack"]
    return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()


class ExpertPool:
    """A folder with one folder for each expert. Two processes may use it at once: entries appear whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entry(self, task: SiteTask) -> Path:
        """The folder of a task's expert, whether it exists or not."""
        return self.path / "experts" / f"{task.site.name}-{fingerprint(task)[:16]}"

    def has(self, task: SiteTask) -> bool:
        """Whether the expert of this task is there."""
        return (self.entry(task) / "manifest.json").is_file()

    def add(self, task: SiteTask, upload: Upload, items: list[Item], seconds: float) -> None:
        """Keep an upload that has passed the audit, and the audit's lines with it."""
        from safetensors.torch import save_file

        entry = self.entry(task)
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
        save_file({name: tensor.contiguous() for name, tensor in upload.weights.items()}, draft / "expert.safetensors")
        if upload.samples is not None:
            save_file({"samples": upload.samples.contiguous()}, draft / "samples.safetensors")
        manifest = {
            "site": upload.site,
            "fingerprint": fingerprint(task),
            "sha256": state_digest(upload.weights),
            "scalars": upload.scalars,
            "seconds": round(seconds, 3),
            "audit": [asdict(item) for item in items],
            "task": task.model_dump(mode="json"),
        }
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        try:
            draft.rename(entry)
        except OSError:  # another process has added the same expert meanwhile
            shutil.rmtree(draft)

    def load(self, task: SiteTask) -> Expert:
        """The expert of a task, its digest verified. Raises FolderError if the entry is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        entry = self.entry(task)
        try:
            manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
            weights = load_file(entry / "expert.safetensors")
            shown = entry / "samples.safetensors"
            samples = load_file(shown)["samples"] if shown.exists() else None
            scalars: dict[str, float] = manifest["scalars"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise FolderError(f"{entry}: cannot be read ({error}); delete this folder and the site trains again") from None
        _verify(entry, manifest, fingerprint(task), weights)
        return Expert(
            site=task.site.name,
            fingerprint=manifest["fingerprint"],
            weights=weights,
            sha256=manifest["sha256"],
            n=int(scalars["n"]),
            validation_accuracy=scalars["validation_accuracy"],
            temperature=scalars["temperature"],
            runs=_runs(scalars),
            samples=samples,
            audit=manifest["audit"],
        )


def _verify(entry: Path, manifest: dict[str, Any], wanted: str, weights: dict[str, Tensor]) -> None:
    found = state_digest(weights)
    for what, here, there in (("fingerprint", manifest["fingerprint"], wanted), ("sha256", found, manifest["sha256"])):
        if here != there:
            mend = "the entry is damaged: delete this folder and the site trains again"
            raise FolderError(f"{entry}: {what}: found {here[:16]}; expected {there[:16]}; {mend}")
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise FolderError(f"{entry}: found NaN or infinity in {broken[0]}; delete this folder and the site trains again")


def _runs(scalars: dict[str, float]) -> list[dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for name, value in scalars.items():
        head, _, rest = name.partition(".")
        if head == "runs":
            number, _, field = rest.partition(".")
            rows.setdefault(int(number), {})[field] = value
    return [rows[number] for number in sorted(rows)]
