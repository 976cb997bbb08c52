"""A small federation for real Flower processes on loopback, which `deployment.py` and `deployment_faults.py` measure."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "deployment")]

from credentials import node_key  # noqa: E402 - after the path is set
from loopback import DeploymentError, Ended, Loopback, last_words  # noqa: E402
from watch import descendants  # noqa: E402

__all__ = ["DeploymentError", "Ended", "Loopback", "descendants", "last_words", "node_key"]

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
PLANES = {"north": ["axial"], "south": ["coronal"], "east": ["sagittal"], "mercy": ["axial", "coronal"]}
SITES = ["north", "south", "east"]
SCENARIO: dict[str, Any] = {
    "name": "deployed",
    "seed": 3,
    "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
    "initialization": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": SITES,
    "training": {"runs": 1, "epochs": 4, "optimizer": "adamw", "deadline_s": 400},
    "target": "mercy",
    "stream": {"kind": "mixture_drift", "batch_size": 8},
    "methods": ["mean"],
}


def world(root: Path, scenario: dict[str, Any], images: int = 80) -> Path:
    """A scenario and its sites on the disk; the scenario's file."""
    for folder in ("sites", "scenarios"):
        (root / folder).mkdir(parents=True)
    for name, planes in PLANES.items():
        source = {"kind": "organ_phantom", "images": images, "patients": images // 5, "planes": planes}
        (root / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "source": source}), encoding="utf-8")
    file = root / "scenarios" / f"{scenario['name']}.yaml"
    file.write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return file


def experts(pool: Path) -> dict[str, str]:
    """sha256 of every expert's file, by the name of its entry: the site and the fingerprint."""
    found = sorted(pool.glob("experts/*/expert.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


@contextmanager
def deployed(out: Path, scenario: Path, absent: tuple[str, ...] = ()) -> Iterator[Loopback]:
    """Everything started, but the SuperNodes of some."""
    with Loopback(out, scenario) as here:
        here.prepare()
        here.start_link()
        for site in SITES:
            if site not in absent:
                here.register(site)
                here.start_node(site)
        yield here


def until(true: Callable[[], bool], within_s: float, what: str) -> float:
    """Wait for something; the seconds that it took. Raises DeploymentError."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > within_s:
            raise DeploymentError(f"{what}: not within {within_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - began
