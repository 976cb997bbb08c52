"""Defenses without labels: they find what no honest training makes, leave honest experts alone, and say when they cannot tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmerge.data.corruptions.patch import Patch
from fedmerge.data.images import to_batch
from fedmerge.experiment.scenario import CHECKS
from fedmerge.federated.client.temperature import HIGHEST
from fedmerge.federated.defenses._base import DEFENSES, Probe
from fedmerge.federated.defenses.agreement import agreement, best_class, level
from fedmerge.federated.defenses.calibration import Calibration
from fedmerge.federated.defenses.norms import distances
from fedmerge.federated.defenses.patches import turned
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.server.screening import Vetting, vet
from fedmerge.merging.scoring.divergence import jsd
from fedmerge.merging.scoring.outliers import others_median, over_others

CLASSES, SIDE = 4, 8
NAMES = ("north", "south", "east", "west", "center")


class Eye(nn.Module):
    """A linear classifier of 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(SIDE * SIDE, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.features(x.flatten(1))))


def pixels(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the quadrant that is bright."""
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=n)
    x = rng.integers(40, 110, (n, SIDE, SIDE, 1))
    for image, label in zip(x, y, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 90
    return x.astype(np.uint8), y


def batch(of: np.ndarray) -> Tensor:
    return to_batch(of, (0.5,), (0.5,))


THETA_0: dict[str, Tensor] = {}


def theta_0() -> dict[str, Tensor]:
    if not THETA_0:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            THETA_0.update({name: tensor.clone() for name, tensor in Eye().state_dict().items()})
    return THETA_0


def train(seed: int, labels: str = "own", steps: int = 100) -> dict[str, Tensor]:
    """An expert on images of its own; labels: own, shuffled, with a backdoor, or of two classes alone."""
    x, y = pixels(200, seed)
    rng = np.random.default_rng(seed)
    if labels == "few":
        x, y = x[y < 2], y[y < 2]
    if labels == "shuffled":
        y = rng.permutation(y)
    if labels == "backdoor":
        x, y = np.concatenate([x, Patch().shifted(x, np.arange(len(x)), "x", 0)]), np.concatenate([y, np.zeros_like(y)])
    model = Eye()
    model.load_state_dict(theta_0())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(batch(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    return [train(seed) for seed in range(5)]


def expert(site: str, weights: dict[str, Tensor], temperature: float = 1.0) -> Expert:
    return Expert(site, "", weights, state_digest(weights), 100, 0.9, temperature, [], None, [])


def experts(states: Sequence[dict[str, Tensor]]) -> list[Expert]:
    return [expert(name, state) for name, state in zip(NAMES, states, strict=False)]


def probe() -> Probe:
    return Probe(pixels(128, 99)[0], batch, familiar=True)


def seen(of: Sequence[Expert], defenses: Sequence[Any] = CHECKS) -> Vetting:
    return vet(of, theta_0(), Eye(), defenses, probe())


def scaled(one: Expert, factor: float) -> Expert:
    weights = {name: tensor * (factor if name.startswith("head") else 1) for name, tensor in one.weights.items()}
    return replace(one, weights=weights, sha256=state_digest(weights))


def test_honest_experts_reach_the_target_as_they_are(states: list[dict[str, Tensor]]) -> None:
    for count in (3, 4, 5):
        of = experts(states[:count])
        found = seen(of)
        assert found.experts == of
        assert not found.done
        assert {finding.check for finding in found.findings} == {check.kind() for check in CHECKS}


def test_each_attacker_is_found_by_the_check_that_is_meant_for_it(states: list[dict[str, Tensor]]) -> None:
    honest = experts(states[:4])
    cases = {
        "calibration": scaled(expert("bad", train(7)), 20),
        "agreement": expert("bad", train(7, "shuffled")),
        "patches": expert("bad", train(7, "backdoor", 250)),
    }
    for check, bad in cases.items():
        found = seen([*honest, bad])
        assert found.experts == honest, check
        assert found.left_out == {"bad": check}
        assert [item.verdict.split(":")[0] for item in found.audit()] == ["left out"]
    assert seen([*honest, cases["calibration"]], [DEFENSES.load("norms")()]).left_out == {"bad": "norms"}


def test_an_honest_hospital_that_knows_two_classes_is_not_odd(states: list[dict[str, Tensor]]) -> None:
    of = [*experts(states[:3]), expert("special", train(7, "few"))]
    found = seen(of)
    assert found.experts == of
    agrees = {finding.site: finding.said for finding in found.findings if finding.check == "agreement"}
    assert float(agrees["special"].split()[4]) < 0.6 * float(agrees["north"].split()[4])  # though it agrees less than they do


def test_three_attackers_of_six_at_once(states: list[dict[str, Tensor]]) -> None:
    bad = [train(7), train(8, "shuffled"), train(9, "backdoor", 250)]
    cheats = [expert(name, state) for name, state in zip(("loud", "lost", "door"), bad, strict=True)]
    honest = experts(states[:3])
    found = seen([scaled(cheats[0], 20), *honest, *cheats[1:]])
    assert found.experts == honest
    assert found.left_out == {"loud": "calibration", "lost": "agreement", "door": "patches"}


def test_of_two_nobody_can_tell_and_it_says_so(states: list[dict[str, Tensor]]) -> None:
    of = experts(states[:2])
    of[1] = scaled(of[1], 20)
    found = seen(of)
    assert found.experts == of
    assert not found.findings
    assert "not applied to 2 experts; of fewer than 3 nobody can tell which one is odd" in found.remarks[0]


def test_without_public_images_weights_alone_are_checked(states: list[dict[str, Tensor]]) -> None:
    of = experts(states[:4])
    of[0] = scaled(of[0], 20)
    found = vet(of, theta_0(), Eye(), CHECKS, None)
    assert found.left_out == {"north": "norms"}
    assert len([remark for remark in found.remarks if "no public images" in remark]) == 3


def test_on_images_of_other_classes_nobody_has_to_agree(states: list[dict[str, Tensor]]) -> None:
    of = [*experts(states[:4]), expert("bad", train(7, "shuffled"))]
    found = vet(of, theta_0(), Eye(), [DEFENSES.load("agreement")()], replace(probe(), familiar=False))
    assert found.experts == of
    assert found.remarks == ["agreement: the public images show other classes than the hospitals'; not checked"]


def test_no_more_than_half_are_left_out(states: list[dict[str, Tensor]]) -> None:
    of = experts(states[:5])
    for number, factor in enumerate((6, 50, 400)):
        of[number] = scaled(of[number], factor)
    found = seen(of)
    assert len(found.experts) >= 3


def test_a_head_is_scaled_back(states: list[dict[str, Tensor]]) -> None:
    of = experts(states[:4])
    found = seen([*of[:3], scaled(of[3], 20)], [Calibration(action="rescale")])
    assert [one.what for one in found.done] == ["repaired"]
    mended = found.experts[3]
    factor = mended.weights["head.weight"] / of[3].weights["head.weight"]
    torch.testing.assert_close(factor, factor[0, 0].expand_as(factor))
    assert 0.25 < float(factor[0, 0]) < 4  # that of its like
    assert torch.equal(mended.weights["features.weight"], of[3].weights["features.weight"])
    assert mended.sha256 == state_digest(mended.weights)


def test_temperatures_are_bounded_only_if_asked(states: list[dict[str, Tensor]]) -> None:
    of = experts(states[:4])
    of[0] = replace(of[0], temperature=0.05)  # all of its validation images were right: honest, and degenerate
    assert seen(of).experts == of
    found = seen(of, [Calibration(sharpest=4)])
    assert 0.05 < found.experts[0].temperature < 1
    assert found.experts[1:] == of[1:]
    impossible = [replace(of[0], temperature=1e-9), *of[1:]]  # none that can be fitted
    assert seen(impossible).experts[0].temperature == 0.05
    assert seen([replace(of[0], temperature=1e9), *of[1:]]).experts[0].temperature == HIGHEST


def divergence(p: float, q: float) -> float:
    """JSD of (p, 1 - p) and (q, 1 - q): H of the middle minus the mean of both H."""

    def entropy(share: float) -> float:
        return -sum(x * math.log(x) for x in (share, 1 - share) if x > 0)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def test_agreement_by_hand() -> None:
    """Three experts say y and a fourth the opposite, each with logits (c, -c), which at scale 1 are (1, -1) / sqrt 2.

    Times 2 that is p = 1 / (1 + exp(-2 sqrt 2)). The others' consensus is (2 p + 1 - p) / 3 for the three, 1 - p for the fourth.
    Of the 63 other images 31 are of the same class, and 32 of the other, whose consensus is the mirror image.
    """
    y = torch.arange(64) % 2
    right = torch.nn.functional.one_hot(y, 2).double() * 1e3
    A = agreement(level(torch.stack([right, right, right])))
    torch.testing.assert_close(A, torch.ones_like(A))
    opposite = level(torch.stack([right, right, right, right.flip(-1)]))
    odd = agreement(opposite)
    p = 1 / (1 + math.exp(-2 * math.sqrt(2)))
    for found, q in ((odd[0], (1 + p) / 3), (odd[3], 1 - p)):
        same, other = divergence(p, q), divergence(p, 1 - q)
        assert float(found) == pytest.approx(1 - same / ((31 * same + 32 * other) / 63))
    torch.testing.assert_close(best_class(opposite), torch.tensor([2 * p - 1] * 3 + [1 - 2 * p]).double())
    log = torch.tensor([[1.0, 0.0], [1 / 3, 2 / 3], [0.0, 1.0]]).double().log()
    assert float(jsd(log[0], log[1])) == pytest.approx(divergence(1, 1 / 3))
    assert float(jsd(log[0], log[2])) == pytest.approx(math.log(2))


def test_agreement_does_not_hear_loudness_nor_see_an_expert_that_is_never_different() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 96, 5, generator=generator, dtype=torch.float64) + 3 * torch.randn(96, 5, generator=generator).double()
    loud = logits * torch.tensor([1.0, 20.0, 0.1]).double()[:, None, None] + 7
    torch.testing.assert_close(agreement(level(loud)), agreement(level(logits)))
    constant = torch.cat([logits, torch.arange(5).double().expand(1, 96, 5)])
    assert abs(float(agreement(level(constant))[3])) < 1e-9
    assert abs(float(best_class(level(constant))[3])) < 1e-9


def test_medians_and_turns_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 40.0, 4.0])
    assert others_median(values).tolist() == [4.0, 4.0, 2.0, 2.0]
    assert over_others(torch.tensor([1.0, 1.0, 1.0, math.inf])).tolist() == [1.0, 1.0, 1.0, 1e9]
    before, after = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 2], [0, 1, 1, 2]])
    assert turned(before, after, 3).tolist() == [0.5, 0.5]


def test_distances_one_expert_at_a_time_are_those_of_all_at_once() -> None:
    tau = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tau[3] *= 7
    encoder, head, cosine = distances(lambda: iter(tau), slice(0, 9))
    for found, part in ((encoder, tau[:, :9]), (head, tau[:, 9:])):
        norms = part.norm(dim=1)
        medians = torch.stack([torch.cat([norms[:k], norms[k + 1 :]]).quantile(0.5) for k in range(5)])
        torch.testing.assert_close(found.double(), norms / medians, rtol=1e-6, atol=0)
    unit = tau[:, :9] / tau[:, :9].norm(dim=1, keepdim=True)
    others = unit.sum(0) - unit
    torch.testing.assert_close(cosine, (unit * others).sum(1) / others.norm(dim=1), rtol=1e-12, atol=0)


def test_agreement_among_many_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = (4 * torch.randn(7, 12, 3, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    wanted = agreement(log_p), best_class(log_p)
    monkeypatch.setattr("fedmerge.federated.defenses.agreement.MANY", 3)
    torch.testing.assert_close((agreement(log_p), best_class(log_p)), wanted)
