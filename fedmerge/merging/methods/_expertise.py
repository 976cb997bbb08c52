"""How much an expert seems to know about an image: the scores that coefficients are made of, and what spreads them.

Oh et al., DaWin, ICLR 2025: Eq. 1-2 and the alternatives of its table D.
"""

from __future__ import annotations

import random
import zlib
from typing import Literal

import torch
from torch import Tensor

from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import State
from fedmerge.merging.scoring.divergence import confidence

Score = Literal[
    "entropy", "maxlogit", "maxlogit_softmax", "confidence", "confidence_difference", "uniform", "normal_05", "normal_08",
    "pseudo_ensemble_soft", "pseudo_ensemble_hard", "pseudo_merged_soft", "pseudo_merged_hard",
]  # fmt: skip

NORMAL = {"normal_05": (0.5, 0.2), "normal_08": (0.8, 0.1)}


def scores(name: Score, evidence: Evidence, calibrated: bool, seed: int) -> Tensor:
    """Expertise of each expert for each image; lambda_k is an expert's share of it.

    entropy: exp(-H), Eq. 1. maxlogit: the largest raw logit, which must be positive to mean anything; maxlogit_softmax: its
    exponential. confidence: exp(max p). confidence_difference: exp(p_(1) - p_(2)). uniform, normal_*: no data, drawn for each
    image (for K > 2 the first is uniform on the simplex). pseudo_*: exp(-loss) under labels from the experts' mean probability or
    from the model of mean weights, as probabilities or as the likeliest class.
    Where the source errs: its confidence rows read one model's logits for both; these read each model's own.

    Parameters
    ----------
    name : Score
        The score.
    evidence : Evidence
        The experts' logits of the batch.
    calibrated : bool
        Whether logits are divided by each site's temperature first.
    seed : int
        Of scores that are drawn.

    Returns
    -------
    Tensor
        (K, N), not negative; 0 for an expert that is not valid.

    References
    ----------
    Oh et al., DaWin, ICLR 2025, equation 1 and table D.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.methods._expertise import scores
    >>> from fedmerge.merging.evidence import Evidence
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> evidence = Evidence(bank, torch.ones(1, 1))
    >>> scores("entropy", evidence, calibrated=True, seed=0)  # e^-H
    tensor([[0.9138],
            [0.9138]], dtype=torch.float64)
    """
    log_p = evidence.log_p(calibrated=calibrated)
    match name:
        case "entropy":
            found = torch.exp(-evidence.entropies(calibrated))
        case "maxlogit":
            found = evidence.logits.amax(-1).to(log_p).clamp(min=1e-8)
        case "maxlogit_softmax":
            top = evidence.logits.amax(-1).to(log_p)
            found = torch.exp(top - torch.where(torch.isfinite(top), top, -torch.inf).amax(0))
        case "confidence":
            found = confidence(log_p).exp()
        case "confidence_difference":
            best = log_p.exp().topk(2, -1).values
            found = (best[..., 0] - best[..., 1]).exp()
        case "uniform" | "normal_05" | "normal_08":
            found = _drawn(name, evidence, seed).to(log_p)
        case _:
            found = torch.exp(-_pseudo_loss(name, evidence))
    return torch.where(evidence.valid[:, None], found, 0).double()


def shares(score: Tensor) -> Tensor:
    """Scores as shares of their sum; uniform where all are 0.

    Parameters
    ----------
    score : Tensor
        (K, N), not negative.

    Returns
    -------
    Tensor
        lambda (N, K), on the simplex.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._expertise import shares
    >>> shares(torch.tensor([[1.0, 0.0], [1 / 3, 0.0]]))
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """
    total = score.sum(0)
    return torch.where(total > 0, score / total.clamp(min=torch.finfo(score.dtype).tiny), 1 / len(score)).T


def with_offset(score: Tensor, seen: State) -> Tensor:
    """Eq. 2 for K experts: lambda_k = (e^-H_k + O w_k) / (sum_j e^-H_j + O).

    O = (1/K) sum_k std(H_k)/mean(H_k), and w is the inverse-entropy rule of Ambekar et al. (Eq. 4) on the images seen. For K = 2 it
    is the printed formula, with 1/T = w. Worked example: e^-H = (0.5, 0.25), O = 0.25, w = (0.8, 0.2): (0.7, 0.3).
    An expert that is not valid gets nothing, and one that never was counts neither in O nor in w.

    Parameters
    ----------
    score : Tensor
        e^-H (K, N); 0 for an expert that is not valid.
    seen : State
        Number, sum and sum of squares of each expert's entropies so far, as `moments` makes them.

    Returns
    -------
    Tensor
        lambda (N, K), on the simplex.

    References
    ----------
    Oh et al., DaWin, ICLR 2025, equation 2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._expertise import moments, with_offset
    >>> H = torch.tensor([[0.1, 0.3], [0.6, 0.6]])
    >>> with_offset((-H).exp(), moments({}, H))
    tensor([[0.6474, 0.3526],
            [0.6122, 0.3878]])
    """
    n, total, squares = seen["n"], seen["sum"], seen["squares"]
    known = n > 0
    mean = (total / n.clamp(min=1)).clamp(min=1e-8)
    variance = ((squares - n * mean**2) / (n - 1).clamp(min=1)).clamp(min=0)
    spread = torch.where(n > 1, variance.sqrt() / mean, 0)  # one image has none
    O = spread.sum() / known.expand_as(spread).sum().clamp(min=1)  # noqa: E741 - the paper's symbol
    w = torch.where(known, 1 / mean, 0)
    w = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    return shares(torch.where(score > 0, score + (O * w)[:, None].to(score), 0))


def moments(state: State, H: Tensor) -> State:
    """Number, sum and sum of squares (K,) of each expert's entropies seen so far; those that are not finite do not count.

    Parameters
    ----------
    state : State
        What has been seen before.
    H : Tensor
        Entropies (K, N) of the batch, nats.

    Returns
    -------
    State
        The state with this batch.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._expertise import moments
    >>> seen = moments({}, torch.tensor([[0.1, 0.3], [0.6, 0.6]]))
    >>> seen["n"], seen["sum"]
    (tensor([2., 2.], dtype=torch.float64), tensor([0.4000, 1.2000], dtype=torch.float64))
    """
    counts = torch.isfinite(H).cpu()
    H = torch.where(counts, H.double().cpu(), 0)
    fresh = {"n": counts.double().sum(1), "sum": H.sum(1), "squares": (H**2).sum(1)}
    return {name: value + state[name] if name in state else value for name, value in fresh.items()}


def _drawn(name: str, evidence: Evidence, seed: int) -> Tensor:
    """Random scores (K, N) that depend on the seed, the experts' names and the batch, and on nothing else."""
    content = zlib.crc32(evidence.batch.detach().cpu().float().numpy().tobytes())
    rows = []
    for expert in evidence.bank.names:
        draw = random.Random(f"{name} {seed} {expert} {content}")
        if name in NORMAL:
            rows.append([min(max(draw.gauss(*NORMAL[name]), 0.01), 0.99) for _ in range(len(evidence.batch))])
        else:
            rows.append([draw.expovariate(1) for _ in range(len(evidence.batch))])
    drawn = torch.tensor(rows, dtype=torch.float64)
    if name not in NORMAL or len(rows) != 2:
        return drawn
    names = evidence.bank.names
    share = drawn[names.index(max(names))]  # of the second of two, in the order of names, as no order of sites matters
    return torch.stack([share if one == max(names) else 1 - share for one in names])


def _pseudo_loss(name: str, evidence: Evidence) -> Tensor:
    """Cross-entropy (K, N) of every expert under labels that no human gave, nats; as in the authors' code without temperatures."""
    log_p = evidence.log_p()
    valid = evidence.valid if bool(evidence.valid.any()) else torch.ones_like(evidence.valid)
    target = evidence.anchor_log_p("mean").exp() if "merged" in name else log_p[valid].exp().mean(0)  # (N, C)
    if name.endswith("hard"):
        target = torch.nn.functional.one_hot(target.argmax(-1), target.shape[-1]).to(log_p)
    return -torch.where(target > 0, target * log_p, 0).sum(-1)
