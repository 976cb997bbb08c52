"""Task vectors of weights as matrices: what the methods share that work on singular values and directions.

A matrix is a parameter with two axes, (outputs, inputs). Where it has nothing in a direction, its singular vectors there are
whatever the SVD completes them with, and may differ between machines; here they are 0, so that no rule mixes them in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.blockwise import Sizes, tauwise


def matrixwise(bank: Bank, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Merge matrix by matrix; all other tensors take the experts' mean.

    Parameters
    ----------
    bank : Bank
        The experts, with theta_0.
    rule : Callable[[Tensor], Tensor]
        Takes the task vectors (K, m, n) of a matrix, and returns the merged one (m, n).

    Returns
    -------
    Tensor
        Merged task vector (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.methods._spectral import matrixwise
    >>> start, a, b = ({"weight": torch.eye(2) * scale} for scale in (1.0, 2.0, 3.0))
    >>> bank = Bank.of(torch.nn.Linear(2, 2, bias=False), [a, b], start)
    >>> matrixwise(bank, lambda tau: tau.sum(0))
    tensor([3., 0., 0., 3.])
    """

    def one(name: str, tau: Tensor) -> Tensor:
        shape = bank.shapes[name]
        return rule(tau.reshape(-1, *shape)).reshape(-1) if len(shape) == 2 else tau.mean(0)

    return tauwise(bank, one)


def matrix_bytes(sizes: Sizes) -> int:
    """Memory for one matrix of all experts, its singular vectors, and what is made of them.

    Parameters
    ----------
    sizes : Sizes
        Experts and parameters.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> from fedmerge.merging.bank.blockwise import Sizes
    >>> from fedmerge.merging.methods._spectral import matrix_bytes
    >>> matrix_bytes(Sizes(experts=3, parameters=5_700_000, largest=589_824, gram=0)) // 2**20  # MiB
    40
    """
    return 6 * 4 * sizes.experts * sizes.largest


def spectrum(M: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors, M = U diag(S) V^T with r = min(m, n).

    A singular value that is rounding is 0, and so are its vectors.

    Parameters
    ----------
    M : Tensor
        Matrices (..., m, n).
    size : Tensor, optional
        (..., 1), what rounding is relative to where M is what is left of something larger; default: the largest singular value.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        U (..., m, r), S (..., r), V^T (..., r, n).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._spectral import spectrum
    >>> U, S, Vh = spectrum(torch.diag(torch.tensor([3.0, 0.0])))
    >>> S
    tensor([3., 0.])
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    rounding = 4 * max(M.shape[-2:]) ** 0.5 * torch.finfo(M.dtype).eps
    there = rounding * (S[..., :1] if size is None else size) < S
    return U.mul_(there[..., None, :]), S.mul_(there), Vh.mul_(there[..., None])


def isotropic(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """mean(S) U V^T, the mean over the singular values that are not 0.

    Parameters
    ----------
    U : Tensor
        (m, r).
    S : Tensor
        (r,).
    Vh : Tensor
        (r, n).

    Returns
    -------
    Tensor
        (m, n).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._spectral import isotropic, spectrum
    >>> isotropic(*spectrum(torch.diag(torch.tensor([3.0, 1.0]))))
    tensor([[2., 0.],
            [0., 2.]])
    """
    return S.sum() / (S > 0).sum().clamp(min=1) * (U @ Vh)


def orthogonal(M: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: P Q^T for M = P diag(S) Q^T (Procrustes), on the span of M.

    Parameters
    ----------
    M : Tensor
        (m, r).

    Returns
    -------
    Tensor
        (m, r).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.methods._spectral import orthogonal
    >>> orthogonal(torch.diag(torch.tensor([3.0, 1.0])))
    tensor([[1., 0.],
            [0., 1.]])
    """
    P, _, Qh = spectrum(M)
    return P @ Qh
