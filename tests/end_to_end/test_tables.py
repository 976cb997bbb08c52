"""A hospital's table by the front door: patients stay together, nobody hears their names, and what is missing is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fedmerge.experiment.experiment import load_experiment
from fedmerge.federated.client.site_log import own_log
from tests.front_door import SCENARIO, done, fedmerge, read, simulate

COLUMNS = {"path": "file", "label": "dx", "patient": "mrn", "domain": "site", "split": "fold"}
SCENARIO_FILE = "scenarios/tiny.yaml"


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hospitals and a target in one table, eight patients each with four images; the target and `a` share a patient."""
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    lines = ["file;dx;mrn;site;fold"]
    for name in "abc":
        for number in range(32):
            file = tmp_path / "pacs" / name / f"{number % 5}" / f"IM{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shade = 170 if number % 2 else 80
            Image.fromarray((shade + rng.integers(-40, 40, (16, 16))).astype(np.uint8)).save(file)
            patient = "Zacharias Zorn" if number % 8 == 0 and name in "ac" else f"patient-{name}-{number % 8}"
            lines.append(f"{file.relative_to(tmp_path / 'pacs')};{number % 2};{patient};{name};train")
    (tmp_path / "pacs" / "cohort.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "key").write_text("e3b0c44298fc1c149afbf4c8996fb924")
    for name in "abc":
        write_site(tmp_path, name, patient_key="key")
    short = {"training": {**SCENARIO["training"], "runs": 1, "epochs": 1}, "methods": ["mean", "expert"]}
    scenario = {**SCENARIO, **short, "sites": ["a", "b"], "target": "c", "stream": {"kind": "iid", "batch_size": 8}}
    (tmp_path / "scenarios").mkdir()
    (tmp_path / SCENARIO_FILE).write_text(yaml.safe_dump(scenario))
    return tmp_path


def write_site(folder: Path, name: str, **fields: Any) -> None:
    source = {"kind": "table", "file": "pacs/cohort.csv", "columns": COLUMNS, "labels": {0: "nevus", 1: "melanoma"}}
    (folder / "sites").mkdir(exist_ok=True)
    site = {"name": name, "source": {**source, "folders": [name], "take": ["train"], **fields}}
    (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site))


def test_a_run_goes_by_patients_and_tells_no_name(hospitals: Path) -> None:
    (hospitals / "pacs/a/1/IM1.png").unlink()
    told = done(hospitals, "--out", "run", "--pool", "pool")
    summary, manifest = (read(hospitals / "run" / f"{name}.json") for name in ("summary", "manifest"))
    assert summary["intervals"] == {"over": "patients", "count": 8}
    assert "95% intervals over 8 patients" in told
    assert "cluster bootstrap over the 8 patients" in (hospitals / "run/report.html").read_text()
    assert "site 'a': rows left out, for their file is missing: 1" in manifest["remarks"]
    shared = "sites 'a' and 'c' have 1 patients in common, so the target 'c' is not unseen for these patients"
    assert shared in manifest["remarks"]
    assert "a/1/IM1.png (missing)" in own_log("a").read_text()
    with np.load(hospitals / "run/predictions.npz") as file:
        assert sorted(set(file["patients"].tolist())) == list(range(8))
        assert file["patients"][0] == 0
    left = [file for folder in ("run", "pool") for file in (hospitals / folder).rglob("*") if file.is_file()]
    assert left
    for file in left:
        assert not {word for word in (b"Zorn", b"patient-a", b"IM1", b"e3b0c442") if word in file.read_bytes()}, file


def test_the_plan_counts_patients_and_says_what_is_unknown(hospitals: Path) -> None:
    (hospitals / "pacs/other.csv").write_bytes((hospitals / "pacs/cohort.csv").read_bytes())
    write_site(hospitals, "b", file="pacs/other.csv")
    planned = fedmerge(hospitals, "plan", SCENARIO_FILE)
    assert planned.returncode == 0, planned.stderr
    assert "sites b: nobody can tell whether their patients are at other sites too, without a common patient_key" in " ".join(
        planned.stdout.split()
    )
    rows = [line.split() for line in planned.stdout.splitlines() if "32" in line]
    assert [row.count("8") for row in rows[:3]] == [2, 2, 1]  # patients, and images held out


def test_sites_without_a_key_in_common_are_unknown(hospitals: Path) -> None:
    (hospitals / "other").write_text("0" * 32)
    write_site(hospitals, "c", patient_key="other")
    told = done(hospitals, "--out", "run", "--pool", "pool", "--experts-only")
    assert "sites a, b, c: nobody can tell" not in told  # a and b have one in common
    assert "sites c: nobody can tell whether their patients are at other sites too" in " ".join(told.split())


def test_an_outline_tells_digests_by_which_the_patient_is_found(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outline = fedmerge(hospitals, "outline", "sites/a.yaml", "--seed", "3")
    assert outline.returncode == 0, outline.stderr
    known = yaml.safe_load(outline.stdout)["source"]
    assert known["patient_key"] != "key"
    assert len(known["patients"]) == 8
    assert all(len(one) == 64 for one in known["patients"])
    assert "Zorn" not in outline.stdout
    (hospitals / "sites/a.yaml").write_text(outline.stdout)
    monkeypatch.chdir(hospitals)
    remarks = load_experiment(Path(SCENARIO_FILE)).remarks()
    assert any(remark.startswith("sites 'a' and 'c' have 1 patients in common") for remark in remarks)


def test_without_a_key_nothing_of_patients_leaves_in_an_outline(hospitals: Path) -> None:
    write_site(hospitals, "a")
    known = yaml.safe_load(fedmerge(hospitals, "outline", "sites/a.yaml", "--seed", "3").stdout)["source"]
    assert not {"patients", "patient_key"} & set(known)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patient_key": "gone"}, "which cannot be read (No such file or directory)"),
        ({"patient_key": "short"}, "with 3 bytes; expected a file with a secret of 16 bytes or more"),
        ({"patient_key": "key", "columns": {"path": "file", "label": "dx", "domain": "site", "split": "fold"}}, "knows patients"),
    ],
)
def test_keys_that_are_none(hospitals: Path, fields: dict[str, Any], said: str) -> None:
    (hospitals / "short").write_text("abc")
    write_site(hospitals, "a", **fields)
    ended = simulate(hospitals)
    assert (ended.returncode, said in " ".join(ended.stderr.split())) == (2, True), ended.stderr


def test_more_missing_than_allowed_stops_the_run_without_a_name(hospitals: Path) -> None:
    for number in range(1, 9):
        (hospitals / f"pacs/a/{number % 5}/IM{number}.png").unlink()
    ended = simulate(hospitals)
    assert ended.returncode == 2
    assert "more than 3 files that are missing or no image" in " ".join(ended.stderr.split())
    assert "IM1" not in ended.stderr + ended.stdout
    assert own_log("a").read_text().count("(missing)") >= 8
