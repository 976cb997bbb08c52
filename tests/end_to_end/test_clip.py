"""CLIP experts by the front door: a zero-shot generalist, hospitals, classes that only the target has, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.clips import MODEL, RESNET, WORDS, random_clip, saved
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
    uploads = [{"fisher": {"samples": 8}}, "gram", "class_counts"]
    folder = written(tmp_path, weights, model=model, methods=methods, uploads=uploads, target={"site": "mercy", "classes": BASE})
    done(folder, "--out", "run", "--quiet")
    assert "head.text.text_projection" in (folder / "run" / "audit.jsonl").read_text()


TASKS = {"north": ["bladder", "heart", "liver"], "south": ["kidney-left", "kidney-right"]}


def test_hospitals_with_tasks_of_their_own(tmp_path: Path, weights: str) -> None:
    methods: list[Any] = [
        {"wise_ft": {"a": 0, "label": "pretrained"}}, "expert", "mean", "fisher", "diwa", "adamerging", {"dawin": {"form": "code"}},
        "posterior",
    ]  # fmt: skip
    asked = {"site": "mercy", "classes": [name for names in TASKS.values() for name in names]}
    stream = {"kind": "iid", "batch_size": 8}
    folder = written(
        tmp_path, weights, classes=TASKS, target=asked, methods=methods, stream=stream, uploads=[{"fisher": {"samples": 8}}, "soup"]
    )
    ended = done(folder, "--out", "unknown", "--pool", "pool")
    assert "mean: of the images of each task, right: north" in ended
    summary = read(folder / "unknown" / "summary.json")
    assert summary["tasks"] == TASKS
    for row in summary["methods"].values():
        of = row["by_task"]
        assert sum(one["n"] for one in of.values()) == summary["stream"]["samples"]
        right = sum(one["accuracy"] * one["n"] for one in of.values())
        assert right / summary["stream"]["samples"] == pytest.approx(row["accuracy"])
        assert row["mean_of_tasks"]["accuracy"] == pytest.approx(sum(one["accuracy"] for one in of.values()) / 2)
        assert all(one["among_own"] >= one["accuracy"] for one in of.values())
    assert 'id="tasks"' in (folder / "unknown" / "report.html").read_text()
    diagnosed = fedmerge(folder, "diagnose", "unknown", "--pool", "pool")
    assert diagnosed.returncode == 0, diagnosed.stderr
    assert {one["setting"] for one in read(folder / "unknown" / "diagnose.json")["by_setting"]} == set(TASKS)
    done(folder, "--set", "target.classes=south", "--out", "known", "--pool", "pool", "--quiet")
    known = read(folder / "known" / "summary.json")
    assert set(known["methods"]["mean"]["per_class"]) == set(TASKS["south"]) and "tasks" not in known
    assert not any(site["trained"] for site in known["sites"])  # the same experts, whatever the target is asked
    assert known["stream"]["samples"] == summary["methods"]["mean"]["by_task"]["south"]["n"]
    for name in ("pretrained", "mean", "expert:south"):  # no coefficients to choose: the head alone is another
        among = summary["methods"][name]["by_task"]["south"]["among_own"]
        assert known["methods"][name]["accuracy"] == pytest.approx(among)


def test_hospitals_whose_images_have_other_classes(tmp_path: Path, weights: str) -> None:
    """Folders of images with classes of their own, as the data sets of DaWin's eight tasks have them."""
    stream = {"kind": "iid", "batch_size": 8}
    folder = written(tmp_path, weights, classes="own", methods=["mean", "expert"], stream=stream)
    rng = np.random.default_rng(0)
    for site, names in {**TASKS, "mercy": [*TASKS["south"], *TASKS["north"]]}.items():
        for number, name in enumerate(names):
            there = tmp_path / "images" / site / "scan" / name
            there.mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(20 * number, 20 * number + 100, (16, 16), dtype=np.uint8)
                Image.fromarray(pixels).save(there / f"{i}.png")
        source = {"kind": "image_folder", "root": str(tmp_path / "images" / site)}
        (folder / "sites" / f"{site}.yaml").write_text(yaml.safe_dump({"name": site, "source": source}))
    words = {name: WORDS[name] for names in TASKS.values() for name in names}
    content = yaml.safe_load((folder / "scenarios" / "tiny.yaml").read_text())
    content["model"]["words"] = words
    (folder / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(content))
    planned = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert planned.returncode == 0 and "task of south: kidney-left, kidney-right" in planned.stdout, planned.stderr
    done(folder, "--out", "run", "--quiet")
    summary = read(folder / "run" / "summary.json")
    assert {site: sorted(names) for site, names in summary["tasks"].items()} == TASKS
    refused = fedmerge(folder, "plan", "scenarios/tiny.yaml", "--set", "classes=null")
    assert refused.returncode == 2 and "extra ['kidney-left', 'kidney-right']" in refused.stderr, refused.stderr


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
        ({"classes": {"north": ["liver", "heart"]}}, "classes: found no classes of 'south'; expected those of every site"),
        ({"classes": {**TASKS, "nroth": BASE}}, "classes.nroth: found 'nroth'; expected a site of the scenario; did you mean"),
        ({"classes": {**TASKS, "south": ["livre", "heart"]}}, "classes.south: found 'livre'; expected a class of the images; did"),
        ({"classes": {**TASKS, "south": ["heart", "heart"]}}, "classes.south: found 'heart' twice; expected every class once"),
        ({"classes": {**TASKS, "south": ["heart"]}}, "a list of two classes or more of 'south'"),
        ({"classes": {**TASKS, "south": "heart"}}, "expected a list of two classes or more of 'south'"),
        ({"classes": "liver"},
         "classes: found 'liver'; expected a list of two classes or more, a mapping from sites to such lists"),
        ({"classes": 3},
         "classes: found 3; expected a list of two classes or more, a mapping from sites to such lists, or 'own'"),
        ({"classes": TASKS, "target": {"site": "mercy", "classes": "suoth"}},
         "target.classes: found 'suoth'; expected a list of classes, or a site of the scenario, whose classes they are;"),
        ({"target": {"site": "mercy", "classes": 3}}, "target.classes: found 3; expected a list of two classes or more, or a"),
        ({"model": {**MODEL, "head": "ft"}, "classes": BASE, "target": {"site": "mercy", "classes": BASE[:3]}},
         "target.classes: found ['bladder', 'heart', 'kidney-left']; expected ['bladder', 'heart', 'kidney-left', 'liver',"),
        ({"model": {**MODEL, "head": "ft"}, "classes": TASKS, "methods": ["mean"]},
         "model.head: found 'ft'; expected 'text'. Hospitals have classes of their own"),
        ({"model": SCENARIO["model"], "classes": TASKS, "initialization": SCENARIO["initialization"]},
         "classes: found {north: ['bladder', 'heart', 'liver'], south: ['kidney-left', 'kidney-right']}; expected no such key"),
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


def test_more_novel_classes_than_prompts(tmp_path: Path, weights: str) -> None:
    """Prompts for the hospitals' classes and one other, where the target has six others."""
    words = {name: WORDS[name] for name in [*BASE, "pancreas"]}
    folder = written(tmp_path, weights, classes=BASE, model={**MODEL, "weights": weights, "words": words})
    lacking = ", ".join(f"'{name}'" for name in WORDS if name not in words)
    said = f"model.words: found no word for {lacking}; expected one for each class, for its prompts"
    for verb in (["plan"], ["simulate", "--out", "run"], ["sweep", "--out", "swept"]):
        ended = fedmerge(folder, verb[0], "scenarios/tiny.yaml", *verb[1:])
        assert ended.returncode == 2 and said in ended.stderr, ended.stderr
        assert ended.stderr.count("  - ") == 1 and "Traceback" not in ended.stderr
    assert not (folder / "run").exists()


def test_weights_of_another_architecture(tmp_path: Path, weights: str) -> None:
    other = saved(tmp_path / "resnet.pt", random_clip(RESNET).state_dict())
    folder = written(tmp_path, other)
    ended = fedmerge(folder, "simulate", "scenarios/tiny.yaml", "--out", "run")
    assert ended.returncode == 2, ended.stderr
    assert "model.weights: resnet.pt (of ViT-B-32) does not fit the model" in ended.stderr
    assert "Traceback" not in ended.stderr and len(ended.stderr) < 2000


def test_weights_are_named(tmp_path: Path, weights: str) -> None:
    folder = written(tmp_path, weights, model=MODEL, initialization={"kind": "pretrained"})
    ended = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert ended.returncode == 2 and "model.weights: found nothing; expected a file or a tag of open_clip" in ended.stderr
