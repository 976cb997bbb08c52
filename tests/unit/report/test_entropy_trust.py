"""Entropy against cross-entropy, from predictions alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from fedmerge.errors import FolderError
from fedmerge.experiment.diagnose import diagnose_run, diagnosis_words
from fedmerge.report.comparison import kept_run
from fedmerge.report.metrics.entropy_trust import how_many_right, kept_predictions, trust


def some(seed: int = 0, samples: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    p = {name: rng.dirichlet(np.ones(3), samples).astype(np.float32) for name in ("a", "b", "c")}
    return p, rng.integers(3, size=samples)


def test_correlations_are_those_of_plain_loops() -> None:
    p, y = some()
    for one in trust(p, y):
        i, j = one.pair
        xs, ys = [], []
        for row_i, row_j, label in zip(p[i].tolist(), p[j].tolist(), y.tolist(), strict=True):
            right = (row_i.index(max(row_i)) == label) + (row_j.index(max(row_j)) == label)
            if one.split not in ("all", ("both wrong", "one right", "both right")[right]):
                continue
            H = [-sum(q * math.log(q) for q in row) for row in (row_i, row_j)]
            loss = [-math.log(row[label]) for row in (row_i, row_j)]
            xs.append(H[0] / sum(H))
            ys.append(loss[0] / sum(loss))
        assert one.samples == len(xs)
        assert one.pearson == pytest.approx(np.corrcoef(xs, ys)[0, 1], abs=1e-5)
        assert one.spearman == pytest.approx(spearmanr(xs, ys).statistic, abs=1e-5)
        assert one.sides == pytest.approx(np.mean([(a < 0.5) == (b < 0.5) for a, b in zip(xs, ys, strict=True)]))


def test_a_perfect_guide_and_a_constant() -> None:
    sure, unsure = [0.98, 0.01, 0.01], [0.3, 0.4, 0.3]
    p = {"a": np.array([sure, unsure], np.float32), "b": np.array([unsure, sure], np.float32)}
    found = {one.split: one for one in trust(p, np.zeros(2, np.int64))}
    assert found["one right"].sides == 1
    assert "good guide" in diagnosis_words(list(found.values()), [0, 2, 0])[1]
    same = {"a": p["a"], "b": p["a"]}
    assert trust(same, np.zeros(2, np.int64))[0].pearson is None
    assert how_many_right(p, np.zeros(2, np.int64)) == [0, 2, 0]


def test_a_run_is_read_and_what_is_none_is_told(tmp_path: Path) -> None:
    p, y = some()
    with pytest.raises(FolderError, match="finished run"):
        kept_predictions(tmp_path)
    np.savez(tmp_path / "predictions.npz", labels=y, **{"p:mean": p["a"]})
    with pytest.raises(FolderError, match=r"found none of an expert; .*add 'expert'"):
        kept_predictions(tmp_path)
    np.savez(tmp_path / "predictions.npz", labels=y, **{"p:expert:a": p["a"]})  # of a scenario with one hospital
    with pytest.raises(FolderError, match=r"found those of one expert, a; .*with_theta_0: true"):
        kept_predictions(tmp_path)
    np.savez(tmp_path / "predictions.npz", labels=y, **{f"p:expert:{name}": q for name, q in p.items()})
    whole = (tmp_path / "predictions.npz").read_bytes()
    (tmp_path / "predictions.npz").write_bytes(whole[: len(whole) // 2])  # the disk was full, or a copy was cut off
    with pytest.raises(FolderError, match="finished run"):
        kept_predictions(tmp_path)
    (tmp_path / "predictions.npz").write_bytes(whole)
    diagnose_run(tmp_path, None)
    assert "Do entropies tell who is right?" in (tmp_path / "diagnose.html").read_text()
    assert len(json.loads((tmp_path / "diagnose.json").read_text())["trust"]) == 12


TORN = ['{"methods": {"m', "[]", "null", '"x"', "7"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(name, content) for name in ("summary.json", "manifest.json", "batches.jsonl") for content in TORN],
        ("summary.json", '{"methods": 7}'),
        ("manifest.json", '{"course": [{"start": 0}]}'),
        ("batches.jsonl", '{"method": "m", "encoder": [0.5, 0.5], "head": null}'),
    ],
)
def test_a_file_that_is_torn_or_of_another_program_is_named(name: str, content: str, tmp_path: Path) -> None:
    p, y = some()
    np.savez(tmp_path / "predictions.npz", labels=y, **{f"p:expert:{site}": q for site, q in p.items()})
    for written in (content.encode(), b"\xff\xfe\x00"):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(
            FolderError, match=rf"{name}: found .* that cannot be read \(.+\); expected th(at|ose) of a finished run$"
        ):
            diagnose_run(tmp_path, None)


def test_a_run_that_has_not_ended_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"status": "running"}')
    with pytest.raises(
        FolderError, match=r"found a run that is running; expected .* finished run.*Give its command again, with --resume"
    ):
        diagnose_run(tmp_path, None)
    with pytest.raises(
        FolderError, match=r"found a run that is running; expected .* finished run.*Give its command again, with --resume"
    ):
        kept_run(tmp_path)
