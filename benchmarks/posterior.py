"""Does `posterior` need to know which kind of hospital it stands in? Regret to the best method of every block, over seeds.

    python benchmarks/posterior.py --out runs/posterior --set development --jobs 2
    python benchmarks/posterior.py --out runs/posterior --set development --table runs/posterior/tables.md

The development set is the phantom, seeds from 100 on, in the federations of `WORLDS`, on the streams of `STREAMS`; those that begin
with ImageNet weights (`--set pretrained`, FEDMERGE_WEIGHTS as scenarios/wbc-pretrained.yaml says) have fewer streams and rows. On
the streams of `CHANGES` (`--set changes`) experts or images change on the way, and whole runs go through them. The test set is the
scenarios of `REAL` as they are shipped, seeds from 0 on.

A block is a federation's kind and a stream; regret is the best ranked row of the block less a row, in points, each the mean over
seeds. Started again, it goes on where it stopped. Rows named `+labels` are under the label prior of their batches, and are ranked
among themselves.
"""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
import yaml
from many_streams import Streams, schedule_of
from regimes import DIFFERENCES, SITES, federation

import fedmerge
from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.report.metrics.significance import holm, over_seeds
from fedmerge.report.terminal import Terminal
from fedmerge.system.process import owners

ROOT = Path(__file__).resolve().parents[1]
TARGET_IMAGES = 600
STREAMS: dict[str, dict[str, Any]] = {
    "i.i.d.": {"kind": "iid"},
    "Dirichlet 0.01": {"kind": "dirichlet_batch", "delta": 0.01},
    "Dirichlet 1": {"kind": "dirichlet_batch", "delta": 1.0},
    "sorted by class": {"kind": "temporal", "order": "sorted"},
    "recurring": {"kind": "mixture_drift", "drift": "recurring"},
    "domain after domain": {"kind": "domain_seq", "within": {"kind": "iid"}},
    "smooth drift": {"kind": "mixture_drift", "drift": "smooth"},
    "single images": {"kind": "iid", "batch_size": 1},
}
PLAIN = ("mean", "ensemble", "dcs", "model_stock", "wise_ft", "ties", "eam")
METHODS: list[Any] = [
    *PLAIN,
    "expert",
    *({name: {"label_prior": "batch", "label": f"{name}+labels"}} for name in PLAIN),
    "posterior",
    {"posterior": {"granularity": "batch", "label": "posterior-batch"}},
    {"posterior": {"label_prior": "batch", "label": "posterior+labels"}},
    {"posterior": {"label_prior": "batch", "granularity": "batch", "label": "posterior-batch+labels"}},
]
ABLATIONS: list[Any] = [
    *(
        {"posterior": {"label": f"without-{left_out}", "panel": [m for m in MEMBERS if m != left_out]}}
        for MEMBERS in (("ensemble", "mean", "wise_ft", "model_stock"),)
        for left_out in MEMBERS
    ),
    *({"posterior": {"label": f"shrink-{shrink}", "shrink": shrink}} for shrink in ("none", "half")),
    {"posterior": {"label": "agreement", "evidence": "agreement"}},
    *({"posterior": {"label": f"beta-{beta}", "beta": beta}} for beta in (0.5, 2, 4)),
    {"posterior": {"label": "head-beta-4", "head_beta": 4}},
    {"posterior": {"label": "em-off", "em": False}},
    {"posterior": {"label": "memory-off", "rho": 0}},
    {"posterior": {"label": "rho-0.9", "rho": 0.9}},
]


IMAGENET = {"kind": "checkpoint", "path": "${FEDMERGE_WEIGHTS}", "match": "order"}
FINE_TUNED = {
    "runs": 1, "epochs": 4, "batch_size": 16, "augment": "none", "evaluations": 3, "precision": "float32_channels_last",
    "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}},
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """A federation of the development set. differs: what sites differ in, by name; sites: how many, with planes and scanners drawn
    where they are not three. skew: Dirichlet concentration of every hospital's shares of classes, the target's too. hijacked: the
    hospital `axial` multiplies its head by 20. epochs: of the proxy that makes theta_0. pretrained: EfficientNet-Lite0 with
    ImageNet weights in place of the proxy, images of 64 px.
    """

    differs: tuple[str, ...] = ("scanner", "plane")
    sites: int = 3
    skew: float | None = None
    hijacked: bool = False
    epochs: int = 8
    pretrained: bool = False

    def write(self, folder: Path, seed: int) -> Path:
        """Its files, as this seed draws them; returns the scenario's."""
        file = federation(folder, self.differs)
        rng = np.random.default_rng([seed, self.sites])
        target = _read(folder / "sites" / "mercy.yaml")
        target["source"]["images"] = TARGET_IMAGES
        scenario = _read(file)
        scenario["initialization"]["epochs"] = self.epochs
        if self.pretrained:
            scenario |= {"model": {"name": "tf_efficientnet_lite0", "size": 64}, "initialization": IMAGENET}
            scenario["training"] |= FINE_TUNED
        if self.sites != len(SITES):
            scenario["sites"] = [f"drawn_{number}" for number in range(self.sites)]
            for name in scenario["sites"]:
                site = _drawn(_read(folder / "sites" / "axial.yaml"), rng) | {"name": name}
                _write(folder / "sites" / f"{name}.yaml", site)
        for name in scenario["sites"]:
            site = _read(folder / "sites" / f"{name}.yaml")
            _write(folder / "sites" / f"{name}.yaml", self._skewed(site, rng))
        if self.hijacked:
            site = _read(folder / "sites" / "axial.yaml")
            _write(folder / "sites" / "axial.yaml", {**site, "attack": {"scale_head": {"factor": 20}}})
        _write(folder / "sites" / "mercy.yaml", self._skewed(target, rng))
        _write(file, scenario)
        return file

    def _skewed(self, site: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if self.skew is not None:
            shares = 10 * rng.dirichlet([self.skew] * len(ORGANS)) + 0.01
            site["source"]["priors"] = {organ: round(float(share), 4) for organ, share in zip(ORGANS, shares, strict=True)}
        return site


def _drawn(site: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A hospital with one plane or two, and a scanner of its own."""
    low, noise = int(rng.integers(20, 70)), round(float(rng.uniform(0.03, 0.1)), 3)
    blur, gamma = round(float(rng.uniform(0, 0.9)), 2), round(float(rng.uniform(0.8, 1.2)), 2)
    site["source"]["planes"] = sorted(rng.choice(SITES, int(rng.integers(1, 3)), replace=False).tolist())
    return site | {"scanner": {"window": [low, int(rng.integers(320, 520))], "noise": noise, "blur": blur, "gamma": gamma}}


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


WORLDS = {
    **{name: World(differs) for name, differs in DIFFERENCES.items()},
    "hijacked": World(hijacked=True),
    "skewed priors": World(skew=0.3),
    "poor theta_0": World(epochs=1),
    "plane, poor theta_0": World(("plane",), epochs=1),
    "2 sites, poor theta_0": World(sites=2, epochs=1),
    "2 sites": World(sites=2),
    "5 sites": World(sites=5),
    "8 sites": World(sites=8),
}
PRETRAINED = {
    "ImageNet, scanner": World(("scanner",), pretrained=True),
    "ImageNet, scanner and plane": World(pretrained=True),
    "ImageNet, skewed priors": World(skew=0.3, pretrained=True),
}
STREAMS_OF_PRETRAINED = ("i.i.d.", "Dirichlet 0.01", "sorted by class")
CHANGES: dict[str, dict[str, Any]] = {
    "a hospital joins, another leaves": {"stream": STREAMS["smooth drift"]},
    "corrupted images": {"stream": {"kind": "corruption", "images": 240}},
}
JOINS_AT, LEAVES_AT = 4, 8
"""Batches, of 12: the last hospital of the list joins before one, the first leaves before the other."""
OF_CHANGES = [*PLAIN, "posterior", {"posterior": {"granularity": "batch", "label": "posterior-batch"}}]
REAL = ("organs", "wbc", "brain-mri")


def scenario_of(folder: Path, kind: str, seed: int) -> Path:
    """The file of a federation of this kind."""
    return ROOT / "scenarios" / f"{kind}.yaml" if kind in REAL else (WORLDS | PRETRAINED)[kind].write(folder, seed)


def measure(out: Path, which: str, kind: str, seed: int, ablations: bool, priors: str) -> None:
    """Accuracies of all methods on all streams of one federation, into a file of its own."""
    place = out / which / kind.replace(" ", "_")
    done = place / f"seed{seed}{'-ablations' if ablations else ''}.json"
    if done.exists():
        return
    few = kind in PRETRAINED
    asked = [entry for entry in METHODS if not few or not _merges_by_image(entry)]
    methods = yaml.safe_dump([*asked, *(ABLATIONS if ablations else [])])
    settings: tuple[tuple[str, Any], ...] = (
        ("methods", yaml.safe_load(methods)), ("defenses", []), ("limits", {"growth": 1000})
    )  # fmt: skip
    if priors != "as_trained":
        settings += (("priors", priors), ("uploads", ["class_counts"]))
    plan = load_experiment(scenario_of(place / f"world{seed}", kind, seed), Overrides(seed=seed, settings=settings))
    streams = Streams(plan, out / "pool", place / f"seed{seed}")
    schedules = {
        name: schedule_of({"batch_size": 32, **spec}) for name, spec in STREAMS.items() if not few or name in STREAMS_OF_PRETRAINED
    }
    domains = plan.target.source.domains()  # of one domain, some streams cannot be made
    rows = {name: streams.accuracies(schedule) for name, schedule in schedules.items() if not schedule.check(domains)}
    (place / "forwards.json").write_text(json.dumps(streams.forwards, indent=2), encoding="utf-8")
    done.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def measure_changes(out: Path, which: str, kind: str, seed: int) -> None:
    """The same on the streams of `CHANGES`, by whole runs."""
    place = out / which / kind.replace(" ", "_")
    done = place / f"seed{seed}.json"
    if done.exists():
        return
    file = scenario_of(place / f"world{seed}", kind, seed)
    common = {"methods": OF_CHANGES, "defenses": [], "limits": {"growth": 1000}}
    rows: dict[str, dict[str, float]] = {}
    for name, change in CHANGES.items():
        asked = {**common, "stream": {"batch_size": 32, **change["stream"]}}
        if "joins" in name:
            first, *others, last = _read(file)["sites"]
            if not others:
                continue
            events = [{"at": JOINS_AT, "join": last}, {"at": LEAVES_AT, "leave": first}]
            asked |= {"sites": [first, *others], "events": events}
        folder = place / f"seed{seed}-{name.split()[0]}"
        ended = fedmerge.run(file, seed=seed, backend="local", settings=asked, pool=out / "pool", out=folder, quiet=True, threads=1)
        rows[name] = {row["method"]: row["accuracy"] for row in ended.table}
        costs = {row["method"]: row["forwards_per_batch"] for row in ended.table}
    (place / "forwards.json").write_text(json.dumps(costs, indent=2), encoding="utf-8")
    done.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def _merges_by_image(entry: Any) -> bool:
    """Whether a row merges once for each image, which takes minutes a batch for large convolutions."""
    name, fields = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
    return name == "posterior" and fields.get("granularity") != "batch"


def measured(out: Path, kinds: list[str]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Accuracy in % by kind, stream, seed, and row, of what has been measured."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for kind in kinds:
        for file in sorted((out / kind.replace(" ", "_")).glob("seed*.json")):
            for stream, row in json.loads(file.read_text(encoding="utf-8")).items():
                found[kind, stream, file.stem.partition("-")[0]] = {name: 100 * accuracy for name, accuracy in row.items()}
    return found


def blocks(found: dict[tuple[str, str, str], dict[str, float]]) -> dict[tuple[str, str], dict[str, float]]:
    """Accuracy in % by block and row, the mean over the seeds that are there."""
    of: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kind, stream, _), row in found.items():
        for name, accuracy in row.items():
            of[kind, stream][name].append(accuracy)
    return {block: {name: float(np.mean(values)) for name, values in row.items()} for block, row in of.items()}


def regrets(of: dict[tuple[str, str], dict[str, float]], names: list[str]) -> dict[str, tuple[float, float, float, str]]:
    """Mean rank, mean and worst regret of every row among these, and the block of the worst."""
    table = {}
    for name in names:
        lost = {block: max(row[other] for other in names) - row[name] for block, row in of.items()}
        ranks = [sum(row[other] > row[name] for other in names) + 1 for row in of.values()]
        worst = max(lost, key=lambda block: lost[block])
        table[name] = (float(np.mean(ranks)), float(np.mean(list(lost.values()))), lost[worst], ", ".join(worst))
    return dict(sorted(table.items(), key=lambda item: item[1][1]))


def rows_of_page(of: dict[tuple[str, str], dict[str, float]], ablations: bool) -> tuple[list[str], list[str]]:
    """Names of the rows without label prior, and of those with it."""
    everyone = [name for name in next(iter(of.values())) if not name.startswith("expert")]
    base = [m if isinstance(m, str) else next(iter(m.values())).get("label", "posterior") for m in METHODS]
    plain = [name for name in (everyone if ablations else base) if "+labels" not in name and name in everyone]
    return plain, [name for name in everyone if "+labels" in name]


def table_of(first: str, names: list[str], rows: dict[str, list[float]]) -> list[str]:
    """Accuracies in Markdown, the best of each row in bold."""
    lines = [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, values in rows.items():
        cells = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]


def regrets_of(of: dict[tuple[str, str], dict[str, float]], names: list[str]) -> list[str]:
    """Mean rank and regrets in Markdown."""
    lines = ["| method | mean rank | mean regret | worst regret | where |", "|---|---|---|---|---|"]
    for name, (rank, mean, worst, where) in regrets(of, names).items():
        lines.append(f"| {name} | {rank:.1f} | {mean:.1f} | {worst:.1f} | {where} |")
    return [*lines, ""]


def write_csv(file: Path, found: dict[tuple[str, str, str], dict[str, float]]) -> None:
    """One line for each block and row: accuracy in %, the mean over the seeds."""
    seeds: dict[tuple[str, str], int] = defaultdict(int)
    for kind, stream, _ in found:
        seeds[kind, stream] += 1
    with file.open("w", encoding="utf-8", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(["federation", "stream", "row", "seeds", "accuracy"])
        for block, row in blocks(found).items():
            lines.writerows([*block, name, seeds[block], f"{accuracy:.1f}"] for name, accuracy in row.items())


def differences_of(found: dict[tuple[str, str, str], dict[str, float]], names: list[str], reference: str) -> list[str]:
    """What every row has less than the reference, in Markdown: one difference a federation (kind and seed), over its streams."""
    from scipy.stats import ttest_1samp

    federations = sorted({(kind, seed) for kind, _, seed in found})
    if len(federations) < 2:
        return ["One federation tells nothing of others.", ""]
    of = {federation: [row for (kind, _, seed), row in found.items() if (kind, seed) == federation] for federation in federations}
    others = [name for name in names if name != reference]
    lost = [[float(np.mean([row[name] - row[reference] for row in rows])) for rows in of.values()] for name in others]
    ps = holm([float(ttest_1samp(values, 0).pvalue) for values in lost])
    lines = [f"| method | less `{reference}` | 95 % interval over {len(federations)} federations | p, Holm |", "|---|---|---|---|"]
    for name, values, p in zip(others, lost, ps, strict=True):
        low, high = over_seeds(values) or (0.0, 0.0)
        lines.append(f"| {name} | {np.mean(values):+.1f} | {low:+.1f} to {high:+.1f} | {'< 0.001' if p < 0.001 else f'{p:.3f}'} |")
    return [*lines, ""]


def pareto_of(of: dict[tuple[str, str], dict[str, float]], names: list[str], forwards: dict[str, float]) -> list[str]:
    """Accuracy against forwards, in Markdown, the cheapest first; in bold who has more than all that cost no more."""
    accuracy = {name: float(np.mean([row[name] for row in of.values()])) for name in names if name in forwards}
    lines, best = ["| method | forwards an image | accuracy, the mean over blocks |", "|---|---|---|"], 0.0
    for name in sorted(accuracy, key=lambda name: (forwards[name], -accuracy[name])):
        value = f"{accuracy[name]:.1f}"
        lines.append(f"| {name} | {forwards[name]:g} | {f'**{value}**' if accuracy[name] > best else value} |")
        best = max(best, accuracy[name])
    return [*lines, ""]


def page(found: dict[tuple[str, str, str], dict[str, float]], ablations: bool, forwards: dict[str, float]) -> str:
    """Accuracy by kind of federation, regrets, differences, and accuracy against forwards, in Markdown."""
    of = blocks(found)
    good = {block: row for block, row in of.items() if "poor theta_0" not in block[0]}
    lines = []
    for title, names in zip(("without label prior", "with label prior"), rows_of_page(of, ablations), strict=True):
        if not names:
            continue
        kinds = {kind: [row for (other, _), row in of.items() if other == kind] for kind, _ in of}
        means = {kind: [float(np.mean([row[name] for row in rows])) for name in names] for kind, rows in kinds.items()}
        lines += [f"### Accuracy by kind of federation, {title}, the mean over streams", "", *table_of("federation", names, means)]
        if len(good) < len(of):
            lines += [f"### Regret where theta_0 is good, {title}", "", *regrets_of(good, names)]
        lines += [f"### Regret of all blocks, {title}", "", *regrets_of(of, names)]
        own = next(name for name in names if name.startswith("posterior"))
        lines += [f"### Differences, {title}", "", *differences_of(found, names, own)]
        lines += [f"### Accuracy against forwards, {title}", "", *pareto_of(of, names, forwards)]
    return "\n".join(lines)


CLOCKED: dict[str, dict[str, Any]] = {
    "ensemble": {"method": "ensemble"},
    "eam": {"method": "eam"},
    "posterior": {"method": "posterior", "fallback": "none"},  # experts are made up, and do not mix
    "posterior-batch": {"method": "posterior", "granularity": "batch", "fallback": "none"},
}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "in_chans": 1},
    "vit_small_patch16_224": {"img_size": 96},
    "resnet18": {},
}
SIDES = {"vit_tiny_patch16_224": 32}


def clock(rounds: int = 12, K: int = 3, N: int = 32) -> str:
    """Seconds for a batch of every method alone, as a share of those of `eam`: methods take turns, and the median counts."""
    torch.set_num_threads(1)
    lines = [f"| model | {' | '.join(CLOCKED)} |", "|---" * (len(CLOCKED) + 1) + "|"]
    for name, keywords in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=11, **keywords)
        base = {key: value.clone() for key, value in model.state_dict().items()}
        moved = [{key: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for key, v in base.items()} for _ in range(K)]
        adapters = {key: fedmerge.Adapter(model, moved, base=base, **fields) for key, fields in CLOCKED.items()}
        side = SIDES.get(name, 96)
        batch = torch.randn(N, keywords.get("in_chans", 3), side, side)
        took: dict[str, list[float]] = defaultdict(list)
        for turn in range(rounds + 2):
            for key, adapt in adapters.items():
                start = time.perf_counter()
                adapt(batch)
                if turn >= 2:  # the first ones warm up
                    took[key].append(time.perf_counter() - start)
        median = {key: float(np.median(seconds)) for key, seconds in took.items()}
        ratios = [f"{seconds / median['eam']:.2f}" for seconds in median.values()]
        lines.append(f"| {name}, {side} px | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(  # noqa: PLR0913 - a command line
    out: Annotated[Path, typer.Option(help="folder of worlds, pool and results")] = Path("runs/posterior"),
    which: Annotated[
        str, typer.Option("--set", help="development, pretrained, changes, test, or clock: seconds of a batch")
    ] = "development",
    seeds: Annotated[int, typer.Option(help="how many")] = 5,
    first: Annotated[int | None, typer.Option(help="the first of them; default: 0 for the test set, else 100")] = None,
    jobs: Annotated[int, typer.Option(help="federations at a time")] = 2,
    ablations: Annotated[bool, typer.Option("--ablations", help="also with every part left out")] = False,
    only: Annotated[list[str] | None, typer.Option(help="this kind of federation; once for each")] = None,
    priors: Annotated[str, typer.Option(help="the scenario's key of that name")] = "as_trained",
    table: Annotated[
        Path | None, typer.Option(help="only write this page of what has been measured, and every block beside it, as .csv")
    ] = None,
) -> None:
    """Measure what is not there yet, and print the regrets."""
    terminal = Terminal()
    if which == "clock":
        terminal.say(clock())
        return
    known = {"development": [*WORLDS], "changes": [*WORLDS], "pretrained": [*PRETRAINED]}.get(which, [*REAL])
    kinds = [kind for kind in known if only is None or kind in only]
    first = (0 if known == [*REAL] else 100) if first is None else first
    which += "" if priors == "as_trained" else f"-{priors}"
    if table is None:
        with owners(jobs) as processes:
            cells = [(kind, seed) for seed in range(first, first + seeds) for kind in kinds]
            running = [
                processes.submit(measure_changes, out, which, kind, seed)
                if which == "changes"
                else processes.submit(measure, out, which, kind, seed, ablations, priors)
                for kind, seed in cells
            ]
            for number, (cell, one) in enumerate(zip(cells, running, strict=True), 1):
                one.result()
                terminal.say(f"{number}/{len(cells)}: {cell[0]}, seed {cell[1]}")
    of_three_sites = ("scanner_and_plane", "organs", "ImageNet,_scanner")
    costs = [out / which / kind / "forwards.json" for kind in of_three_sites]
    forwards = next((json.loads(cost.read_text(encoding="utf-8")) for cost in costs if cost.exists()), {})
    found = measured(out / which, kinds)
    text = page(found, ablations, forwards)
    if table:
        table.write_text(text, encoding="utf-8")
        write_csv(table.with_suffix(".csv"), found)
    terminal.say(text)


if __name__ == "__main__":
    typer.run(main)
