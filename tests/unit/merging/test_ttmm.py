"""TTMM's coefficients against a loop in numpy, its fallbacks, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.errors import CheckpointError, MethodError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.functional import Adapter
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.methods.ttmm import Ttmm
from fedmerge.merging.predict import rows_of
from tests.banks import a_batch
from tests.conftest import Net, expert_states

BASE = expert_states(1, 99)[0]


def bank_of(phi: Tensor, base: dict[str, Tensor] | None = BASE) -> Bank:
    return Bank.of(
        Net(), expert_states(len(phi)), base, statistics={"centroid": [{"centroid": row} for row in phi]}, dtype=torch.float64
    )


def embeddings(batch: Tensor) -> np.ndarray:
    """What theta_0's head is given, by the network written out."""
    net = Net().double().eval()
    net.load_state_dict(BASE)
    with torch.no_grad():
        x = torch.relu(net.norm(net.stem(batch))) * net.scale[:, None, None]
        return x.mean((2, 3))[:, net.table].numpy()  # type: ignore[index]


def found(method: Ttmm, bank: Bank, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return method.coefficients(Evidence(bank, batch)).encoder


def reference(f: np.ndarray, phi: np.ndarray, beta: float, tau: float, most: int) -> tuple[np.ndarray, bool]:
    """w (K,) of one embedding by loops, or nobody; f need not have length 1."""
    f = f / math.sqrt(sum(value * value for value in f))
    kernel = [math.exp(-(1 - sum(a * b for a, b in zip(f, row, strict=True))) / beta) for row in phi]
    v = [value / sum(kernel) for value in kernel]
    kept = sorted(range(len(v)), key=lambda k: -v[k])[:most]
    w = np.array([value if value > tau and k in kept else 0.0 for k, value in enumerate(v)])
    return (w / w.sum(), False) if w.any() else (w, True)


@settings(max_examples=20)
@given(
    st.integers(1, 6), st.sampled_from([0.01, 0.04, 0.3]), st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 6), st.integers(0, 9)
)
def test_coefficients_are_those_of_a_loop(K: int, beta: float, tau: float, most: int, seed: int) -> None:
    phi = torch.randn(K, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    phi = phi / phi.norm(dim=1, keepdim=True)
    bank, batch = bank_of(phi), a_batch(5)
    f = embeddings(batch)
    whole = f / np.linalg.norm(f, axis=1, keepdims=True)
    for granularity, each in (("image", f), ("batch", whole.mean(0, keepdims=True))):
        w = found(Ttmm(granularity=granularity, beta=beta, tau=tau, most=most), bank, batch)  # type: ignore[arg-type]
        for row, one in zip(w.reshape(-1, w.shape[-1]), each, strict=True):
            wanted, nobody = reference(one, phi.numpy(), beta, tau, most)
            np.testing.assert_allclose(row[:K].numpy(), wanted, atol=1e-10)
            assert float(row[K:].sum()) == (1 if nobody else 0)


def test_the_worked_example() -> None:
    method, bank = Ttmm(), bank_of(torch.eye(4, dtype=torch.float64)[:3])
    w = method._sparse(torch.tensor([[1, 0.96, 0.8]], dtype=torch.float64), bank)
    torch.testing.assert_close(w[0, :3], torch.tensor([0.731, 0.269, 0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_where_nobody_is_near_enough_it_is_theta_0_or_the_nearest() -> None:
    bank, batch = bank_of(torch.eye(4, dtype=torch.float64)), a_batch(3)
    w = found(Ttmm(tau=0.99, beta=10), bank, batch)
    assert w.tolist() == [[0, 0, 0, 0, 1]] * 3
    bank.shared_head = False
    w = found(Ttmm(tau=0.99, beta=10), bank, batch)
    assert w.shape == (3, 4)
    assert w.argmax(1).tolist() == embeddings(batch).argmax(1).tolist()


def test_an_image_that_theta_0_cannot_see_spoils_no_other() -> None:
    bank, batch = bank_of(torch.eye(4, dtype=torch.float64)), a_batch(3)
    clean = found(Ttmm(), bank, batch)
    batch[1] = torch.nan
    w = found(Ttmm(), bank, batch)
    torch.testing.assert_close(w[[0, 2]], clean[[0, 2]])
    assert w[1, :4].tolist() == [0.25] * 4
    assert bool(torch.isfinite(found(Ttmm(granularity="batch"), bank, batch)).all())


def test_it_costs_one_forward_of_theta_0_however_many_experts_there_are() -> None:
    evidence = Evidence(bank_of(torch.eye(4, dtype=torch.float64)), a_batch(3))
    with torch.no_grad(), evidence.billed() as bill:
        Ttmm().coefficients(evidence)
        evidence.anchor_log_p("theta_0")
    assert bill.forwards == evidence.forwards_run == 1


def test_what_is_missing_is_named() -> None:
    phi = torch.eye(4, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="ttmm: needs the statistic 'centroid' of every site"):
        rows_of([load_method("ttmm")], Bank.of(Net(), expert_states(2), BASE))
    with pytest.raises(CheckpointError, match="theta_0: found a bank that was made without it"):
        rows_of([load_method("ttmm")], bank_of(phi, None))
    with pytest.raises(MethodError, match="method ttmm: found no centroid; expected statistics="):
        Adapter(Net(), expert_states(2), method="ttmm", base=BASE)
    with pytest.raises(CheckpointError, match="found centroids of 3 numbers; expected 4"):
        found(Ttmm(), bank_of(phi[:, :3]), a_batch(2))
    for odd, words in (
        ({"centroid": phi[0, :3]}, r"of expert-1: found centroid \(3,\); expected one vector"),
        ({"center": phi[0]}, r"of expert-1: found center \(4,\); expected one vector"),
        ({"centroid": phi[0] * torch.nan}, "of expert-1: found NaN or infinity"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Bank.of(Net(), expert_states(2), BASE, statistics={"centroid": [{"centroid": phi[0]}, odd]})
