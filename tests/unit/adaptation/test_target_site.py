"""The target's loop against a naive one, what it costs, and going on from a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.data.images import to_batch
from fedmerge.errors import CheckpointError
from fedmerge.federated.model import build, normalization
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, load_method
from fedmerge.merging.scoring import active
from fedmerge.report.batch_log import Step
from tests.targets import MODEL, base, experts

Targets = Callable[..., TargetTask]


def test_a_cap_bounds_adaptive_coefficients_and_nothing_else(target: Targets) -> None:
    task = target("mean", "dcs", load_method("eam", eps=1e-8))
    free = TargetSite(task, experts(), base()).advance(1000)
    bound = TargetSite(replace(task, cap=0.4), experts(), base()).advance(1000)
    assert max(max(step.encoder or ()) for step in steps_by(bound, "eam")) <= 0.4 + 1e-6
    assert max(max(step.head or ()) for step in steps_by(bound, "eam")) <= 0.4 + 1e-6
    assert max(max(step.head or ()) for step in steps_by(free, "eam")) > 0.4  # or the test could not fail
    for name in ("mean", "dcs"):
        for one, other in zip(steps_by(free, name), steps_by(bound, name), strict=True):
            assert np.array_equal(one.probabilities, other.probabilities)


def steps_by(steps: list[Step], method: str) -> list[Step]:
    return [step for step in steps if step.method == method]


def test_every_row_is_what_a_naive_loop_predicts(target: Targets) -> None:
    site = TargetSite(target("mean", "weighted_mean", "expert", "ensemble", load_method("eam", rho=0)), experts(), base())
    steps = site.advance(1000)
    model = build(MODEL, 11).eval()
    states = [{name: torch.tensor(array) for name, array in expert.weights.items()} for expert in experts()]
    n = [expert.n for expert in experts()]
    for t, index in enumerate(site.stream.batches):
        x = to_batch(site.images.pixels[index], *normalization(MODEL))

        def predicted(state: dict[str, torch.Tensor], x: torch.Tensor = x) -> np.ndarray:
            model.load_state_dict(state)
            with torch.no_grad():
                return model(x).softmax(-1).numpy()

        def mixed(encoder: list[float], head: list[float]) -> dict[str, torch.Tensor]:
            use = {name: head if name.startswith("head") else encoder for name in states[0]}
            return {name: sum(w * s[name] for w, s in zip(use[name], states, strict=True)) for name in states[0]}

        alone = [predicted(state) for state in states]
        third = [1 / 3] * 3
        eam = steps_by(steps, "eam")[t]
        assert eam.encoder is not None
        assert eam.head is not None
        wanted = {
            "mean": predicted(mixed(third, third)),
            "weighted_mean": predicted(mixed([k / sum(n) for k in n], [k / sum(n) for k in n])),
            "ensemble": np.mean(alone, axis=0),
            "eam": predicted(mixed(list(eam.encoder), list(eam.head))),
            **{f"expert:{expert.site}": p for expert, p in zip(experts(), alone, strict=True)},
        }
        for name, p in wanted.items():
            step = steps_by(steps, name)[t]
            np.testing.assert_allclose(step.probabilities, p, atol=2e-5)
            assert step.correct == int((step.probabilities.argmax(1) == site.images.labels[index]).sum())
            assert step.n == len(index)
            bytes_of_a_merge = (3 + 1) * 4 * sum(array.size for array in base().values())
            assert step.merge_bytes == (bytes_of_a_merge if name == "eam" else 0)


def test_logits_are_shared_and_billed_as_if_alone(target: Targets) -> None:
    site = TargetSite(target(), experts(), base())
    steps = site.advance(3)
    alone = {step.method: step.forwards for step in steps}
    # Alone: K experts on the batch and two views, then the merged model; dcs and the ensemble need the experts' K alone.
    assert alone == {"mean": 1, "weighted_mean": 1, "ensemble": 3, "dcs": 3, "eam": 10} | {
        f"expert:{expert.site}": 1 for expert in experts()
    }
    assert site.forwards_so_far() == 3 * (9 + 3)  # all rows: 9 of experts, 3 of merged models


def test_no_gradient_is_kept_and_nothing_is_counted_twice(target: Targets) -> None:
    site = TargetSite(target(), experts(), base())
    steps: list[Step] = []
    while found := site.advance(2):
        steps += found
    assert site.advance(2) == []
    keys = [(step.t, step.method) for step in steps]
    assert len(set(keys)) == len(keys) == len(site.stream) * len(site.rows)
    assert not site.bank.theta.requires_grad
    assert sum(step.n for step in steps_by(steps, "mean")) == site.stream.samples


def test_going_on_from_a_snapshot_is_an_undisturbed_run(target: Targets) -> None:
    whole = TargetSite(target(), experts(), base())
    expected = whole.advance(1000)
    first = TargetSite(target(), experts(), base())
    begun = first.advance(4)
    second = TargetSite(target(), experts(), base())
    second.restore(first.snapshot())
    resumed = begun + second.advance(1000)
    assert [(s.t, s.method, s.encoder, s.head) for s in resumed] == [(s.t, s.method, s.encoder, s.head) for s in expected]
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(resumed, expected, strict=True))
    assert second.forwards_so_far() == whole.forwards_so_far()


EVERY_STATE = (
    "t3",
    "t3_batch",
    "dawin_sample",
    "oracle",
    load_method("dawin", scope="prefix"),
    load_method("dawin", scope="full", label="dawin-full"),
    load_method("adamerging"),
    load_method("fisher", mode="target", samples=20, label="fisher-target"),
)


def test_what_learns_from_the_stream_goes_on_where_it_stood(target: Targets) -> None:
    """Rows by image, two passes, gradients: all of them from a snapshot as if nothing had happened."""
    whole = TargetSite(target(*EVERY_STATE), experts(), base())
    expected = whole.advance(1000)
    first = TargetSite(target(*EVERY_STATE), experts(), base())
    begun = first.advance(5)
    second = TargetSite(target(*EVERY_STATE), experts(), base())
    second.restore(first.snapshot())
    resumed = begun + second.advance(1000)
    for a, b in zip(resumed, expected, strict=True):
        assert (a.t, a.method) == (b.t, b.method)
        assert np.array_equal(a.probabilities, b.probabilities)
    assert second.per_sample_ways() == whole.per_sample_ways()


def test_who_is_asked_next_is_part_of_a_snapshot(target: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert active, one more asked: of three, somebody is left out of every batch, and forwards are counted as they were."""
    for name, value in {"FEW": 1, "MOST": 1, "WIDE": 1, "EXPLORED": 1}.items():
        monkeypatch.setattr(active, name, value)
    methods = [load_method("posterior", active="auto", fallback="none")]
    whole = TargetSite(target(*methods), experts(), base())
    expected = whole.advance(1000)
    first = TargetSite(target(*methods), experts(), base())
    begun = first.advance(4)
    second = TargetSite(target(*methods), experts(), base())
    second.restore(first.snapshot())
    resumed = begun + second.advance(1000)
    for a, b in zip(resumed, expected, strict=True):
        assert (a.notes, a.encoder, a.forwards) == (b.notes, b.encoder, b.forwards)
        assert np.array_equal(a.probabilities, b.probabilities)
    assert second.forwards_so_far() == whole.forwards_so_far()
    asked = {step.notes["forwarded"][0] for step in expected}
    assert asked <= {1, 2, 3}
    assert {step.forwards - step.notes["forwarded"][0] for step in expected} <= {
        4,
        5,
        6,
    }  # the panel's three, and the merge's rows: two, and the rest
    assert max(asked) < 3 or any(step.notes["alarm"] == [1] for step in expected)


def test_rows_by_image_are_a_merge_for_every_image(target: Targets) -> None:
    site = TargetSite(target("t3", "dawin_sample"), experts(), base())
    steps = site.advance(3)
    model = build(MODEL, 11).eval()
    bank = site.bank
    for t in range(3):
        x = to_batch(site.images.pixels[site.stream.batches[t]], *normalization(MODEL))
        evidence = Evidence(bank, x)
        for name in ("t3", "dawin_sample"):
            method = load_method(name)
            assert isinstance(method, Adaptive)
            found = method.coefficients(evidence)
            for i, image in enumerate(x):
                model.load_state_dict(bank.state_dict(bank.mix(found.encoder[i], found.head[i])))
                with torch.no_grad():
                    wanted = model(image[None]).softmax(-1)[0]
                np.testing.assert_allclose(steps_by(steps, name)[t].probabilities[i], wanted, atol=2e-5)


def test_a_broken_expert_gets_no_weight_and_is_named(target: Targets) -> None:
    broken = experts()
    huge = {name: array * 1e30 if name == "blocks.0.mlp.fc1.weight" else array for name, array in broken[1].weights.items()}
    broken[1] = type(broken[1])("south", huge, 40, 1.0)
    site = TargetSite(target("eam", "ensemble", "t3", "t3_batch", "dawin", "dawin_sample", "doe", "dcs", "mean"), broken, base())
    for step in site.advance(2):
        assert np.isfinite(step.probabilities).all()
        if step.method in ("eam", "t3", "t3_batch", "dawin", "dawin_sample"):
            assert step.encoder is not None
            assert step.encoder[1] == 0
            assert step.notes["invalid"] == [1]


def test_an_expert_of_another_model_is_refused(target: Targets) -> None:
    wrong = experts()
    wrong[2].weights["head.bias"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError, match="west does not fit the model"):
        TargetSite(target(), wrong, base())


def test_the_description_shows_no_labels(target: Targets) -> None:
    said = TargetSite(target(), experts(), base()).describe()
    assert said.stream.batches * 8 == said.stream.samples
    assert said.stream.samples + said.stream.unused == 96
    assert said.shown is not None
    assert said.shown.shape == (2, 16, 16, 1)
    assert set(said.rows) >= {"mean", "eam", "expert:north"}
