"""One domain left out after the other: four folders of images, each the target once, and trained once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fedmerge.experiment.experiment import Overrides, load_each, load_experiment
from fedmerge.experiment.sweep import cells_of
from tests.front_door import SCENARIO, done, fedmerge, read

DOMAINS = ["art", "cartoon", "photo", "sketch"]


def domains(root: Path, **changes: Any) -> Path:
    """Four domains of one task, which differ in brightness; 24 images each. Returns the scenario's file."""
    rng = np.random.default_rng(0)
    (root / "scenarios").mkdir(parents=True)
    (root / "sites").mkdir()
    for number, domain in enumerate(DOMAINS):
        for label, shade in (("cat", 40), ("dog", 130)):
            (root / "data" / domain / label).mkdir(parents=True)
            for image in range(12):
                pixels = (shade + 15 * number + rng.integers(-30, 30, (16, 16))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "data" / domain / label / f"{image}.png")
        source = {"kind": "image_folder", "root": str(root / "data"), "folders": [domain]}
        (root / "sites" / f"{domain}.yaml").write_text(yaml.safe_dump({"name": domain, "source": source}))
    short = {"training": {**SCENARIO["training"], "runs": 1, "epochs": 1}, "stream": {"kind": "iid", "batch_size": 8}}
    content = {**SCENARIO, **short, "methods": ["mean", "expert"], "sites": DOMAINS, "target": "each", **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (root / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(content))
    return root / "scenarios" / "tiny.yaml"


def experts(root: Path) -> list[str]:
    """The site of every expert in the pool."""
    return sorted(read(manifest)["site"] for manifest in (root / "pool").glob("experts/*/manifest.json"))


def test_each_domain_is_a_target_once_and_trained_once(tmp_path: Path) -> None:
    domains(tmp_path)
    trained: dict[str, int] = dict.fromkeys(DOMAINS, 0)
    for domain in DOMAINS:
        done(tmp_path, "--target", domain)
        run = tmp_path / "runs" / f"tiny-{domain}-3"
        summary, manifest = read(run / "summary.json"), read(run / "manifest.json")
        assert [site["name"] for site in summary["sites"]] == [name for name in DOMAINS if name != domain]
        assert summary["stream"]["samples"] == 24  # all of the target is streamed: no split is taken from it
        for name, now in manifest["trained"].items():
            trained[name] += now
    assert trained == dict.fromkeys(DOMAINS, 1)
    assert experts(tmp_path) == DOMAINS


@pytest.mark.slow
def test_a_sweep_leaves_out_every_domain_and_prints_their_table(tmp_path: Path) -> None:
    domains(tmp_path)
    swept = fedmerge(tmp_path, "sweep", "scenarios/tiny.yaml")
    assert swept.returncode == 0, swept.stderr + swept.stdout
    assert "4 cells" in swept.stdout
    assert experts(tmp_path) == DOMAINS
    out = tmp_path / "runs" / "tiny-sweep"
    cells = sorted(out.glob("cells/*/summary.json"))
    assert [[site["name"] for site in read(cell)["sites"]] for cell in cells] == [
        [name for name in DOMAINS if name != domain] for domain in DOMAINS
    ]
    with (out / "domains.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    of_mean = [read(cell)["methods"]["mean"]["accuracy"] for cell in cells]
    assert [float(rows["mean"][domain]) for domain in DOMAINS] == [pytest.approx(100 * one, abs=0.051) for one in of_mean]
    assert float(rows["mean"]["mean"]) == pytest.approx(25 * sum(of_mean), abs=0.051)
    assert rows["expert:art"]["art"] == rows["expert:art"]["mean"] == ""
    assert "One domain left out" in (out / "sweep.html").read_text()
    assert "domain left out of training" in swept.stdout


@pytest.mark.slow
def test_a_plan_shows_every_domain_and_what_all_take(tmp_path: Path) -> None:
    domains(tmp_path)
    told = fedmerge(tmp_path, "plan", "scenarios/tiny.yaml")
    assert told.returncode == 0, told.stderr
    assert [f"target {number} of 4: {name}" in told.stdout for number, name in enumerate(DOMAINS, 1)] == [True] * 4
    assert "4 runs of 3 experts each, of 4 that are trained once and shared" in told.stdout


def test_a_plan_takes_one_domain_or_each(tmp_path: Path) -> None:
    file = domains(tmp_path)
    for target, number in ((None, 4), ("each", 4), ("art", 1)):
        found = load_each(file, Overrides(target=target))
        assert [one.target.name for one in found] == DOMAINS[:number]
        assert {len(one.sites) for one in found} == {3}
    ordinary = domains(tmp_path / "ordinary", sites=DOMAINS[:3], target="sketch")
    assert [one.target.name for one in load_each(ordinary, Overrides())] == ["sketch"]
    assert [[site.name for site in one.sites] for one in load_each(ordinary, Overrides(target="each"))] == [
        ["cartoon", "photo", "sketch"], ["art", "photo", "sketch"], ["art", "cartoon", "sketch"], ["art", "cartoon", "photo"],
    ]  # fmt: skip
    cells = cells_of(ordinary, [], [], "each")
    assert [cell.options(()) for cell in cells[2:]] == [
        ["--seed", "3", "--target", "photo", "--add-site", "sketch"],
        ["--seed", "3", "--target", "sketch"],
    ]
    assert [len(load_experiment(ordinary, cell.overrides(())).sites) for cell in cells] == [3] * 4


def test_a_run_of_each_names_both_ways_on(tmp_path: Path) -> None:
    file = domains(tmp_path, target={"site": "each", "max_bytes": "2GB"})
    wrong = fedmerge(tmp_path, "simulate", str(file))
    assert wrong.returncode == 2
    assert "target: found 'each', which stands for every site in turn" in wrong.stderr
    assert "--target (one of: art, cartoon, photo, sketch)" in wrong.stderr
    assert f"fedmerge sweep {file}" in wrong.stderr
    for options, said in {
        ("--target", "fotos"): "fotos.yaml",
        ("--set", "target=art"): "Use the option '--target art', which removes it from the sites",
        ("--target", "art", "--set", "sites=[art]"): "sites: found",
    }.items():
        wrong = fedmerge(tmp_path, "simulate", str(file), *options)
        assert wrong.returncode == 2
        assert said in wrong.stderr, wrong.stderr
    for verb in ("sweep", "plan"):
        alone = fedmerge(tmp_path, verb, str(file), "--set", "sites=[art]")
        assert alone.returncode == 2
        assert "sites: found 'art' alone; expected two or more, of which each is the target once" in alone.stderr
