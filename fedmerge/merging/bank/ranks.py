"""Which of a vector's entries are the smallest or the largest in magnitude: exact, and without sorting all of them.

Magnitudes are ranked as a stable sort ranks them: of equal ones the first comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge.merging.bank.blockwise import block


def order_of(size: Tensor) -> Tensor:
    """The order of magnitudes in each row, as a stable sort gives it.

    On a CPU bits of float32 and places are sorted as one integer each, by numpy: ten times faster than a stable sort of torch.

    Parameters
    ----------
    size : Tensor
        Magnitudes (rows, n), not negative.

    Returns
    -------
    Tensor
        Places from the smallest to the largest (rows, n), int64.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.ranks import order_of
    >>> order_of(torch.tensor([[2.0, 0.5, 1.0]]))
    tensor([[1, 2, 0]])
    """
    if size.device.type != "cpu" or size.dtype != torch.float32:
        return size.argsort(dim=-1, stable=True)
    keys = size.view(torch.int32).long()  # bits of numbers that are not negative are in the order of the numbers
    keys.bitwise_left_shift_(32).add_(torch.arange(size.shape[-1]))
    keys.numpy().sort(axis=-1)
    return keys.bitwise_and_(2**32 - 1)


SMALL = 2**14
"""Entries that are sorted as they are: a sample of them would save nothing."""


def magnitude_of_rank(tau: Tensor, rank: int) -> Tensor:
    """The magnitude of a given rank among the entries of a vector.

    Exact, and in one pass: every n^(1/3)-th entry tells between which two magnitudes it lies but for one case in 10,000, and only
    what is there has to be ordered.

    Parameters
    ----------
    tau : Tensor
        The vector (n,).
    rank : int
        From 1, the smallest, to n.

    Returns
    -------
    Tensor
        A scalar tensor.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.ranks import magnitude_of_rank
    >>> magnitude_of_rank(torch.tensor([0.1, -4.0, 2.0, 0.3]), rank=3)
    tensor(2.)
    """
    n = len(tau)
    if n > SMALL:
        sample = tau[:: int(n ** (1 / 3)) // 2 | 1].abs()  # odd, so that it is no column of most matrices
        place, share = rank / n * len(sample), rank / n
        margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 1
        low, high = (_of_rank(sample, min(len(sample), max(1, int(at)))) for at in (place - margin, place + margin))
        below, found = _between(tau, low, high)
        if below < rank <= below + len(found):
            return _of_rank(found, rank - below)
    return _of_rank(tau.abs(), rank)


FOLDS = 8
"""Entries that are looked at together for one that is sought."""


def _between(tau: Tensor, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many magnitudes are below `low`, and those that lie in [low, high].

    Comparisons are written as numbers, and entries are found by sums over `FOLDS` parts of a block: torch compares and adds numbers
    several times faster than it fills and searches masks.
    """
    below, found = 0, []
    step = min(16 * block(tau, 4), 2**24)  # a few MB: more calls cost more than the cache saves
    room = tau.new_empty(3, min(step, len(tau)))
    under = torch.nextafter(high, high.new_tensor(torch.inf))
    for part in torch.split(tau, step):
        size, reach, beyond = room[:, : len(part)]
        torch.abs(part, out=size)
        torch.ge(size, low, out=reach)
        below += len(part) - int(reach.sum())  # exact: a block has fewer than 2^24 entries
        inside = reach.sub_(torch.ge(size, under, out=beyond))
        folded = inside[: len(part) // FOLDS * FOLDS].view(FOLDS, -1)
        at = folded.sum(0).nonzero()[:, 0]
        some = size[: folded.numel()].view(FOLDS, -1).index_select(1, at)
        found += [some[(some >= low) & (some < under)], size[folded.numel() :][inside[folded.numel() :] > 0]]
    return below, torch.cat(found)


def _of_rank(values: Tensor, rank: int) -> Tensor:
    return values.kthvalue(rank).values


def between_ranks(tau: Tensor, first: int, last: int) -> Tensor:
    """Mask of the entries whose rank of magnitude lies between two ranks.

    Entries of equal magnitude are ranked in the order of their places.

    Parameters
    ----------
    tau : Tensor
        The vector (n,).
    first : int
        Entries with fewer than this many before them are left out, 0 to n.
    last : int
        Entries after this rank are left out, 0 to n.

    Returns
    -------
    Tensor
        (n,), 1 and 0 as numbers of the same kind.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.ranks import between_ranks
    >>> between_ranks(torch.tensor([0.1, -4.0, 2.0, 0.3]), first=1, last=3)
    tensor([0., 0., 1., 1.])
    """
    if first >= last:
        return torch.zeros_like(tau)
    size = tau.abs()
    low, high = (magnitude_of_rank(tau, rank) for rank in (first + 1, last))
    mask = torch.ge(size, low, out=torch.empty_like(size))
    lower = len(tau) - _ones(mask)
    mask -= torch.gt(size, high, out=torch.empty_like(size))
    if lower == first and _ones(mask) == last - first:
        return mask
    early, late = first - lower, last - int((size < high).sum())  # of those equal to the ends: dropped, and kept
    for edge, dropped in ((low, slice(0, early)), (high, slice(late, None))):
        if dropped != slice(0, 0):
            mask[(size == edge).nonzero()[:, 0][dropped]] = 0
    return mask


def _ones(mask: Tensor) -> int:
    """How many entries are 1 and not 0; sums of 2^24 of them are exact in float32."""
    return sum(int(part.sum()) for part in torch.split(mask, 2**24))
