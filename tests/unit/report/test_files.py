"""What a run leaves behind: one page that needs nothing else, and lines from which an interrupted run goes on."""

from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedmerge.report.batch_log import Step
from fedmerge.report.checkpoint import Progress
from fedmerge.report.pages.run import confusions, verdicts, write
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import summarize
from fedmerge.report.terminal import in_short
from tests.unit.report.conftest import a_record, steps_of

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Balance(HTMLParser):
    """Every element that is opened is closed, and every picture has a description."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            assert dict(attrs).get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `record` leaves behind, to be read."""
    write(folder := tmp_path_factory.mktemp("written"), a_record())
    return folder


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = (written / "report.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"data:[^\"']+", "", page)
    assert "<b>this</b>" not in page
    assert "one seed" in page
    assert "Circular block bootstrap".lower() in page.lower()
    assert page.count('src="data:image/png') == 3
    assert "This hospital shows no images" in page
    assert {path.name for path in (written / "plots").iterdir()} >= {"accuracy.svg", "running.svg", "coefficients-0.svg"}
    assert not list(written.rglob("*.draft"))


def test_a_round_that_went_on_without_a_hospital_is_told(record: RunRecord, tmp_path: Path) -> None:
    absence = {"round": 2, "site": "north", "reason": "its <upload> was refused"}
    model = {"rounds": 3, "hospitals": 2, "absent": [absence], "sites": {"north": {"steps": 4, "up": 8, "down": 8}}}
    manifest = {**record.manifest, "federated": {"ensemble": model}, "one_shot": {"steps": {"north": 4}, "down": 8}}
    write(tmp_path, replace(record, manifest=manifest))
    page = (tmp_path / "report.html").read_text()
    assert "went on without north in round 2 (its &lt;upload&gt; was refused)." in page
    assert "and again in the rounds of the rows that take several" in page
    assert "what hospitals sent in rounds passed the same audit" in page


def test_the_same_record_gives_the_same_files(record: RunRecord, written: Path, tmp_path: Path) -> None:
    write(tmp_path, record)
    for name in ("summary.json", "report.html", "plots/accuracy.svg"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_the_predictions_give_the_numbers_again(written: Path) -> None:
    summary = json.loads((written / "summary.json").read_text())
    with np.load(written / "predictions.npz") as kept:
        for name, row in summary["methods"].items():
            assert (kept[f"p:{name}"].argmax(1) == kept["labels"]).mean() == row["accuracy"]


def test_the_headline_says_when_the_method_loses(record: RunRecord) -> None:
    assert verdicts(record, summarize(record)) == []  # eam is best, which the lead says
    worse = steps_of("eam", record.labels, 0.3, True, 3)
    losing = replace(record, steps=[step for step in record.steps if step.method != "eam"] + worse)
    (said,) = verdicts(losing, summarize(losing))
    assert said.startswith("eam loses to the mean (")
    assert in_short(summarize(losing))[0].startswith(("mean is right for", "ensemble is right for"))


def test_the_headline_says_when_the_commonest_class_alone_is_better(record: RunRecord) -> None:
    labels = [np.zeros_like(batch) for batch in record.labels]
    said = verdicts(record, summarize(replace(record, labels=labels)))
    assert said[-1] == ("The commonest class alone, bladder, is right for 100.0%: no ranked method is better.")


def test_in_short_the_best_method_with_its_cost_and_where_it_fails(record: RunRecord) -> None:
    summary = summarize(record)
    first, second = in_short(summary)
    row = summary["methods"]["eam"]
    assert first.startswith(f"eam is right for {100 * row['accuracy']:.1f}% of 200 images (95% interval ")
    assert f"{100 * row['vs_mean']['difference']:+.1f} points against the mean" in first
    assert first.endswith("at 1 forward per batch.")
    worst = min(row["per_class"], key=row["per_class"].get)
    assert f"the class '{worst}' ({100 * row['per_class'][worst]:.1f}%)" in second
    assert second.startswith("It fails most for the domain '")
    assert in_short({**summary, "methods": {name: {**row, "ranked": False} for name, row in summary["methods"].items()}}) == []
    alone = replace(record, labels=[np.zeros_like(batch) for batch in record.labels])
    assert "the class" not in in_short(summarize(alone))[1]  # one class cannot be the worst of several


def test_the_best_method_is_set_against_the_mean_class_by_class(record: RunRecord, written: Path, tmp_path: Path) -> None:
    found = confusions(record, summarize(record))
    assert found is not None
    assert found["method"] == "eam"
    y = np.concatenate(record.labels)
    for name, key in (("eam", "counts"), ("mean", "mean")):
        matrix = np.array(found[key])
        assert matrix.sum(1).tolist() == np.bincount(y).tolist()
        assert matrix.trace() == sum(step.correct for step in record.steps_of(name))
    true, taken, count, by_mean = found["mistakes"][0]
    assert by_mean >= count
    assert true != taken
    only = replace(record, methods={"mean": record.methods["mean"]})
    assert confusions(only, summarize(only)) is None
    assert "Which class is taken for which?" in (written / "report.html").read_text()
    many = replace(record, classes=tuple(f"class {n}" for n in range(14)))
    wide = [replace(s, probabilities=np.pad(s.probabilities, ((0, 0), (0, 11)))) for s in record.steps]
    write(tmp_path, replace(many, steps=wide))
    assert "The commonest mistakes of eam or the mean" in (tmp_path / "report.html").read_text()


def same(a: list[Step], b: list[Step]) -> bool:
    return [x.line() for x in a] == [x.line() for x in b] and all(
        np.array_equal(x.probabilities, y.probabilities) for x, y in zip(a, b, strict=True)
    )


def kept(progress: Progress, method: str) -> list[Step]:
    """What a progress holds of one method, probabilities and all."""
    steps = progress.ledger.steps_of(method)
    p = np.split(progress.ledger.probabilities(method), np.cumsum([step.n for step in steps])[:-1])
    return [replace(step, probabilities=own) for step, own in zip(steps, p, strict=True)]


def test_an_interrupted_run_goes_on_where_it_was(record: RunRecord, tmp_path: Path) -> None:
    key = {"index": "x", "experts": ["y"]}
    steps = record.steps_of("eam")
    progress = Progress.open(tmp_path, key, resume=False)
    for start in (0, 4):
        state = {"eam": {"encoder": np.array([start / 8, 1 - start / 8])}}
        progress.add(steps[start : start + 4], {"position": start + 4, "forwards_run": 12, "states": state})
    again = Progress.open(tmp_path, key, resume=True)
    assert same(kept(again, "eam"), steps[:8])
    assert again.snapshot is not None
    assert again.snapshot["position"] == 8
    np.testing.assert_array_equal(again.snapshot["states"]["eam"]["encoder"], [0.5, 0.5])
    lines = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    assert [line["t"] for line in lines] == list(range(8))
    assert Progress.open(tmp_path, {**key, "experts": ["z"]}, resume=True).snapshot is None
    assert Progress.open(tmp_path, key, resume=True).snapshot is None  # what belonged to others is gone


def test_a_torn_chunk_costs_only_its_own_batches(record: RunRecord, tmp_path: Path) -> None:
    steps = record.steps_of("mean")
    progress = Progress.open(tmp_path, {}, resume=False)
    for start in (0, 4):
        progress.add(steps[start : start + 4], {"position": start + 4, "forwards_run": 4, "states": {"mean": {}}})
    last = max((tmp_path / "progress").glob("*.npz"))
    last.write_bytes(last.read_bytes()[:100])
    again = Progress.open(tmp_path, {}, resume=True)
    assert same(kept(again, "mean"), steps[:4])
    assert again.snapshot is not None
    assert again.snapshot["position"] == 4


def test_a_file_that_lost_its_end_costs_its_own_batches_too(record: RunRecord, tmp_path: Path) -> None:
    steps = record.steps_of("mean")
    progress = Progress.open(tmp_path, {}, resume=False)
    for start in (0, 4):
        progress.add(steps[start : start + 4], {"position": start + 4, "forwards_run": 4, "states": {"mean": {}}})
    with (tmp_path / "progress" / "0.f32").open("r+b") as file:
        file.truncate(6 * 10 * 3 * 4)
    again = Progress.open(tmp_path, {}, resume=True)
    assert same(kept(again, "mean"), steps[:4])
    again.add(steps[4:8], {"position": 8, "forwards_run": 4, "states": {"mean": {}}})
    assert same(kept(again, "mean"), steps[:8])
    assert len((tmp_path / "batches.jsonl").read_text().splitlines()) == 8


def test_a_report_from_disk_is_the_report_from_memory(record: RunRecord, written: Path, tmp_path: Path) -> None:
    progress = Progress.open(tmp_path, {}, resume=False)
    assert isinstance(record.steps, list)
    for t in range(record.stream.batches):
        own = [step for step in record.steps if step.t == t]
        progress.add(own, {"position": t + 1, "forwards_run": 0, "states": {}})
    assert len(list((tmp_path / "progress").iterdir())) == 3 + 2  # a file for each method, two snapshots
    write(tmp_path, replace(record, steps=progress.ledger))
    for name in ("summary.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    for folder in (tmp_path, written):
        with np.load(folder / "predictions.npz") as stored:
            np.testing.assert_array_equal(stored["p:eam"], record.probabilities("eam"))


def test_a_disk_that_fills_up_leaves_whole_files(record: RunRecord, written: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; the system refuses to write in the same way."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, replace(record, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    json.loads((tmp_path / "summary.json").read_text())
    np.load(tmp_path / "predictions.npz")["labels"]
    assert (tmp_path / "report.html").read_bytes() == (written / "report.html").read_bytes()


def test_the_page_says_what_noise_promises_and_what_is_withheld(record: RunRecord, written: Path, tmp_path: Path) -> None:
    sites = [replace(site, n=None, validation_accuracy=None, runs=[]) for site in record.sites]
    privacy = {"said": "noised: epsilon 4.38 at delta 1e-05 (clip 1, z 2)", "unit": "one upload"}
    summary = write(tmp_path, replace(record, sites=sites, manifest={**record.manifest, "privacy": privacy}))
    page = (tmp_path / "report.html").read_text()
    assert "Uploads are noised: epsilon 4.38 at delta 1e-05" in page
    assert page.count("<td>withheld</td>") == 4
    assert [site["n"] for site in summary["sites"]] == [None, None]
    assert "epsilon" not in (written / "report.html").read_text()
