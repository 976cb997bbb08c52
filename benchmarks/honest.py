"""All methods on all main schedules over several seeds, with the rows that must accompany a claim about entropy-adaptive merging.

    FEDMERGE_DATA=/folder/of/folders python benchmarks/honest.py --out runs/honest

Every method stands at its defaults. Beside `eam` stand its own variants (gamma, rho, scorer, surest expert whole), so that a reader
sees how much hangs on a choice. One `fedmerge sweep` for each scenario; started again, it goes on where it stopped. Smooth drift
needs a target with two domains, which brain-mri has not. The tables are `<out>/<scenario>/sweep.md` and `sweep.csv`.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ("organs", "wbc", "brain-mri")
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"kind": "iid"},
    {"kind": "dirichlet_batch", "delta": 0.01},
    {"kind": "dirichlet_batch", "delta": 0.1},
    {"kind": "dirichlet_batch", "delta": 1},
    {"kind": "temporal"},
)
DRIFT: dict[str, Any] = {"kind": "mixture_drift", "drift": "smooth"}
EXPLAINED = """\
Accuracy, percent, and in brackets the difference to the mean merge on the same stream, points; a star marks a 95% t interval over
seeds that leaves out 0, not corrected for the number of rows. Every method stands at its defaults; rows `eam-...` change one field
of `eam`. Made by `python benchmarks/honest.py --page docs/methods-by-schedule.md`; what it means is in [results.md](results.md)."""
SCORERS = ("raw_diff", "product", "ratio", "entropy_only", "rank_sum")


def variants() -> list[dict[str, Any]]:
    """`eam` with one field changed at a time, labelled by it."""
    changes: list[tuple[str, dict[str, Any]]] = [
        *((f"eam-gamma-{gamma:g}", {"gamma": gamma}) for gamma in (0.0, 1.0, 50.0, float("inf"))),
        *((f"eam-rho-{rho:g}", {"rho": rho}) for rho in (0.0, 0.9)),
        *((f"eam-{scorer.replace('_', '-')}", {"scorer": scorer}) for scorer in SCORERS),
        ("eam-argmin", {"variant": "argmin_entropy"}),
        ("eam-one-alpha", {"variant": "entropy_only"}),
        ("eam-calibrated", {"calibrated": True}),
    ]
    return [{"eam": {**fields, "label": label}} for label, fields in changes]


def honest(name: str, folder: Path) -> Path:
    """The scenario with every method of organs-all and the variants, as a file in `folder`."""
    scenario = yaml.safe_load((ROOT / "scenarios" / f"{name}.yaml").read_text(encoding="utf-8"))
    everything = yaml.safe_load((ROOT / "scenarios" / "organs-all.yaml").read_text(encoding="utf-8"))
    scenario |= {"uploads": everything["uploads"], "methods": [*everything["methods"], *variants()]}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return file


def streams(name: str) -> str:
    """What `--set stream=` takes: the main schedules at the scenario's batch size."""
    scenario = yaml.safe_load((ROOT / "scenarios" / f"{name}.yaml").read_text(encoding="utf-8"))
    chosen = SCHEDULES if name == "brain-mri" else (*SCHEDULES, DRIFT)
    size = {"batch_size": scenario["stream"]["batch_size"]}
    return ",".join(yaml.safe_dump({**one, **size}, default_flow_style=True, width=1000).strip() for one in chosen)


def table(sweep: Path) -> list[str]:
    """Methods by schedules as Markdown, the best on the average on top: accuracy, and the difference to the mean merge.

    A star marks a difference whose 95% t interval over seeds leaves out 0; it is not corrected for the number of rows.
    """
    with (sweep / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for row in rows:
        sure = row["minus mean"] and float(row["minus mean low"]) * float(row["minus mean high"]) > 0
        versus = f" ({row['minus mean']}{'*' if sure else ''})" if row["minus mean"] else ""
        cells.setdefault(row["method"], {})[row["stream"]] = (float(row["accuracy"]), row["accuracy"] + versus)
    names = [re.sub(r"batch_size \d+, |_batch$", "", name) for name in streams]
    order = sorted(cells, key=lambda name: ("not ranked" in name, -sum(value for value, _ in cells[name].values())))
    body = [
        f"| {name} | {' | '.join(cells[name][stream][1] if stream in cells[name] else '' for stream in streams)} |"
        for name in order
    ]
    return [f"| method | {' | '.join(names)} |", "|---" * (len(streams) + 1) + "|", *body]


def main(
    scenario: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="folder of sweeps and pools")] = Path("runs/honest"),
    page: Annotated[Path | None, typer.Option(help="where the tables go", show_default="OUT/tables.md")] = None,
) -> None:
    """Sweep each scenario over the schedules and seeds, and write one table for each."""
    for name in scenario or SCENARIOS:
        file = honest(name, out.resolve() / "scenarios")
        command = [sys.executable, "-m", "fedmerge", "sweep", str(file), "--seeds", str(seeds), "--set", f"stream={streams(name)}"]
        subprocess.run([*command, "--out", str(out.resolve() / name), "--pool", str(out.resolve() / "pool")], check=True, cwd=ROOT)
    lines = [f"# Every method on every main schedule, {seeds} seeds", "", EXPLAINED]
    for name in scenario or SCENARIOS:
        lines += ["", f"## {name}", "", *table(out.resolve() / name)]
    (page or out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
