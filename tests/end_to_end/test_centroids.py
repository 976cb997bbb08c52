"""`ttmm` and the statistic `centroid` by the front door: what hospitals upload, what the report says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.front_door import simulate, world


def with_keys(file: Path, **keys: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("centroids")
    with_keys(
        world(folder), methods=["mean", "ttmm", {"ttmm": {"granularity": "batch", "label": "ttmm-batch"}}], uploads=["centroid"]
    )
    return folder


def test_hospitals_upload_their_centroids_and_the_target_merges_by_them(folder: Path) -> None:
    done = simulate(folder, "--out", "runs/ttmm")
    assert done.returncode == 0, done.stderr
    items = [json.loads(line) for line in (folder / "runs" / "ttmm" / "audit.jsonl").read_text().splitlines()]
    sent = [item for item in items if "centroid" in str(item.get("item")) or item["kind"] == "centroid"]
    assert {item["site"] for item in sent} == {"north", "south"}
    rows = json.loads((folder / "runs" / "ttmm" / "summary.json").read_text())["methods"]
    assert rows["ttmm-batch"]["forwards_per_batch"] == 2  # theta_0, and the merged model
    assert set(rows["ttmm"]["needs"]) == {"centroid", "theta_0"}
    steps = [json.loads(line) for line in (folder / "runs" / "ttmm" / "batches.jsonl").read_text().splitlines()]
    assert all(abs(sum(step["encoder"]) - 1) < 1e-6 for step in steps if step["method"] == "ttmm")


NEEDED = "'ttmm', which needs the statistic 'centroid' of every site; expected 'centroid' among the scenario's uploads"
WITH_THETA_0 = "methods[0].ttmm.with_theta_0: found true; expected false. The method starts from theta_0 already"
BY_THETA_0 = "uploads: found 'centroid', which is measured by theta_0; expected statistics that need none"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("uploads=[]", NEEDED),
        ("methods=[{ttmm: {with_theta_0: true}}]", WITH_THETA_0),
        ("initialization=null", BY_THETA_0),
        ("methods=[{ttmm: {beta: 0}}]", "greater than 0"),
        ("methods=[{posterior: {active: some}}]", "'all' or 'auto'"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_trains(folder: Path, change: str, said: str) -> None:
    done = simulate(folder, "--set", change)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
