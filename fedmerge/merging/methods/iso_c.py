"""Matrices merged by task arithmetic, and all their singular values made equal."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods._spectral import isotropic, matrix_bytes, matrixwise, spectrum


class IsoC(Static):
    """For every matrix theta = theta_0 + s mean(S) U V^T, U S V^T = (1/K) sum_k tau_k; other tensors take s times the mean tau_k.

    A sum of task vectors has a few large singular values, of what tasks have in common; equal ones leave room for each task.
    The nuclear norm stays as it is. A direction in which no expert moved (S = 0) stays at theta_0.
    Where sources differ: the paper scales the sum by an alpha chosen on labeled validation images, and its code the mean of other
    tensors by the same alpha; here both are means (alpha = s / K for matrices), so that s = 1 is near the expert where K = 1.
    Convolutions have four axes and are averaged, as in the authors' code: on a CNN little but the head is isotropic.
    Worked example: K = 1, tau = diag(3, 1): mean(S) = 2 and theta = theta_0 + diag(2, 2).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> start, a = ({"weight": torch.diag(torch.tensor(row))} for row in ([0.0, 0.0], [3.0, 1.0]))
    >>> fedmerge.merge(model, [a], "iso_c", base=start)["weight"]
    tensor([[2., 0.],
            [0., 2.]])
    """

    paper: ClassVar[str] = "Marczak et al., No task left behind: isotropic model merging (Iso-C), ICML 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    scale: float = Field(1.0, ge=0, le=5, description="s, the scale of the isotropic mean task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        merged = matrixwise(bank, lambda tau: isotropic(*spectrum(tau.mean(0))))
        return bank.anchor_row("theta_0") + self.scale * merged

    def working_bytes(self, sizes: Sizes) -> int:
        """One matrix of all experts, and its singular vectors."""
        return matrix_bytes(sizes)
