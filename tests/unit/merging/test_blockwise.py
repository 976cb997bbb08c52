"""Selection by rank against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmerge.merging.bank.blockwise import inner_products
from fedmerge.merging.bank.ranks import SMALL, between_ranks, magnitude_of_rank, order_of


def drawn(kind: str, n: int) -> Tensor:
    tau = torch.randn(n, generator=torch.Generator().manual_seed(n))
    match kind:
        case "equal":
            return (tau * 2).round()
        case "frozen":
            return tau * (torch.arange(n) % 3 == 0)
        case "misleading":  # every entry that the sample may look at is small
            return tau.where(torch.arange(n) % (int(n ** (1 / 3)) // 2 | 1) != 0, 1e-3 * tau)
        case _:
            return tau


@pytest.mark.parametrize("kind", ["random", "equal", "frozen", "misleading"])
@pytest.mark.parametrize("n", [1, 7, SMALL + 5, 3 * SMALL])
def test_ranks_are_those_of_a_stable_sort(kind: str, n: int) -> None:
    tau = drawn(kind, n)
    order = np.argsort(tau.abs().numpy(), kind="stable")
    for rank in {1, max(1, n // 3), max(1, int(0.8 * n)), n}:
        assert magnitude_of_rank(tau, rank) == tau.abs()[order[rank - 1]]
    for first, last in ((0, n), (n // 2, n - n // 100), (n // 3, n // 3), (n // 4, n // 4 + 1)):
        wanted = np.zeros(n, bool)
        wanted[order[first:last]] = True
        assert (np.asarray(between_ranks(tau, first, last)) == wanted).all()


@pytest.mark.parametrize(("groups", "d"), [(1, 3), (1, 512), (1, 3000), (5, 700), (3, 1)])
def test_inner_products_of_float32_are_those_of_float64(groups: int, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    origin = torch.randn(groups, d, generator=generator)
    rows = origin + 0.01 * torch.randn(4, groups, d, generator=generator)
    for point in (None, origin):
        found, x = inner_products(rows, point), (rows if point is None else rows - point).double().transpose(0, 1)
        wanted = x @ x.mT
        lengths = wanted.diagonal(dim1=1, dim2=2).sqrt()
        error = (found - wanted).abs() / (lengths[:, :, None] * lengths[:, None])
        assert found.dtype == torch.float64 and float(error.max()) < 3e-7


@pytest.mark.parametrize("kind", ["random", "equal", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orders_are_those_of_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    size = drawn(kind, 7 * 300).view(7, 300).abs().to(dtype)
    assert (order_of(size) == size.argsort(dim=-1, stable=True)).all()
