"""What a method remembers of each expert, when experts come and go between two batches.

before, after: the experts' names, in the order of the first axis of what is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Roster:
    """Whose experts are there from one batch on.

    Attributes
    ----------
    start : int
        Number of the batch, from 0.
    experts : tuple[str, ...]
        Names in the scenario's order.
    change : str, default ''
        What has just happened, or nothing.

    Examples
    --------
    >>> from fedmerge.merging.state import Roster
    >>> Roster(start=8, experts=("axial", "coronal"), change="coronal joins").experts
    ('axial', 'coronal')
    """

    start: int
    experts: tuple[str, ...]
    change: str = ""


Names = Sequence[str]


def carried_rows(past: Tensor, before: Names, after: Names, fresh: Tensor) -> Tensor:
    """One row for each expert: who stays keeps its own, who is new gets a fresh one.

    Parameters
    ----------
    past : Tensor
        Rows (K, ...) of the experts before.
    before : Names
        Their names.
    after : Names
        Names of the experts of now.
    fresh : Tensor
        Rows (K', ...) of the experts of now, for newcomers.

    Returns
    -------
    Tensor
        (K', ...).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.state import carried_rows
    >>> past, fresh = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> carried_rows(past, before=("a", "b"), after=("b", "c"), fresh=fresh)
    tensor([[2.],
            [0.]])
    """
    return torch.stack(
        [past[before.index(name)].to(row) if name in before else row for name, row in zip(after, fresh, strict=True)]
    )


def carried_shares(past: Tensor, before: Names, after: Names) -> Tensor | None:
    """Shares of the experts of now: 0 for who is new; what left is divided among who stays, in proportion to what they had.

    abar'_k = abar_k / sum_{j stays} abar_j. Worked example: (0.5, 0.3, 0.2) without the first, with a newcomer: (0.6, 0.4, 0).

    Parameters
    ----------
    past : Tensor
        Shares (K,) of the experts before, on the simplex.
    before : Names
        Their names.
    after : Names
        Names of the experts of now.

    Returns
    -------
    Tensor | None
        (K',) on the simplex; None if nobody who stays had a share: then there is no past.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.state import carried_shares
    >>> carried_shares(torch.tensor([0.5, 0.3, 0.2]), before=("a", "b", "c"), after=("b", "c", "d"))
    tensor([0.6000, 0.4000, 0.0000])
    """
    kept = carried_rows(past, before, after, past.new_zeros(len(after)))
    if all(name in after for name, share in zip(before, past.tolist(), strict=True) if share != 0):
        return kept  # nothing to divide, and not a bit changes
    return kept / kept.sum() if float(kept.sum()) > 0 else None


def places(before: Names, after: Names) -> list[int] | None:
    """Where the experts of now stood before.

    Parameters
    ----------
    before : Names
        Names of the experts before.
    after : Names
        Names of the experts of now.

    Returns
    -------
    list[int] | None
        Their places; None if one of them is new: then what was measured on images that all have seen is no longer good.

    Examples
    --------
    >>> from fedmerge.merging.state import places
    >>> places(before=("a", "b", "c"), after=("c", "a"))
    [2, 0]
    >>> places(before=("a", "b"), after=("b", "d")) is None  # d has no past
    True
    """
    return [before.index(name) for name in after] if set(after) <= set(before) else None
