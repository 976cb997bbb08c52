"""What do federations with rounds reach, at what cost, beside merges of experts that are uploaded once?

    FEDMERGE_DATA=/folder/of/folders python benchmarks/federated.py --out runs/federated --page docs/federated-results.md

For each scenario and seed: the scenario's hospitals, their experts, and every strategy below from the same hospitals and the same
theta_0, with as many local steps as all runs of a hospital's own training together; then all of them on the scenario's stream.
Hospitals train one after the other in this process, as `experts/local.py` does; by Flower the same bits come out. What OUT/pool
holds is not trained again. Without FEDMERGE_DATA the real data are left out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Federated, TargetTask
from fedmerge.experiment.experiment import Overrides, RunOptions, load_experiment
from fedmerge.experiment.stream_phase import contribution
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, own_steps, site_task
from fedmerge.federated.pool.global_models import GlobalPool
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.report.metrics.significance import over_seeds
from fedmerge.report.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("mean", "weighted_mean", "ensemble", "model_stock", "t3_batch", "eam")
STRATEGIES: list[Any] = [
    {"fedavg": {"rounds": 1}},
    {"fedavg": {"rounds": 5}},
    {"fedavg": {"rounds": 20}},
    {"fedprox": {"rounds": 5}},
    {"fednova": {"rounds": 5}},
    "fedfisher",
    {"fedfisher": {"information": "kfac"}},
    {"fedadam": {"rounds": 20}},
    {"fedmedian": {"rounds": 5}},
]
Row = dict[str, float]
"""accuracy, rounds, steps, up and down; means over hospitals."""


def measured(name: str, seed: int, out: Path) -> dict[str, Row]:
    """Every row of one scenario and seed: from `out`, or measured now."""
    kept = out / "found" / f"{name}-{seed}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(measure(name, seed, out)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def measure(name: str, seed: int, out: Path) -> dict[str, Row]:
    """Train what is missing, and consume the stream."""
    overrides = Overrides(seed=seed, methods=METHODS, settings=(("federated", STRATEGIES),))
    plan = load_experiment(ROOT / "scenarios" / f"{name}.yaml", overrides)
    request = RunOptions(out=out / f"{name}-{seed}", pool=out / "pool", quiet=True)
    request.out.mkdir(parents=True, exist_ok=True)
    initial = make_theta_0(plan, request, Terminal(quiet=True))
    tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
    job = job_of(plan, tuple(tasks), initial, request)
    LocalBackend().gather(job, lambda _: None)
    if failed := LocalBackend().compete(job, lambda _: None):
        raise SystemExit(str(failed))
    pool, strategies = GlobalPool(request.pool, tasks), plan.scenario.federated
    models = [pool.model(strategy) for strategy in strategies]
    rows = [Federated(m.strategy.key, m.strategy.paper, {}, "", {k: t.numpy() for k, t in m.stand.theta.items()}) for m in models]
    scenario = plan.scenario
    task = TargetTask(plan.target, scenario.model, plan.classes, scenario.stream, scenario.methods, seed, 1, federated=tuple(rows))
    experts = load_experts(tasks, request)
    site = TargetSite(task, [contribution(one) for one in experts], {k: t.numpy() for k, t in initial.weights.items()})
    hits: dict[str, list[tuple[int, int]]] = {}
    while steps := site.advance(64):
        for step in steps:
            hits.setdefault(step.method, []).append((step.correct, step.n))
    size = float(sum(t.numel() * t.element_size() for t in initial.weights.values()))
    one_shot = {"rounds": 1.0, "steps": float(np.mean(list(own_steps(plan, experts).values()))), "up": size, "down": size}
    cost = dict.fromkeys(hits, one_shot)
    for model in models:
        sites = list(model.as_record()["sites"].values())
        cost[model.strategy.key] = {"rounds": float(model.stand.rounds)} | {
            key: float(np.mean([one[key] for one in sites])) for key in ("steps", "up", "down")
        }
    return {m: {"accuracy": sum(c for c, _ in done) / sum(n for _, n in done), **cost[m]} for m, done in hits.items()}


def table(found: list[dict[str, Row]]) -> list[str]:
    """Markdown: best first."""
    mean = {name: float(np.mean([one[name]["accuracy"] for one in found])) for name in found[0]}
    lines = ["| row | accuracy | against the mean | rounds | local steps | MB up | MB down |", "|---|---|---|---|---|---|---|"]
    for name in sorted(mean, key=lambda name: -mean[name]):
        gains = [100 * (one[name]["accuracy"] - one["mean"]["accuracy"]) for one in found]
        reach = over_seeds(gains)
        against = f"{np.mean(gains):+.1f}" + (f" ({reach[0]:+.1f} to {reach[1]:+.1f})" if reach and name != "mean" else "")
        cost = {key: float(np.mean([one[name][key] for one in found])) for key in ("rounds", "steps", "up", "down")}
        numbers = f"{cost['rounds']:.0f} | {cost['steps']:.0f} | {cost['up'] / 1e6:.2f} | {cost['down'] / 1e6:.2f}"
        lines.append(f"| {name} | {100 * mean[name]:.1f} | {against} | {numbers} |")
    return lines


def main(
    scenario: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="folder of what is measured, and the pool")] = Path("runs/federated"),
    page: Annotated[Path | None, typer.Option(help="where the tables go", show_default="OUT/tables.md")] = None,
) -> None:
    """Measure what is missing, and write a table for each scenario."""
    torch.set_num_threads(1)
    names = scenario or ["organs", *(["wbc", "brain-mri"] if "FEDMERGE_DATA" in os.environ else [])]
    lines = []
    for name in names:
        found = []
        for seed in range(seeds):
            found.append(measured(name, seed, out.resolve()))
            typer.echo(f"{name}, seed {seed}: done")
        lines += [f"## {name}, {seeds} seed{'s' if seeds > 1 else ''}", "", *table(found), ""]
    (page or out / "tables.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
