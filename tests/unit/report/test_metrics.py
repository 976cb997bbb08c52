"""Metrics, intervals and tests against independent computations."""

from __future__ import annotations

import gc
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.report.metrics import significance
from fedmerge.report.metrics.classification import by_group, calibration_error, err, gap_closed, mce_in, mce_t3, measure
from fedmerge.report.metrics.segments import halves, segments
from fedmerge.report.pages.run import render
from fedmerge.report.plots.run import draw
from fedmerge.report.records import RunRecord
from fedmerge.report.summary import influence, predictions, summarize


def loops(p: np.ndarray, labels: list[np.ndarray]) -> dict[str, float]:
    """The same metrics, sample by sample in Python floats."""
    y = [int(label) for batch in labels for label in batch]
    guess = [max(range(p.shape[1]), key=lambda c, row=row: row[c]) for row in p.tolist()]
    recalls, scores = [], []
    for c in sorted(set(y)):
        hit = sum(a == b == c for a, b in zip(y, guess, strict=True))
        recalls.append(hit / y.count(c))
        scores.append(2 * hit / (y.count(c) + guess.count(c)))
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, a, b in zip(p.tolist(), y, guess, strict=True):
        bins[min(14, math.ceil(row[b] * 15) - 1)].append((row[b], a == b))
    ece = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / len(y)
    batches = list(itertools.accumulate((len(batch) for batch in labels), initial=0))
    each = [sum(y[i] == guess[i] for i in range(a, b)) / (b - a) for a, b in itertools.pairwise(batches)]
    return {
        "accuracy": sum(a == b for a, b in zip(y, guess, strict=True)) / len(y),
        "batch_accuracy": sum(each) / len(each),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(scores) / len(scores),
        "auroc": area(p, y),
        "brier": sum(sum((q - (c == a)) ** 2 for c, q in enumerate(row)) for row, a in zip(p.tolist(), y, strict=True)) / len(y),
        "nll": sum(-math.log(max(row[a], 1e-12)) for row, a in zip(p.tolist(), y, strict=True)) / len(y),
        "ece": ece,
    }


def area(p: np.ndarray, y: list[int]) -> float | None:
    """AUROC as the share of pairs in the right order, ties by half, averaged over the classes that occur."""
    if len(set(y)) < 2:
        return None
    areas = []
    for c in sorted(set(y)):
        own = [row[c] for row, a in zip(p.tolist(), y, strict=True) if a == c]
        rest = [row[c] for row, a in zip(p.tolist(), y, strict=True) if a != c]
        areas.append(sum((a > b) + (a == b) / 2 for a in own for b in rest) / (len(own) * len(rest)))
    return sum(areas) / len(areas)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 5))
def test_metrics_are_those_of_plain_loops(seed: int, sizes: list[int], classes: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [rng.integers(classes, size=size) for size in sizes]
    p = rng.dirichlet(np.ones(classes), sum(sizes)).astype(np.float32)
    wanted = loops(p, labels)
    for name, value in measure(p, labels).as_dict().items():
        assert value == pytest.approx(wanted[name], abs=2e-6), name


@pytest.mark.parametrize("samples", [1, 40, 3000])
def test_the_calibration_error_is_that_of_torchmetrics_to_the_last_bit(samples: int) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    for seed in range(20):
        rng = np.random.default_rng(seed)
        p, y = rng.dirichlet(np.full(5, 0.3), samples).astype(np.float32), rng.integers(5, size=samples)
        p[0], p[-1] = np.eye(5)[y[0]], 0.2  # at both ends: sure, and without a guess
        wanted = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), 5, n_bins=15, norm="l1")
        assert calibration_error(p, y) == float(wanted)


def test_one_sure_mistake_costs_a_bounded_amount() -> None:
    p = np.array([[1.0, 0.0]], np.float32)
    assert measure(p, [np.array([1])]).nll == pytest.approx(27.63, abs=0.01)


def test_accuracy_by_group() -> None:
    p = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    assert by_group(p, np.array([0, 1, 0, 0]), np.array([0, 0, 2, 2])) == {0: 1.0, 2: 0.5}


@pytest.mark.parametrize(("a", "b"), [(0, 0), (5, 0), (3, 9), (7, 7), (1, 2)])
def test_mcnemar_is_the_exact_binomial(a: int, b: int) -> None:
    n = a + b
    chances = [math.comb(n, i) / 2**n for i in range(n + 1)]
    wanted = min(1.0, sum(c for c in chances if c <= chances[a] * (1 + 1e-7))) if n else 1.0
    gc.freeze()  # statsmodels collects garbage in each call, which takes long where a test process has loaded much
    assert significance.mcnemar(a, b) == pytest.approx(wanted)
    assert significance.mcnemar(a, b) == significance.mcnemar(b, a)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    sizes = np.full(60, 32)
    hits = 0
    for seed in range(150):
        low, high = significance.interval(rng.binomial(32, 0.8, 60), sizes, seed)
        hits += low <= 0.8 <= high
    assert 0.87 <= hits / 150 <= 0.99


def test_blocks_widen_the_interval_of_a_stream_whose_neighbors_are_alike() -> None:
    drift = np.repeat([32, 24, 16, 24, 32, 8], 10)
    mixed = np.random.default_rng(0).permutation(drift)
    low, high = significance.interval(drift, np.full(60, 32), 0)
    lower, higher = significance.interval(mixed, np.full(60, 32), 0)
    assert high - low > 1.3 * (higher - lower)


def test_the_interval_over_patients_covers_the_truth_where_that_over_batches_does_not() -> None:
    """60 patients of 8 images that are right or wrong together, in random order."""
    covered = {"patients": 0, "batches": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        patients = rng.permutation(np.repeat(np.arange(60), 8))
        right = (rng.random(60) < 0.7).astype(np.int64)[patients]
        for over, units, length in (("patients", patients, 1), ("batches", np.repeat(np.arange(15), 32), None)):
            low, high = significance.interval(*significance.per_unit(right, units), seed, length)
            covered[over] += low <= 0.7 <= high
    assert covered["patients"] >= 88
    assert covered["batches"] <= 70


def test_whole_patients_are_drawn_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    correct, sizes = rng.integers(0, 5, 300), np.full(300, 5)
    at_once = significance.interval(correct, sizes, 0, 1)
    reach = 1.96 * (correct / 5).std() / np.sqrt(300)
    center = correct.sum() / sizes.sum()
    assert at_once == pytest.approx((center - reach, center + reach), abs=0.1 * reach)
    monkeypatch.setattr(significance, "AT_ONCE", 1000)
    assert significance.interval(correct, sizes, 0, 1) == at_once


def test_the_summary_says_what_intervals_are_over(record: RunRecord) -> None:
    assert summarize(record)["intervals"] == {"over": "batches", "count": 20}
    patients = [np.arange(10) // 2 + 5 * (t // 4) for t in range(20)]
    known = replace(record, patients=patients)
    summary = summarize(known)
    assert summary["intervals"] == {"over": "patients", "count": 25}
    assert summary["methods"]["eam"]["ci95"] != summarize(record)["methods"]["eam"]["ci95"]
    assert summary["methods"]["eam"]["accuracy"] == summarize(record)["methods"]["eam"]["accuracy"]
    assert "cluster bootstrap over the 25 patients" in render(known, summary, draw(known, summary))
    assert np.array_equal(predictions(known)["patients"], np.concatenate(patients))
    assert "patients" not in predictions(record)
    alone = replace(record, patients=[np.zeros(10, np.int64)] * 20)
    assert summarize(alone)["intervals"]["over"] == "batches"


def test_a_method_against_itself_differs_by_nothing() -> None:
    right = np.random.default_rng(0).random(100) < 0.7
    found = significance.paired(right, right, np.repeat(np.arange(10), 10), 0)
    assert (found.difference, found.ci95, found.p) == (0.0, (0.0, 0.0), 1.0)
    better = significance.paired(np.ones(100, bool), right, np.repeat(np.arange(10), 10), 0)
    assert better.difference == pytest.approx(1 - right.mean())
    assert better.ci95[0] > 0


def test_the_summary_keeps_its_promised_keys(record: RunRecord) -> None:
    summary = json.loads(json.dumps(summarize(record)))
    assert {"scenario", "seed", "stream", "sites", "methods"} <= set(summary)
    assert {"kind", "batches", "samples", "index_sha256"} <= set(summary["stream"])
    assert {"name", "trained", "expert_sha256", "n", "validation_accuracy"} <= set(summary["sites"][0])
    promised = "accuracy ci95 balanced_accuracy macro_f1 nll ece vs_mean forwards_per_batch merge_bytes_per_batch"
    promised += " seconds needs gradient ranked"
    for row in summary["methods"].values():
        assert set(promised.split()) <= set(row)
    assert summary["methods"]["mean"]["vs_mean"] is None
    assert summary["methods"]["ensemble"]["vs_mean"]["difference"] == 0
    assert summary["methods"]["eam"]["vs_mean"]["ci95"][0] > 0
    assert summary["seeds"] == "one seed"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps: list[float]) -> None:
    """Written as the procedure: go up the sorted p-values, and stop at the first that is above alpha / (m - i)."""
    adjusted = significance.holm(ps)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for number, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
            if ps[i] * (len(ps) - number) > alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_an_interval_over_seeds_needs_two_of_them() -> None:
    assert significance.over_seeds([0.9]) is None
    low, high = significance.over_seeds([0.8, 0.9, 1.0]) or (0, 0)
    assert (low, high) == pytest.approx((0.9 - 4.302653 * 0.1 / 3**0.5, 0.9 + 4.302653 * 0.1 / 3**0.5), abs=1e-6)


def test_err_and_mce_are_those_of_the_published_table() -> None:
    """T^3, table 7, breast: Err of the expert 84.43, 68.17 and 54.76 give an mCE of 69.12."""
    assert mce_t3([84.43, 68.17, 54.76]) == pytest.approx(69.12, abs=0.005)
    assert mce_t3([84.43, None, 54.76]) == pytest.approx((84.43 + 54.76) / 2)
    assert mce_t3([None]) is None
    assert err(0.9, 0.8) == pytest.approx(50)
    assert err(0.9, 1.0) is None
    errors, base = {"noise": [0.1, 0.3], "blur": [0.2, 0.2]}, {"noise": [0.2, 0.6], "blur": [0.1, 0.3]}
    assert mce_in(errors, base) == pytest.approx((50 + 100) / 2)
    assert mce_in(errors, {"noise": [0, 0], "blur": [0, 0]}) is None
    assert gap_closed(0.85, 0.8, 0.9) == pytest.approx(0.5)
    assert gap_closed(0.85, 0.9, 0.9) is None


def test_how_many_experts_count() -> None:
    alone = influence(np.array([[1.0, 0, 0], [0, 1, 0]]))
    assert alone.effective == pytest.approx(1)
    assert alone.strongest == (0.5, 0.5, 0)
    alike = influence(np.full((4, 3), 1 / 3))
    assert alike.effective == pytest.approx(3)
    assert alike.mean == pytest.approx((1 / 3,) * 3)
    uneven = influence(np.array([[0.7, 0.2, 0.1]]))
    assert uneven.effective == pytest.approx(math.exp(-sum(q * math.log(q) for q in (0.7, 0.2, 0.1))))
    assert influence(np.array([[1.5, -0.5]])).effective == pytest.approx(1)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([1, 2, 7]))
def test_recall_f1_and_auroc_are_those_of_scikit_learn(n: int, classes: int, seed: int, digits: int) -> None:
    """Of one digit, many images have the same score."""
    from sklearn.metrics import f1_score, recall_score, roc_auc_score

    rng = np.random.default_rng(seed)
    p = np.round(rng.dirichlet(np.ones(classes), n), digits).astype(np.float32)
    y = rng.integers(classes, size=n)
    present = np.unique(y)
    found, macro = measure(p, [y]), {"labels": present, "average": "macro", "zero_division": 0}
    assert found.balanced_accuracy == recall_score(y, p.argmax(1), **macro)
    assert found.macro_f1 == f1_score(y, p.argmax(1), **macro)
    if len(present) > 1:
        assert found.auroc == pytest.approx(np.mean([roc_auc_score(y == c, p[:, c]) for c in present]), abs=1e-12)


def test_one_class_has_no_auroc() -> None:
    found = measure(np.full((4, 3), 1 / 3, np.float32), [np.zeros(4, np.int64)])
    assert found.auroc is None
    assert found.accuracy == 1
    assert found.brier == pytest.approx(2 / 3)


def test_segments_and_recovery() -> None:
    truth = np.array([[1, 0], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8], [0, 1], [0, 1.0]])
    correct, sizes = np.array([8, 8, 8, 2, 6, 10]), np.full(6, 10)
    first, second = segments(truth, correct, sizes)
    assert (first.domain, first.start, first.stop, first.accuracy, first.recovery) == (0, 0, 3, 0.8, 0)
    assert (second.domain, second.start, second.stop, second.accuracy, second.recovery) == (1, 3, 6, 0.6, 1)
    assert halves(correct, sizes) == (0.8, 0.6)
    assert halves(correct[:1], sizes[:1]) is None


def test_the_bootstrap_covers_what_it_should() -> None:
    """95% intervals of independent batches hold the true accuracy 95 times in 100, within what chance and T = 60 allow."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        correct = rng.binomial(32, 0.8, size=60)
        low, high = significance.interval(correct, np.full(60, 32), seed)
        hits += low <= 0.8 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_accuracy_by_severity_and_mce_by_hand(record: RunRecord) -> None:
    """Two families at severities 1 and 3; the mean's errors are the base of mCE (Hendrycks & Dietterich, section 4.3)."""
    conditions = (("noise", 1), ("noise", 3), ("jpeg", 1), ("jpeg", 3))
    names = tuple(f"{family} {severity}" for family, severity in conditions)
    sizes = [len(labels) for labels in record.labels]
    domains = [np.full(n, t * 4 // len(sizes)) for t, n in enumerate(sizes)]
    truth = np.stack([np.bincount(batch, minlength=4) / len(batch) for batch in domains])
    stream = replace(record.stream, kind="corruption", conditions=conditions, domain_names=names, truth=truth)
    found = summarize(replace(record, stream=stream, domains=domains))["methods"]

    error: dict[str, dict[str, float]] = {}
    for name in record.methods:
        wrong = record.probabilities(name).argmax(1) != np.concatenate(record.labels)
        error[name] = {at: float(wrong[np.concatenate(domains) == c].mean()) for c, at in enumerate(names)}
    for name, row in found.items():
        mine, mean = error[name], error["mean"]
        assert row["per_severity"] == pytest.approx(
            {"1": 1 - (mine["noise 1"] + mine["jpeg 1"]) / 2, "3": 1 - (mine["noise 3"] + mine["jpeg 3"]) / 2}
        )
        assert row["per_family"] == pytest.approx(
            {"noise": 1 - (mine["noise 1"] + mine["noise 3"]) / 2, "jpeg": 1 - (mine["jpeg 1"] + mine["jpeg 3"]) / 2}
        )
        ratios = [(mine[f"{f} 1"] + mine[f"{f} 3"]) / (mean[f"{f} 1"] + mean[f"{f} 3"]) for f in ("noise", "jpeg")]
        assert row["mce_in_vs_mean"] == pytest.approx(100 * np.mean(ratios))
    assert found["mean"]["mce_in_vs_mean"] == pytest.approx(100)


def test_a_stream_of_plain_images_has_no_severities(record: RunRecord) -> None:
    row = summarize(record)["methods"]["eam"]
    assert row["per_severity"] == {}
    assert row["mce_in_vs_mean"] is None


@given(st.integers(0, 60), st.integers(0, 60), st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_mcnemar_and_holm_are_those_of_statsmodels(a: int, b: int, ps: list[float]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    gc.freeze()  # statsmodels collects garbage in each call, which takes long where a test process has loaded much
    assert significance.mcnemar(a, b) == pytest.approx(mcnemar([[7, a], [b, 9]], exact=True).pvalue, abs=1e-12)
    assert significance.holm(ps) == pytest.approx(multipletests(ps, method="holm")[1].tolist(), abs=1e-12)
    gc.unfreeze()


def test_the_commonest_class_alone_is_told_and_never_ranked(record: RunRecord) -> None:
    """By hand: a stream of 7 of one class and 3 of another, of three that there are."""
    labels = [np.array([1] * 7 + [2] * 3)] * len(record.labels)
    found = summarize(replace(record, labels=labels))
    assert found["majority_class"] == {"class": "heart", "accuracy": 0.7, "balanced_accuracy": 0.5, "ranked": False}
    assert "majority_class" not in found["methods"]


@pytest.mark.parametrize("done", [True, False])
def test_the_label_prior_is_applied_once(record: RunRecord, done: bool) -> None:
    """Batches of one class after another, which half of the images tell from the next by little: 5 of 10 are right, and all under
    the prior."""
    batch = np.array([[0.55, 0.4, 0.05]] * 5 + [[0.45, 0.5, 0.05]] * 5, np.float32)
    labels = [np.full(10, t % 3) for t in range(len(record.labels))]
    steps = [replace(s, probabilities=np.roll(batch, s.t % 3, 1), correct=5) for s in record.steps if s.method == "eam"]
    hyper_parameters = {"label_prior": "batch" if done else "none"}
    methods = {"eam": replace(record.methods["eam"], hyper_parameters=hyper_parameters)}
    row = summarize(replace(record, labels=labels, steps=steps, methods=methods))["methods"]["eam"]
    assert (row["accuracy"], row["accuracy_label_prior"]) == (0.5, 0.5 if done else 1.0)
