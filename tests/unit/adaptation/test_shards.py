"""Experts that lie in shards: the same predictions as from one bank, one clear error for what cannot be, and no hang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmerge.adaptation.shard import check_shards, divided
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.errors import CheckpointError, PerSampleRefused, ScenarioError
from fedmerge.experiment.stream_phase import Walk
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import METHODS, load_method
from fedmerge.merging.per_sample.mixture import Mixture
from fedmerge.report.batch_log import Step
from fedmerge.report.terminal import Terminal
from fedmerge.stream.events import Event, rosters
from tests.targets import base, experts

Targets = Callable[..., TargetTask]

SPREAD = [
    *("mean", "weighted_mean", "wise_ft", "task_arithmetic", "ties", "dare", "model_stock", "slerp", "mixup"),
    *("iso_c", "iso_cts", "tsv_m", "consensus_ta", "breadcrumbs", "della", "lines", "lame"),
    *("posterior", "ensemble", "expert", "dcs", "doe", "eam", "t3", "t3_batch", "dawin", "dawin_sample", "oracle"),
    load_method("ties", combine="sum", label="ties-sum"),
    load_method("slerp", of="tau", label="slerp-tau"),
    load_method("lines", of="ties", label="lines-ties"),
    load_method("lame", of="ties", label="lame-ties"),
    load_method("mean", head_policy="mean", label="mean-heads"),
    load_method("t3_batch", generalist="theta_0", label="t3-anchor"),
    load_method("dawin", form="code", label="dawin-anchor"),
    load_method("dare", then="ties", label="dare-ties"),
]
BY_NAME = {expert.site: expert for expert in experts()}


def spread(task: TargetTask, shards: int) -> TargetTask:
    return replace(task, shards=shards, per_sample="rows")


def alike(a: list[Step], b: list[Step], atol: float = 2e-6) -> None:
    assert [(s.t, s.method, s.correct) for s in a] == [(s.t, s.method, s.correct) for s in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.probabilities, y.probabilities, atol=atol, err_msg=x.method)


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_from_shards_every_method_predicts_what_it_does_from_one_bank(target: Targets, shards: int) -> None:
    """Five shards for three experts: two have nothing to do."""
    task = target(*SPREAD, images=40)
    whole, parts = TargetSite(spread(task, 1), experts(), base()), TargetSite(spread(task, shards), experts(), base())
    assert whole.bank.shards is None
    assert parts.bank.shards is not None
    assert parts.bank.shards.experts == {2: (1, 2), 3: (1, 1, 1), 5: (1, 1, 1)}[shards]
    assert parts.describe().bank["rows"] == "in shards"
    a, b = whole.advance(4), parts.advance(4)
    alike(a, b)
    assert [s.forwards for s in a] == [s.forwards for s in b]


def test_every_method_that_is_not_refused_is_among_those_compared() -> None:
    compared = {entry if isinstance(entry, str) else entry.kind() for entry in SPREAD}
    spreadable = {name for name in METHODS.names if not METHODS.load(name)().whole}
    assert spreadable - compared == {"regmean", "regmean_pp", "ttmm"}  # they need uploads: tests/unit/merging/test_sharded.py


def test_what_needs_all_experts_in_one_place_is_what_needs_the_memory_for_it() -> None:
    sizes = Sizes(experts=200, parameters=5_000_000, largest=150_000, gram=0)
    methods = [METHODS.load(name)() for name in METHODS.names] + [
        load_method("dare", then="ties"),
        load_method("fisher", mode="target"),
    ]
    for method in methods:
        assert method.whole == (method.working_bytes(sizes) >= 4 * sizes.experts * sizes.parameters), method.key


def test_no_row_of_an_expert_is_at_the_target(target: Targets) -> None:
    bank: Any = TargetSite(spread(target("mean", "eam"), 2), experts(), base()).bank
    for name in ("rows", "theta", "tau"):
        with pytest.raises(CheckpointError, match="spread over shards"):
            getattr(bank, name)
    own = {name for name, value in vars(bank).items() if isinstance(value, torch.Tensor) and value.numel() > bank.P}
    assert not own  # theta_0's row, and the merged one
    batch, rows = torch.zeros(2, 1, 16, 16), torch.eye(3)[:2]
    with pytest.raises(PerSampleRefused, match="spread over shards"):
        Mixture(bank).forward(batch, rows, rows)
    whole = Bank.of(bank.model, [{k: torch.from_numpy(v) for k, v in one.weights.items()} for one in experts()])
    for k in range(3):
        torch.testing.assert_close(bank.row_logits(k, batch), whole.row_logits(k, batch))
        assert torch.equal(bank.mix(torch.eye(3)[k]), whole.theta[k])  # one-hot: bit for bit


def test_a_broken_expert_without_a_coefficient_spoils_nothing(target: Targets) -> None:
    north, south, west = experts()
    huge = replace(south, weights={n: a * 1e30 if n.endswith("mlp.fc1.weight") else a for n, a in south.weights.items()})
    task = target("eam", "dcs", "t3_batch", "ensemble")
    sites = [TargetSite(spread(task, shards), [north, huge, west], base()) for shards in (1, 2)]
    alike(sites[0].advance(3), sites[1].advance(3))


def test_experts_come_and_go_over_shards(target: Targets) -> None:
    task, events = (
        target("mean", "expert", "eam", load_method("dawin", scope="prefix")),
        (Event(at=3, join="west"), Event(at=7, leave="north")),
    )
    found = []
    for shards in (1, 2, 3):
        site = TargetSite(spread(task, shards), [BY_NAME["north"], BY_NAME["south"]], base())
        walk = Walk(site, rosters(("north", "south"), events), BY_NAME, Terminal(quiet=True))
        found.append([step for steps in walk for step in steps])
    alike(found[0], found[1])
    alike(found[0], found[2])


def test_a_snapshot_holds_no_row_and_fits_any_number_of_shards(target: Targets) -> None:
    task = target("mean", "eam", load_method("dawin", scope="prefix"))
    whole = TargetSite(spread(task, 1), experts(), base()).advance(6)
    first = TargetSite(spread(task, 2), experts(), base())
    begun, snapshot = first.advance(3), first.snapshot()
    assert max((value.size for state in snapshot["states"].values() for value in state.values()), default=0) < first.bank.P / 10
    second = TargetSite(spread(task, 3), experts(), base())
    second.restore(snapshot)
    alike(whole, begun + second.advance(3))


@pytest.mark.parametrize(
    ("shards", "named", "said"),
    [
        (4, {}, "target.shards: found 4; expected at most 3"),
        (
            2,
            {"methods": (load_method("mean"), load_method("adamerging"))},
            r"methods\[1\]: found 'adamerging', which needs all experts in one process",
        ),
        (2, {"methods": (load_method("diwa"),)}, r"methods\[0\]: found 'diwa'"),
        (2, {"methods": (load_method("fisher", mode="target", label="F"),)}, r"methods\[0\]: found 'F'"),
        (2, {"per_sample": "mixture"}, "per_sample: found 'mixture'; expected auto, rows or samples"),
        (2, {"max_bytes": 10**9}, "target.max_bytes: found it and target.shards: 2; expected one of the two"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(shards: int, named: dict[str, Any], said: str) -> None:
    given = {"methods": (load_method("mean"),), "per_sample": "auto", "max_bytes": None} | named
    with pytest.raises(ScenarioError, match=said):
        check_shards(shards, 3, **given)
    check_shards(1, 3, **given)


def test_experts_are_divided_as_evenly_as_can_be() -> None:
    many = [replace(experts()[0], site=f"s{number}") for number in range(10)]
    assert [[one.site for one in group] for group in divided(many[:4], 3)] == [["s0"], ["s1"], ["s2", "s3"]]
    for shards in range(1, 13):
        groups = divided(many, shards)
        assert [one.site for group in groups for one in group] == [one.site for one in many]
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
