"""Is averaging at risk in this federation? An answer from the weights in a pool alone: no image, no label, no forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fedmerge.errors import FolderError, first_line
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.model import build
from fedmerge.federated.pool.experts import Expert, ExpertPool
from fedmerge.federated.server.initialization import kept_theta_0
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.geometry.drift import Drift, drift
from fedmerge.report.terminal import console

LEVELS = ((0.5, "low"), (0.2, "some"), (-1.0, "high"))
"""Least agreement, and what it says of the risk: a convention, fitted to no target. How accuracy will fall, no weights can tell."""


@dataclass(frozen=True)
class Federation:
    """Experts of a pool that can be merged: one model, one theta_0, the same classes and training seed."""

    tasks: tuple[SiteTask, ...]
    experts: tuple[Expert, ...]
    raw: Drift
    relative: Drift | None

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(expert.site for expert in self.experts)


def federations(pool: Path) -> list[Federation]:
    """Every set of two experts or more that share a model and theta_0. Raises FolderError if there is none."""
    groups: dict[str, dict[str, tuple[SiteTask, Path]]] = {}
    for manifest in sorted(pool.glob("experts/*/manifest.json")):
        task = _task(manifest)
        key = json.dumps([task.model.model_dump(mode="json"), task.classes, task.seed, task.initial_sha256])
        groups.setdefault(key, {}).setdefault(task.site.name, (task, manifest.parent))
    found = [_federation(pool, [*entries.values()]) for entries in groups.values() if len(entries) > 1]
    if not found:
        held = sum(len(entries) for entries in groups.values())
        raise FolderError(f"{pool}: found {held} experts, no two of which share theta_0; expected the pool of a run, e.g. 'pool'")
    return found


def show_risk(found: Sequence[Federation]) -> None:
    """Print a table and a verdict in words for each federation."""
    out = console()
    for one in found:
        task = one.tasks[0]
        out.print(f"{', '.join(one.names)}: {task.model.name}, {len(task.classes)} classes, seed {task.seed}", markup=False)
        out.print(risk_table(one))
        for line in risk_words(one):
            out.print(line, markup=False)
        out.print()


def risk_table(one: Federation) -> Table:
    """One row for each block."""
    shown = Table()
    shown.add_column("block")
    for name in ("angle", "norm ratio", "left in the mean", "angle, learned", "left, learned", "if unrelated", "agreement"):
        shown.add_column(name, justify="right")
    shown.add_column("risk")
    for number, block in enumerate(one.raw.blocks):
        raw = [f"{one.raw.mean_angle[number]:.1f}°", f"{one.raw.norm_ratio[number]:.2f}", f"{one.raw.attenuation[number]:.0%}"]
        learned = ["", "", "", "", ""]
        if one.relative is not None:
            agreement = float(one.relative.agreement[number])
            unrelated = len(one.experts) ** -0.5
            angle, left = float(one.relative.mean_angle[number]), float(one.relative.attenuation[number])
            learned = [f"{angle:.1f}°", f"{left:.0%}", f"{unrelated:.0%}", f"{agreement:+.2f}", risk(agreement)]
        shown.add_row(block, *raw, *learned)
    return shown


def risk_words(one: Federation) -> list[str]:
    """What the table means, for somebody who knows data but not this literature."""
    if one.relative is None:
        return [
            "theta_0 of these experts is not in the pool; run their scenario once more: nobody trains, and theta_0 is left there."
        ]
    weight = one.relative.norms.mean(1) ** 2
    whole = float((one.relative.agreement * weight).sum() / weight.sum())
    kept_share = float((one.relative.attenuation * weight).sum() / weight.sum())
    ranked = sorted(zip(one.relative.agreement.tolist(), one.relative.blocks, strict=True))
    worst = ", ".join(block for _, block in ranked[:3])
    unrelated = len(one.experts) ** -0.5
    said = [
        f"Risk of averaging: {risk(whole)} (agreement {whole:+.2f}; 1: all learned the same, 0: what they learned is unrelated).",
        f"The mean keeps {kept_share:.0%} of the length of what a site has learned; of unrelated updates, {unrelated:.0%}.",
        f"Least agreement: {worst}. Head: {float(one.relative.agreement[-1]):+.2f}.",
    ]
    advice = {
        "low": "The sites pull in one direction: the mean merge may do well; compare it all the same.",
        "some": "The mean weakens what each site has learned: compare it with a merge per batch, and with scaled sums of updates.",
        "high": "The sites' updates have little in common: compare the mean with a merge per batch before it is used.",
    }
    return [*said, advice[risk(whole)]]


def risk(agreement: float) -> str:
    """Words for an agreement."""
    return next(word for least, word in LEVELS if agreement >= least or least == LEVELS[-1][0])


def as_json(found: Sequence[Federation]) -> list[dict[str, Any]]:
    """All numbers, for other programs."""
    return [
        {
            "sites": one.names,
            "model": one.tasks[0].model.name,
            "raw": _numbers(one.raw),
            "learned": _numbers(one.relative) if one.relative else None,
            "words": risk_words(one),
        }
        for one in found
    ]


def _numbers(of: Drift) -> dict[str, Any]:
    fields = ("norms", "angles", "attenuation", "mean_angle", "norm_ratio", "predicted", "agreement")
    return {"blocks": of.blocks} | {field: getattr(of, field).tolist() for field in fields}


def _federation(pool: Path, entries: Sequence[tuple[SiteTask, Path]]) -> Federation:
    tasks, experts = [task for task, _ in entries], [ExpertPool(pool).load(task, entry) for task, entry in entries]
    base = kept_theta_0(tasks[0].initial_sha256, pool)
    model = build(tasks[0].model, len(tasks[0].classes), seed=tasks[0].seed)
    bank = Bank.of(model, {expert.site: expert.weights for expert in experts}, base)
    return Federation(tuple(tasks), tuple(experts), drift(bank, relative=False), drift(bank, relative=True) if base else None)


def _task(manifest: Path) -> SiteTask:
    try:
        return SiteTask.model_validate(json.loads(manifest.read_text(encoding="utf-8"))["task"])
    except (OSError, ValueError, KeyError) as error:
        said, mend = first_line(error), "Delete it: the site trains again"
        raise FolderError(f"{manifest.parent}: found one that cannot be read ({said}); expected a whole one. {mend}") from None
