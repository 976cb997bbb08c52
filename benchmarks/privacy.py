"""What does differential privacy of the uploads cost in accuracy?

    python benchmarks/privacy.py --out runs/privacy --page docs/privacy-price.md

Hospitals of `organs` train once for each seed, in this process and on one thread; then their task vectors are clipped and noised as
`privacy:` in a scenario would, for every clip C and noise multiplier z of a grid, and the target's stream is run with the result.
z = 0 is clipping without noise, which promises nothing; the row without a clip is the exact upload. Each method stands at its
defaults; `expert` is the best single expert, picked with hindsight. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.experiment.experiment import Experiment, Overrides, RunOptions, load_experiment
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, site_task
from fedmerge.federated.client.site_training import model_of
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.security.privacy import Privacy, noised
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.statistics._base import State
from fedmerge.merging.bank.layout import Parts
from fedmerge.report.terminal import Terminal
from fedmerge.rng import generator

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("mean", "eam", "ensemble", "expert")
GRID = {10.0: (0.0003, 0.001, 0.003, 0.01), 1.0: (0.0, 0.003, 0.03, 0.1), 0.01: (0.1, 0.5, 1.0, 2.0, 8.0)}
"""C -> values of z. Above 10 no task vector of this scenario is clipped; at 0.01 next to nothing is left of one."""
DELTA = 1e-5
BATCHES_AT_A_TIME = 64


def trained(seed: int, out: Path, pool: Path) -> tuple[Experiment, State, list[Expert]]:
    """The scenario, theta_0, and the hospitals' exact experts."""
    plan = load_experiment(ROOT / "scenarios" / "organs.yaml", Overrides(seed=seed, methods=METHODS))
    (out / f"seed{seed}").mkdir(parents=True, exist_ok=True)
    request = RunOptions(out=out / f"seed{seed}", pool=pool, quiet=True)
    initial = make_theta_0(plan, request, Terminal(quiet=True))
    tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
    outcomes = LocalBackend().gather(job_of(plan, tuple(tasks), initial, request), lambda _: None)
    if failed := [outcome for outcome in outcomes.values() if outcome.reason]:
        raise SystemExit(f"{failed}")
    return plan, initial.weights, load_experts(tasks, request)


def accuracies(plan: Experiment, theta_0: State, states: dict[str, State]) -> dict[str, float]:
    """Share of right predictions over the target's stream, by method."""
    experts = [Contribution(name, {key: t.numpy() for key, t in state.items()}, None, 1.0) for name, state in states.items()]
    scenario = plan.scenario
    task = TargetTask(plan.target, scenario.model, plan.classes, scenario.stream, scenario.methods, scenario.seed, threads=1)
    site = TargetSite(task, experts, {key: tensor.numpy() for key, tensor in theta_0.items()})
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    while steps := site.advance(BATCHES_AT_A_TIME):
        for step in steps:
            right[step.method][0] += step.correct
            right[step.method][1] += step.n
    found = {name: hits / seen for name, (hits, seen) in right.items()}
    singles = [value for name, value in found.items() if name.startswith("expert:")]
    return {**{name: found[name] for name in METHODS if name in found}, "expert": max(singles)}


def rows_of(seed: int, out: Path, pool: Path) -> list[dict[str, Any]]:
    """One row for each clip and multiplier, theta_0 itself and the exact uploads among them; kept in `out`."""
    file = out / f"seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    plan, theta_0, experts = trained(seed, out, pool)
    model = model_of(
        site_task(plan, 0, make_theta_0(plan, RunOptions(out / f"seed{seed}", pool, quiet=True), Terminal(quiet=True)))
    )
    parts = Parts.of(model)
    names = (*parts.encoder, *parts.head)
    norms = [float(torch.cat([(e.weights[n] - theta_0[n]).flatten() for n in names]).norm()) for e in experts]
    size = sum(theta_0[name].numel() for name in names)
    cells: list[tuple[float | None, float]] = [(None, 0.0), (0.0, 0.0), *((clip, z) for clip, zs in GRID.items() for z in zs)]
    rows = []
    for clip, z in cells:
        states = {
            one.site: one.weights
            if clip is None
            else noised(one.weights, theta_0, parts, clip, z * clip, generator(seed, "privacy", one.site).bytes)
            for one in experts
        }
        rows.append({"clip": clip, "z": z, "norms": norms, "parameters": size, **accuracies(plan, theta_0, states)})
        print(seed, clip, z, {name: round(rows[-1][name], 3) for name in METHODS}, flush=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def epsilon_of(clip: float | None, z: float) -> str:
    """As a cell of the table."""
    if clip == 0:
        return "0 (nothing is sent)"
    if z == 0:
        return "none"
    epsilon = Privacy(clip=clip, noise_multiplier=z, delta=DELTA).epsilon if clip else None
    return "above 500" if epsilon is None else f"{epsilon:.3g}"


def table(found: list[list[dict[str, Any]]]) -> list[str]:
    """Markdown: mean ± standard deviation over seeds, percent."""
    lines = [f"| C | z | epsilon | {' | '.join(METHODS)} |", "|---" * (3 + len(METHODS)) + "|"]
    for rows in zip(*found, strict=True):
        clip, z = rows[0]["clip"], rows[0]["z"]
        cells = [f"{100 * np.mean([r[m] for r in rows]):.1f} ± {100 * np.std([r[m] for r in rows]):.1f}" for m in METHODS]
        shown = "no clip" if clip is None else "theta_0 itself" if clip == 0 else f"{clip:g}"
        lines.append(f"| {shown} | {z:g} | {epsilon_of(clip, z)} | {' | '.join(cells)} |")
    return lines


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="folder of results")] = Path("runs/privacy"),
    pool: Annotated[Path, typer.Option(help="folder of experts")] = Path("pool"),
    page: Annotated[Path | None, typer.Option(help="where the table goes", show_default="OUT/table.md")] = None,
) -> None:
    """Train, noise, stream, and write the table."""
    torch.set_num_threads(1)
    found = [rows_of(seed, out.resolve(), pool.resolve()) for seed in range(seeds)]
    norms = sorted(norm for rows in found for norm in rows[0]["norms"])
    size = found[0][0]["parameters"]
    said = f"{seeds} seeds, delta {DELTA:g}; {size} parameters; task vectors are {norms[0]:.1f} to {norms[-1]:.1f} long."
    (page or out / "table.md").write_text("\n".join([said, "", *table(found)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
