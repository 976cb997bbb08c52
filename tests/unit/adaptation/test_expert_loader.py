"""A bank that does not go into the target's memory: the same predictions from disk, or one clear message."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedmerge.adaptation import expert_loader
from fedmerge.adaptation.expert_loader import Budget, Holding, check_limit
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Federated, TargetTask
from fedmerge.errors import FolderError, ScenarioError
from fedmerge.experiment.experiment import Experiment, Overrides
from fedmerge.experiment.experiment import load_experiment as load_plan
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import METHODS, Method, load_method
from tests.conftest import TINY
from tests.targets import MODEL, base, experts

Targets = Callable[..., TargetTask]
Limits = Callable[[TargetTask], TargetTask]

WHOLE = ("adamerging", "diwa", "fisher")
"""Methods that need all experts' parameters at once."""
ON_DISK = [
    *("mean", "weighted_mean", "wise_ft", "task_arithmetic", "ties", "dare", "model_stock", "slerp", "mixup"),
    *("iso_c", "iso_cts", "tsv_m", "consensus_ta", "breadcrumbs", "della", "lines", "lame"),
    *("ensemble", "expert", "dcs", "doe", "eam", "t3", "t3_batch", "dawin", "dawin_sample", "oracle"),
    load_method("ties", combine="sum", label="ties-sum"),
    load_method("slerp", of="tau", label="slerp-tau"),
    load_method("lines", of="ties", label="lines-ties"),
    load_method("lame", of="ties", label="lame-ties"),
    load_method("model_stock", filter_wise=True, label="stock-filters"),
]


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """The task with a limit one byte below what its rows in memory would take; the process itself counts for nothing."""
    monkeypatch.setattr(expert_loader, "PROCESS_BYTES", 0)
    monkeypatch.setattr(expert_loader, "RESIDENT", (64, 4096))

    def limited(task: TargetTask) -> TargetTask:
        budget = Holding(task, base(), 3).budget
        return replace(task, max_bytes=budget.beside + budget.rows - 1)

    return limited


def test_half_precision_takes_half_of_the_rows_and_predicts_about_the_same(target: Targets, below: Limits) -> None:
    task = target("mean", "eam", images=40)
    half = replace(task, precision="bfloat16")
    assert Holding(half, base(), 3).budget.rows * 2 == Holding(task, base(), 3).budget.rows
    sites = [TargetSite(each, experts(), base()) for each in (task, half, replace(half, max_bytes=below(half).max_bytes))]
    assert [site.held["precision"] for site in sites] == ["float32", "bfloat16", "bfloat16"]
    assert sites[1].bank.like.dtype == torch.bfloat16 and sites[2].held["rows"] == "on disk"
    full, short, disk = (np.concatenate([step.probabilities for step in site.advance(100)]) for site in sites)
    np.testing.assert_allclose(short, full, atol=0.05)
    np.testing.assert_array_equal(disk, short)


def test_from_disk_every_method_predicts_what_it_does_from_memory(target: Targets, below: Limits) -> None:
    task = replace(target(*ON_DISK, images=40), per_sample="rows")
    memory = TargetSite(task, experts(), base())
    disk = TargetSite(below(task), experts(), base())
    assert memory.bank.mapped is None
    assert disk.bank.mapped is not None
    assert disk.describe().bank["rows"] == "on disk"
    assert torch.equal(disk.bank.rows, memory.bank.rows)
    for a, b in zip(memory.advance(4), disk.advance(4), strict=True):
        assert (a.t, a.method, a.correct) == (b.t, b.method, b.correct)
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=2e-6, err_msg=a.method)
        if a.method in ("mean", "eam", "ensemble", "dawin"):
            np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_every_method_says_what_it_needs_at_once() -> None:
    sizes = Sizes(experts=200, parameters=5_000_000, largest=150_000, gram=7_000_000)
    needed = {name: METHODS.load(name)().working_bytes(sizes) for name in METHODS.names}
    assert {name for name, count in needed.items() if count >= 4 * sizes.experts * sizes.parameters} >= set(WHOLE)
    assert needed["mean"] == needed["eam"] == needed["ties"] == needed["dare"] == 0
    assert load_method("dare", then="ties").working_bytes(sizes) == 0
    assert 0 < needed["slerp"] < sizes.experts * sizes.parameters


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_that_needs_all_at_once_is_refused_by_name(name: str) -> None:
    sizes = Sizes(200, 5_000_000, 150_000, 0)
    budget = Budget(10**9, sizes, 1, (load_method("mean"), load_method(name)))
    assert budget.on_disk
    with pytest.raises(ScenarioError, match=rf"methods\[1\]: found '{name}', which needs .* GB for 200 experts at once.*1 GB"):
        budget.check()
    replace(budget, methods=(load_method("mean"),)).check()
    assert not replace(budget, limit=10**11).on_disk


def test_a_limit_below_the_process_itself_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"target.max_bytes: found 100 MB; expected at least \d+ MB"):
        check_limit(10**8, 3, MODEL, 11, (load_method("mean"),))
    check_limit(None, 3, MODEL, 11, (load_method("mean"),))


def test_what_is_checked_before_training_counts_what_the_target_will_hold(target: Targets) -> None:
    """A limit that is too small for the target's own budget, its images aside, is so before anybody trains, and no other is."""
    arrays = base()
    rows = tuple(Federated(f"fedavg-{rounds}", "", {}, "", arrays) for rounds in range(1, 6))
    whole = replace(target("mean", "eam"), federated=rows, generalist=arrays)
    budget = Budget.of(whole, 3)
    assert budget.beside == Budget.of(replace(whole, federated=()), 3).beside + 5 * budget.sizes.parameters * 4
    assert budget.rows == 5 * budget.sizes.parameters * 4 < expert_loader.RESIDENT[0]  # so few that the disk saves nothing
    least = budget.beside + budget.rows
    for limit, ends in ((least - 1, pytest.raises(ScenarioError, match=r"target\.max_bytes")), (least, nullcontext())):
        with ends:
            check_limit(limit, 3, whole.model, len(whole.classes), whole.methods, federated=5, anchors=2)
        with ends:
            replace(budget, limit=limit).check()


def test_a_disk_without_room_is_one_message(target: Targets, below: Limits) -> None:
    """A limit on the size of files stands for a full disk."""
    task, (soft, hard) = below(target("mean")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(FolderError, match=r"found .* free \(File too large\); expected room for .* Set FEDMERGE_CACHE"):
            Holding(task, base(), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scenario(folder: Path, target: object) -> Path:
    (folder / "sites").mkdir(exist_ok=True)
    (folder / "scenarios").mkdir(exist_ok=True)
    for name in ("north", "mercy"):
        source = {"kind": "organ_phantom", "images": 40, "patients": 8}
        (folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "source": source}))
    proxy = {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1}
    content = {"name": "small", "model": TINY, "initialization": proxy, "sites": ["north"], "stream": {"kind": "iid"}}
    file = folder / "scenarios" / "small.yaml"
    file.write_text(yaml.safe_dump({**content, "methods": ["mean"], "target": target}))
    return file


def test_a_target_may_say_how_much_memory_it_has(tmp_path: Path) -> None:
    plain = load_plan(scenario(tmp_path, "mercy"))
    assert "max_bytes" not in plain.resolved()["target"]
    limited = load_plan(scenario(tmp_path, {"site": "mercy", "max_bytes": "2GB"}))
    assert limited.scenario.target.max_bytes == 2 * 10**9
    assert limited.resolved() == plain.resolved() | {"target": plain.resolved()["target"] | {"max_bytes": 2 * 10**9}}
    set_later: Experiment = load_plan(scenario(tmp_path, "mercy"), Overrides(settings=(("target.max_bytes", "1GiB"),)))
    assert set_later.scenario.target.max_bytes == 2**30


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            {"site": "mercy", "max_byte": 3},
            "target.max_byte: found an unknown key",
        ),
        ({"max_bytes": "2GB"}, "target.site: found nothing"),
        ({"site": "mercy", "max_bytes": "much"}, "target.max_bytes: found 'much'"),
        ({"site": "mercy", "max_bytes": -1}, "target.max_bytes: found -1"),
    ],
)
def test_a_mistake_in_it_is_named(tmp_path: Path, target: object, said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_plan(scenario(tmp_path, target))
    assert said in str(caught.value)


def test_what_a_method_needs_does_not_shrink_with_more_experts() -> None:
    for name in METHODS.names:
        method: Method = METHODS.load(name)()
        few, many = (method.working_bytes(Sizes(count, 1000, 100, 50)) for count in (2, 20))
        assert few <= many
