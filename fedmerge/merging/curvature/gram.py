"""Inner products of the inputs of a model's linear layers, and the least-squares merge that they allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by the name of their weight, in the order of the modules.

    A layer that shares its weight with another appears once. The last layer of PyTorch's own attention, as CLIP's towers have it,
    is left out: its weight is read, and the layer never called.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    dict[str, nn.Linear]
        Weight's name -> layer.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.gram import linear_layers
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> list(linear_layers(model))
    ['0.weight', '2.weight']
    """
    modules = dict(model.named_modules())
    uncalled = {f"{name}.out_proj" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear) and name not in uncalled}
    found = {f"{name}.weight".removeprefix("."): module for name, module in linear.items()}  # a model may be one layer
    return {name: layer for name, layer in found.items() if name in dict(model.named_parameters())}


@torch.no_grad()
def grams(model: nn.Module, batches: Iterable[Tensor], only: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """Gram matrices G = X^T X / rows of the inputs of linear layers, over all batches.

    `rows` counts images times tokens, so that sites of different sizes weigh the same.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    batches : Iterable[Tensor]
        Images (N, channels, H, W), batch by batch.
    only : Callable[[str], bool], optional
        Takes a weight's name, and says whether its matrix is wanted.

    Returns
    -------
    dict[str, Tensor]
        Weight's name -> G (d, d), float32, for a layer of d inputs.

    References
    ----------
    Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023, section 3.2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.gram import grams
    >>> model = torch.nn.Linear(2, 1, bias=False).eval()
    >>> grams(model, [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])["weight"]
    tensor([[1., 1.],
            [1., 2.]])
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if only(name)}
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)

    def listen(name: str) -> Callable[[nn.Module, Any], None]:
        def hear(_: nn.Module, inputs: Any) -> None:
            X = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + X.T @ X
            rows[name] += len(X)

        return hear

    hooks = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (G / rows[name]).float() for name, G in sums.items()}


def least_squares(W: Tensor, G: Tensor, ratio: float, ridge: float) -> Tensor:
    """The weight with least sum_k ||X_k W^T - X_k W_k^T||^2: W^T = (sum_k G_k)^-1 sum_k G_k W_k^T.

    Computed in float64.

    Parameters
    ----------
    W : Tensor
        Weights (K, outputs, d).
    G : Tensor
        Gram matrices (K, d, d).
    ratio : float
        Factor of the elements of G off the diagonal, in (0, 1].
    ridge : float
        Added to the diagonal as a share of the mean eigenvalue of sum_k G_k, in favor of the mean of W_k; greater than 0, so that
        equal W_k come back as they are.

    Returns
    -------
    Tensor
        (outputs, d).

    References
    ----------
    Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023, section 3.2.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.gram import least_squares
    >>> W, G = torch.tensor([0.0, 4.0]).reshape(2, 1, 1), torch.tensor([1.0, 3.0]).reshape(2, 1, 1)
    >>> least_squares(W, G, ratio=1.0, ridge=1e-6)  # the site of larger inputs counts three times
    tensor([[3.0000]])
    """
    W64, G64 = W.double(), G.to(W.device).double()
    diagonal = torch.diag_embed(G64.diagonal(dim1=1, dim2=2))
    G64 = ratio * G64 + (1 - ratio) * diagonal
    total, d = G64.sum(0), W.shape[-1]
    strength = ridge * total.trace() / d
    mean = W64.mean(0)
    pulled = torch.einsum("kde,koe->do", G64, W64 - mean)  # sum_k G_k (W_k - mean)^T, (d, outputs)
    factor = torch.linalg.cholesky(total + strength.clamp(min=torch.finfo(torch.float64).tiny) * torch.eye(d).to(total))
    return (mean + torch.cholesky_solve(pulled, factor).T).to(W)


def merge_layers(theta: Tensor, bank: Any, G: Mapping[str, Tensor], ratio: float, ridge: float) -> Tensor:
    """Replace every linear weight that has a Gram matrix by the least-squares merge of the experts.

    Parameters
    ----------
    theta : Tensor
        Parameters (P,), which are overwritten.
    bank : Any
        The experts.
    G : Mapping[str, Tensor]
        Weight's name -> (K, d, d).
    ratio : float
        As of `least_squares`.
    ridge : float
        As of `least_squares`.

    Returns
    -------
    Tensor
        theta (P,).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.curvature.gram import merge_layers
    >>> bank = Bank.of(torch.nn.Linear(1, 1, bias=False), [{"weight": torch.tensor([[w]])} for w in (0.0, 4.0)])
    >>> G = {"weight": torch.tensor([1.0, 3.0]).reshape(2, 1, 1)}
    >>> merge_layers(bank.theta.mean(0), bank, G, ratio=1.0, ridge=1e-6)
    tensor([3.0000])
    """
    for name, gram in G.items():
        columns, shape = bank.slices[name], bank.shapes[name]
        rows = bank.columns(columns)
        theta[columns] = least_squares(rows.reshape(len(rows), *shape), gram, ratio, ridge).reshape(-1)
        bank.read(rows.numel() * rows.element_size())
    return theta
