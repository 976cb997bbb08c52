"""The numbers of a run: `summary.json`, and `predictions.npz` from which they can be computed again.

How an adaptive method spreads its trust: the coefficients of a run in a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.merging.scoring.latent import label_shares, under
from fedmerge.report.metrics.classification import SMALLEST, by_group, err, gap_closed, mce_in, mce_t3, measure
from fedmerge.report.metrics.communication_cost import costs
from fedmerge.report.metrics.segments import halves, segments
from fedmerge.report.metrics.significance import holm, interval, paired, per_unit
from fedmerge.report.records import RunRecord
from fedmerge.system.process import one_thread

REFERENCE = "mean"

OF_A_SITE = ("name", "trained", "brought", "expert_sha256", "n", "validation_accuracy", "temperature", "attack", "left_out")
"""What the summary has of a hospital's row."""


def summarize(record: RunRecord) -> dict[str, Any]:
    """The summary, with the same keys in every version; methods stand in the scenario's order."""
    stream = record.stream
    methods = {name: _method(record, name) for name in record.methods}
    _relate(methods)
    _by_severity(methods, stream.conditions)
    for name, cost in costs(record).items():
        methods[name]["cost"] = cost
    if record.novel:
        _by_novelty(record, methods)
    if record.tasks:
        _by_task(record, methods)
    for row in methods.values() if record.parts else ():
        row["by_part"] = {name: _mean_of(row["per_domain"], domains) for name, domains in record.parts.items()}
    return {
        "scenario": record.scenario,
        "seed": record.seed,
        "seeds": "one seed",
        "intervals": {"over": record.units[0], "count": len(np.unique(record.units[1]))},
        "stream": {
            "kind": stream.kind,
            "batches": stream.batches,
            "samples": stream.samples,
            "unused": stream.unused,
            "index_sha256": stream.index_sha256,
        },
        "sites": [{name: getattr(site, name) for name in OF_A_SITE} for site in record.sites],
        "changes": [asdict(one) for one in record.changes],
        **({"parts": {name: list(domains) for name, domains in record.parts.items()}} if record.parts else {}),
        **(
            {"classes": {"base": [c for c in record.classes if c not in record.novel], "novel": list(record.novel)}}
            if record.novel
            else {}
        ),
        **({"tasks": {name: list(classes) for name, classes in record.tasks.items()}} if record.tasks else {}),
        "majority_class": _majority_class(record),
        "methods": methods,
        "forwards_per_batch_shared": record.forwards_run,
    }


def _by_novelty(record: RunRecord, methods: dict[str, dict[str, Any]]) -> None:
    """Accuracy on images of base and of novel classes: among all classes, as in all other numbers, and among their own alone.

    Base-to-novel tables of papers have the latter (Zhou et al., CoCoOp, CVPR 2022), and the harmonic mean of the two.
    """
    base = tuple(name for name in record.classes if name not in record.novel)
    for name, row in methods.items():
        found = _by_classes(record, name, {"base": base, "novel": record.novel})
        both = [float(one["among_own"]) for one in found.values()]
        mean = 2 * both[0] * both[1] / sum(both) if len(both) > 1 and max(both) > 0 else None
        row["by_novelty"] = {**found, "harmonic_mean": mean}


def _by_task(record: RunRecord, methods: dict[str, dict[str, Any]]) -> None:
    """Accuracy on the images of each task, and the mean over tasks: among all classes, and among the task's own alone."""
    for name, row in methods.items():
        found = _by_classes(record, name, record.tasks)
        keys = ("accuracy", "among_own") if found else ()
        row["by_task"], row["mean_of_tasks"] = found, {key: float(np.mean([one[key] for one in found.values()])) for key in keys}


def _by_classes(record: RunRecord, method: str, kinds: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """A row's accuracy on the images of each kind of classes, if there are any: predicted among all classes, and among its own."""
    y, p = np.concatenate(record.labels)[record.covered_samples(method)], record.probabilities(method)
    found = {}
    for kind, classes in kinds.items():
        own = np.array([name in classes for name in record.classes])
        here = own[y]
        if here.any():
            among = np.where(own, p[here], -1.0).argmax(-1)
            found[kind] = {
                "n": int(here.sum()),
                "accuracy": float((p[here].argmax(-1) == y[here]).mean()),
                "among_own": float((among == y[here]).mean()),
            }
    return found


def _mean_of(per_domain: dict[str, float], domains: Sequence[str]) -> float | None:
    """The mean accuracy over domains, each counting the same; None if the row covers none of their images."""
    there = [per_domain[name] for name in domains if name in per_domain]
    return float(np.mean(there)) if there else None


def _majority_class(record: RunRecord) -> dict[str, Any]:
    """What a table of accuracies is to be read against: always the commonest class of the stream, which nobody knows beforehand."""
    counts = np.bincount(np.concatenate(record.labels), minlength=len(record.classes))
    return {
        "class": record.classes[counts.argmax()],
        "accuracy": float(counts.max() / counts.sum()),
        "balanced_accuracy": float(1 / np.count_nonzero(counts)),
        "ranked": False,
    }


def right(record: RunRecord, method: str) -> NDArray[np.bool_]:
    """Whether each prediction is right (samples that the row covers,)."""
    y = np.concatenate(record.labels)[record.covered_samples(method)]
    hits: NDArray[np.bool_] = record.probabilities(method).argmax(-1) == y
    return hits


def predictions(record: RunRecord) -> dict[str, NDArray[Any]]:
    """Labels, domains, batch numbers, and every method's probabilities (samples, C) as float32; NaN where its row was not there.

    Numbers of patients, too, where they are known: as they first appear in the stream.
    """
    sizes = [len(batch) for batch in record.labels]
    return {
        "labels": np.concatenate(record.labels),
        "domains": np.concatenate(record.domains),
        "batch": np.repeat(np.arange(len(sizes)), sizes),
        **({"patients": np.concatenate(record.patients)} if record.patients else {}),
        **{f"p:{name}": _whole(record, name) for name in record.methods},
    }


def _whole(record: RunRecord, name: str) -> NDArray[np.float32]:
    there, p = record.covered_samples(name), record.probabilities(name)
    if there.all():
        return p
    found = np.full((len(there), p.shape[1]), np.nan, dtype=np.float32)
    found[there] = p
    return found


def _method(record: RunRecord, name: str) -> dict[str, Any]:
    steps, info, p = record.steps_of(name), record.methods[name], record.probabilities(name)
    batches, samples = record.covered(name), record.covered_samples(name)
    whole = bool(batches.all())
    labels = [batch for batch, there in zip(record.labels, batches, strict=True) if there]
    y, domains = np.concatenate(labels), np.concatenate(record.domains)[samples]
    sizes = np.array([step.n for step in steps])
    correct = np.array([step.correct for step in steps])
    names = record.stream.domain_names
    return {
        **measure(p, labels).as_dict(),
        "accuracy_label_prior": _under_label_prior(p, labels, done=info.hyper_parameters.get("label_prior") == "batch"),
        "ci95": _interval(record, name),
        "vs_mean": _versus_mean(record, name),
        "halves": halves(correct, sizes) if whole else None,
        "segments": [asdict(s) | {"domain": names[s.domain]} for s in segments(record.stream.truth, correct, sizes)]
        if whole
        else [],
        "per_domain": {names[group]: value for group, value in by_group(p, y, domains).items()},
        "per_class": {record.classes[group]: value for group, value in by_group(p, y, y).items()},
        "influence": _influence(record, name),
        "forwards_per_batch": float(np.mean([step.forwards for step in steps])),
        "forwards_after_first_pass": 1 if info.precomputes else None,
        "merge_bytes_per_batch": int(np.mean([step.merge_bytes for step in steps])),
        "seconds": float(np.sum([step.seconds for step in steps])),
        "kind": info.kind,
        "needs": list(info.needs),
        "gradient": info.gradient,
        "ranked": info.ranked and whole,
        "covers": None if whole else spans(batches),
        "remark": info.remark if whole else "; ".join(filter(None, [info.remark, _partly(spans(batches))])),
        "paper": info.paper,
    }


@one_thread()
def _under_label_prior(p: NDArray[np.float32], labels: Sequence[NDArray[np.int64]], done: bool) -> float:
    """Accuracy if each batch's predictions were taken under its own shares of labels, where these pay: see `label_shares`.

    done: they have been already.
    """
    if done:
        return float((p.argmax(1) == np.concatenate(labels)).mean())
    seen: dict[str, torch.Tensor] = {}
    hits, log_p_all = 0, torch.from_numpy(p).clamp(min=SMALLEST).log()
    for log_p, y in zip(torch.split(log_p_all, [len(batch) for batch in labels]), labels, strict=True):
        shares, _, seen = label_shares(log_p, seen)
        hits += int((under(shares, log_p).argmax(1).numpy() == y).sum())
    return hits / sum(map(len, labels))


def spans(there: NDArray[np.bool_]) -> list[list[int]]:
    """Runs of batches [first, last] in which a row was there."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    return [[int(a), int(b) - 1] for a, b in edges.reshape(-1, 2)]


def _partly(covers: list[list[int]]) -> str:
    there = " and ".join(f"{a} to {b}" for a, b in covers)
    return f"covers batches {there} only, and is compared with the mean on those"


def _influence(record: RunRecord, name: str) -> dict[str, Any] | None:
    """Of encoder and head, with the sites' names; None for a method without coefficients."""
    found: dict[str, Any] = {}
    for part in ("encoder", "head"):
        given = record.coefficients(name, part)
        if given is None:
            return None
        rows, names = given
        of = influence(rows)
        pairs = {"mean": of.mean, "strongest": of.strongest}
        found[part] = {key: dict(zip(names, values, strict=True)) for key, values in pairs.items()} | {"effective": of.effective}
    return found


def _relate(methods: dict[str, dict[str, Any]]) -> None:
    """What a row says only beside others: adjusted p-values, errors relative to the mean merge, and the way to the oracle."""
    compared = [row["vs_mean"] for row in methods.values() if row["vs_mean"] and row["ranked"]]
    for versus, p in zip(compared, holm([versus["p"] for versus in compared]), strict=True):
        versus["p_holm"] = p
    mean, oracle = methods.get(REFERENCE), next((row for row in methods.values() if "labels" in row["needs"]), None)
    for row in methods.values():
        base = mean if row["covers"] is None else None
        errs = {name: err(value, base["per_domain"][name]) for name, value in row["per_domain"].items()} if base else {}
        row["err_vs_mean"] = errs
        row["mce_vs_mean"] = mce_t3(list(errs.values()))
        row["gap_closed"] = gap_closed(row["accuracy"], base["accuracy"], oracle["accuracy"]) if base and oracle else None


def _by_severity(methods: dict[str, dict[str, Any]], conditions: tuple[tuple[str, int], ...]) -> None:
    """Accuracy by severity and by family, and mCE as in ImageNet-C with the mean merge as base; None elsewhere."""
    errors: dict[str, dict[str, list[float]]] = {}
    for name, row in methods.items():
        errors[name] = {}
        levels: dict[int, list[float]] = {}
        for family, severity in conditions:
            accuracy = row["per_domain"].get(f"{family} {severity}")  # a stream that was cut short may lack some
            if accuracy is not None:
                errors[name].setdefault(family, []).append(1 - accuracy)
                levels.setdefault(severity, []).append(accuracy)
        row["per_severity"] = {str(severity): float(np.mean(levels[severity])) for severity in sorted(levels)}
        row["per_family"] = {family: 1 - float(np.mean(values)) for family, values in errors[name].items()}
    for name, row in methods.items():
        comparable = conditions and REFERENCE in methods and row["covers"] is None
        row["mce_in_vs_mean"] = mce_in(errors[name], errors[REFERENCE]) if comparable else None


def _interval(record: RunRecord, name: str) -> tuple[float, float]:
    """Of the accuracy, over the patients or batches that the row covers."""
    _, units, length = record.units
    hits = right(record, name).astype(np.int64)
    return interval(*per_unit(hits, units[record.covered_samples(name)]), record.seed, length)


def _versus_mean(record: RunRecord, name: str) -> dict[str, Any] | None:
    """On the batches that the row covers; nothing for the mean itself, and nothing where it was not run."""
    if name == REFERENCE or REFERENCE not in record.methods:
        return None
    common, (_, units, length) = record.covered_samples(name), record.units
    found = paired(right(record, name), right(record, REFERENCE)[common], units[common], record.seed, length)
    return {"difference": found.difference, "ci95": found.ci95, "p": found.p}


@dataclass(frozen=True)
class Influence:
    """Over the stream's batches. mean: (K,), each expert's coefficient. strongest: (K,), in what share of batches it is largest.

    effective: mean over batches of exp(H(alpha)), between 1 (one expert alone) and K (all alike).
    """

    mean: tuple[float, ...]
    strongest: tuple[float, ...]
    effective: float


def influence(coefficients: NDArray[np.float64]) -> Influence:
    """Of coefficients (T, K); negative ones, which extrapolation makes, count as none in the effective number."""
    share = np.clip(coefficients, 0, None)
    share = share / np.maximum(share.sum(1, keepdims=True), np.finfo(float).tiny)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    largest = np.bincount(coefficients.argmax(1), minlength=coefficients.shape[1]) / len(coefficients)
    return Influence(tuple(coefficients.mean(0).tolist()), tuple(largest.tolist()), float(np.exp(entropy).mean()))
