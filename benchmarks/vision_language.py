"""The tables of docs/vision-language.md: each part runs its scenarios over seeds, and prints a table in Markdown.

python benchmarks/vision_language.py t3          # in domain, novel, noise, digital, mCE; and T^3's table of coefficients
python benchmarks/vision_language.py batches     # T^3_B and DaWin by batch size
python benchmarks/vision_language.py robust      # in domain and out of it
python benchmarks/vision_language.py multitask   # three tasks, unknown and known
python benchmarks/vision_language.py cost [--images 4] [--batches 2] [--name ViT-B-16] [--methods t3_batch,t3] [--threads 1]

`--seeds 0,1,2`; `--out FOLDER` keeps runs and a pool of experts: a run that is there is not done again, so a part that was
interrupted goes on. `cost` has CPU seconds of a batch with random weights at 224 px.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge import Adapter
from fedmerge.data.images import to_batch
from fedmerge.experiment.experiment import Overrides, RunOptions, load_experiment
from fedmerge.experiment.training_phase import load_experts, make_theta_0, site_task
from fedmerge.federated.model import ClipSpec, build, normalization
from fedmerge.report.terminal import Terminal

SCENARIOS = Path(__file__).parent.parent / "scenarios"
BATCHES = (1, 16, 32, 64, 128, 256)
TASKS = ("chest", "abdomen", "pelvis")
NOISE = ("noise", "shot", "impulse", "speckle")
ZERO_SHOT = "expert:theta_0"

Row = dict[str, float | None]


def ran(out: Path, scenario: str, seed: int, *options: str) -> dict[str, Any]:
    """The summary of a run, done now unless it is there."""
    words = [scenario, str(seed), *(option for option in options if "=" in option)]
    folder = out / "-".join(word.rpartition(".")[2] for word in words)
    if not (folder / "summary.json").exists():
        where = ["--seed", str(seed), "--out", str(folder), "--pool", str(out / "pool"), "--resume", "--quiet"]
        command = [sys.executable, "-m", "fedmerge.simulate", str(SCENARIOS / f"{scenario}.yaml"), *where, *options]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def table(header: Sequence[str], seeds: Sequence[int], rows_of: Callable[[int], dict[str, Row]]) -> None:
    """A line for each row: the mean over seeds, and its standard error."""
    found = [rows_of(seed) for seed in seeds]
    print(f"| row | {' | '.join(header)} |\n|---|{'--:|' * len(header)}")
    for name in found[0]:
        cells = [_cell([one[name][key] for one in found if name in one]) for key in header]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _cell(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return ""
    error = statistics.stdev(there) / math.sqrt(len(there)) if len(there) > 1 else None
    return f"{statistics.mean(there):.1f}" + (f" ± {error:.1f}" if error is not None else "")


def t3(out: Path, seeds: Sequence[int]) -> None:
    """The four settings, and T^3's mCE: Err of novel, noise and digital, the zero-shot model being 100."""

    def rows(seed: int) -> dict[str, Row]:
        clean = ran(out, "t3-benchmark", seed)["methods"]
        corrupted = ran(out, "t3-benchmark-corruption", seed)["methods"]
        found: dict[str, Row] = {}
        for name, row in clean.items():
            one: Row = {"in domain": row["by_novelty"]["base"]["accuracy"], "novel": row["by_novelty"]["novel"]["accuracy"]}
            families = corrupted[name]["per_family"] if name in corrupted else None
            for kind in ("noise", "digital"):
                of = [value for family, value in (families or {}).items() if (family in NOISE) == (kind == "noise")]
                one[kind] = statistics.mean(of) if of else None
            found[name] = {key: None if value is None else 100 * value for key, value in one.items()}
        for row in found.values():
            errors = [_err(row[key], found[ZERO_SHOT][key]) for key in ("novel", "noise", "digital")]
            row["mCE"] = None if None in errors else statistics.mean(errors)  # type: ignore[type-var]
        return found

    table(("in domain", "novel", "noise", "digital", "mCE"), seeds, rows)


def _err(accuracy: float | None, base: float | None) -> float | None:
    return None if accuracy is None or base is None or base == 100 else 100 * (100 - accuracy) / (100 - base)


def batches(out: Path, seeds: Sequence[int]) -> None:
    """Accuracy in domain and on novel classes by batch size, by the experts of part t3: one order of images for all sizes."""

    def rows(seed: int) -> dict[str, Row]:
        ran(out, "t3-benchmark", seed)
        experiment = load_experiment(SCENARIOS / "t3-benchmark.yaml", Overrides(seed=seed))
        options = RunOptions(out=out, pool=out / "pool", quiet=True)
        initial = make_theta_0(experiment, options, Terminal(quiet=True))
        (expert,) = load_experts([site_task(experiment, 0, initial)], options)
        spec, classes = experiment.scenario.model, experiment.target_classes
        base, state = initial.weights | initial.target_head, expert.weights | initial.target_head
        images = experiment.target.images(spec.geometry, seed).of_classes(classes)
        images = images.subset(np.random.default_rng(seed).permutation(len(images)))
        x, y = to_batch(images.pixels, *normalization(spec)), torch.from_numpy(images.labels)
        novel = torch.tensor([name not in experiment.classes for name in classes])[y]
        found: dict[str, Row] = {}
        for size in BATCHES:
            adapters = {
                "t3_batch": Adapter(build(spec, len(classes)), [state], "t3_batch", base, generalist="theta_0"),
                "dawin": Adapter(build(spec, len(classes)), [base, state], "dawin", temperatures=[1.0, expert.temperature]),
            }
            for name, adapt in adapters.items():
                right = torch.cat([adapt(batch).argmax(1) for batch in x.split(size)]) == y
                for label, these in (("in domain", ~novel), ("novel", novel)):
                    found.setdefault(f"{name}, {label}", {})[str(size)] = 100 * float(right[these].double().mean())
        return found

    table([str(size) for size in BATCHES], seeds, rows)


def robust(out: Path, seeds: Sequence[int]) -> None:
    """Accuracy in the hospital's domain, and out of it."""

    def rows(seed: int) -> dict[str, Row]:
        methods = ran(out, "dawin-robust", seed)["methods"]
        parts = {"in domain": "in_domain", "out of domain": "out_of_domain"}
        return {name: {key: 100 * row["by_part"][part] for key, part in parts.items()} for name, row in methods.items()}

    table(("in domain", "out of domain"), seeds, rows)


def multitask(out: Path, seeds: Sequence[int]) -> None:
    """Accuracy in each task and the mean: among all classes, and where a stream is one task's and predicted among its classes."""

    def rows(seed: int) -> dict[str, Row]:
        whole = ran(out, "dawin-multitask", seed)["methods"]
        known = {task: ran(out, "dawin-multitask", seed, "--set", f"target.classes={task}")["methods"] for task in TASKS}
        found: dict[str, Row] = {}
        for name, row in whole.items():
            one: Row = {f"{task}, unknown": 100 * row["by_task"][task]["accuracy"] for task in TASKS}
            one["mean, unknown"] = 100 * row["mean_of_tasks"]["accuracy"]
            there = {f"{task}, known": 100 * known[task][name]["accuracy"] for task in TASKS}
            found[name] = one | there | {"mean, known": statistics.mean(there.values())}
        own = {task: found[f"expert:{task}"] for task in TASKS}
        each = {f"{task}, {state}": own[task][f"{task}, {state}"] for state in ("unknown", "known") for task in TASKS}
        means = {
            f"mean, {state}": statistics.mean(v for key, v in each.items() if key.endswith(f", {state}") and v is not None)
            for state in ("unknown", "known")
        }
        return {**found, "each task's own expert": {**each, **means}}

    header = [f"{task}, {state}" for state in ("unknown", "known") for task in (*TASKS, "mean")]
    table(header, seeds, rows)


def cost(asked: argparse.Namespace) -> None:
    """A line for each method: CPU seconds of a batch, and the peak of the process so far."""
    torch.set_num_threads(asked.threads)
    spec = ClipSpec(name=asked.name)
    model = build(spec, 8)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    expert = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in start.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{asked.name}, {parameters / 1e6:.1f} million parameters leave a hospital, {torch.get_num_threads()} threads")
    side = spec.geometry.size
    for method in asked.methods.split(","):
        adapt = Adapter(model, {"expert": expert}, method=method, base=start, generalist="theta_0")
        seconds = []
        for _ in range(asked.batches):
            batch = torch.rand(asked.images, 3, side, side, generator=generator)
            began = time.process_time()
            adapt(batch)
            seconds.append(time.process_time() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        said = f"{min(seconds):.2f} CPU seconds for {asked.images} images, the best of {asked.batches} batches"
        print(f"{method}: {said}; peak {peak:.1f} GiB", flush=True)


PARTS: dict[str, Callable[[Path, Sequence[int]], None]] = {"t3": t3, "batches": batches, "robust": robust, "multitask": multitask}


def main() -> None:
    """Print the table of a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "cost"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/vision-language"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--name", default="ViT-B-16")
    parser.add_argument("--methods", default="t3_batch,t3")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.part == "cost":
        cost(asked)
    else:
        PARTS[asked.part](asked.out, [int(seed) for seed in asked.seeds.split(",")])


if __name__ == "__main__":
    main()
