"""Which of many experts a batch is shown to: those that recent batches resembled, and others in turn.

An expert is active while its share in recent batches is at least `LEAST`, and among the `MOST` largest. Beside the active ones a
batch is shown to `EXPLORED` others, to those first that have waited longest; where some have never been asked, or nobody is active,
to up to `WIDE`. So who joins is asked next, and a thousand experts have all been asked after 42 batches. What is remembered:

    turn (K,)   number of the batch that an expert has last been asked about, 0 for never
    apart (4,)  images on which active experts and a consensus that does not hang on them answered otherwise, and images: of the
                stream, whose older images fade, and of the last few since an alarm

An alarm is raised where the last few images differ from the consensus more often than those before by two standard deviations and
one image. Then this batch, too, is shown to `WIDE` others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedmerge.merging.state import carried_rows

FEW = 24
"""Experts up to which all are asked: fewer would save nothing worth while."""

MOST = 16
LEAST = 1 / (4 * MOST)
WIDE = 24

EXPLORED = 4
"""They stand for all who are not asked. With two, chance decided: one stream of 30 hospitals lost 3.5 points."""

PAST, LAST = 1024, 32
"""Images after which what was seen of the stream, and of its last images, has faded to 1/e."""

State = Mapping[str, Tensor]


def start(K: int) -> dict[str, Tensor]:
    """Nobody has been asked.

    Parameters
    ----------
    K : int
        Experts.

    Returns
    -------
    dict[str, Tensor]
        turn (K,) int64 and apart (4,) float64, all 0.

    Examples
    --------
    >>> from fedmerge.merging.scoring.active import start
    >>> start(3)
    {'turn': tensor([0, 0, 0]), 'apart': tensor([0., 0., 0., 0.], dtype=torch.float64)}
    """
    return {"turn": torch.zeros(K, dtype=torch.int64), "apart": torch.zeros(4, dtype=torch.float64)}


def carried(state: State, before: Sequence[str], after: Sequence[str]) -> dict[str, Tensor]:
    """What is remembered when experts come and go: who is new has never been asked.

    Parameters
    ----------
    state : State
        Of the experts before; without `turn` where all of them were asked.
    before, after : Sequence[str]
        Names of the experts.

    Returns
    -------
    dict[str, Tensor]
        turn (K,) and apart (4,) of the experts after.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.active import carried, start
    >>> state = {**start(2), "turn": torch.tensor([5, 7])}
    >>> carried(state, before=("a", "b"), after=("b", "c"))["turn"]  # c has never been asked
    tensor([7, 0])
    """
    fresh = start(len(after))
    if "turn" not in state:
        return fresh
    return {"turn": carried_rows(state["turn"], before, after, fresh["turn"]), "apart": state["apart"]}


def candidates(state: State, shares: Tensor, names: Sequence[str], others: int | None = None) -> tuple[list[int], list[int]]:
    """Who sees this batch.

    Parameters
    ----------
    state : State
        With `turn`.
    shares : Tensor
        (K,) of recent batches, on the simplex.
    names : Sequence[str]
        The experts', which settle who of those that waited equally long comes first.
    others : int | None, optional
        How many that are not active see it; default: as few as allowed.

    Returns
    -------
    tuple[list[int], list[int]]
        Rows of the active experts, and of the others, each in order.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.scoring.active import candidates, start
    >>> shares, state = torch.tensor([0.9] + [0.1 / 39] * 39), {**start(40), "turn": torch.ones(40, dtype=torch.int64)}
    >>> active, others = candidates(state, shares, [f"site-{k}" for k in range(40)], others=2)
    >>> active, len(others)
    ([0], 2)
    """
    asked = state["turn"] > 0
    most = torch.topk(torch.where(asked, shares, 0), min(MOST, len(shares)))
    active = sorted(k for k, share in zip(most.indices.tolist(), most.values.tolist(), strict=True) if share >= LEAST)
    if others is None:
        never = int((~asked).sum())
        others = max(EXPLORED, min(WIDE, never)) if active else WIDE
    lot, turn = _lots(tuple(names)), state["turn"].tolist()
    rest = sorted(set(range(len(shares))) - {*active}, key=lambda k: (turn[k], lot[k]))
    return active, sorted(rest[:others])


def asked(state: State, rows: Sequence[int]) -> dict[str, Tensor]:
    """What is remembered once experts have been asked about a batch.

    Parameters
    ----------
    state : State
        With `turn`.
    rows : Sequence[int]
        Their rows.

    Returns
    -------
    dict[str, Tensor]
        turn (K,).

    Examples
    --------
    >>> from fedmerge.merging.scoring.active import asked, start
    >>> asked(start(3), rows=[0, 2])["turn"]  # the first batch
    tensor([1, 0, 1])
    """
    turn = state["turn"].clone()
    turn[list(rows)] = int(turn.max()) + 1
    return {"turn": turn}


def alarmed(state: State, different: int, images: int) -> tuple[dict[str, Tensor], bool]:
    """Whether the last images differ more often than those before them.

    Parameters
    ----------
    state : State
        With `apart`.
    different : int
        Images of this batch on which active experts and the consensus answered otherwise.
    images : int
        Images of this batch.

    Returns
    -------
    tuple[dict[str, Tensor], bool]
        apart (4,) with this batch, and whether an alarm is raised.

    Examples
    --------
    >>> from fedmerge.merging.scoring.active import alarmed, start
    >>> state = start(2)
    >>> for _ in range(10):
    ...     state, alarm = alarmed(state, different=1, images=32)
    >>> alarmed(state, different=20, images=32)[1]
    True
    """
    long, seen, lately, last = state["apart"].tolist()
    lately, last = lately * math.exp(-images / LAST) + different, last * math.exp(-images / LAST) + images
    p = (long + 1) / (seen + 2)
    alarm = seen > 0 and lately > p * last + 2 * math.sqrt(last * p * (1 - p)) + 1
    faded = math.exp(-images / PAST)
    after = [long * faded + different, seen * faded + images, *((0.0, 0.0) if alarm else (lately, last))]
    return {"apart": torch.tensor(after, dtype=torch.float64)}, alarm


@lru_cache(maxsize=8)
def _lots(names: tuple[str, ...]) -> list[str]:
    """In which order those who have waited equally long are asked: by names, and not by their place in the scenario."""
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]
