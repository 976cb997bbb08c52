"""CLIP experts by the front door: a zero-shot generalist, hospitals, classes that only the target has, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clips import MODEL, WORDS, random_clip, saved
from tests.front_door import SCENARIO, done, fedmerge, lines, read, world

BASE = ["bladder", "heart", "kidney-left", "liver", "spleen"]
METHODS: list[Any] = [
    {"wise_ft": {"a": 0, "label": "pretrained"}}, "mean", "ensemble", "expert", {"t3": {"generalist": "theta_0"}}, "dawin",
    {"t3_batch": {"generalist": "theta_0"}}, "task_arithmetic", "ties", "slerp", "posterior",
    {"dawin": {"with_theta_0": True, "label": "dawin-both"}}, {"mean": {"with_theta_0": True, "label": "souping"}},
    {"dawin_sample": {"with_theta_0": True, "label": "per-sample-both"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("weights") / "w.pt", random_clip().state_dict())


def written(tmp_path: Path, weights: str, **changes: Any) -> Path:
    file = world(tmp_path / "w")
    training = {**SCENARIO["training"], "runs": 1, "epochs": 1}
    scenario = {key: value for key, value in SCENARIO.items() if key != "initialization"}
    scenario |= {"model": {**MODEL, "weights": weights}, "training": training, "methods": METHODS}
    file.write_text(yaml.safe_dump({key: value for key, value in (scenario | changes).items() if value is not None}))
    return file.parent.parent


def test_a_run_with_classes_that_nobody_trains_on(tmp_path: Path, weights: str) -> None:
    folder = written(tmp_path, weights, classes=BASE)
    done(folder, "--out", "run", "--quiet")
    summary = read(folder / "run" / "summary.json")
    assert len(summary["methods"]) == len(METHODS) + 1  # a row of each of two experts
    assert summary["classes"]["novel"] == sorted(set(WORDS) - set(BASE))
    for row in summary["methods"].values():
        of = row["by_novelty"]
        assert of["base"]["n"] + of["novel"]["n"] == summary["stream"]["samples"]
        right = of["base"]["accuracy"] * of["base"]["n"] + of["novel"]["accuracy"] * of["novel"]["n"]
        assert right / summary["stream"]["samples"] == pytest.approx(row["accuracy"])
    assert "novel" in (folder / "run" / "report.html").read_text()
    audit = "\n".join(lines(folder / "run"))
    assert "visual.proj" in audit and "text" not in audit.replace("text_head", "")
    assert str(weights) not in (folder / "run" / "audit.jsonl").read_text()
    plan = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert plan.returncode == 0 and "5 classes" in plan.stdout
    diagnosed = fedmerge(folder, "diagnose", "run", "--pool", "pool")
    assert diagnosed.returncode == 0, diagnosed.stderr
    found = read(folder / "run" / "diagnose.json")
    assert {one["setting"] for one in found["by_setting"]} == {"base", "novel"}
    assert sum(one["samples"] for one in found["by_who"]) == summary["stream"]["samples"]


def test_a_zero_shot_model_and_one_expert_in_and_out_of_domain(tmp_path: Path, weights: str) -> None:
    both = {"with_theta_0": True}
    methods: list[Any] = [{"wise_ft": {"a": a, "label": f"wise-{a}"}} for a in (0, 0.5, 1)]
    methods += [{"expert": both}, {"dcs": both}, {"doe": both}, {"dawin": both}, {"oracle": {**both, "by": "select"}}]
    folder = written(tmp_path, weights, sites=["north"], methods=methods)  # axial alone; the target has coronal slices, too
    done(folder, "--out", "run", "--quiet")
    summary = read(folder / "run" / "summary.json")
    assert summary["parts"] == {"in_domain": ["axial"], "out_of_domain": ["coronal"]}
    for row in summary["methods"].values():
        assert row["by_part"] == {"in_domain": row["per_domain"]["axial"], "out_of_domain": row["per_domain"]["coronal"]}
    ends = {"wise-0": "expert:theta_0", "wise-1": "expert:north"}
    assert all(summary["methods"][a]["accuracy"] == summary["methods"][b]["accuracy"] for a, b in ends.items())
    assert summary["methods"]["oracle"]["accuracy"] >= max(summary["methods"][name]["accuracy"] for name in ends)
    assert 'id="robustness"' in (folder / "run" / "report.html").read_text()
    diagnosed = fedmerge(folder, "diagnose", "run", "--pool", "pool")
    assert diagnosed.returncode == 0, diagnosed.stderr
    assert "One hospital has an expert" in diagnosed.stdout
    found = read(folder / "run" / "diagnose.json")
    assert found["experts"] == ["north", "theta_0"] and len(found["quadrants"]) == 4
    single = {one["row"] for one in found["entropies"] if one["single"]}
    assert single == {"expert:north", "expert:theta_0"}
    assert 'id="entropies"' in (folder / "run" / "diagnose.html").read_text()


def test_both_towers_leave_where_both_are_tuned(tmp_path: Path, weights: str) -> None:
    model = {**MODEL, "weights": weights, "tune": "both"}
    methods = ["mean", "fisher", "regmean", "posterior", {"t3": {"generalist": "theta_0"}}, "adamerging"]
    uploads = ["fisher", "gram", "class_counts"]
    folder = written(tmp_path, weights, model=model, methods=methods, uploads=uploads, target={"site": "mercy", "classes": BASE})
    done(folder, "--out", "run", "--quiet")
    assert "head.text.text_projection" in (folder / "run" / "audit.jsonl").read_text()


def some(words: dict[str, str], *, without: str = "", **more: str) -> dict[str, Any]:
    return {"model": {**MODEL, "words": {name: word for name, word in words.items() if name != without} | more}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (some(WORDS, without="spleen"), "model.words: found no word for 'spleen'; expected one for each class, for its"),
        (some(WORDS, brain="brain"), "model.words.brain: found 'brain'; expected the name of a class"),
        (some(WORDS, liver="heart"), "'heart' and 'liver' have one prompt, 'heart': expected one of its own for each"),
        ({"model": {**MODEL, "name": "ViT-B-61"}}, "model.name: found 'ViT-B-61'; expected a model of open_clip; did you mean"),
        ({"model": {**MODEL, "kind": "clap"}}, "model: found 'clap'; expected a known kind"),
        ({"target": {"site": "mercy", "classes": ["liver", "brain"]}}, "target.classes: found 'brain'; expected a class of the"),
        ({"classes": ["liver", "liver"]}, "classes: found 'liver' twice; expected every class once"),
        ({"classes": ["livre", "heart"]}, "classes: found 'livre'; expected a class of the images; did you mean 'liver'?"),
        ({"initialization": {"kind": "pretrained", "head_init": "zero"}}, "head_init: found 'zero'; expected 'text' with"),
        ({"initialization": {"kind": "proxy", "source": "organ_phantom"}}, "model.weights: found weights beside initialization"),
        ({"model": SCENARIO["model"], "classes": BASE, "initialization": SCENARIO["initialization"]},
         "classes: found ['bladder', 'heart', 'kidney-left', 'liver', 'spleen']; expected no such key with a model of timm"),
        ({"model": {**SCENARIO["model"], "templates": ["a {}"]}, "initialization": SCENARIO["initialization"]},
         "templates: only a model that reads text has them. Say 'kind: clip'"),
        ({"model": {**MODEL, "head": "ft"}, "classes": BASE, "methods": ["mean"]},
         "methods[0]: found 'mean' and the new classes femur-left, femur-right, kidney-right"),
        ({"priors": "uniform", "uploads": ["class_counts"]}, "priors: found 'uniform', and a model whose classifier has no bias"),
        ({"methods": [{"fisher": {"with_theta_0": True}}], "uploads": ["fisher"]}, "with_theta_0: found true; expected false"),
        ({"methods": [{"weighted_mean": {"with_theta_0": True}}]}, "with_theta_0: found true; expected false. The start"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_starts(tmp_path: Path, weights: str, changes: dict[str, Any], said: str) -> None:
    if changes.get("model", {}).get("kind") in ("clip", "clap"):
        changes = changes | {"model": {**changes["model"], "weights": weights}}
    folder = written(tmp_path, weights, **changes)
    for verb in ("plan", "simulate"):
        ended = fedmerge(folder, verb, "scenarios/tiny.yaml", *(["--out", "run"] if verb == "simulate" else []))
        assert ended.returncode == 2
        assert said in ended.stderr, ended.stderr
        assert ended.stderr.count("  - ") == 1, ended.stderr
    assert not (folder / "run").exists()


def test_weights_are_named(tmp_path: Path, weights: str) -> None:
    folder = written(tmp_path, weights, model=MODEL, initialization={"kind": "pretrained"})
    ended = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert ended.returncode == 2 and "model.weights: found nothing; expected a file or a tag of open_clip" in ended.stderr
