"""The folder of one run: claimed by one process, never shared by two scenarios, readable at any moment."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from filelock import FileLock

from fedmerge.errors import FolderError
from fedmerge.experiment.experiment import WITHOUT_EFFECT, Experiment
from fedmerge.experiment.scenario import LIMITS, Scenario
from fedmerge.federated.site import Site
from fedmerge.report.comparison import FINISHED_RUN, refuse_unfinished
from fedmerge.system.files import atomic_write, reading, see_that_writable
from fedmerge.system.process import cores, free_lock

RECORDED_PACKAGES = ("fedmerge", "torch", "torchvision", "timm", "flwr", "ray", "numpy", "pydantic", "safetensors")


class RunFolder:
    """`scenario.yaml` (resolved) and `manifest.json` of a run; the other files are written by their rooms.

    keep: what an interrupted run wrote stays. Use it as a context: it is locked while open, and the manifest says how the
    run ended.
    Raises FolderError if the folder holds another scenario's run, or another process is running there.
    """

    def __init__(self, path: Path, experiment: Experiment, keep: bool = False) -> None:
        self.path, self.experiment, self.keep = path, experiment, keep
        self.manifest: dict[str, Any] = {
            "status": "running",
            "scenario": experiment.scenario.name,
            "scenario_sha256": experiment.sha256(),
            "seed": experiment.scenario.seed,
            "backend": experiment.scenario.backend,
            "classes": list(experiment.classes),
            "target_classes": list(experiment.target_classes),
            "inputs": experiment.inputs(),
            "versions": _versions(),
            "machine": _machine(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "training_precision": experiment.scenario.training.precision,
            "phases_seconds": {},
        }
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        _refuse_other_scenario(self.path, self.experiment)
        see_that_writable(self.path, "--out")
        self._lock = free_lock(self.path / ".lock")
        if self._lock is None:
            raise FolderError(
                f"{self.path}: found another process that writes here; expected a folder for this run alone. Choose another --out"
            )
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def _begin(self) -> None:
        """The files of a run that has just begun."""
        if not self.keep:
            (self.path / "audit.jsonl").unlink(missing_ok=True)
        (self.path / "audit.jsonl").touch()
        _mend_last_line(self.path / "audit.jsonl")
        text = yaml.safe_dump(self.experiment.resolved(), sort_keys=False, allow_unicode=True)
        atomic_write(self.path / "scenario.yaml", text)
        self.status.unlink(missing_ok=True)
        self._write()

    def _release(self) -> None:
        if self._lock:
            self._lock.release()

    @property
    def status(self) -> Path:
        """What the run is at, for `fedmerge watch`."""
        return self.path / "status.json"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.manifest["status"] = "done" if kind is None else "failed"
        if error is not None:
            self.manifest["reason"] = str(error) or type(error).__name__
        self.manifest["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._write()
        finally:  # on a full disk, too: a notebook may try again
            self._release()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase into the manifest, whether it succeeds or not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.manifest["phases_seconds"][name] = round(time.perf_counter() - began, 3)
            self._write()

    def _write(self) -> None:
        atomic_write(self.path / "manifest.json", json.dumps(self.manifest, indent=2))


def reopened(path: Path) -> tuple[Experiment, dict[str, Any]]:
    """The plan and the manifest of a finished run, as they were. Raises FolderError if there is none, or it cannot be read."""
    with reading(path, "no run", FINISHED_RUN):
        content = yaml.safe_load((path / "scenario.yaml").read_text(encoding="utf-8"))
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        founders, joining = content["sites"], content.pop("joining", [])
        sites = tuple(Site.model_validate(site) for site in [*founders, *joining])
        whole = content["target"]
        limits = {key: whole.pop(key) for key in {*LIMITS, "classes"} & whole.keys()}
        target = Site.model_validate(whole)
        names = {"sites": [site["name"] for site in founders], "target": {"site": target.name, **limits}}
        scenario = Scenario.model_validate({**content, **names})
        classes = tuple(manifest["classes"])
        experiment = Experiment(scenario, sites, target, classes, tuple(manifest.get("target_classes", classes)))
    refuse_unfinished(path, manifest)
    return experiment, manifest


def _mend_last_line(file: Path) -> None:
    """Cut off a line that a killed run has begun and not ended: what it told of was not admitted."""
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)  # which no kill leaves half done


def _refuse_other_scenario(path: Path, experiment: Experiment) -> None:
    file = path / "scenario.yaml"
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path}: found a file; expected a folder for the run. Choose another --out")
    if not file.exists():
        if path.is_dir() and any(item.name != ".lock" for item in path.iterdir()):
            raise FolderError(f"{path}: found files that are no run; expected an empty folder. Choose another --out")
        return
    new = json.loads(json.dumps(experiment.resolved()))
    with reading(file, "a file that cannot be read", "expected the scenario of a run. Choose another --out, or delete the folder"):
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
        differs = sorted(key for key in {*old, *new} - WITHOUT_EFFECT if old.get(key) != new.get(key))
    if differs:
        raise FolderError(
            f"{path}: found the run of another scenario (differs in: {', '.join(differs)}); expected "
            f"'{experiment.scenario.name}' with the same content. Choose another --out, or delete the folder"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _machine() -> dict[str, Any]:
    """What may explain a difference in timing and in the last bits; nothing that names the machine or its user."""
    import torch

    return {
        "system": platform.system(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "cores": cores(),
        "byte_order": sys.byteorder,
    }


def _processor() -> str:
    """The processor's kind: sums are added up in another order on another, and a run gives other last bits."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
