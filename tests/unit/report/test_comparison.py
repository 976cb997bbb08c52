"""Two runs side by side: paired on the same images, by patients where they are known, and refused where streams differ."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedmerge.errors import FolderError
from fedmerge.report.comparison import KeptRun, compare, kept_run
from fedmerge.report.metrics.significance import paired
from fedmerge.report.pages.comparison import cells, comparison_page
from tests.front_door import done, fedmerge

LABELS = np.array([0, 1] * 20)
PATIENTS = np.repeat(np.arange(10), 4)
SCENARIO: dict[str, Any] = {
    "name": "tiny",
    "training": {"epochs": 2},
    "sites": [{"name": "north", "validation": 0.2}],
    "target": {"name": "mercy", "scanner": {"noise": 0.1}},
    "stream": {"kind": "iid", "batch_size": 8},
    "methods": [{"mean": {"kind": "mean", "label": None}}, {"eam": {"kind": "eam", "label": None, "gamma": 5.0}}],
}
MANIFEST = {"status": "done", "classes": ["a", "b"], "inputs": {"site mercy": "0" * 64}, "versions": {"torch": "2.9"}}
SUMMARY = {"seed": 3, "stream": {"index_sha256": "1" * 64, "samples": 40}}


def probabilities(wrong: list[int], labels: np.ndarray[Any, Any] = LABELS) -> np.ndarray[Any, Any]:
    p = np.full((len(labels), 2), 0.2, np.float32)
    p[np.arange(len(labels)), labels] = 0.8
    p[wrong] = p[wrong][:, ::-1]
    return p


def written(path: Path, wrong: dict[str, list[int]], **changes: Any) -> KeptRun:
    """A run whose methods are wrong on these images; changes: by the file that they are in."""
    path.mkdir()
    whole = {"scenario": SCENARIO, "manifest": MANIFEST, "summary": SUMMARY}
    for name, content in whole.items():
        content = copy.deepcopy(content)
        for keys, value in changes.get(name, {}).items():
            *above, last = keys.split(".")
            node: Any = content
            for key in above:
                node = node[key]
            node[last] = value
        text = yaml.safe_dump(content, sort_keys=False) if name == "scenario" else json.dumps(content)
        (path / f"{name}.{'yaml' if name == 'scenario' else 'json'}").write_text(text)
    arrays = {"labels": LABELS, "batch": np.repeat(np.arange(5), 8), "patients": PATIENTS, **changes.get("stored", {})}
    arrays |= {f"p:{name}": probabilities(images) for name, images in wrong.items()}
    np.savez(path / "predictions.npz", **arrays)
    return kept_run(path)


def test_differences_are_paired_and_over_patients(tmp_path: Path) -> None:
    first = written(tmp_path / "a", {"mean": [0, 1, 2, 3, 8], "eam": [5], "ties": []})
    second = written(tmp_path / "b", {"mean": [0, 9], "eam": [5], "posterior": []})
    found = compare(first, second)
    assert found.units == ("patients", 10)
    mean, eam = found.rows
    assert (mean.method, mean.first, mean.second, mean.images) == ("mean", 35 / 40, 38 / 40, 40)
    right, other = np.ones(40, bool), np.ones(40, bool)
    right[[0, 1, 2, 3, 8]] = False
    other[[0, 9]] = False
    assert mean.difference == paired(other, right, PATIENTS, 3, 1)
    assert mean.difference.difference == pytest.approx(3 / 40)
    assert mean.p_holm == pytest.approx(2 * mean.difference.p)
    assert (eam.difference.difference, eam.difference.ci95, eam.difference.p) == (0, (0, 0), 1)
    assert [line.rpartition(": ")[2] for line in found.alone] == ["ties", "posterior"]
    assert found.changed == []
    assert cells(found)[0][:4] == ["mean", "87.5", "95.0", "+7.5"]


def test_without_patients_blocks_of_batches_are_drawn_and_rows_are_compared_where_both_are_there(tmp_path: Path) -> None:
    gone = probabilities([1])
    gone[:8] = np.nan
    stored = {"patients": np.zeros(40, int)}
    first = written(tmp_path / "a", {"mean": [0]}, stored={**stored, "p:late": gone})
    second = written(tmp_path / "b", {"mean": [0], "late": [0, 9]}, stored=stored)
    found = compare(first, second)
    assert found.units == ("batches", 5)
    late = next(row for row in found.rows if row.method == "late")
    assert (late.images, late.first, late.second) == (32, 1.0, 31 / 32)


def test_what_differs_is_told_by_its_key(tmp_path: Path) -> None:
    first = written(tmp_path / "a", {"mean": []})
    methods = [{"eam": {"kind": "eam", "label": None, "gamma": 1.0}}, {"mean": {"kind": "mean", "label": None}}]
    sites = [{"name": "north", "validation": 0.3}, {"name": "south", "validation": 0.2}]
    second = written(
        tmp_path / "b",
        {"mean": []},
        scenario={"methods": methods, "sites": sites, "training.epochs": 4},
        manifest={"versions.torch": "2.10", "experts": {"north": "a" * 64}},
    )
    assert compare(first, second).changed == [
        ("training.epochs", "2", "4"),
        ("sites.north.validation", "0.2", "0.3"),
        ("sites.south", "", '{"name": "south", "validation": 0.2}'),
        ("methods.eam.gamma", "5.0", "1.0"),
        ("versions.torch", "2.9", "2.10"),
        ("experts", "", '{"north": "' + "a" * 58 + "..."),
    ]


def test_entries_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """A second row of the same method is one that was added; the first has not changed."""
    of_a, of_c = ({"expert": {"kind": "expert", "label": None, "site": site}} for site in "ac")
    first, second = (
        written(tmp_path / name, {"mean": []}, scenario={"methods": rows}) for name, rows in (("x", [of_c]), ("y", [of_c, of_a]))
    )
    assert [key for key, _, _ in compare(first, second).changed] == ["methods.expert (2)"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scenario": {"target.name": "anna"}}, "another target: mercy in the first, anna in the second"),
        ({"summary": {"seed": 4}}, "another seed: 3 in the first, 4 in the second"),
        ({"manifest": {"classes": ["a", "c"]}}, "another list of classes"),
        ({"manifest": {"inputs": {"site mercy": "2" * 64}}}, "another set of images at the target (by its digest): 000000000000"),
        ({"scenario": {"target.scanner": {"noise": 0.2}}}, "another scanner of the target"),
        ({"scenario": {"stream.batch_size": 16}}, "another stream.batch_size: 8 in the first, 16 in the second"),
        ({"summary": {"stream.samples": 32}}, "another number of images in the stream: 40 in the first, 32 in the second"),
        ({"summary": {"stream.index_sha256": "2" * 64}}, "another order of the images"),
        ({"stored": {"labels": 1 - LABELS}}, "other labels in predictions.npz"),
    ],
)
def test_runs_on_other_streams_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    first, second = written(tmp_path / "a", {"mean": []}), written(tmp_path / "b", {"mean": []}, **changes)
    with pytest.raises(FolderError) as caught:
        compare(first, second)
    assert said in str(caught.value)
    assert "expected two runs of one target, one seed and one stream" in str(caught.value)


def test_runs_without_a_method_in_common_are_refused(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", {"mean": []}), written(tmp_path / "b", {"eam": []})
    with pytest.raises(FolderError, match="found no method in both"):
        compare(first, second)


def no_summary(run: Path) -> None:
    (run / "summary.json").unlink()


def cut_off(run: Path) -> None:
    (run / "predictions.npz").write_bytes((run / "predictions.npz").read_bytes()[:200])


def still_running(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({**MANIFEST, "status": "running"}))


def other_json(run: Path) -> None:
    (run / "summary.json").write_text("[]")


def of_another_program(run: Path) -> None:
    (run / "manifest.json").write_text("null")


def with_arrays(run: Path, **changed: np.ndarray[Any, Any] | None) -> None:
    with np.load(run / "predictions.npz") as stored:
        arrays = {**stored, **changed}
    np.savez(run / "predictions.npz", **{name: array for name, array in arrays.items() if array is not None})


def without_batches(run: Path) -> None:
    with_arrays(run, batch=None)


def of_other_lengths(run: Path) -> None:
    with_arrays(run, **{"p:mean": probabilities([])[:5]})


def of_fewer_classes(run: Path) -> None:
    with_arrays(run, labels=LABELS + 1)


def of_words(run: Path) -> None:
    with_arrays(run, labels=np.array(["a"] * len(LABELS)))


@pytest.mark.parametrize(
    "break_it",
    [
        *(no_summary, cut_off, still_running, other_json, of_another_program),
        *(without_batches, of_other_lengths, of_fewer_classes, of_words),
    ],
)
def test_a_folder_that_is_no_finished_run(tmp_path: Path, break_it: Callable[[Path], None]) -> None:
    written(tmp_path / "a", {"mean": []})
    written(tmp_path / "b", {"mean": []})
    break_it(tmp_path / "b")
    ended = fedmerge(tmp_path, "compare", "a", "b")
    assert ended.returncode == 2
    assert ended.stderr.startswith("fedmerge: b: ")
    assert "expected the folder of a finished run" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_page_holds_every_number_and_no_markup_of_a_name(tmp_path: Path) -> None:
    first = written(tmp_path / "a", {"mean": [0, 1, 2]})
    second = written(tmp_path / "b", {"mean": []}, scenario={"question": "<script>"})
    page = comparison_page(compare(first, second))
    assert "+7.5" in page
    assert "<script>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('scope="row"') == 2


def test_two_real_runs(first: tuple[Path, str]) -> None:
    folder, _ = first
    done(folder, "--out", "other", "--set", "methods.eam.gamma=1")
    ended = fedmerge(folder, "compare", "runs/tiny-3", "other", "--html", "pages/compare.html")
    assert ended.returncode == 0, ended.stderr
    assert "methods.eam.gamma" in ended.stdout
    assert "weighted_mean" in ended.stdout
    assert "paired 95% intervals over" in ended.stdout
    assert "Two runs side by side" in (folder / "pages/compare.html").read_text()
    (folder / "pages/folder").mkdir()
    ended = fedmerge(folder, "compare", "runs/tiny-3", "other", "--html", "pages/folder")
    assert ended.returncode == 2
    assert "--html: found the folder 'pages/folder'; expected a file" in ended.stderr
