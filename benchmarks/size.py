"""What a hospital and a target hold of many images, and what reading them costs. Figures are in docs/size.md.

    python benchmarks/size.py hospital --images 50000
    python benchmarks/size.py target --images 100000 --side 64 --batch-size 100 --kill

Each makes a folder of JPEG files, once, and then works on it as a federation would, in a process of its own that is watched from
outside: anonymous memory is what is really held; pages of files, which `max RSS` counts too, go when memory is short.
Linux only: memory is read from /proc.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - after the path to this checkout
import typer  # noqa: E402

from fedmerge.system.process import cores, owners  # noqa: E402

CLASSES = ("benign", "malignant")
PART = 500
"""Files that one process writes at a time."""

BLOCK, BLOCKS = 4, 5
"""Steps of training that are timed together, and how often, in turns with and without reading."""

EVERY_S = 0.1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Images = Annotated[int, typer.Option(min=100)]
Side = Annotated[int, typer.Option(min=32, help="of the images, pixels")]
Out = Annotated[Path, typer.Option(help="images and their cache")]
Model = Annotated[str, typer.Option(help="timm's name")]
Kwargs = Annotated[str, typer.Option(help="of the model, JSON")]


@app.command()
def hospital(
    images: Images = 50_000,
    side: Side = 224,
    out: Out = Path("runs/size"),
    model: Model = "vit_tiny_patch16_224",
    kwargs: Kwargs = "{}",
    augment: Annotated[str, typer.Option(help="full, light or none")] = "none",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """One epoch of a hospital's training."""
    folder = _folder(out, images, side)
    asked = {"folder": str(folder), "model": model, "kwargs": json.loads(kwargs), "augment": augment, "side": side}
    asked |= {"batch_size": batch_size}
    told = _watched("hospital", asked, out)
    typer.echo(f"hospital, {images} images of {side} pixels, {told['parameters'] / 1e6:.2f} M parameters:")
    typer.echo(f"  decoded in {told['decode_s']:.0f} s; epoch of {told['steps']} steps in {told['epoch_s']:.0f} s")
    _tell_peaks(told, images * side * side * 3)


@app.command()
def pace(
    images: Images = 1000,
    side: Side = 224,
    out: Out = Path("runs/size"),
    model: Model = "tf_efficientnet_lite0",
    kwargs: Kwargs = "{}",
    augment: Annotated[str, typer.Option(help="full, light or none")] = "none",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Seconds of a training step, and of the same step for tensors that are in memory, in turns: what reading costs."""
    asked = {"folder": str(_folder(out, images, side)), "model": model, "kwargs": json.loads(kwargs), "augment": augment}
    asked |= {"batch_size": batch_size, "side": side}
    told = _watched("pace", asked, out)
    typer.echo(
        f"{model}, {told['parameters'] / 1e6:.2f} M parameters, {side} pixels, {augment} augmentation, seconds a step (medians):\n"
        f"  {told['wall'][0]:.3f} with reading, {told['wall'][1]:.3f} from memory, ratio {told['wall'][0] / told['wall'][1]:.3f}; "
        f"of processors {told['cpu'][0]:.3f} and {told['cpu'][1]:.3f}, ratio {told['cpu'][0] / told['cpu'][1]:.3f}"
    )


@app.command()
def target(
    images: Images = 100_000,
    side: Side = 64,
    out: Out = Path("runs/size"),
    model: Model = "vit_tiny_patch16_224",
    kwargs: Kwargs = '{"patch_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 2}',
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    kill: Annotated[bool, typer.Option(help="the process half-way, and let another go on; then compare")] = False,
) -> None:
    """A whole run, to its report, of two hospitals with 200 images and a target with many."""
    run = out.resolve() / f"target-{images}-{side}"
    asked = {"scenario": str(_scenario(run, images, side, model, json.loads(kwargs), batch_size))}
    told = _watched("target", asked | {"run": str(run / "whole")}, out)
    typer.echo(f"target, {images} images of {side} pixels, {told['batches']} batches, {told['parameters'] / 1e6:.2f} M parameters:")
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in told["phases"].items())
    typer.echo(f"  {phases}; {told['cpu']:.0f} s of processors")
    _tell_peaks(told, images * side * side * 3)
    if kill:
        half = _watched("target", asked | {"run": str(run / "killed")}, out, kill_at=told["batches"] // 2)
        again = _watched("target", asked | {"run": str(run / "killed")}, out)
        same = "the same" if again["sha256"] == told["sha256"] else "OTHER"
        typer.echo(f"  killed after {half['batches']} of {told['batches']} batches and run again: {same} predictions")
        _tell_peaks(again, images * side * side * 3)


def _tell_peaks(told: dict[str, Any], pixels: int) -> None:
    all_of_them = f"all pixels are {pixels / 2**20:.0f} MiB, as floats {pixels / 2**18:.0f} MiB"
    typer.echo(f"  before the images: anonymous {told['before']:.0f} MiB; {all_of_them}")
    for name, (anonymous, shared, resident) in told["peaks"].items():
        typer.echo(f"  peak of {name}: anonymous {anonymous:.0f} MiB, PSS {shared:.0f} MiB, max RSS {resident:.0f} MiB")


def _scenario(run: Path, images: int, side: int, model: str, kwargs: dict[str, Any], batch_size: int) -> Path:
    """A scenario, its three sites and theta_0, in the run's folder, which is emptied."""
    from safetensors.torch import save_file

    from fedmerge.federated.model import build

    shutil.rmtree(run, ignore_errors=True)
    (run / "sites").mkdir(parents=True)
    spec = _model(model, kwargs, side)
    weights = build(spec, len(CLASSES), seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, run / "theta_0.safetensors")
    for name, count in (("north", 200), ("south", 202), ("ward", images)):
        source = {"kind": "image_folder", "root": str(_folder(run.parent, count, side))}
        (run / "sites" / f"{name}.yaml").write_text(json.dumps({"name": name, "source": source}), encoding="utf-8")
    scenario = {
        "name": "size",
        "model": spec.model_dump(mode="json", exclude_defaults=True),
        "initialization": {"kind": "checkpoint", "path": str(run / "theta_0.safetensors")},
        "sites": ["sites/north.yaml", "sites/south.yaml"],
        "training": {"runs": 1, "epochs": 1},
        "target": "sites/ward.yaml",
        "stream": {"kind": "iid", "batch_size": batch_size},
        "methods": ["mean", "ensemble", "eam"],
    }
    (run / "scenario.yaml").write_text(json.dumps(scenario), encoding="utf-8")
    return run / "scenario.yaml"


def _folder(out: Path, images: int, side: int) -> Path:
    """So many files, half of each class; those that are there stay."""
    folder = (out / f"images-{images}-{side}").resolve()
    for label in CLASSES:
        (folder / "ward" / label).mkdir(parents=True, exist_ok=True)
    parts = [(str(folder), start, min(start + PART, images), side) for start in range(0, images, PART)]
    left = [part for part in parts if not _file(folder, part[2] - 1).exists()]
    with owners(cores()) as writers:
        list(writers.map(write_images, left))
    return folder


def _file(folder: Path, number: int) -> Path:
    return folder / "ward" / CLASSES[number % 2] / f"{number:06d}.jpg"


def write_images(part: tuple[str, int, int, int]) -> None:
    """Soft blots, warmer in one class; no two images are alike."""
    from PIL import Image

    folder, start, stop, side = part
    for number in range(start, stop):
        rng = np.random.default_rng(number)
        small = rng.integers(60, 190, (12, 12, 3)) + np.array([40, 0, 0]) * (number % 2)
        image = Image.fromarray(small.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        image.save(_file(Path(folder), number), quality=90)


def _watched(work: str, asked: dict[str, Any], out: Path, kill_at: int = 0) -> dict[str, Any]:
    """What a process tells that does the work, and the peaks of it and of those that it starts.

    kill_at: batches of a stream after which the process is killed; then the batches that are in its log.
    """
    environment = {**os.environ, "FEDMERGE_CACHE": str(out.resolve() / "cache")}
    process = subprocess.Popen(
        [sys.executable, __file__, "work", work, json.dumps(asked)], stdout=subprocess.PIPE, text=True, env=environment
    )
    peaks: dict[str, list[float]] = {}
    while process.poll() is None:
        for pid, name in [(process.pid, work), *((child, "a decoding process") for child in _children(process.pid))]:
            with suppress(OSError, ValueError):
                status, rollup = _fields(f"/proc/{pid}/status"), _fields(f"/proc/{pid}/smaps_rollup")
                seen = [status["RssAnon"], rollup["Pss"], status["VmHWM"]]
                peaks[name] = [max(pair) for pair in zip(peaks.get(name, [0.0] * 3), seen, strict=True)]
        if kill_at and (done := _batches(asked["run"])) >= kill_at:
            process.kill()
            process.wait()
            return {"batches": done}
        time.sleep(EVERY_S)
    assert process.stdout
    said = process.stdout.read()
    if process.returncode != 0:
        raise typer.Exit(process.returncode)
    return {**json.loads(said.splitlines()[-1]), "peaks": peaks}


def _batches(run: str) -> int:
    """Batches in the log of a run."""
    file = Path(run, "batches.jsonl")
    return int(json.loads(file.read_bytes().splitlines()[-2])["t"]) + 1 if file.exists() and file.stat().st_size > 1000 else 0


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def _fields(file: str) -> dict[str, float]:
    """MiB by name."""
    lines = [line.split() for line in Path(file).read_text(encoding="ascii", errors="replace").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


@app.command(hidden=True)
def work(what: str, asked: str) -> None:
    """In the process that is watched."""
    typer.echo(json.dumps({"hospital": _train, "pace": _pace, "target": _stream}[what](json.loads(asked))))


def _model(name: str, kwargs: dict[str, Any], side: int) -> Any:
    """The model for images of so many pixels: transformers are built for a size, others take any."""
    from fedmerge.federated.model import ModelSpec

    size = {"kwargs": kwargs | {"img_size": side}} if name.startswith("vit") else {"kwargs": kwargs, "size": side}
    return ModelSpec.model_validate({"name": name, **size})


def _task(asked: dict[str, Any]) -> Any:
    from fedmerge.federated.messages import SiteTask
    from fedmerge.federated.site import Site

    rates = {"lr": {"default": 1e-3, "draw": [1e-3]}}
    training = {"runs": 1, "epochs": 1, "max_steps": 10**9, "evaluations": 1, "diversity": rates}
    training |= {name: asked[name] for name in ("augment", "batch_size") if name in asked}
    return SiteTask.model_validate(
        {
            "site": Site.model_validate({"name": "ward", "source": {"kind": "image_folder", "root": asked["folder"]}}),
            "model": _model(asked["model"], asked["kwargs"], asked["side"]),
            "training": training,
            "classes": CLASSES,
            "seed": 0,
            "initial_sha256": "",
            "head_init": "zero",
        }
    )


def _train(asked: dict[str, Any]) -> dict[str, Any]:
    from fedmerge.federated.client.site_training import model_of, open_ward, steps_of, train_runs

    task = _task(asked)
    theta_0 = {name: tensor.clone() for name, tensor in model_of(task).state_dict().items()}
    before, began = _held(), time.perf_counter()
    ward, _ = open_ward(task)
    decoded = time.perf_counter()
    train_runs(task, theta_0, ward, lambda *_: None)
    return {
        "before": before,
        "decode_s": decoded - began,
        "epoch_s": time.perf_counter() - decoded,
        "steps": steps_of(task.training, len(ward.train.y))[1],
        "parameters": sum(tensor.numel() for tensor in theta_0.values()),
    }


def _pace(asked: dict[str, Any]) -> dict[str, Any]:
    """Wall-clock and processor seconds of a step, with reading and from memory: medians of blocks that take turns."""
    from dataclasses import replace

    from fedmerge.federated.client.site_training import open_ward
    from fedmerge.federated.client.trainer import LabeledImages, Recipe, fit

    task = _task(asked)
    ward, model = open_ward(task)
    training = task.training
    recipe = Recipe(1e-4, 0.0, BLOCK, training.batch_size, "adam", "constant", training.augment, flips=False)
    first = slice(0, BLOCK * training.batch_size)
    held = LabeledImages(ward.train.x[first], ward.train.y[first])
    fit(model, held, replace(recipe, steps=1), 0, lambda _: None)
    seconds: list[list[list[float]]] = [[], []]
    for number in range(BLOCKS):
        for kind, data in enumerate((ward.train, held)):
            wall, processor = time.perf_counter(), time.process_time()
            fit(model, data, recipe, number, lambda _: None)
            seconds[kind].append([(time.perf_counter() - wall) / BLOCK, (time.process_time() - processor) / BLOCK])
    wall, cpu = ([statistics.median(block[at] for block in kind) for kind in seconds] for at in range(2))
    return {"wall": wall, "cpu": cpu, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def _stream(asked: dict[str, Any]) -> dict[str, Any]:
    import fedmerge
    from fedmerge.experiment.run import run_experiment  # noqa: F401 - what a run needs is there before memory is looked at

    before, run = _held(), Path(asked["run"])
    found = fedmerge.run(asked["scenario"], backend="local", out=run, pool=run / "pool", quiet=True, threads=1, resume=run.exists())
    with np.load(run / "predictions.npz") as stored:
        digest = hashlib.sha256(b"".join(stored[name].tobytes() for name in sorted(stored.files))).hexdigest()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return {
        "before": before,
        "batches": found.summary["stream"]["batches"],
        "phases": manifest["phases_seconds"],
        "cpu": time.process_time(),
        "parameters": sum(item.nbytes for item in _weights(run)) // 4,
        "sha256": digest,
    }


def _weights(run: Path) -> list[Any]:
    from safetensors.numpy import load_file

    return list(load_file(run.parent / "theta_0.safetensors").values())


def _held() -> float:
    return _fields("/proc/self/status")["RssAnon"]


if __name__ == "__main__":
    app()
