"""The sum that every linear merge is: rows by their coefficients, without a copy of any of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 2**19
"""Columns that a merge on a CPU sums at a time."""


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor, read: Callable[[int], None] = lambda _: None) -> Tensor:
    """out (P,) = sum_k weights_k rows_k, reading only rows of weight other than 0. rows: (K, P).

    Block by block: what is being summed stays in the cache, so that memory is read once for each row and written once.
    read: told the bytes of rows that have been read, block by block.
    """
    used = [(k, weight) for k, weight in enumerate(weights.tolist()) if weight != 0]
    if not used:
        return out.zero_()
    if len(used) == 1 and used[0][1] == 1:
        return out.copy_(rows[used[0][0]])
    step = BLOCK if out.device.type == "cpu" else len(out)
    for start in range(0, len(out), step):
        block = out[start : start + step]
        for number, (k, weight) in enumerate(used):
            part = rows[k, start : start + step]
            if number == 0:
                torch.mul(part, weight, out=block)
            else:
                block.add_(part, alpha=weight)
        read(len(used) * len(block) * block.element_size())
    return out
