"""All methods on all main schedules over several seeds, with the rows that must accompany a claim about entropy-adaptive merging.

    FEDMERGE_DATA=/folder/of/folders python benchmarks/honest.py --page docs/methods-by-schedule.md

Every method stands at its defaults. Beside `eam` stand its own variants (gamma, rho, scorer, surest expert whole), so that a reader
sees how much hangs on a choice; `--head-init` asks the same of the head that hospitals start from, for which they train anew.
What was measured stays in `<out>`; started again, it goes on where it stopped. Smooth drift needs a target with two domains, which
brain-mri has not. One run of `fedmerge simulate` gives the same numbers for one stream; this is many streams at the price of few.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from many_streams import Streams, schedule_of

from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.report.metrics.significance import over_seeds

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ("organs", "wbc", "brain-mri")
SCHEDULES: dict[str, dict[str, Any]] = {
    "i.i.d.": {"kind": "iid"},
    "Dirichlet 0.01": {"kind": "dirichlet_batch", "delta": 0.01},
    "Dirichlet 0.1": {"kind": "dirichlet_batch", "delta": 0.1},
    "Dirichlet 1": {"kind": "dirichlet_batch", "delta": 1},
    "temporal (note)": {"kind": "temporal"},
    "smooth drift": {"kind": "mixture_drift", "drift": "smooth"},
}
EXPLAINED = """\
Accuracy of all methods and of 14 variants of `eam` on six streams, in percent. Brackets hold the difference to the mean merge
on the same stream, in points. A star marks a 95% t interval over seeds that excludes 0, not corrected for the number of rows.
Every method has its defaults; rows `eam-...` change one field of `eam`. Made by `python benchmarks/honest.py --scenario NAME
--seeds N`; [All results](results.md) says what the tables mean."""
SCORERS = ("raw_diff", "product", "ratio", "entropy_only", "rank_sum")
DEAR, DEAR_ON = ("fisher-target",), ("i.i.d.",)
"""What takes minutes for each stream, and the streams on which it is measured."""
BATCH = {"posterior": {"granularity": "batch", "label": "posterior-batch"}}
"""A row beside those of the scenario of all methods."""
HEADS = ("shared_random", "zero", "fed_lp", "per_site_random")
OF_HEADS = ("mean", "eam", "eam-one-alpha", "ensemble", "model_stock", "dcs")
STREAMS_OF_HEADS = ("i.i.d.", "Dirichlet 0.01", "smooth drift")
"""Rows and streams of the tables of heads."""

Found = dict[str, dict[str, float]]
"""Stream -> method -> accuracy, of one seed."""


def variants() -> list[dict[str, Any]]:
    """`eam` with one field changed at a time, labeled by it."""
    changes: list[tuple[str, dict[str, Any]]] = [
        *((f"eam-gamma-{gamma:g}", {"gamma": gamma}) for gamma in (0.0, 1.0, 50.0, float("inf"))),
        *((f"eam-rho-{rho:g}", {"rho": rho}) for rho in (0.0, 0.9)),
        *((f"eam-{scorer.replace('_', '-')}", {"scorer": scorer}) for scorer in SCORERS),
        ("eam-argmin", {"variant": "argmin_entropy"}),
        ("eam-one-alpha", {"variant": "entropy_only"}),
        ("eam-calibrated", {"calibrated": True}),
    ]
    return [{"eam": {**fields, "label": label}} for label, fields in changes]


def honest(name: str, folder: Path, head_init: str) -> Path:
    """The scenario with every method of organs-all and the variants, as a file in `folder`.

    head_init: "" for the scenario's own; else few methods, and one run for each hospital, for the tables of heads.
    """
    scenario = yaml.safe_load((ROOT / "scenarios" / f"{name}.yaml").read_text(encoding="utf-8"))
    everything = yaml.safe_load((ROOT / "scenarios" / "organs-all.yaml").read_text(encoding="utf-8"))
    scenario |= {"uploads": everything["uploads"], "methods": [*everything["methods"], BATCH, *variants()]}
    if head_init:
        kept = [entry for entry in scenario["methods"] if label(entry) in OF_HEADS]
        scenario |= {"uploads": [], "methods": kept, "training": {**scenario["training"], "runs": 1}}
        scenario["initialization"] = {**scenario["initialization"], "head_init": head_init}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return file


def label(entry: Any) -> str:
    """The name of a method's row."""
    name, fields = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
    return str(fields.get("label", name))


def measured(name: str, head_init: str, seed: int, out: Path) -> Found:
    """All accuracies of one seed: from `out`, or measured now."""
    kept = out / "found" / f"{name}-{head_init or 'all'}-{seed}.json"
    if not kept.exists():
        folder = out / f"{name}-{head_init or 'all'}-{seed}"
        plan = load_experiment(honest(name, folder / "scenarios", head_init), Overrides(seed=seed))
        streams = Streams(plan, out / "pool", folder)
        size = plan.scenario.stream.batch_size
        chosen = {
            title: schedule_of({**spec, "batch_size": size})
            for title, spec in SCHEDULES.items()
            if spec["kind"] != "mixture_drift" or len(plan.target.source.domains()) > 1
            if not head_init or title in STREAMS_OF_HEADS
        }
        found = {
            title: streams.accuracies(schedule, without=() if title in DEAR_ON else DEAR) for title, schedule in chosen.items()
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def table(seeds: list[Found], unranked: tuple[str, ...] = ("oracle", "dawin-full")) -> list[str]:
    """Methods by streams as Markdown, what gains most on the mean merge on top, what is not ranked at the end."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for found in seeds:
        for stream, row in found.items():
            for method, accuracy in row.items():
                values[method][stream].append(100 * accuracy)
    streams = list(seeds[0])
    gain = {name: np.mean([np.mean(v) - np.mean(values["mean"][s]) for s, v in of.items()]) for name, of in values.items()}
    order = sorted(values, key=lambda name: (name in unranked, -float(gain[name])))
    lines = [f"| method | {' | '.join(streams)} |", "|---" * (len(streams) + 1) + "|"]
    for name in order:
        cells = [
            _cell(values[name][stream], values["mean"][stream], name == "mean") if len(values[name][stream]) == len(seeds) else ""
            for stream in streams
        ]
        lines.append(f"| {name}{' (not ranked)' if name in unranked else ''} | {' | '.join(cells)} |")
    return lines


def _cell(own: list[float], mean: list[float], alone: bool) -> str:
    gains = [a - b for a, b in zip(own, mean, strict=True)]
    if alone:
        return f"{np.mean(own):.1f}"
    reach = over_seeds(gains)
    sure = reach is not None and reach[0] * reach[1] > 0
    return f"{np.mean(own):.1f} ({np.mean(gains):+.1f}{'*' if sure else ''})"


def heads(name: str, seeds: int, out: Path) -> list[str]:
    """Accuracy for every way to begin the head, of hospitals that train one run each."""
    lines = [f"| {name}: head | stream | {' | '.join(OF_HEADS)} |", "|---" * (len(OF_HEADS) + 2) + "|"]
    for head in HEADS:
        found = [measured(name, head, seed, out) for seed in range(seeds)]
        for stream in found[0]:
            of = {method: [100 * one[stream][method] for one in found] for method in OF_HEADS}
            cells = [_cell(of[method], of["mean"], method == "mean") for method in OF_HEADS]
            lines.append(f"| {head} | {stream} | {' | '.join(cells)} |")
    return lines


def main(
    scenario: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    head_init: Annotated[int, typer.Option("--head-init", min=0, help="seeds of the tables of heads; 0 for none")] = 3,
    out: Annotated[Path, typer.Option(help="folder of what is measured, and the pool")] = Path("runs/honest"),
    page: Annotated[Path | None, typer.Option(help="where the tables go", show_default="OUT/tables.md")] = None,
) -> None:
    """Measure what is missing, scenario by scenario and seed by seed, and write the tables."""
    names, out = scenario or list(SCENARIOS), out.resolve()
    lines = ["# Every method on every main schedule", "", EXPLAINED]
    for name in names:
        found = []
        for seed in range(seeds):
            found.append(measured(name, "", seed, out))
            typer.echo(f"{name}, seed {seed}: done")
        lines += ["", f"## {name}, {seeds} seeds", "", *table(found)]
    for name in names if head_init else ():
        lines += ["", f"## {name} by the head that hospitals start from, {head_init} seeds", "", *heads(name, head_init, out)]
    (page or out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
