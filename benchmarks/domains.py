"""Leave one domain out, as the papers print it: four generated domains in DomainBed's layout, each the target once, over seeds.

    python benchmarks/domains.py --seeds 3 --page runs/domains/table.md

The domains are the phantom's organs, of other patients each, seen by four scanners: the scanner alone differs. The images are
the same for every seed, which changes who is held out, theta_0, training and the order of the stream. Each cell has the experts of
the other three domains, and every expert is trained once for each seed. Started again, it goes on where it stopped.
`fedmerge sweep OUT/domains.yaml --seeds 3` gives the same table, by a process for each cell; here one process measures all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - after the path to this checkout
import typer  # noqa: E402
import yaml  # noqa: E402

from fedmerge.experiment.experiment import Overrides, load_each  # noqa: E402

SCANNERS: dict[str, dict[str, Any]] = {
    "general": {"window": [40, 400], "noise": 0.04},
    "low_dose": {"window": [40, 400], "noise": 0.16, "grain": 0.6},
    "old": {"window": [40, 400], "resolution": 0.5, "gamma": 1.5, "noise": 0.03},
    "wide": {"window": [100, 1200], "blur": 0.7, "noise": 0.02},
}
SIZE = 32
METHODS = (
    "mean",
    "weighted_mean",
    "wise_ft",
    "model_stock",
    "ties",
    "ensemble",
    "dcs",
    "dawin",
    "t3_batch",
    "eam",
    "posterior",
    "expert",
)


def make_images(root: Path, images: int, patients: int) -> None:
    """`<root>/<domain>/<organ>/<patient>-<number>.png`, 8-bit gray; domains that are there stay."""
    from PIL import Image

    from fedmerge.data.datasets._base import Geometry
    from fedmerge.federated.site import Site

    for domain, scanner in SCANNERS.items():
        if (root / domain).exists():
            continue
        source = {"kind": "organ_phantom", "images": images, "patients": patients}
        found = Site.model_validate({"name": domain, "source": source, "scanner": scanner}).images(Geometry(SIZE, 1), seed=0)
        draft = root / f".{domain}"
        for number in range(len(found)):
            file = draft / found.classes[found.labels[number]] / f"{found.groups[number]:04d}-{number:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(found.pixels[number, ..., 0]).save(file)
        draft.rename(root / domain)


def make_scenario(folder: Path) -> Path:
    """Four sites, all the scenario's own, and each the target in turn."""
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    for domain in SCANNERS:
        source = {
            "kind": "image_folder",
            "root": str(folder / "images"),
            "folders": [domain],
            "patient": r"(\d+)-\d+\.png",
            "flips": False,
        }
        (folder / "sites" / f"{domain}.yaml").write_text(yaml.safe_dump({"name": domain, "source": source}), encoding="utf-8")
    scenario = {
        "name": "domains",
        "model": {
            "name": "vit_tiny_patch16_224",
            "kwargs": {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "in_chans": 1},
        },
        "initialization": {"kind": "proxy", "source": "organ_phantom", "epochs": 3},
        "sites": list(SCANNERS),
        "training": {
            **{"runs": 1, "epochs": 10, "optimizer": "adamw", "schedule": "cosine", "augment": "none", "evaluations": 5},
            "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}},
        },
        "target": "each",
        "stream": {"kind": "iid", "batch_size": 32},
        "methods": list(METHODS),
        "backend": "local",
    }
    file = folder / "domains.yaml"
    file.write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return file


def validation(pool: Path) -> dict[str, list[float]]:
    """Accuracy of every expert on its own held-out patients, by domain."""
    found: dict[str, list[float]] = {domain: [] for domain in SCANNERS}
    for file in sorted(pool.glob("experts/*/manifest.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found[manifest["site"]].append(manifest["scalars"]["validation_accuracy"])
    return found


def measured(scenario: Path, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Accuracy of every method by the domain that is left out: from `out`, or measured now."""
    from many_streams import Streams

    found: dict[str, dict[str, float]] = {}
    for plan in load_each(scenario, Overrides(seed=seed)):
        kept = out / "cells" / f"{plan.target.name}-{seed}.json"
        if not kept.exists():
            streams = Streams(plan, out / "pool", out / "cells" / f"{plan.target.name}-{seed}")
            kept.write_text(json.dumps(streams.accuracies(plan.scenario.stream)), encoding="utf-8")
            typer.echo(f"seed {seed}, {plan.target.name} left out: {len(plan.sites)} experts")
        found[plan.target.name] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def table(seeds: list[dict[str, dict[str, float]]]) -> list[str]:
    """Methods by domains in percent, means over seeds; the mean over domains with its standard deviation over seeds; best first.

    An expert has no row where its own domain is left out, and so no mean.
    """
    rows: list[tuple[float, str]] = []
    for method in dict.fromkeys(name for of in seeds for cell in of.values() for name in cell):
        cells = [[100 * of[domain].get(method, np.nan) for domain in SCANNERS] for of in seeds]
        each, over = np.mean(cells, 0), np.mean(cells, 1)
        shown = ["" if np.isnan(value) else f"{value:.1f}" for value in each]
        mean = "" if np.isnan(over).any() else f"{over.mean():.1f} ± {over.std(ddof=min(1, len(over) - 1)):.1f}"
        rows.append((-np.inf if not mean else over.mean(), f"| {method} | {' | '.join(shown)} | {mean} |"))
    head = f"| left out: | {' | '.join(SCANNERS)} | mean |"
    return [head, "|---" * (len(SCANNERS) + 2) + "|", *(row for _, row in sorted(rows, key=lambda row: -row[0]))]


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: Annotated[int, typer.Option(min=100, help="of each domain")] = 600,
    patients: Annotated[int, typer.Option(min=10, help="of each domain")] = 100,
    out: Annotated[Path, typer.Option(help="images, pool and cells")] = Path("runs/domains"),
    page: Annotated[Path | None, typer.Option(help="where the table goes", show_default="OUT/table.md")] = None,
) -> None:
    """Make the images, train each domain's expert once for every seed, and write the table over domains."""
    out = out.resolve()
    make_images(out / "images", images, patients)
    scenario = make_scenario(out)
    lines = [*table([measured(scenario, seed, out) for seed in range(seeds)]), ""]
    for domain, own in validation(out / "pool").items():
        lines.append(f"- {domain}: {len(own)} experts, accuracy on own held-out patients {', '.join(f'{one:.3f}' for one in own)}")
    (page or out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
