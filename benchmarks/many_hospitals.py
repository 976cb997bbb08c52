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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from many_streams import Streams, schedule_of
from posterior import World

from fedmerge.adaptation.expert_loader import Holding
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.experiment.experiment import Experiment, Overrides, RunOptions, load_experiment
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, site_task
from fedmerge.federated.client.worker import answer
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.server.collect import collect, incomplete
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.site import Site
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.scoring.active import FEW, WIDE
from fedmerge.report.terminal import Terminal

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
STEADY = 6
"""Batches that are measured once all experts have been asked."""
STEP = 50
"""Hospitals that are asked at a time."""
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
METHODS: list[Any] = [
    "mean",
    "ensemble",
    "eam",
    "posterior",
    {"posterior": {"active": "auto", "label": "posterior-active"}},
    {"posterior": {"granularity": "batch", "label": "posterior-batch"}},
    {"posterior": {"granularity": "batch", "active": "auto", "label": "posterior-batch-active"}},
    {"posterior": {"em": False, "label": "no-em"}},
    {"posterior": {"em": False, "active": "auto", "label": "no-em-active"}},
    "ttmm",
    {"ttmm": {"granularity": "batch", "label": "ttmm-batch"}},
    {"ttmm": {"beta": 0.004, "label": "ttmm-0.004"}},
]


@app.command()
def accuracy(
    hospitals: Annotated[int, typer.Option(help="how many take part")] = 30,
    of: Annotated[int, typer.Option(help="of how many that are drawn, so that 30 and 100 have one pool")] = 100,
    seed: Annotated[int, typer.Option(help="of hospitals and training")] = 0,
    images: Annotated[int, typer.Option(help="of a hospital")] = 96,
    epochs: Annotated[int, typer.Option(help="of a hospital's training")] = 8,
    only: Annotated[list[str] | None, typer.Option(help="this stream; once for each")] = None,
    out: Out = Path("runs/many"),
) -> None:
    """Accuracy of every method on every stream of one federation. What a file of `--out` has already is not measured again."""
    began, file = time.process_time(), out / f"accuracy-{hospitals}-{seed}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    left = {name: spec for name, spec in STREAMS.items() if name not in found and (not only or name in only)}
    if not left:
        return
    plan = drawn(out, hospitals, of, seed, images, epochs)
    streams = Streams(plan, out / "pool", out / f"run-{hospitals}")
    typer.echo(f"{hospitals} hospitals trained and asked about all images: {time.process_time() - began:.0f} s of CPU")
    for name, spec in left.items():
        found[name] = {key: 100 * value for key, value in streams.accuracies(schedule_of({"batch_size": 32, **spec})).items()}
        typer.echo(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in found[name].items()))
        _keep(file, found)
    typer.echo(f"{time.process_time() - began:.0f} s of CPU in all")


def drawn(out: Path, hospitals: int, of: int, seed: int, images: int, epochs: int) -> Experiment:
    """A federation of the phantom: planes, scanners and shares of classes are drawn."""
    folder = out / f"world-{hospitals}-{seed}"
    file = World(sites=of, skew=1.0, epochs=8).write(folder, seed)
    scenario = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(scenario | {"sites": scenario["sites"][:hospitals]}), encoding="utf-8")
    for site in sorted((folder / "sites").glob("drawn_*.yaml")):
        content = yaml.safe_load(site.read_text(encoding="utf-8"))
        content["source"] |= {"images": images, "patients": images // 8}
        site.write_text(yaml.safe_dump(content | {"samples": 0}), encoding="utf-8")
    lr = {"default": 1e-3, "draw": [1e-3]}
    training = {"runs": 1, "epochs": epochs, "optimizer": "adamw", "schedule": "cosine", "augment": "none", "diversity": {"lr": lr}}
    settings = (
        ("methods", METHODS), ("uploads", ["centroid"]), ("training", training), ("model.kwargs", MODEL), ("defenses", []),
        ("limits", {"growth": 1000}), ("backend", "local"),
    )  # fmt: skip
    return load_experiment(file, Overrides(seed=seed, settings=settings))


@app.command()
def cost(
    experts: Annotated[str, typer.Option(help="numbers of experts")] = "3,10,30,100,300,1000",
    kwargs: Annotated[str, typer.Option(help="of vit_tiny_patch16_224, as YAML; {} has 5.4 M parameters")] = "{}",
    max_bytes: Annotated[int, typer.Option(help="memory that the target may take")] = 2 * 10**9,
    every: Annotated[int, typer.Option(help="experts above which the row of all is left out")] = 100,
    out: Out = Path("runs/many"),
) -> None:
    """CPU time of a batch by the number of experts; what `--out` has is not measured again."""
    given = {"img_size": 32, "patch_size": 8, "in_chans": 1, **yaml.safe_load(kwargs)}
    file = out / "cost.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for K in map(int, experts.split(",")):
        for name, fields in COSTS.items():
            selects = fields.get("active") == "auto"
            if any((one["experts"], one["row"]) == (K, name) for one in found) or (not selects and every < K):
                continue
            warm = K // WIDE + 3 if K > FEW and selects else 1
            found.append({"experts": K, "row": name, **_batches(K, given, fields, (warm, STEADY), max_bytes)})
            typer.echo(str(found[-1]))
            _keep(file, found)


def _batches(K: int, kwargs: dict[str, Any], fields: dict[str, Any], count: tuple[int, int], limit: int) -> dict[str, Any]:
    """One target with so many made-up experts: seconds of CPU and forwards of a batch, and memory of its own at the end."""
    torch.set_num_threads(1)
    warm, batches = count[0], sum(count)
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
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "parameters": target.bank.P,
        "rows": where,
        "first": seconds[0],  # with what is merged once
        "warm": float(np.mean(seconds[1:warm])) if warm > 1 else None,
        "warm_forwards": float(np.mean(forwards[:warm])),
        "steady": float(np.median(seconds[warm:])),
        "steady_forwards": float(np.mean(forwards[warm:])),
        "own_memory": own,
    }


@app.command()
def federation(
    hospitals: Annotated[int, typer.Option(help="number of hospitals")] = 1000,
    images: Annotated[int, typer.Option(help="of a hospital")] = 24,
    seconds: Annotated[float, typer.Option(help="of CPU, after which it stops; started again, it goes on")] = 3600,
    out: Out = Path("runs/many"),
) -> None:
    """Hospitals with tiny models end in the pool by the backend `local`; CPU time of every operation, by how many there are."""
    began, folder = time.process_time(), out / "federation"
    request = RunOptions(out=folder / f"run-{hospitals}", pool=folder / "pool", quiet=True)
    request.out.mkdir(parents=True, exist_ok=True)
    took: dict[str, float] = {}
    with _timed(took, "load and check the scenario"):
        plan = load_experiment(_tiny_world(folder, hospitals, images))
        plan.remarks()
    initial = make_theta_0(plan, request, Terminal(quiet=True))
    with _timed(took, "make the tasks"):
        tasks = tuple(site_task(plan, number, initial) for number in range(hospitals))
    job = job_of(plan, tasks, initial, request)
    with _timed(took, "find the hospitals to ask"):
        left = incomplete(job)
    place, trained = out / "federation.json", list[Any]()
    found = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {"trained": [], "operations": {}}
    while left and time.process_time() - began < seconds:
        count, clock = min(STEP, len(left)), time.process_time()
        collect(job, lambda requests, _: (answer(one, lambda _: None) for one in requests[:STEP]))  # the others stay silent
        left = incomplete(job)
        trained.append([hospitals - len(left), (time.process_time() - clock) / count])
        typer.echo(f"{hospitals - len(left)} in the pool: {trained[-1][1]:.3f} s of CPU for a hospital")
    found["trained"] += trained
    if not left:
        with _timed(took, "check that all have answered"):
            LocalBackend().gather(job, lambda _: None)
        with _timed(took, "load all experts from the pool"):
            load_experts(tasks, request)
        with _timed(took, "look for two equal experts"):
            ExpertPool(job.pool).twin("", tasks)
        found["operations"][str(hospitals)] = took
        typer.echo(str(took))
    _keep(place, found)


@contextmanager
def _timed(took: dict[str, float], what: str) -> Iterator[None]:
    began = time.process_time()
    yield
    took[what] = time.process_time() - began


def _tiny_world(folder: Path, count: int, images: int) -> Path:
    """A scenario with the first so many of hospitals that are drawn one by one, so that all numbers of them have one pool."""
    for part in ("sites", "scenarios"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    source = {"kind": "organ_phantom", "images": images, "patients": images // 4}
    names = [f"site{number:04d}" for number in range(count)]
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        planes = [str(rng.choice(["axial", "coronal", "sagittal"]))]
        site = {"name": name, "source": {**source, "planes": planes}, "scanner": {"noise": round(float(rng.uniform(0.02, 0.1)), 3)}}
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
    file = folder / "scenarios" / f"tiny-{count}.yaml"
    file.write_text(yaml.safe_dump(scenario), encoding="utf-8")
    return file


@app.command()
def picture(
    to: Annotated[Path, typer.Option(help="an SVG file")] = Path("docs/many-hospitals.svg"), out: Out = Path("runs/many")
) -> None:
    """Growth curves of what has been measured."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    costs = json.loads((out / "cost.json").read_text(encoding="utf-8"))
    for name in COSTS:
        points = sorted((one["experts"], one["steady"]) for one in costs if one["row"] == name)
        ten = dict(points)[10]
        left.plot([K for K, _ in points], [seconds / ten for _, seconds in points], "o-", label=name, ms=4)
    left.set(xscale="log", yscale="log", xlabel="experts", ylabel="CPU time of a batch, 10 experts = 1", title="posterior")
    found = json.loads((out / "federation.json").read_text(encoding="utf-8"))
    counts = sorted(map(int, found["operations"]))
    for what in found["operations"][str(counts[-1])]:
        right.plot(counts, [1000 * found["operations"][str(count)][what] / count for count in counts], "o-", label=what, ms=4)
    trained = np.array(sorted(found["trained"]))
    right.plot(trained[:, 0], 1000 * trained[:, 1], ".", label="training and admission", ms=3, color="gray")
    right.set(xscale="log", yscale="log", xlabel="hospitals", ylabel="CPU time for each, ms", title="federation, backend local")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "fedmerge", "svg.fonttype": "none"}):
        figure.savefig(to, format="svg", metadata={"Date": None})


@app.callback()
def _verbs() -> None:
    """One verb a part."""


def _keep(file: Path, found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    app()
