"""Where do `eam` and `posterior` beat the mean, the ensemble, Model Stock and the best single expert, and where do they not?

    python benchmarks/regimes.py --out runs/regimes --docs docs

On the phantom, over how sites differ (nothing, scanners, planes, both), the label skew of the stream, the order of domains in it
and the batch size, over several seeds. All streams of one federation pass through one process. Every method stands at its
defaults. The best single expert is picked with hindsight, which no hospital could do. Started again, it goes on where it
stopped. Writes `regimes.csv` and `regimes.svg`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from many_streams import Streams, schedule_of

from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.report.metrics.significance import over_seeds
from fedmerge.stream.schedules._base import Schedule

ROOT = Path(__file__).resolve().parents[1]
SITES = ("axial", "coronal", "sagittal")
PLANES = list(SITES)
DIFFERENCES = {"nothing": (), "scanner": ("scanner",), "plane": ("plane",), "scanner and plane": ("scanner", "plane")}
SKEWS = {"0.01": 0.01, "0.1": 0.1, "1": 1.0, "none": 1000.0}
ORDERS = ("mixed", "one after another")
SIZES = (8, 32, 128)
METHODS = ("eam", "posterior")
RIVALS = ("mean", "ensemble", "model_stock", "best expert")
IMAGES, PATIENTS, TARGET_IMAGES = 1000, 125, 1200


def federation(folder: Path, differs: tuple[str, ...]) -> Path:
    """The scenario organs with sites that differ in these ways alone; returns its file."""
    scenario = yaml.safe_load((ROOT / "scenarios" / "organs.yaml").read_text(encoding="utf-8"))
    scenario |= {
        "methods": ["mean", "expert", "ensemble", "model_stock", *METHODS],
        "training": {**scenario["training"], "runs": 1},
    }
    target = yaml.safe_load((ROOT / "sites" / "mercy.yaml").read_text(encoding="utf-8"))
    target["source"]["images"] = TARGET_IMAGES
    sites = {"mercy": target}
    for name in SITES:
        site = yaml.safe_load((ROOT / "sites" / f"{name}.yaml").read_text(encoding="utf-8"))
        site["source"] = {"kind": "organ_phantom", "images": IMAGES, "patients": PATIENTS}
        site["source"]["planes"] = [name] if "plane" in differs else PLANES
        if "scanner" not in differs:
            site["scanner"] = target["scanner"]
        sites[name] = site
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    (folder / "scenarios").mkdir(exist_ok=True)
    for name, site in sites.items():
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    file = folder / "scenarios" / "organs.yaml"
    file.write_text(yaml.safe_dump(scenario), encoding="utf-8")
    return file


def schedule(skew: float, order: str, size: int) -> Schedule:
    """A stream with this label skew, in batches of mixed domains or of one domain after another."""
    inner = {"kind": "dirichlet_batch", "delta": skew}
    if order == "mixed":
        return schedule_of({**inner, "batch_size": size})
    return schedule_of({"kind": "domain_seq", "within": inner, "batch_size": size})


def measure(file: Path, seed: int, folder: Path, pool: Path) -> list[dict[str, Any]]:
    """Accuracies of all methods on all streams of one federation."""
    streams = Streams(load_experiment(file, Overrides(seed=seed)), pool, folder / f"seed{seed}")
    return [
        {"skew": skew, "order": order, "size": size, "accuracies": streams.accuracies(schedule(delta, order, size))}
        for skew, delta in SKEWS.items()
        for order in ORDERS
        for size in SIZES
    ]


Cell = dict[str, tuple[float, ...]]
"""Of one method in one regime: accuracy in %, and points above each rival, seed by seed."""


def gains(found: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[tuple[Any, ...], Cell]:
    """By what sites differ in, order, skew, batch size, and method."""
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (difference, _), rows in found.items():
        for row in rows:
            of = dict(row["accuracies"])
            of["best expert"] = max(value for name, value in of.items() if name.startswith("expert"))
            for method in METHODS:
                cell = cells[difference, row["order"], row["skew"], row["size"], method]
                cell["accuracy"].append(100 * of[method])
                for rival in RIVALS:
                    cell[rival].append(100 * (of[method] - of[rival]))
    return {key: {name: tuple(values) for name, values in of.items()} for key, of in cells.items()}


def write_csv(file: Path, cells: dict[tuple[Any, ...], Cell]) -> None:
    """One line for each regime and method: means over seeds, and ends of 95% t intervals."""
    with file.open("w", encoding="utf-8", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        ends = [f"{name}{end}" for name in ("accuracy", *[f"less {rival}" for rival in RIVALS]) for end in ("", " low", " high")]
        lines.writerow(["sites differ in", "domains", "label skew", "batch size", "method", "seeds", *ends])
        for key, cell in cells.items():
            numbers: list[str] = []
            for name in ("accuracy", *RIVALS):
                reach = over_seeds(cell[name]) or ("", "")
                numbers += [f"{end:.1f}" if end != "" else "" for end in (float(np.mean(cell[name])), *reach)]
            lines.writerow([*key, len(cell["accuracy"]), *numbers])


def draw(file: Path, cells: dict[tuple[Any, ...], Cell], seeds: int) -> None:
    """One heat map for each method and rival: points that the method is above, with half the width of the interval."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 15.5), layout="constrained")
    for axes, (rival, method) in zip(figure.subplots(len(RIVALS), len(METHODS)).flat, product(RIVALS, METHODS), strict=True):
        _heat_map(axes, cells, method, rival)
    figure.supxlabel(f"label skew (delta) above, batch size below; {seeds} seeds, bold: 95% t interval leaves out 0", fontsize=8)
    figure.supylabel("sites differ in; domains of the stream", fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "fedmerge", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _heat_map(axes: Any, cells: dict[tuple[Any, ...], Cell], method: str, rival: str) -> None:
    rows, columns = [*product(DIFFERENCES, ORDERS)], [(skew, size) for size in SIZES for skew in SKEWS]
    shown = np.full((len(rows), len(columns)), np.nan)
    for r, c in np.ndindex(shown.shape):
        values = cells[*rows[r], *columns[c], method][rival]
        shown[r, c] = np.mean(values)
        reach = over_seeds(values)
        half = f"\n±{(reach[1] - reach[0]) / 2:.1f}" if reach else ""
        color = "white" if abs(shown[r, c]) > 6 else "black"
        weight = "bold" if reach and reach[0] * reach[1] > 0 else "normal"
        axes.text(c, r, f"{shown[r, c]:+.1f}{half}", ha="center", va="center", fontsize=6.5, color=color, weight=weight)
    axes.imshow(shown, cmap="RdBu", vmin=-10, vmax=10, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{skew}\n{size}" for skew, size in columns], fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{difference}; {order}" for difference, order in rows], fontsize=7)
    axes.set_title(f"{method} minus {rival}, points", loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="folder of experts and results")] = Path("runs/regimes"),
    docs: Annotated[Path | None, typer.Option(help="where the tables and the picture go; OUT if left out")] = None,
) -> None:
    """Train what is missing, measure what is missing, and write the map."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for name, differs in DIFFERENCES.items():
            folder = out / name.replace(" ", "-")
            kept = folder / f"seed{seed}.json"
            if not kept.exists():
                rows = measure(federation(folder, differs), seed, folder, out / "pool")
                kept.write_text(json.dumps(rows), encoding="utf-8")
            found[name, seed] = json.loads(kept.read_text(encoding="utf-8"))
            typer.echo(f"seed {seed}, sites differ in {name}: done")
    cells = gains(found)
    place = docs or out
    write_csv(place / "regimes.csv", cells)
    draw(place / "regimes.svg", cells, seeds)


if __name__ == "__main__":
    typer.run(main)
