"""Run scenarios over several seeds, cold pool and then warm, and write the table of all methods with times and memory.

    python benchmarks/scenarios.py --scenario organs --seeds 3 --out runs/benchmark

Wall time is that of the whole command. Memory is the sum of the proportional set sizes of all processes that the command started,
so that shared pages count once, sampled twice a second. The other scenarios need FEDMERGE_DATA, as their files say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
MARK = "FEDMERGE_BENCHMARK"


def memory(mark: str) -> int:
    """Bytes of all processes whose environment holds the mark, shared pages counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError):  # ended meanwhile, or not ours
            continue
    return total


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of a command. Raises CalledProcessError if it fails."""
    mark = f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], memory(mark))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, name: value})
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    return seconds, peak[0] / 2**30


def run(scenario: str, seed: int, out: Path) -> dict[str, Any]:
    """One seed, cold and warm; the summary with what was measured."""
    pool, measured = out / "pool" / f"{scenario}-{seed}", {}
    for phase in ("cold", "warm"):
        folder = out / f"{scenario}-{seed}-{phase}"
        command = [sys.executable, "-m", "fedmerge.simulate", f"scenarios/{scenario}.yaml", "--seed", str(seed), "--quiet"]
        seconds, gib = timed([*command, "--out", str(folder), "--pool", str(pool)])
        measured[phase] = {"seconds": seconds, "peak_gib": gib}
        typer.echo(f"{scenario} seed {seed} {phase}: {seconds:.0f} s, {gib:.2f} GiB")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    audit = json.loads((folder / "manifest.json").read_text())
    return {**summary, "measured": measured, "phases": audit["phases_seconds"]}


def table(name: str, runs: list[dict[str, Any]]) -> str:
    """Accuracy of every method as mean and standard deviation over seeds, with the difference to the mean merge by seed."""
    lines = [f"### {name}, {len(runs)} seeds\n", "| method | accuracy | minus the mean merge, by seed |", "|---|---|---|"]
    methods = sorted(runs[0]["methods"], key=lambda method: -mean(run["methods"][method]["accuracy"] for run in runs))
    for method in methods:
        values = [100 * run["methods"][method]["accuracy"] for run in runs]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else " (one seed)"
        gains = [100 * (r["methods"][method]["accuracy"] - r["methods"]["mean"]["accuracy"]) for r in runs]
        shown = "" if method == "mean" else ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"| {method} | {mean(values):.1f}{spread} | {shown} |")
    lines += [
        "",
        "| seed | cold, s | warm, s | peak, GiB | images in stream | validation accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        cold, warm = run["measured"]["cold"], run["measured"]["warm"]
        sites = ", ".join(f"{site['name']} {site['validation_accuracy']:.3f}" for site in run["sites"])
        cells = [f"{cold['seconds']:.0f}", f"{warm['seconds']:.0f}", f"{max(cold['peak_gib'], warm['peak_gib']):.2f}"]
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {run['stream']['samples']} | {sites} |")
    return "\n".join(lines) + "\n"


def main(
    scenario: Annotated[list[str], typer.Option(help="name of a file in scenarios/; may be repeated")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="run folders, pools and tables")] = Path("runs/benchmark"),
) -> None:
    """Write one Markdown table for each scenario."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in scenario:
        text = table(name, [run(name, seed, out) for seed in range(seeds)])
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
