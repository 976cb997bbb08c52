"""The Laplacian correction against loops over images, in numpy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.lame import Lame, affinity, smoothed
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import predict, rows_of
from fedmerge.merging.scoring.features import with_embedding
from tests.banks import a_bank, a_batch, outcome
from tests.conftest import expert_states

STATES = expert_states(3, 1)
NONE = torch.zeros(9, dtype=torch.bool)


def corrected(log_p: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    N = len(log_p)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = [sorted((j for j in range(N) if j != i), key=lambda j, i=i: np.linalg.norm(unit[i] - unit[j]))[:k] for i in range(N)]
    z = np.exp(log_p)
    for _ in range(100):
        before = z
        rows = []
        for i in range(N):
            pull = sum(((j in near[i]) + (i in near[j])) / 2 * before[j] for j in range(N))
            raised = np.exp(log_p[i] + pull)
            rows.append(raised / raised.sum())
        z = np.array(rows)
        if abs(z - before).max() < 1e-8:
            break
    return z


@pytest.mark.parametrize("of", ["mean", "ties", {"task_arithmetic": {"scale": 0.2}}])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (2, 5), (4, 5), (9, 5), (9, 1), (9, 3)])
def test_lame(n: int, k: int, of: str) -> None:
    bank, batch = a_bank(STATES), a_batch(n)
    name, fields = (of, {}) if isinstance(of, str) else next(iter(of.items()))
    theta = load_method(name, **fields).merge(bank)
    state = bank.state_dict(theta)
    pieces = {key: state[key].numpy() for key in ("head.weight", "head.bias")}
    logits, features = with_embedding(bank.model, lambda: bank.forward(theta, batch))
    logits = logits.double()
    np.testing.assert_allclose(features.numpy() @ pieces["head.weight"].T + pieces["head.bias"], logits.numpy(), rtol=1e-12)
    wanted = corrected(logits.log_softmax(1).numpy(), features.numpy(), k)
    np.testing.assert_allclose(outcome(load_method("lame", of=of, k=k), bank, batch).numpy(), wanted, atol=1e-10)


def test_lame_by_hand() -> None:
    """Two images of alike features: the doubtful one follows the sure one; k is more than there are."""
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    w = affinity(torch.tensor([[1.0, 0.1], [3.0, 0.0]]).double(), 5, NONE[:2])
    assert w.tolist() == [[0, 1], [1, 0]]
    a, b = math.exp(math.log(0.4) + 0.9), math.exp(math.log(0.6) + 0.1)
    first = (p.log() + w @ p).softmax(1)
    torch.testing.assert_close(first[1], torch.tensor([a / (a + b), b / (a + b)], dtype=torch.float64))
    z = smoothed(p.log(), w)
    assert z.argmax(1).tolist() == [0, 0]
    torch.testing.assert_close(z, (p.log() + w @ z).softmax(1), atol=1e-7, rtol=0)


def test_a_neighbor_on_one_side_counts_half() -> None:
    features = torch.tensor([[0.0], [0.1], [0.5]]).double()
    features = torch.cat([features.cos(), features.sin()], 1)
    assert affinity(features, 1, NONE[:3]).tolist() == [[0, 1, 0], [1, 0, 0.5], [0, 0.5, 0]]
    assert affinity(features * torch.tensor([[1.0], [9], [4]]), 1, NONE[:3]).tolist() == [[0, 1, 0], [1, 0, 0.5], [0, 0.5, 0]]
    broken = torch.tensor([False, True, False])
    assert affinity(features, 2, broken).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_one_image_and_one_merged_model_stay_as_they_are() -> None:
    bank = a_bank(STATES)
    torch.testing.assert_close(outcome(load_method("lame"), bank, a_batch(1)), outcome(load_method("mean"), bank, a_batch(1)))


def test_a_row_merges_once_and_gives_what_the_method_alone_gives() -> None:
    bank, batch = a_bank(STATES), a_batch(6)
    method = load_method("lame", of={"mixup": {"seed": 3}})
    (row,) = rows_of([method], bank).values()
    inner = load_method("mixup", seed=3)
    assert torch.equal(row.theta, inner.merge(bank))
    assert torch.equal(row.statistics, inner.statistics(bank))
    evidence = Evidence(bank, batch)
    with evidence.billed() as bill:
        found = predict(row, evidence, PerSample(bank))
    assert bill.forwards == 1
    assert torch.equal(found.log_p.exp(), outcome(method, bank, batch).log().exp())


def test_an_image_that_is_not_finite_spoils_no_other() -> None:
    bank, batch = a_bank(STATES), a_batch(5)
    without = outcome(load_method("lame"), bank, batch[1:])
    batch[0] = torch.inf
    (row,) = rows_of([load_method("lame")], bank).values()
    found = predict(row, Evidence(bank, batch), PerSample(bank))
    torch.testing.assert_close(found.log_p[1:].exp(), without)
    assert found.notes == {"not_finite": [1.0]}
    torch.testing.assert_close(found.log_p[0].exp(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_head_that_is_no_module_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) @ self.weight.T

    bank = Bank.of(Bare(), [Bare().state_dict()], head=["weight"])
    with pytest.raises(CheckpointError, match="found a head, weight, that is no module"):
        Lame().predict(Evidence(bank, torch.ones(2, 4)))
