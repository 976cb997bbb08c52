"""The other commands on the folders of a real run: plan, sweep, diagnose, and every method in one scenario."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedmerge.merging.methods._base import METHODS
from tests.front_door import SCENARIO, done, fedmerge, lines, read

pytestmark = pytest.mark.slow


def test_a_plan_tells_what_is_in_the_pool(first: tuple[Path, str]) -> None:
    told = fedmerge(first[0], "plan", "scenarios/tiny.yaml")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("in the pool") == 2
    assert "never trains" in told.stdout
    assert "nobody trains" in told.stdout
    changed = fedmerge(first[0], "plan", "scenarios/tiny.yaml", "--without", "south", "--add-site", "east", "--methods", "mean,eam")
    assert changed.returncode == 0, changed.stderr
    assert [name in changed.stdout for name in ("south", "east", "methods: mean, eam\n")] == [False, True, True]
    wrong = fedmerge(first[0], "plan", "scenarios/tiny.yaml", "--pool", "scenarios/tiny.yaml")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--pool: found 'scenarios/tiny.yaml', a file; expected a folder" in wrong.stderr


def test_a_plan_names_a_damaged_expert(first: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(first[0], folder)
    damaged = next((folder / "pool" / "experts").glob("south-*"))
    (damaged / "expert.safetensors").write_bytes(b"torn")
    told = fedmerge(folder, "plan", "scenarios/tiny.yaml")
    assert told.returncode == 2
    assert f"{damaged.name}: found an entry that cannot be read" in told.stderr
    assert "Delete it, and the site trains again" in told.stderr


def test_a_sweep_shares_experts_and_goes_on_where_it_stopped(first: tuple[Path, str]) -> None:
    folder = first[0]
    before = sorted((folder / "pool" / "experts").iterdir())
    options = ("--set", "stream={kind: iid, batch_size: 8},{kind: temporal, batch_size: 8}", "--methods", "mean,eam")
    swept = fedmerge(folder, "sweep", "scenarios/tiny.yaml", *options)
    assert swept.returncode == 0, swept.stderr + swept.stdout
    assert swept.stdout.count("majority class") == 2 and "minus mean" in swept.stdout
    out = folder / "runs" / "tiny-sweep"
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = {
        (kind, method)
        for kind in ("iid, batch_size 8", "temporal, batch_size 8")
        for method in ("mean", "eam", "majority class (not ranked)")
    }
    assert {(row["stream"], row["method"]) for row in rows} == wanted
    assert "data:image/svg+xml" in (out / "sweep.html").read_text()
    assert sorted((folder / "pool" / "experts").iterdir()) == before
    cells = sorted((out / "cells").iterdir())
    assert len({read(cell / "summary.json")["stream"]["index_sha256"] for cell in cells}) == 2
    again = fedmerge(folder, "sweep", "scenarios/tiny.yaml", *options)
    assert again.returncode == 0, again.stderr
    assert "2 cells, 2 of them done before" in again.stdout
    wrong = fedmerge(folder, "sweep", "scenarios/tiny.yaml", "--set", "methods.eam.gama=1")
    assert wrong.returncode == 2
    assert "did you mean 'gamma'?" in wrong.stderr


def test_a_sweep_tells_what_failed_and_writes_the_tables_of_the_rest(first: tuple[Path, str]) -> None:
    options = ("--set", "training.diversity.lr.draw=[2e-3],[1e30]", "--methods", "mean", "--out", "runs/in-part")
    swept = fedmerge(first[0], "sweep", "scenarios/tiny.yaml", *options)
    assert swept.returncode == 2
    assert "cell draw=1e30-seed3: " in swept.stderr
    assert "training diverged" in swept.stderr
    assert (
        "1 of 2 cells are done, and in the tables (runs/in-part/sweep.html). The same command runs the others again" in swept.stderr
    )
    out = first[0] / "runs" / "in-part"
    table = (out / "sweep.md").read_text()
    assert "| 2e-3 | mean |" in table
    assert table.endswith("Missing, because they failed: draw=1e30-seed3.\n")
    assert "draw=1e30-seed3" in (out / "sweep.html").read_text()


def test_a_run_is_diagnosed_from_its_own_experts(first: tuple[Path, str]) -> None:
    folder, _ = first
    command = [sys.executable, "-m", "fedmerge", "diagnose", "runs/tiny-3"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "barriers between experts, on 80 images" in ended.stdout
    found = read(folder / "runs" / "tiny-3" / "diagnose.json")
    assert {(tuple(row["pair"]), row["part"]) for row in found["barriers"]} == {
        (("north", "south"), part) for part in ("both", "encoder", "head")
    }
    page = (folder / "runs" / "tiny-3" / "diagnose.html").read_text()
    for heading in ("trust", "coefficients", "drift", "barriers"):
        assert f'id="{heading}"' in page
    elsewhere = fedmerge(folder, "diagnose", "runs/tiny-3", "--pool", "nowhere")
    assert elsewhere.returncode == 2
    assert "name the run's own pool with --pool" in elsewhere.stderr


def test_every_method_of_the_folder_runs_and_is_labeled(first: tuple[Path, str]) -> None:
    """All methods on one stream, with whatever they need; the experts are those that the first run has trained."""
    folder, _ = first
    target_fisher = {"fisher": {"mode": "target", "samples": 8, "label": "fisher-target"}}
    stream = {"dawin": {"scope": "full", "label": "dawin-full"}}
    everything = {
        **SCENARIO,
        "name": "everything",
        "methods": [*METHODS.names, target_fisher, stream],
        "uploads": [{"fisher": {"samples": 8}}, {"gram": {"samples": 8}}, {"gram_rounds": {"samples": 8}}, "soup", "centroid"],
    }
    (folder / "scenarios" / "everything.yaml").write_text(yaml.safe_dump(everything))
    said = done(folder, "scenarios/everything.yaml")
    assert "compute fisher, gram, gram_rounds, soup, centroid" in said
    summary = read(folder / "runs" / "everything-3" / "summary.json")
    rows = summary["methods"]
    assert set(METHODS.names) - {"expert"} <= set(rows)
    assert not any(site["trained"] for site in summary["sites"])
    assert not rows["oracle"]["ranked"]
    assert not rows["dawin-full"]["ranked"]
    assert rows["dawin-full"]["remark"] == "sees the whole stream before it predicts"
    assert {name for name, row in rows.items() if row["gradient"]} >= {"adamerging", "fisher-target"}
    assert {"fisher", "gram", "gram_rounds", "soup", "centroid"} <= {
        json.loads(x)["kind"] for x in lines(folder / "runs" / "everything-3")
    }
    assert read(folder / "runs" / "everything-3" / "manifest.json")["per_sample"]["taken"]
    report = (folder / "runs" / "everything-3" / "report.html").read_text()
    assert "sees the whole stream before it predicts" in report
    assert "fisher" in report


def test_a_full_disk_is_one_message(first: tuple[Path, str]) -> None:
    folder, _ = first
    ended = fedmerge(folder, "mirage", "pool", "--out", "/dev/full")
    assert ended.returncode == 2
    assert "the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "/dev/full" in ended.stderr


@pytest.mark.parametrize("words", [("mirage", "pool", "--out"), ("compare", "runs/tiny-3", "runs/tiny-3", "--html")])
def test_a_file_that_a_user_names_is_looked_at_first(first: tuple[Path, str], words: tuple[str, ...]) -> None:
    folder, _ = first
    for where, said in {
        "pool": "found the folder 'pool'; expected a file, e.g. pool/",
        "tiny/x/y": "which cannot be written",
    }.items():
        (folder / "tiny").touch()
        ended = fedmerge(folder, *words, where)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert said in ended.stderr
    assert fedmerge(folder, *words, "made/here/file").returncode == 0
    assert (folder / "made" / "here" / "file").is_file()


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (("mirage", "pool", "--out", "unread.json"), "unread.json"),
        (("compare", "runs/tiny-3", "runs/tiny-3", "--html", "unread.html"), "unread.html"),
        (("diagnose", "unread", "--predictions-only"), "unread/diagnose.html"),
    ],
)
def test_files_are_written_whether_or_not_anybody_reads_what_is_printed(
    first: tuple[Path, str], words: tuple[str, ...], written: str
) -> None:
    """As with `| head -1`, which leaves before the end."""
    folder, _ = first
    shutil.copytree(folder / "runs" / "tiny-3", folder / "unread", dirs_exist_ok=True)
    (folder / written).unlink(missing_ok=True)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        subprocess.run([sys.executable, "-m", "fedmerge", *words], cwd=folder, stdout=write_end, stderr=subprocess.DEVNULL)
    finally:
        os.close(write_end)
    assert (folder / written).is_file()


def test_a_locale_that_reads_other_names_of_files_is_named(tmp_path: Path) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def said(*words: str) -> str:
        ended = subprocess.run([sys.executable, "-m", "fedmerge", *words], cwd=tmp_path, capture_output=True, env=ascii_only)
        return (ended.stdout + ended.stderr).decode()

    assert "reads names of files as ascii, not as UTF-8" in said("plan", "gr\u00f6\u00dfe.yaml")
    assert "PYTHONUTF8" not in said("plan", "plain.yaml")
    assert "names of files are read as ascii. Set PYTHONUTF8=1" in said("doctor")
