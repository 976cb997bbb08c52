"""Hospitals that bring an expert which was trained elsewhere: by the command, with others that train and without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.data.datasets.organ_phantom import ORGANS
from tests.front_door import SCENARIO, done, fedmerge, lines, read, world

SHORT = {**SCENARIO, "training": {**SCENARIO["training"], "runs": 1, "epochs": 1}, "methods": ["mean", "expert", "task_arithmetic"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation whose hospitals have trained; its files are copied by each test."""
    folder = tmp_path_factory.mktemp("trained") / "here"
    world(folder).write_text(yaml.safe_dump(SHORT))
    done(folder, "--out", "first")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "here")
    return tmp_path / "here"


def weights(folder: Path, site: str, pool: str = "pool") -> dict[str, Tensor]:
    (file,) = (folder / pool / "experts").glob(f"{site}-*/expert.safetensors")
    return load_file(file)


def bring(folder: Path, site: str, file: Path, **more: Any) -> None:
    path = folder / "sites" / f"{site}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "expert": {"checkpoint": str(file), **more}}))


def without_start(folder: Path, **changes: Any) -> None:
    content = {**SHORT, "methods": ["mean", "expert", "ensemble", "eam", "slerp", "posterior", "t3_batch"], **changes}
    del content["initialization"]
    (folder / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(content))


def elsewhere(folder: Path) -> list[str | None]:
    """South's expert as others would save it: half precision, wrapped, head of another name and order. Returns its classes."""
    state = weights(folder, "south")
    order = [3, 1, *(n for n in range(len(ORGANS)) if n not in (1, 3))]
    rows = [*order, 0]  # an eleventh output that nobody here knows
    odd = {}
    for name, tensor in state.items():
        head = name.startswith("head.")
        odd[f"module.backbone.{name.replace('head.', 'fc.')}"] = (tensor[rows] if head else tensor).half()
    torch.save({"epoch": 3, "state_dict": odd, "optimizer": {"lr": 0.1}}, folder / "south.pth")
    return [*(ORGANS[n] for n in order), None]


def test_one_brings_and_one_trains(folder: Path) -> None:
    bring(folder, "south", folder / "south.pth", classes=elsewhere(folder))
    said = " ".join(done(folder, "--out", "mixed", "--pool", "fresh").split())
    assert "hospitals: north train; south bring their experts" in said
    assert "site 'south' brings its expert, and trains none: taken from 'state_dict'; prefix 'module.backbone.' stripped" in said
    assert (
        "head 'fc' taken as 'head'; 12 outputs put into the order of the classes, 1 of them not used; float16 made float32" in said
    )
    assert "(brought)" in said
    manifest = read(folder / "mixed" / "manifest.json")
    assert manifest["trained"] == {"north": True, "south": False}
    here, there = weights(folder, "south", "fresh"), weights(folder, "south")
    assert all(torch.equal(here[name], there[name].half().float()) for name in there)
    assert not [line for line in lines(folder / "mixed") if '"south"' in line and "runs." in line]
    assert [line for line in lines(folder / "mixed") if '"south"' in line and "head.weight" in line]  # audited as any other
    again = done(folder, "--out", "again", "--pool", "fresh", "--experts-only")
    assert "every expert is in the pool" in again
    elsewhere_now = folder / "moved.pth"
    (folder / "south.pth").rename(elsewhere_now)
    bring(folder, "south", elsewhere_now, classes=[*ORGANS, None])  # other classes: another expert
    assert "south bring their experts" in done(folder, "--out", "other", "--pool", "fresh", "--experts-only")


@pytest.mark.slow
def test_a_plan_tells_who_brings_what(folder: Path) -> None:
    bring(folder, "south", folder / "south.pth", classes=elsewhere(folder))
    told = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert told.returncode == 0, told.stderr
    assert "brings it" in told.stdout
    assert "nobody trains" in told.stdout


def test_all_bring_and_nobody_knows_where_they_started(folder: Path) -> None:
    for site in ("north", "south"):
        save_file(weights(folder, site), folder / f"{site}.safetensors")
        bring(folder, site, folder / f"{site}.safetensors")
    without_start(folder)
    said = done(folder, "--out", "brought", "--pool", "fresh")
    assert "hospitals: north, south bring their experts" in said
    summary, first = read(folder / "brought" / "summary.json"), read(folder / "first" / "summary.json")
    for row in ("mean", "expert:north", "expert:south"):
        assert summary["methods"][row]["accuracy"] == first["methods"][row]["accuracy"]
    assert "not known: all hospitals bring experts" in (folder / "brought" / "report.html").read_text()
    without_start(folder, methods=["mean", "ties", {"lame": {"of": "task_arithmetic"}}])
    refused = fedmerge(folder, "simulate", "scenarios/tiny.yaml", "--out", "refused", "--pool", "fresh")
    assert refused.returncode == 2
    assert "methods[1]: found 'ties', which needs theta_0" in refused.stderr
    assert "methods[2]: found 'lame" in refused.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {name: tensor for name, tensor in state.items() if "norm" not in name},
            "missing: blocks.0.norm1.weight (16,)",
        ),
        (
            lambda state: state | {"head.weight": state["head.weight"][:5]},
            "shape of head.weight: found (5, 16), expected (11, 16) (a head of 5 classes)",
        ),
        (lambda state: state | {"norm.weight": state["norm.weight"] * float("nan")}, "values of norm.weight: found NaN"),
        (
            lambda state: {n: t[:5] if n.startswith("head") else t for n, t in state.items()},
            "found a head of 5 outputs; expected 11",
        ),
        (lambda state: {n: 0.05 * torch.randn_like(t) for n, t in state.items()}, "these were trained from another initialization"),
    ],
)
def test_files_that_do_not_fit_are_one_message(folder: Path, change: Any, said: str) -> None:
    save_file({name: tensor.contiguous() for name, tensor in change(weights(folder, "south")).items()}, folder / "odd.safetensors")
    bring(folder, "south", folder / "odd.safetensors")
    wrong = fedmerge(folder, "simulate", "scenarios/tiny.yaml", "--out", "wrong", "--pool", "fresh")
    assert wrong.returncode == 2
    assert "site 'south'" in wrong.stderr
    assert said in wrong.stderr, wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_what_asks_a_hospital_to_train_is_refused(folder: Path) -> None:
    bring(folder, "south", folder / "nowhere.pth", clases=[])
    wrong = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert "expert.clases: found an unknown key" in wrong.stderr
    bring(folder, "south", folder / "nowhere.pth")
    assert "site 'south': expert.checkpoint: " in (told := fedmerge(folder, "plan", "scenarios/tiny.yaml").stderr)
    assert "nowhere.pth: found nothing that can be opened (No such file or directory)" in told
    for changes, said in (
        (
            {"federated": ["fedavg"]},
            "federated[0]: found 'fedavg-5', but site 'south' brings its expert and does not train; expected sites that all train",
        ),
        (
            {"initialization": {**SHORT["initialization"], "head_init": "fed_lp"}},
            "initialization.head_init: found 'fed_lp', but site",
        ),
    ):
        (folder / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump({**SHORT, **changes}))
        wrong = fedmerge(folder, "sweep", "scenarios/tiny.yaml")
        assert wrong.returncode == 2
        assert said in wrong.stderr, wrong.stderr
    without_start(folder)
    wrong = fedmerge(folder, "simulate", "scenarios/tiny.yaml")
    assert "initialization: found nothing, but site 'north' starts its training from it" in wrong.stderr
