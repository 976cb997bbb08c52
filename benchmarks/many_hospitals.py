"""Many hospitals: accuracy and cost of methods by the number of experts, and what the federation's own work costs.

    python benchmarks/many_hospitals.py accuracy --hospitals 30          # and 100
    python benchmarks/many_hospitals.py cost                             # K = 3 to 1000 made-up experts
    python benchmarks/many_hospitals.py federation --hospitals 1000      # tiny models, backend local
    python benchmarks/many_hospitals.py picture --to docs/many-hospitals.svg

Hospitals are of the phantom, each with one plane or two, a scanner and shares of classes drawn. Times are CPU times of one process
and one thread, and worth something as ratios of one run. Everything goes to JSON files in `--out`, from which the picture is drawn.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from many_streams import Streams, schedule_of
from posterior import World

import fedmerge
from fedmerge.adaptation.expert_loader import Holding
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.site import Site
from fedmerge.merging.methods._base import load_method
from fedmerge.system.process import owners

app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="folder of worlds, pools and results")]
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "in_chans": 1}
STREAMS: dict[str, dict[str, Any]] = {
    "i.i.d.": {"kind": "iid"},
    "Dirichlet 1": {"kind": "dirichlet_batch", "delta": 1.0},
    "domain after domain": {"kind": "domain_seq", "within": {"kind": "iid"}},
    "smooth drift": {"kind": "mixture_drift", "drift": "smooth"},
}
COSTS: dict[str, dict[str, Any]] = {
    "image, active": {"active": "auto"},
    "batch, active": {"active": "auto", "granularity": "batch"},
    "batch, all": {"granularity": "batch"},
}
WARM, STEADY = 36, 8
"""Batches until all of a thousand experts have been asked once, and batches after them."""
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
METHODS: list[Any] = [
    "mean",
    "ensemble",
    "eam",
    "posterior",
    {"posterior": {"active": "auto", "label": "posterior-active"}},
    {"posterior": {"granularity": "batch", "label": "posterior-batch"}},
    {"posterior": {"granularity": "batch", "active": "auto", "label": "posterior-batch-active"}},
    "ttmm",
    {"ttmm": {"granularity": "batch", "label": "ttmm-batch"}},
    {"ttmm": {"beta": 0.004, "label": "ttmm-0.004"}},
]


@app.command()
def accuracy(
    hospitals: Annotated[int, typer.Option(help="how many")] = 30,
    seed: Annotated[int, typer.Option(help="of hospitals and training")] = 0,
    images: Annotated[int, typer.Option(help="of a hospital")] = 160,
    epochs: Annotated[int, typer.Option(help="of a hospital's training")] = 6,
    out: Out = Path("runs/many"),
) -> None:
    """Accuracy of every method on every stream of one federation."""
    began, folder = time.process_time(), out / f"world-{hospitals}-{seed}"
    file = World(sites=hospitals, skew=1.0, epochs=8).write(folder, seed)
    for site in sorted((folder / "sites").glob("drawn_*.yaml")):
        drawn = yaml.safe_load(site.read_text(encoding="utf-8"))
        drawn["source"] |= {"images": images, "patients": images // 8}
        site.write_text(yaml.safe_dump(drawn | {"samples": 0}), encoding="utf-8")
    lr = {"default": 1e-3, "draw": [1e-3]}
    training = {"runs": 1, "epochs": epochs, "optimizer": "adamw", "schedule": "cosine", "augment": "none", "diversity": {"lr": lr}}
    settings = (
        ("methods", METHODS), ("uploads", ["centroid"]), ("training", training), ("model.kwargs", MODEL), ("defenses", []),
        ("limits", {"growth": 1000}), ("backend", "local"),
    )  # fmt: skip
    plan = load_experiment(file, Overrides(seed=seed, settings=settings))
    streams = Streams(plan, out / f"pool-{hospitals}", folder / "run")
    typer.echo(f"{hospitals} hospitals trained and asked about all images: {time.process_time() - began:.0f} s of CPU")
    found = {}
    for name, spec in STREAMS.items():
        found[name] = {key: 100 * value for key, value in streams.accuracies(schedule_of({"batch_size": 32, **spec})).items()}
        typer.echo(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found[name].items()))
    _keep(out / f"accuracy-{hospitals}-{seed}.json", {"hospitals": hospitals, "seed": seed, "accuracy": found})
    typer.echo(f"{time.process_time() - began:.0f} s of CPU in all")


@app.command()
def cost(
    experts: Annotated[str, typer.Option(help="numbers of experts")] = "3,10,30,100,300,1000",
    kwargs: Annotated[str, typer.Option(help="of vit_tiny_patch16_224, as YAML; {} has 5.4 M parameters")] = "{}",
    max_bytes: Annotated[int, typer.Option(help="memory that the target may take")] = 2 * 10**9,
    every: Annotated[int, typer.Option(help="above so many experts, all of them see two batches and no more")] = 30,
    out: Out = Path("runs/many"),
) -> None:
    """CPU time of a batch by the number of experts, in a process of its own for each, over that of 10 experts."""
    given = {"img_size": 32, "patch_size": 8, "in_chans": 1, **yaml.safe_load(kwargs)}
    file = out / "cost.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for K in map(int, experts.split(",")):
        for name, fields in COSTS.items():
            batches = 2 if every < K and fields.get("active") != "auto" else WARM + STEADY
            with owners(1) as owner:
                one = owner.submit(_batches, K, given, fields, batches, max_bytes).result()
            found.append({"experts": K, "row": name, **one})
            typer.echo(str(found[-1]))
            _keep(file, found)


def _batches(K: int, kwargs: dict[str, Any], fields: dict[str, Any], batches: int, limit: int) -> dict[str, Any]:
    """One target with so many made-up experts: seconds of CPU, forwards and peak memory."""
    torch.set_num_threads(1)
    spec = ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)  # type: ignore[arg-type]
    method = load_method("posterior", **fields)
    source = {"kind": "organ_phantom", "images": 32 * batches, "patients": 32 * batches}
    site = Site.model_validate({"name": "mercy", "source": source})
    task = TargetTask(site, spec, ORGANS, schedule_of({"kind": "iid", "batch_size": 32}), (method,), 0, 1, max_bytes=limit)
    base = {name: tensor.numpy() for name, tensor in build(spec, len(ORGANS), seed=0).state_dict().items()}
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32) * np.float32(0.02)
    holding = Holding(task, base, K)
    for number in range(K):
        weights = {name: a + np.resize(np.roll(noise, 4099 * number), a.shape) for name, a in base.items()}
        holding.admit(Contribution(f"site{number:04d}", weights, 32, 1.0))
    target = TargetSite(task, holding, base)
    where, seconds, forwards = target.held["rows"], [], []
    for _ in range(batches):
        began = time.process_time()
        (step,) = target.advance(1)
        seconds.append(time.process_time() - began)
        forwards.append(step.forwards)
    later = slice(1, None) if batches == 2 else slice(WARM, None)  # the first makes what is merged once
    return {
        "parameters": target.bank.P,
        "rows": where,
        "first": seconds[0],
        "all": float(np.mean(seconds[1:])),
        "steady": float(np.median(seconds[later])),
        "forwards": float(np.mean(forwards[1:])),
        "steady_forwards": float(np.mean(forwards[later])),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@app.command()
def federation(
    hospitals: Annotated[str, typer.Option(help="numbers of hospitals")] = "100,1000",
    images: Annotated[int, typer.Option(help="of a hospital")] = 40,
    out: Out = Path("runs/many"),
) -> None:
    """CPU time of a whole run by the backend `local`, tiny models, and of the same run with all experts in the pool."""
    found = []
    for count in map(int, hospitals.split(",")):
        folder = out / f"federation-{count}"
        _tiny_world(folder, count, images)
        one: dict[str, Any] = {"hospitals": count}
        for turn in ("cold", "again"):
            began, clock = time.process_time(), time.perf_counter()
            fedmerge.run(folder / "scenarios" / "tiny.yaml", out=folder / turn, pool=folder / "pool", quiet=True)
            one |= {turn: time.process_time() - began, f"{turn}_clock": time.perf_counter() - clock}
            one[f"{turn}_phases"] = json.loads((folder / turn / "manifest.json").read_text(encoding="utf-8")).get("seconds")
        found.append(one)
        typer.echo(str(one))
        _keep(out / "federation.json", found)


def _tiny_world(folder: Path, count: int, images: int) -> None:
    rng = np.random.default_rng(count)
    for part in ("sites", "scenarios"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    source = {"kind": "organ_phantom", "images": images, "patients": images // 4}
    names = [f"site{number:04d}" for number in range(count)]
    for name in names:
        planes = [str(rng.choice(["axial", "coronal", "sagittal"]))]
        site = {"name": name, "source": {**source, "planes": planes}, "scanner": {"noise": float(rng.uniform(0.02, 0.1))}}
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    target = {"name": "mercy", "source": {**source, "images": 320, "patients": 80}}
    (folder / "sites" / "mercy.yaml").write_text(yaml.safe_dump(target), encoding="utf-8")
    scenario = {
        "name": "tiny",
        "backend": "local",
        "jobs": 1,
        "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
        "initialization": {"kind": "proxy", "source": {**source, "images": 200, "patients": 50}, "epochs": 2},
        "sites": names,
        "training": {"runs": 1, "epochs": 1, "optimizer": "adamw", "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}}},
        "uploads": ["centroid"],
        "target": "mercy",
        "stream": {"kind": "iid", "batch_size": 32},
        "methods": ["mean", {"posterior": {"active": "auto"}}, "ttmm"],
    }
    (folder / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(scenario), encoding="utf-8")


@app.callback()
def _verbs() -> None:
    """One verb a part."""


def _keep(file: Path, found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    app()
