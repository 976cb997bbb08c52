"""Data sets larger than memory: what a hospital and a target hold of their images, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.image_folder import ImageFolder

FEW, MANY, SIDE = 400, 1000, 224
MORE = (MANY - FEW) * SIDE * SIDE * 3
"""Bytes of the pixels that many images have more than few."""

MODEL = {"img_size": SIDE, "patch_size": 112, "embed_dim": 16, "depth": 1, "num_heads": 2}

MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.federated.client.site_training import measured_statistic, open_ward, train_runs
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.site import Site
from fedmerge.federated.statistics.gram import Gram
from fedmerge.merging.methods._base import load_method
from fedmerge.stream.schedules._base import SCHEDULES

def held():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")) * 1024

most = 0
def look():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.005)

def peaks(root, name):
    global most
    source = {"kind": "image_folder", "root": root}
    site = Site.model_validate({"name": name, "source": source, "scanner": {"noise": 0.1}})
    training = {"runs": 1, "epochs": 1, "evaluations": 1, "augment": "none", "batch_size": 8}
    task = SiteTask(site=site, model=spec, training=training, classes=("a", "b"), seed=0, initial_sha256="", head_init="zero")
    most = held()
    ward, model = open_ward(task)
    train_runs(task, weights, ward, lambda *_: None)
    measured_statistic(task, Gram(), model, ward, list)
    print(most)
    del ward
    most = held()
    stream, methods = SCHEDULES.load("iid")(batch_size=8), (load_method("mean"), load_method("ensemble"))
    target = TargetTask(site, spec, ("a", "b"), stream, methods, 0, 1)
    consumer = TargetSite(target, [Contribution(name, arrays, 10, 1.0) for name in "ab"], arrays)
    while consumer.advance(4): pass
    print(most)

spec = ModelSpec(name="vit_tiny_patch16_224", kwargs=eval(sys.argv[1]))
weights = build(spec, 2, seed=0).state_dict()
arrays = {name: tensor.numpy() for name, tensor in weights.items()}
threading.Thread(target=look, daemon=True).start()
for name, root in zip(("few", "many"), sys.argv[2:]): peaks(root, name)
"""


LOAD = """
import sys
from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.image_folder import ImageFolder
ImageFolder(root=sys.argv[1]).load(Geometry(16, 3), "x", 0)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "x"


def folder_of(root: Path, count: int, side: int) -> Path:
    """Two classes of uncompressed images, no two of them alike."""
    noise = np.random.default_rng(0).integers(0, 256, side * side * 3, np.uint8)
    for number in range(count):
        file = root / "ward" / "ab"[number % 2] / f"{number}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P6 %d %d 255\n" % (side, side) + np.roll(noise, number).tobytes())
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_neither_hospital_nor_target_holds_its_images(tmp_path: Path) -> None:
    """Not even their pixels, let alone floats of four times as many bytes: with more images the peaks stay where they are."""
    roots = [folder_of(tmp_path / str(count), count, SIDE) for count in (FEW, MANY)]
    command = [sys.executable, "-c", MEASURED, repr(MODEL), *map(str, roots)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stderr == ""
    hospital, target, hospital_of_many, target_of_many = map(int, found.stdout.split())
    print(found.stdout)
    assert max(hospital_of_many - hospital, target_of_many - target) < MORE / 2


def test_a_process_that_is_killed_half_way_leaves_nothing_that_is_read(tmp_path: Path, cache: Path) -> None:
    root = folder_of(tmp_path / "images", 300, 16)
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(root)])
    while not list(cache.glob(".*.npy-*.draft")):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(cache.glob(".*.npy-*.draft")) and not list(cache.glob("*.npy"))
    again = ImageFolder(root=str(root)).load(Geometry(16, 3), "x", 0)
    plain = np.stack(
        [np.fromfile(root / "ward" / "ab"[n % 2] / f"{n}.ppm", np.uint8)[-768:].reshape(16, 16, 3) for n in range(300)]
    )
    order = sorted(range(300), key=lambda n: f"ward/{'ab'[n % 2]}/{n}.ppm")
    assert np.array_equal(again.pixels, plain[order])
    assert not list(cache.glob(".*draft"))
