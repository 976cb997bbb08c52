"""The predictions of a merged model, corrected so that images that look alike to it get labels alike; no weight moves."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Building, Output, Static
from fedmerge.merging.scoring.features import with_embedding


class Lame(Building, Output):
    """z_i = softmax(log p_i + sum_j w_ij z_j), from z = p until no z changes by 1e-8, 100 steps at most.

    p: the merged model's predictions. w = (W + W^T) / 2, W_ij = 1 for the k images of the batch whose features (inputs of the head,
    scaled to length 1) are nearest to those of image i, itself apart. A batch of one stays as it is, and an image whose logits are
    not finite is nobody's neighbor.
    Where sources differ: the authors' code makes W symmetric only if asked to, stops where the objective changes by 1e-8 of itself,
    and adds 1e-10 to p before the logarithm.
    Worked example: k = 1, two images with p = (0.9, 0.1) and (0.4, 0.6): the first step makes the second softmax(log 0.4 + 0.9,
    log 0.6 + 0.1) = (0.597, 0.403).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    >>> state = {"1.weight": torch.eye(2)}
    >>> batch = torch.tensor([[3.0, 1.0], [2.0, 0.5], [1.1, 1.0]])[:, None, None]
    >>> fedmerge.Adapter(model, [state], "mean")(batch).exp()[2]
    tensor([0.5250, 0.4750])
    >>> fedmerge.Adapter(model, [state], "lame", k=1)(batch).exp()[2]  # as its neighbors say
    tensor([0.6344, 0.3656])
    """

    paper: ClassVar[str] = "Boudiaf et al., Parameter-free online test-time adaptation (LAME), CVPR 2022"
    cost: ClassVar[str] = "1"
    exceptions: ClassVar[dict[str, str]] = {"fixed point": "it corrects the predictions of a model, also of one alone"}

    k: int = Field(5, ge=1, description="k, the number of neighbors of an image in its batch")

    @property
    def merged_once(self) -> Static:
        """The method whose model predicts."""
        return self.built_on

    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C), of a model merged for this batch."""
        return self.correct(evidence, self.built_on.merge(evidence.bank), self.built_on.statistics(evidence.bank))

    def correct(self, evidence: Evidence, theta: Tensor, statistics: Tensor | None) -> Tensor:
        """Class probabilities (N, C)."""
        evidence.charge(1)
        bank = evidence.bank
        with bank.recorded.off():
            found = with_embedding(bank.model, lambda: bank.forward(theta, evidence.batch, statistics), bank.parts.head)
        logits, features = found
        logits = logits.double()
        broken = ~(torch.isfinite(logits).all(1) & torch.isfinite(features).all(1))
        log_p = torch.where(broken[:, None], 0, logits).log_softmax(1)
        z = smoothed(log_p, affinity(features, self.k, broken))
        return torch.where(broken[:, None], torch.nan, z).to(evidence.bank.wide)


def affinity(features: Tensor, k: int, broken: Tensor) -> Tensor:
    """Affinity of images: a half for each of two that is among the k nearest of the other.

    Parameters
    ----------
    features : Tensor
        (N, d).
    k : int
        Number of neighbors, at least 1.
    broken : Tensor
        bool (N,), images whose features are not finite; they have no neighbors.

    Returns
    -------
    Tensor
        w (N, N), symmetric, in {0, 0.5, 1}.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.lame import affinity
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> affinity(features, k=1, broken=torch.zeros(3, dtype=torch.bool))
    tensor([[0.0000, 1.0000, 0.0000],
            [1.0000, 0.0000, 0.5000],
            [0.0000, 0.5000, 0.0000]])
    """
    N = len(features)
    features = F.normalize(features, dim=1)
    itself = torch.eye(N, dtype=torch.bool, device=features.device)
    distance = torch.cdist(features, features).masked_fill(itself | broken | broken[:, None], torch.inf)
    near = distance.topk(min(k, N - 1), largest=False)
    W = torch.zeros_like(distance).scatter_(1, near.indices, torch.isfinite(near.values).to(distance))
    return (W + W.T) / 2


def smoothed(log_p: Tensor, w: Tensor) -> Tensor:
    """The fixed point of z_i = softmax(log p_i + sum_j w_ij z_j) from z = p.

    Parameters
    ----------
    log_p : Tensor
        (N, C), nats.
    w : Tensor
        Affinities (N, N).

    Returns
    -------
    Tensor
        z (N, C), probabilities.

    References
    ----------
    Boudiaf et al., Parameter-free online test-time adaptation, CVPR 2022.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.lame import smoothed
    >>> log_p = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log()
    >>> smoothed(log_p, w=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[0.9175, 0.0825],
            [0.6058, 0.3942]])
    """
    z = log_p.exp()
    for _ in range(100):
        before, z = z, (log_p + w @ z).softmax(1)
        if bool((z - before).abs().max() < 1e-8):
            break
    return z
