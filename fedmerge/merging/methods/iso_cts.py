"""Isotropic matrices that keep the directions common to the experts, and make room for those of each."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.methods._base import Static
from fedmerge.merging.methods._spectral import isotropic, matrix_bytes, matrixwise, orthogonal, spectrum


class IsoCts(Static):
    """For every matrix theta = theta_0 + (s/K) mean(S) U' V'^T, of r = min(m, n) directions, c common and n of each expert:

        common      U_0 S_0 V_0^T = the c leading directions of sum_k tau_k
        specific    U_k S_k V_k^T = the n leading directions of tau_k - U_0 U_0^T tau_k
        joint       U' = orthogonal([U_0 U_1 .. U_K]), V' likewise, S = (S_0, S_1, .., S_K)

    n = round((r - int(share r)) / K), c = r - K n; other tensors take s times the mean tau_k. K = 1, and share = 1, are `iso_c`.
    Where sources differ: the scale, as in `iso_c`. Where the authors' code errs: rounding n up may ask for more directions than
    there are (r = 3, K = 4, share = 0), so n is r // K at most; and where [U_0 .. U_K] has a lower rank, as for identical experts,
    it completes U' and V' with directions that nobody has; here they are left out.
    Worked example: K = 2, tau_1 = diag(2, 0), tau_2 = diag(0, 1), share = 0: n = 1, mean(S) = 1.5, theta_0 + diag(0.75, 0.75).

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> start, a, b = ({"weight": torch.diag(torch.tensor(row))} for row in ([0.0, 0.0], [2.0, 0.0], [0.0, 1.0]))
    >>> fedmerge.merge(model, [a, b], "iso_cts", base=start, share=0)["weight"]
    tensor([[0.7500, 0.0000],
            [0.0000, 0.7500]])
    """

    paper: ClassVar[str] = "Marczak et al., No task left behind: isotropic model merging (Iso-CTS), ICML 2025"
    needs: ClassVar[frozenset[str]] = frozenset({"theta_0"})

    share: float = Field(0.8, ge=0, le=1, description="share of a matrix's directions that are common to all experts")
    scale: float = Field(1.0, ge=0, le=5, description="s, the scale of the isotropic mean task vector")

    def rule(self, bank: Bank) -> Tensor:
        """(P,)."""
        return bank.anchor_row("theta_0") + self.scale * matrixwise(bank, self._joint)

    def working_bytes(self, sizes: Sizes) -> int:
        """One matrix of all experts, and its singular vectors."""
        return matrix_bytes(sizes)

    def _joint(self, tau: Tensor) -> Tensor:
        """(K, m, n) -> (m, n)."""
        K, r = len(tau), min(tau.shape[1:])
        n = min(round((r - int(self.share * r)) / K), r // K)
        c = r - K * n
        U_0, S_0, Vh_0 = spectrum(tau.sum(0))
        U_0, S_0, Vh_0 = U_0[:, :c], S_0[:c], Vh_0[:c]
        U_k, S_k, Vh_k = spectrum(tau - U_0 @ (U_0.T @ tau), torch.linalg.matrix_norm(tau)[:, None])
        U = orthogonal(torch.cat([U_0, *U_k[:, :, :n]], 1))
        V = orthogonal(torch.cat([Vh_0, *Vh_k[:, :n]]).T)
        return isotropic(U, torch.cat([S_0, S_k[:, :n].reshape(-1)]), V.T) / K
