"""What does one cheating hospital do to every method, and what do the defenses bring back? And do they leave honest ones alone?

    FEDMERGE_DATA=/folder/of/folders python benchmarks/hijack.py --out runs/hijack --docs docs

The hospitals of organs.yaml, joined by each attacker of hijack.yaml alone and by all three. Hospitals train one after the other in
this process, as `experts/local.py` does, with one thread; what is in OUT/pool is not trained again, and what OUT/streams-*.json
holds is not measured again. Writes `hijack.md`: accuracy, how often the patch gets what it wants, what each defense brings back and
costs, and what it sees of honest hospitals. Without FEDMERGE_DATA the real data are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from regimes import DIFFERENCES, federation

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.data.corruptions.patch import Patch
from fedmerge.experiment.experiment import Experiment, Overrides, RunOptions, load_experiment
from fedmerge.experiment.scenario import CHECKS
from fedmerge.experiment.stream_phase import contribution
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, site_task
from fedmerge.federated.defenses._base import DEFENSES, Defense
from fedmerge.federated.messages import Initial
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.screening import Vetting, probe_of, vet
from fedmerge.report.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "mean",
    "weighted_mean",
    "wise_ft",
    "ties",
    "model_stock",
    "ensemble",
    "expert",
    "dcs",
    "doe",
    "t3_batch",
    "dawin",
    "eam",
    "posterior",
)
HONEST = ("axial", "coronal", "sagittal")
ATTACKERS = ("scaled_head", "shuffled", "backdoored")
FEDERATIONS = {"nobody": (), **{name: (name,) for name in ATTACKERS}, "all three": ATTACKERS}
TARGET_CLASS = 0


def named(name: str, **fields: Any) -> Defense:
    """One defense."""
    return DEFENSES.load(name)(**fields)


DEFENDED: dict[str, tuple[Defense, ...]] = {
    "off": (),
    **{check.kind(): (check,) for check in CHECKS},
    "calibration, rescale": (named("calibration", action="rescale"),),
    "calibration, temperatures": (named("calibration", sharpest=4),),
    "cap 0.6": (named("cap"),),
    "default": CHECKS,
}
ALONE = {
    **{check.kind(): ("nobody", *ATTACKERS) for check in CHECKS},
    **dict.fromkeys(("calibration, rescale", "calibration, temperatures", "cap 0.6"), ("nobody", "scaled_head")),
}
"""Where a defense that is not the default is measured."""


def hospitals(
    scenario: str, seed: int, out: Path, add: tuple[str, ...] = (), file: Path | None = None
) -> tuple[Experiment, Initial, list[Expert]]:
    """A scenario's experts, trained in this process if they are not in the pool."""
    overrides = Overrides(seed=seed, methods=METHODS, add_sites=tuple(str(ROOT / "sites" / f"{name}.yaml") for name in add))
    plan = load_experiment(file or ROOT / "scenarios" / f"{scenario}.yaml", overrides)
    request = RunOptions(out=out / f"{scenario}-{seed}", pool=out / "pool", quiet=True)
    request.out.mkdir(parents=True, exist_ok=True)
    initial = make_theta_0(plan, request, Terminal(quiet=True))
    tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
    LocalBackend().gather(job_of(plan, tuple(tasks), initial, request), lambda _: None)
    return plan, initial, load_experts(tasks, request)


def vetted(plan: Experiment, initial: Initial, experts: list[Expert], defenses: Iterable[Defense]) -> Vetting:
    """The coordinator's part of a run."""
    scenario = plan.scenario
    probe = probe_of(scenario.initialization, scenario.probe, scenario.model, plan.classes, scenario.seed)
    return vet(experts, initial.weights, build(scenario.model, len(plan.classes)), tuple(defenses), probe)


def stream(plan: Experiment, initial: Initial, experts: list[Expert], cap: float | None, patched: bool) -> dict[str, float]:
    """Every method's accuracy; or, where every image bears the patch, the share of other classes that it turns to the target."""
    scenario = plan.scenario
    target = plan.target.model_copy(update={"shifts": (Patch(),)}) if patched else plan.target
    task = TargetTask(target, scenario.model, plan.classes, scenario.stream, scenario.methods, scenario.seed, 1, cap=cap)
    base = {name: tensor.numpy() for name, tensor in initial.weights.items()}
    site = TargetSite(task, [contribution(expert) for expert in experts], base)
    labels = site.answers().labels
    right: dict[str, list[np.ndarray]] = {}
    while steps := site.advance(64):
        for step in steps:
            y, said = labels[step.t], step.probabilities.argmax(-1)
            right.setdefault(step.method, []).append(said[y != TARGET_CLASS] == TARGET_CLASS if patched else said == y)
    return {method: float(np.concatenate(hits).mean()) for method, hits in right.items()}


def told(found: Vetting) -> str:
    """What was done, in a few words."""
    return ", ".join(f"{one.site} {one.what} by {one.check}" for one in found.done) or "nobody"


class Notebook:
    """What has been measured for one seed, by what determines it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def stream(
        self, plan: Experiment, initial: Initial, experts: list[Expert], cap: float | None, patched: bool
    ) -> dict[str, float]:
        """As `stream`, once for the same experts."""
        key = json.dumps([[(expert.sha256, round(expert.temperature, 6)) for expert in experts], cap, patched])
        if key not in self.known:
            self.known[key] = stream(plan, initial, experts, cap, patched)
            self.file.write_text(json.dumps(self.known), encoding="utf-8")
        return self.known[key]


def measure(seed: int, out: Path) -> list[dict[str, Any]]:
    """One row for each federation and defense that differs from another."""
    plan, initial, everyone = hospitals("hijack", seed, out)
    notes = Notebook(out / f"streams-{seed}.json")
    rows = []
    for attackers, names in FEDERATIONS.items():
        experts = [expert for expert in everyone if expert.site in (*HONEST, *names)]
        for defense, defenses in DEFENDED.items():
            if attackers not in ALONE.get(defense, FEDERATIONS):
                continue
            found = vetted(plan, initial, experts, defenses)
            cap = min((one.most for one in defenses if one.at_target), default=None)
            row = {
                "seed": seed,
                "attackers": attackers,
                "defense": defense,
                "done": [asdict(done) for done in found.done],
                "seconds": found.seconds,
                "forwards": found.forwards,
                "accuracy": notes.stream(plan, initial, found.experts, cap, False),
            }
            if defense in ("off", "default") and attackers in ("nobody", "backdoored", "all three"):
                row["success"] = notes.stream(plan, initial, found.experts, cap, True)
            rows.append(row)
            typer.echo(f"seed {seed}, {attackers}, {defense}: {told(found)}; {found.seconds:.1f} s")
    return rows


def honest(scenario: str, seed: int, out: Path, add: tuple[str, ...] = (), file: Path | None = None) -> dict[str, Any]:
    """What the default checks see of hospitals that are all honest."""
    plan, initial, experts = hospitals(scenario, seed, out, add, file)
    found = vetted(plan, initial, experts, CHECKS)
    same = [expert.sha256 for expert in found.experts] == [expert.sha256 for expert in experts]
    return {"scenario": " + ".join([scenario, *add]), "seed": seed, "sites": len(experts), "same": same, **found.as_record()}


def mean_by(rows: list[dict[str, Any]], attackers: str, defense: str, key: str = "accuracy") -> dict[str, float]:
    """Percent, over seeds; without the experts alone."""
    chosen = [row[key] for row in rows if row["attackers"] == attackers and row["defense"] == defense and key in row]
    methods = [name for name in chosen[0] if not name.startswith("expert:")]
    return {name: 100 * float(np.mean([one[name] for one in chosen])) for name in methods}


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)])


def damage(rows: list[dict[str, Any]]) -> str:
    """Accuracy without an attacker; and the difference to it with each, without and with the default defenses."""
    clean = mean_by(rows, "nobody", "off")
    head = ["method", "no attacker"]
    columns = []
    for attackers in list(FEDERATIONS)[1:]:
        for defense in ("off", "default"):
            head.append(f"{attackers}, {'undefended' if defense == 'off' else 'defended'}")
            columns.append(mean_by(rows, attackers, defense))
    return table(head, ([name, f"{clean[name]:.1f}", *(f"{one[name] - clean[name]:+.1f}" for one in columns)] for name in clean))


def each(rows: list[dict[str, Any]], attackers: str) -> str:
    """Difference to the federation without the attacker, under each defense."""
    clean = mean_by(rows, "nobody", "off")
    measured = [name for name in DEFENDED if attackers in ALONE.get(name, FEDERATIONS)]
    found = {defense: mean_by(rows, attackers, defense) for defense in measured}
    return table(["method", *measured], ([name, *(f"{of[name] - clean[name]:+.1f}" for of in found.values())] for name in clean))


def successes(rows: list[dict[str, Any]]) -> str:
    """How often the patch gets what it wants."""
    cases = [
        ("nobody", "off"),
        *((attackers, defense) for attackers in ("backdoored", "all three") for defense in ("off", "default")),
    ]
    found = [mean_by(rows, *case, key="success") for case in cases]
    return table(["method", *(f"{a}, {d}" for a, d in cases)], ([name, *(f"{of[name]:.1f}" for of in found)] for name in found[0]))


def decisions(rows: list[dict[str, Any]]) -> str:
    """Who was left out or repaired by what, in how many seeds, and the cost."""
    seeds = len({row["seed"] for row in rows})
    lines = []
    for attackers in FEDERATIONS:
        for defense in DEFENDED:
            of = [row for row in rows if row["attackers"] == attackers and row["defense"] == defense]
            if not of or defense == "off":
                continue
            done = [f"{one['site']} {one['what']} by {one['check']}" for row in of for one in row["done"]]
            told = "; ".join(f"{text} ({done.count(text)} of {seeds} seeds)" for text in dict.fromkeys(done)) or "nobody"
            cost = [f"{np.mean([row[key] for row in of]):{form}}" for key, form in (("forwards", ".0f"), ("seconds", ".1f"))]
            lines.append([attackers, defense, told, *cost])
    return table(["attackers", "defense", "left out or repaired", "images through one model", "seconds"], lines)


def margins(found: list[dict[str, Any]]) -> str:
    """The largest figures of honest hospitals, next to the bounds."""
    lines = []
    for one in found:
        of = {check.kind(): [f for f in one["findings"] if f["check"] == check.kind()] for check in CHECKS}
        cells = ["not judged"] * 4
        if one["findings"]:
            agreed = "other classes: not judged"
            if of["agreement"]:
                low = min(of["agreement"], key=lambda f: f["value"] - f["bound"])
                agreed = f"{low['value']:.2f} (bound {low['bound']:.2f}{', cannot tell' if 'cannot tell' in low['said'] else ''})"
            cells = [f"{max(f['value'] for f in of['calibration']):.2f}", f"{max(f['value'] for f in of['norms']):.2f}"]
            cells += [agreed, f"{max(f['value'] for f in of['patches']):.0%}"]
        lines.append([one["scenario"], str(one["seed"]), str(one["sites"]), "same bits" if one["same"] else "changed", *cells])
    head = ["scenario", "seed", "sites", "experts that reach the target", "calibration, most 4", "norms, most 4"]
    return table([*head, "least agreement on the best class", "patches, most 50%"], lines)


def page(rows: list[dict[str, Any]], found: list[dict[str, Any]], text: str) -> str:
    """The words of `docs/hijack.md` stand in the file; only what is between the marks is made."""
    parts = {
        "damage": damage(rows),
        "scaled": each(rows, "scaled_head"),
        "honest-each": each(rows, "nobody"),
        "success": successes(rows),
        "decisions": decisions(rows),
        "margins": margins(found),
    }
    for name, content in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{content}\n{end}{after}" if mark else f"{text}\n<!-- {name} -->\n{content}\n<!-- end -->\n"
    return text


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    real_seeds: Annotated[int, typer.Option(min=0, help="seeds of wbc and brain-mri")] = 5,
    out: Annotated[Path, typer.Option(help="folder of experts and results")] = Path("runs/hijack"),
    regimes: Annotated[int, typer.Option(min=0, help="seeds of the honest federations of benchmarks/regimes.py")] = 5,
    docs: Annotated[Path | None, typer.Option(help="where the page is; OUT if left out")] = None,
) -> None:
    """Train what is missing, measure what is missing, and write the tables."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        rows += measure(seed, out)
        found.append(honest("organs", seed, out))
    found.append(honest("organs", 0, out, ("st_anna",)))
    for title, differs in DIFFERENCES.items():
        file = federation(out / "regimes" / title.replace(" ", "-"), differs)
        found += [honest(f"organs, sites differ in {title}", seed, out, file=file) for seed in range(regimes)]
    for seed in range(real_seeds if "FEDMERGE_DATA" in os.environ else 0):
        found += [honest(name, seed, out) for name in ("wbc", "brain-mri")]
    (out / "hijack.json").write_text(json.dumps({"rows": rows, "honest": found}), encoding="utf-8")
    file = (docs or out) / "hijack.md"
    file.write_text(page(rows, found, file.read_text(encoding="utf-8") if file.exists() else ""), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
