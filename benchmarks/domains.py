"""Leave one domain out, as the papers print it: four generated domains in DomainBed's layout, each the target once, over seeds.

    python benchmarks/domains.py --seeds 3 --page runs/domains/table.md

The domains are the phantom's organs, of other patients each, seen by four scanners: the scanner alone differs. The images are
the same for every seed, which changes who is held out, theta_0, training and the order of the stream. Each cell has the experts of
the other three domains, and every expert is trained once for each seed. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402 - after the path to this checkout
import yaml  # noqa: E402

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


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: Annotated[int, typer.Option(min=100, help="of each domain")] = 1200,
    patients: Annotated[int, typer.Option(min=10, help="of each domain")] = 150,
    out: Annotated[Path, typer.Option(help="images, pool and sweep")] = Path("runs/domains"),
    page: Annotated[Path | None, typer.Option(help="where the table goes", show_default="OUT/table.md")] = None,
) -> None:
    """Make the images, run the sweep, and write its table over domains."""
    out = out.resolve()
    make_images(out / "images", images, patients)
    options = ["--seeds", str(seeds), "--jobs", "1", "--pool", str(out / "pool"), "--out", str(out / "sweep"), "--quiet"]
    subprocess.run([sys.executable, "-m", "fedmerge", "sweep", str(make_scenario(out)), *options], check=True, cwd=ROOT)
    with (out / "sweep" / "domains.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    for domain, own in validation(out / "pool").items():
        lines.append(f"- {domain}: {len(own)} experts, accuracy on own held-out patients {', '.join(f'{one:.3f}' for one in own)}")
    (page or out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
