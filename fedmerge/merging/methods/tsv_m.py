"""The leading singular directions of every expert's matrices, side by side and made orthogonal."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods._spectral import matrix_bytes, matrixwise, orthogonal, spectrum


class TsvM(Static):
    """For every matrix theta = theta_0 + s U' S V'^T, U' = orthogonal([U_1 .. U_K]), V' likewise, S = (S_1, .., S_K).

    U_k S_k V_k^T are the n = r // K leading directions of tau_k, r = min(m, n); other tensors take s times the mean tau_k. Experts
    whose directions are orthogonal are added without loss, and one expert alone is itself.
    Where the authors' code errs: it keeps nothing of a matrix with fewer directions than experts (a head of two classes, three
    hospitals), here one of each; and where [U_1 .. U_K] has a lower rank, as for identical experts, it completes U' and V' with
    directions that nobody has; here they are left out, so that K identical experts give the leading directions of one.
    Worked example: K = 2, tau_1 = diag(2, 0), tau_2 = diag(0, 1): theta = theta_0 + diag(2, 1).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> start, a, b = ({"weight": torch.diag(torch.tensor(row))} for row in ([0.0, 0.0], [2.0, 0.0], [0.0, 1.0]))
    >>> fedmerge.merge(model, [a, b], "tsv_m", base=start)["weight"]
    tensor([[2., 0.],
            [0., 1.]])
    """

    paper: ClassVar[str] = "Gargiulo et al., Task singular vectors (TSV-Merge), CVPR 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    scale: float = Field(1.0, ge=0, le=5, description="s, the scale of the merged task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        return bank.anchor_row("theta_0") + self.scale * matrixwise(bank, side_by_side)

    def working_bytes(self, sizes: Sizes) -> int:
        """One matrix of all experts, and its singular vectors."""
        return matrix_bytes(sizes)


def side_by_side(tau: Tensor) -> Tensor:
    """U' S V'^T of task vectors, whose leading singular directions stand side by side.

    Parameters
    ----------
    tau : Tensor
        (K, m, n).

    Returns
    -------
    Tensor
        (m, n).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods.tsv_m import side_by_side
    >>> tau = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    >>> side_by_side(tau)
    tensor([[2., 0.],
            [0., 1.]])
    """
    n = max(1, min(tau.shape[1:]) // len(tau))
    U_k, S_k, Vh_k = spectrum(tau)
    U = orthogonal(torch.cat([*U_k[:, :, :n]], 1))
    V = orthogonal(torch.cat([*Vh_k[:, :n]]).T)
    return U * S_k[:, :n].reshape(-1) @ V.T
