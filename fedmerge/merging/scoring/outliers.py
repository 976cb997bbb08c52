"""A figure of each expert next to those of the others, so that one that is far out does not set the measure."""

from __future__ import annotations

import torch
from torch import Tensor

MUCH = 1e9
"""More than any bound."""


def others_median(values: Tensor) -> Tensor:
    """The median of all the others, for each of K values; of two in the middle, their mean.

    Parameters
    ----------
    values : Tensor
        (K,), K at least 2.

    Returns
    -------
    Tensor
        (K,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.outliers import others_median
    >>> others_median(torch.tensor([1.0, 2.0, 4.0]))
    tensor([3.0000, 2.5000, 1.5000])
    """
    rest = [torch.cat([values[:k], values[k + 1 :]]).double() for k in range(len(values))]
    return torch.stack([torch.quantile(one, 0.5) for one in rest]).to(values)


def over_others(values: Tensor) -> Tensor:
    """Each of K positive values over the others' median.

    Parameters
    ----------
    values : Tensor
        (K,), K at least 2; what is not finite counts as `MUCH`.

    Returns
    -------
    Tensor
        (K,) float64, at most `MUCH`.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.outliers import over_others
    >>> over_others(torch.tensor([1.0, 1.0, 20.0]))
    tensor([ 0.0952,  0.0952, 20.0000], dtype=torch.float64)
    """
    finite = values.double().nan_to_num(nan=MUCH, posinf=MUCH).clamp(max=MUCH)
    return (finite / others_median(finite)).clamp(max=MUCH)
