"""How a run bears load: long streams, pools larger than memory, many hospitals. Figures are in docs/load.md.

    python benchmarks/load.py long-stream --batches 20000
    python benchmarks/load.py big-pool --experts 200 --max-bytes 1GB
    python benchmarks/load.py many-sites --sites 50
    python benchmarks/load.py many-sites --sites 6 --large

Each is one run by the front door, with its processes watched from outside. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from watch import KINDS, Watched, watch

LARGE = {"model": {"name": "vit_base_patch32_224", "kwargs": {"img_size": 32, "in_chans": 1}}}
"""350 MB in each message, and quick to train: one patch in each image."""
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
PLANES = ("axial", "coronal", "sagittal")
DEADLINE_S = 4 * 3600.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def world(folder: Path, scenario: dict[str, Any], sites: list[str], images: int, target_images: int) -> Path:
    """Phantom hospitals, a target and a scenario in a folder of their own; returns the scenario's file."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sites").mkdir(parents=True)
    (folder / "scenarios").mkdir()
    for number, name in enumerate([*sites, "mercy"]):
        last = name == "mercy"
        source = {"kind": "organ_phantom", "images": target_images if last else images, "patients": images // 10}
        source |= {} if last else {"planes": [PLANES[number % 3]]}
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "source": source}), encoding="utf-8")
    whole = {
        "seed": 0,
        "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
        "initialization": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
        "sites": sites,
        "training": {"runs": 1, "epochs": 1, "batch_size": 16, "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}}},
        "target": "mercy",
        **scenario,
    }
    file = folder / "scenarios" / f"{scenario['name']}.yaml"
    file.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return file


def simulate(file: Path, every_s: float, *options: str) -> Watched:
    """One run by the front door, watched."""
    folder = file.parent.parent
    run = folder / "runs" / file.stem
    command = [sys.executable, "-m", "fedmerge.simulate", str(file), "--out", str(run), "--pool", str(folder / "pool"), *options]
    found = watch(command, Path.cwd(), run, every_s, DEADLINE_S)
    found.write(folder / f"{file.stem}.csv")
    if found.returncode != 0:
        typer.echo(found.said)
        raise typer.Exit(found.returncode)
    return found


def tell_peaks(found: Watched) -> None:
    """A line for each kind of process."""
    for role in ("driver", "server", "clients", "target", "daemons"):
        typer.echo(f"  peak of {role:<8} " + ", ".join(f"{kind} {found.peak(role, kind):.0f} MiB" for kind in KINDS))
    total, count = max(s.total for s in found.samples), max(s.processes for s in found.samples)
    typer.echo(f"  peak of all processes together {total:.0f} MiB (shared pages once), {count} processes at most")


@app.command()
def long_stream(
    batches: Annotated[int, typer.Option(min=100)] = 20_000,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "mean,expert,ensemble,dcs,eam,t3_batch",
    out: Annotated[Path, typer.Option(help="a folder that is made anew")] = Path("runs/load/long"),
) -> None:
    """Does memory grow with the stream? One image a batch; slopes of memory over batches."""
    scenario = {"name": "long", "stream": {"kind": "single", "of": "iid"}, "methods": methods.split(",")}
    found = simulate(world(out, scenario, list(PLANES), 120, batches), 1.0, "--threads", "1")
    run = out / "runs" / "long"
    phases = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["phases_seconds"]
    done = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stream"]["batches"]
    typer.echo(f"{done} batches of one image: stream {phases['stream']:.0f} s, report {phases['report']:.0f} s")
    for role in ("driver", "target", "daemons"):
        slope, error = found.slope(role, "RssAnon", batches)
        typer.echo(
            f"  {role:<8} {slope:+.0f} bytes a batch (standard error {error:.0f}): {slope * batches / 2**20:+.1f} MiB in all"
        )
    tell_peaks(found)
    sizes = {file.name: file.stat().st_size for file in run.rglob("*") if file.is_file()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    typer.echo("  on disk: " + ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in largest))


@app.command()
def big_pool(
    experts: Annotated[int, typer.Option(min=2)] = 200,
    max_bytes: Annotated[str, typer.Option(help="the target's limit; '' for none")] = "1GB",
    batches: Annotated[int, typer.Option(min=1)] = 4,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "mean,ensemble,eam",
    out: Annotated[Path, typer.Option(help="a folder; its pool is filled once and kept")] = Path("runs/load/pool"),
) -> None:
    """Experts of 5 million parameters that do not go into the target's memory: theta_0 with seeded noise, nobody trains."""
    name = f"pool{experts}" + ("-limited" if max_bytes else "")
    model = {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32, "patch_size": 8, "in_chans": 1}}
    source = {"kind": "organ_phantom", "images": 60, "patients": 12}
    scenario = {
        "name": name,
        "model": model,
        "initialization": {"kind": "proxy", "source": source, "epochs": 1},
        "target": {"site": "mercy", "max_bytes": max_bytes} if max_bytes else "mercy",
        "stream": {"kind": "iid", "batch_size": 8, "max_batches": batches},
        "methods": methods.split(","),
    }
    kept = out / "pool"
    held = out.with_name(out.name + "-kept")
    if kept.exists():
        kept.rename(held)
    file = world(out, scenario, [f"site{number:03d}" for number in range(experts)], 40, 8 * batches)
    if held.exists():
        held.rename(kept)
    parameters = fill(file, out, kept)
    found = simulate(file, 0.2)
    manifest = json.loads((out / "runs" / name / "manifest.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "runs" / name / "batches.jsonl").read_text(encoding="utf-8").splitlines()]
    typer.echo(f"{experts} experts of {parameters / 1e6:.2f} M parameters, limit {max_bytes or 'none'}: {found.seconds:.0f} s")
    typer.echo(f"  bank {manifest['bank']}; phases {manifest['phases_seconds']}")
    for method in scenario["methods"]:
        own = [line["seconds"] for line in lines if line["method"] == method]
        typer.echo(f"  {method}: {sum(own) / len(own):.2f} s a batch of its own (the first also waits for the experts' logits)")
    tell_peaks(found)


def fill(file: Path, out: Path, pool: Path) -> int:
    """Made-up experts into the pool, admitted as uploads are; returns their number of parameters."""
    import torch

    from fedmerge.experiment.experiment import RunOptions, load_experiment
    from fedmerge.experiment.training_phase import job_of, make_theta_0, site_task
    from fedmerge.federated.server.collect import collect
    from fedmerge.report.terminal import Terminal

    plan = load_experiment(file)
    request = RunOptions(out=out, pool=pool, quiet=True)
    initial = make_theta_0(plan, request, Terminal(quiet=True))
    tasks = tuple(site_task(plan, number, initial) for number in range(len(plan.sites)))

    def ask(requests: Any, deadline_s: float) -> Any:
        for number, one in enumerate(requests):
            yield made_up(one, torch.Generator().manual_seed(number))

    job = job_of(plan, tasks, initial, request)
    refused = [outcome.reason for outcome in collect(job, ask).values() if outcome.reason]
    if refused:
        raise SystemExit(refused[0])
    return sum(tensor.numel() for tensor in initial.weights.values())


def made_up(request: Any, generator: Any) -> Any:
    """A site's answer without a training: theta_0 and a little noise."""
    import torch

    from fedmerge.federated.messages import Reply
    from fedmerge.federated.security.audit import RUN_SCALARS, Upload
    from fedmerge.federated.server.admission import check_seal

    task = request.task
    weights = {name: tensor + 0.002 * torch.randn(tensor.shape, generator=generator) for name, tensor in request.weights.items()}
    runs = {f"runs.{run}.{name}": 0.5 for run in range(task.training.runs) for name in RUN_SCALARS}
    scalars = {"n": 32.0, "validation_accuracy": 0.5, "temperature": 1.0, **runs}
    upload = Upload(task.site.name, weights, scalars, classes=task.classes)
    return Reply(task, replace(upload, seal=check_seal(request, upload)), "", 0.0)


@app.command()
def many_sites(
    sites: Annotated[int, typer.Option(min=2)] = 50,
    large: Annotated[bool, typer.Option("--large", help="with ViT-B/32, and no method but the mean")] = False,
    out: Annotated[Path, typer.Option(help="a folder that is made anew")] = Path("runs/load/sites"),
) -> None:
    """One simulation of many hospitals: seconds, processes, memory."""
    names = [f"site{number:03d}" for number in range(sites)]
    scenario = {
        "name": "sites",
        "stream": {"kind": "mixture_drift", "batch_size": 16},
        "methods": ["mean"] if large or sites > 200 else ["mean", "expert", "ensemble", "eam"],
        **(LARGE if large else {}),
    }
    found = simulate(world(out, scenario, names, 60, 320), 0.1 if large else 0.5)
    manifest = json.loads((out / "runs" / "sites" / "manifest.json").read_text(encoding="utf-8"))
    typer.echo(f"{len(manifest['experts'])} hospitals: {found.seconds:.0f} s; phases {manifest['phases_seconds']}")
    tell_peaks(found)
    typer.echo(f"  page {(out / 'runs' / 'sites' / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
