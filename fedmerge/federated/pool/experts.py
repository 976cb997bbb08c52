"""Experts on disk: safetensors and a manifest each, keyed by a fingerprint of all that determined them. None is trained twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.errors import FolderError, UploadRefused
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.pool.tensor_file import save
from fedmerge.federated.security.audit import Item, Seal, Upload, digest, scalar_digest
from fedmerge.federated.security.signing import signed_by
from fedmerge.federated.security.statement import contents, parsed
from fedmerge.federated.site import Site
from fedmerge.system.files import atomic_folder

TRAINER_VERSION = 1
"""Raise it whenever the same task would train another expert."""


@dataclass(frozen=True)
class Expert:
    """One site's expert as the target gets it. runs: hyper-parameters and accuracy of every run. statistics: by kind.

    signed: whether its upload was signed with the site's key, and still verifies. n, validation_accuracy: None where the upload is
    noised, for then no number is sent; the temperature is 1 and there are no runs.
    """

    site: str
    fingerprint: str
    weights: dict[str, Tensor]
    sha256: str
    n: int | None
    validation_accuracy: float | None
    temperature: float
    runs: list[dict[str, float]]
    samples: Tensor | None
    audit: list[dict[str, Any]]
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    signed: bool = False


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
        "training": task.training.model_dump(mode="json", exclude={"deadline_s", "retries"}),
        "classes": task.classes,
        "seed": task.seed,
        "initial": task.initial_sha256,
        "head_init": task.head_init,
    }
    if site.shifts:  # what a site does not do is left out, so that a new kind of it makes no expert another one
        determined["shifts"] = site.model_dump(mode="json")["shifts"]
    if task.own:
        determined["own"] = task.own
    if task.privacy:
        determined["privacy"] = task.privacy.model_dump(mode="json")
    if site.expert:  # nothing of how others train determines it
        determined |= {"training": None, "expert": {"sha256": site.expert.digest, "classes": site.expert.classes}}
    if site.attack:
        determined["attack"] = site.model_dump(mode="json")["attack"]
    return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()


class ExpertPool:
    """A folder with one folder for each expert. Two processes may use it at once: entries appear whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[int, tuple[SiteTask, Path]] = {}
        self._digests: dict[str, str] = {}

    def entry(self, task: SiteTask) -> Path:
        """The folder of a task's expert, whether it exists or not."""
        if id(task) not in self._entries:  # the task is kept, so that its number stays its own
            self._entries[id(task)] = task, self.path / "experts" / f"{task.site.name}-{fingerprint(task)[:16]}"
        return self._entries[id(task)][1]

    def has(self, task: SiteTask) -> bool:
        """Whether the expert of this task is there."""
        return (self.entry(task) / "manifest.json").is_file()

    def sha256(self, task: SiteTask) -> str:
        """The digest of a task's expert as its manifest has it, or nothing."""
        try:
            return str(json.loads((self.entry(task) / "manifest.json").read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def twin(self, sha256: str, tasks: Sequence[SiteTask]) -> str:
        """The first of these tasks whose expert has this digest, by its site's name, or nothing. Each manifest is read once."""
        with suppress(OSError):
            there = {entry.name for entry in os.scandir(self.path / "experts")}
            for task in tasks:
                name = self.entry(task).name
                if name in there and not self._digests.get(name):
                    self._digests[name] = self.sha256(task)
        return next((task.site.name for task in tasks if self._digests.get(self.entry(task).name) == sha256), "")

    def add(self, task: SiteTask, upload: Upload, items: list[Item], seconds: float) -> None:
        """Keep an upload that has passed the audit, and the audit's lines with it."""
        manifest = {
            "site": upload.site,
            "fingerprint": fingerprint(task),
            "sha256": upload.sha256,
            "scalars": upload.scalars,
            "seconds": round(seconds, 3),
            "audit": [item.as_line() for item in items],
            "task": task.model_dump(mode="json"),
            "statement": upload.seal.text,
            "signature": upload.seal.signature,
        }
        manifest["manifest_sha256"] = _digest(manifest)
        if not self.has(task):  # entries appear whole: what lies there is left of one that somebody has spoiled
            shutil.rmtree(self.entry(task), ignore_errors=True)
            self.entry(task).unlink(missing_ok=True)
        with atomic_folder(self.entry(task)) as draft:
            save(draft / "expert.safetensors", upload.weights)
            if upload.samples is not None:
                save(draft / "samples.safetensors", {"samples": upload.samples})
            (draft / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")

    def entry_of(self, site: str, sha256: str) -> Path | None:
        """The folder of an expert that a run has used, whatever images the site has now."""
        for manifest in sorted(self.path.glob(f"experts/{site}-*/manifest.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(manifest.read_text(encoding="utf-8"))["sha256"] == sha256:
                    return manifest.parent
        return None

    def load(self, task: SiteTask, entry: Path | None = None) -> Expert:
        """The expert of a task, its digest verified. Raises FolderError if the entry is damaged.

        entry: its folder, where it may be of images that the site has no more.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        wanted = "" if entry else fingerprint(task)
        entry = entry or self.entry(task)
        try:
            manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
            weights = load_file(entry / "expert.safetensors")
            shown = entry / "samples.safetensors"
            samples = load_file(shown)["samples"] if shown.exists() else None
            scalars: dict[str, float] = manifest["scalars"]
            seal = Seal(manifest["statement"], manifest["signature"])
            upload = Upload(task.site.name, weights, scalars, samples, seal=seal)
            _verify(entry, manifest, wanted or manifest["fingerprint"], upload)
            check_seal(seal, task.site)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UploadRefused) as error:
            raise FolderError(
                f"{entry}: found an entry that cannot be read ({error}); expected a whole one. Delete it, and the site trains again"
            ) from None
        return Expert(
            site=task.site.name,
            fingerprint=manifest["fingerprint"],
            weights=weights,
            sha256=manifest["sha256"],
            n=None if task.privacy else int(scalars["n"]),
            validation_accuracy=None if task.privacy else scalars["validation_accuracy"],
            temperature=1.0 if task.privacy else scalars["temperature"],
            runs=_runs(scalars),
            samples=samples,
            audit=manifest["audit"],
            signed=bool(seal.signature),
        )


def check_seal(seal: Seal, site: Site) -> None:
    """Raises ValueError if a signature is not by the key of the site's file. Without one, the site had no key then."""
    if seal.signature and site.public_key and not signed_by(site.public_key, seal.signed_text, seal.signature):
        raise ValueError("its signature is not by the key that the site's file has now")


def _verify(entry: Path, manifest: dict[str, Any], wanted: str, upload: Upload) -> None:
    weights, audited = upload.weights, {line["item"]: line["sha256"] for line in manifest["audit"]}
    pairs = [("fingerprint", manifest["fingerprint"], wanted), ("sha256", upload.sha256, manifest["sha256"])]
    pairs += [(name, scalar_digest(value), audited.get(name, "nothing")) for name, value in upload.scalars.items()]
    shown = digest(upload.samples) if upload.samples is not None else "nothing"
    pairs.append(("samples", shown, audited.get("samples", "nothing")))
    pairs.append(("manifest", _digest(manifest), manifest["manifest_sha256"]))
    for what, here, there in pairs:
        if here != there:
            mend = "The entry is damaged. Delete it, and the site trains again"
            raise FolderError(f"{entry}: {what}: found {here[:16]}; expected {there[:16]}. {mend}")
    if upload.seal.text:
        facts = {name: fact for name, fact in contents(upload).items() if name in ("weights", "scalars", "samples")}
        if differ := parsed(upload.seal, upload.site).differences(facts):
            raise ValueError(f"its {differ[0]} are not what the site has stated")
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise FolderError(
            f"{entry}: found NaN or infinity in {broken[0]}; expected finite numbers. Delete it, and the site trains again"
        )


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _runs(scalars: dict[str, float]) -> list[dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for name, value in scalars.items():
        head, _, rest = name.partition(".")
        if head == "runs":
            number, _, field = rest.partition(".")
            rows.setdefault(int(number), {})[field] = value
    return [rows[number] for number in sorted(rows)]
