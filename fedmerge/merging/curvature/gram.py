"""Inner products of the inputs of a model's linear layers, and the least-squares merge that they allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Weight's name -> layer, in the order of the modules; a layer that shares its weight with another appears once.

    Without the last layer of PyTorch's own attention, as CLIP's towers have it: its weight is read, and the layer never called.
    """
    modules = dict(model.named_modules())
    uncalled = {f"{name}.out_proj" for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear) and name not in uncalled}
    found = {f"{name}.weight": module for name, module in linear.items()}
    return {name: layer for name, layer in found.items() if name in dict(model.named_parameters())}


@torch.no_grad()
def grams(model: nn.Module, batches: Iterable[Tensor], only: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """Weight's name -> G = X^T X / rows, (d, d) float32, X the inputs (rows, d) of that layer over all batches.

    rows counts images times tokens, so that sites of different sizes weigh the same. The model must be in evaluation mode.
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
    """The W (outputs, d) with least sum_k ||X_k W^T - X_k W_k^T||^2: W^T = (sum_k G_k)^-1 sum_k G_k W_k^T.

    W: (K, outputs, d). G: (K, d, d). ratio: factor of the elements off the diagonal. ridge: added to the diagonal as a share of
    the mean eigenvalue of sum_k G_k, in favor of the mean of W_k; so equal W_k come back as they are. float64 inside.
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
    """theta (P,) with every linear weight for which there is a G replaced by the least-squares merge of the bank's experts."""
    for name, gram in G.items():
        columns, shape = bank.slices[name], bank.shapes[name]
        rows = bank.columns(columns)
        theta[columns] = least_squares(rows.reshape(len(rows), *shape), gram, ratio, ridge).reshape(-1)
        bank.read(rows.numel() * rows.element_size())
    return theta
