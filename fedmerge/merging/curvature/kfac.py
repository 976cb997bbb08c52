"""Fisher information by layer as a Kronecker product A (x) G: A of what goes into a layer, G of gradients of what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.errors import SiteError
from fedmerge.merging.bank.stateless import Stateless
from fedmerge.merging.curvature.fisher import Batched, diagonal

Layer = nn.Linear | nn.Conv2d
Estimator = Literal["exact", "mc"]
Calls = list[tuple[Tensor, Tensor]]
"""Of a layer, for each time that it was called: inputs (N, tokens, d) and the output as it came."""

INPUTS, GRADIENTS = ".A", ".G"
"""After a weight's name, the names of its two factors; no parameter can have one, below a parameter."""

BATCH = 32
"""Images that are looked at together."""


def layers(model: nn.Module) -> dict[str, Layer]:
    """Layers that K-FAC covers: each nn.Linear, and each convolution of patches that do not overlap, which is linear in a patch.

    Subclasses are left out, which may use their weights otherwise, and so are weights that modules share.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    dict[str, Layer]
        Weight's name -> layer.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import layers
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    >>> list(layers(model))
    ['0.weight', '2.weight']
    """
    times = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if name and (type(module) is nn.Linear or _of_patches(module)) and all(times[id(p)] == 1 for p in module.parameters())
    }


def _of_patches(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or module.groups != 1 or module.dilation != (1, 1):
        return False
    return module.kernel_size == module.stride and module.padding in ((0, 0), "valid")


def sides(layer: Layer) -> tuple[int, int]:
    """Sizes of the two factors of a layer.

    Parameters
    ----------
    layer : Layer
        One of `layers`.

    Returns
    -------
    tuple[int, int]
        Rows of A: the layer's inputs, and 1 more if it has a bias; rows of G: its outputs.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import sides
    >>> sides(torch.nn.Linear(2, 3))  # two inputs and the bias; three outputs
    (3, 3)
    """
    return layer.weight[0].numel() + (layer.bias is not None), len(layer.weight)


def others(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of no layer that K-FAC covers: norms, tokens, positions, all other convolutions.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    dict[str, nn.Parameter]
        Name -> parameter.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import others
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    >>> list(others(model))
    ['1.weight', '1.bias']
    """
    inside = {id(parameter) for layer in layers(model).values() for parameter in layer.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}


@torch.no_grad()
def beside_images(model: nn.Module, image: Tensor) -> str:
    """The first layer that K-FAC would cover and that is applied to something else than images, as in a text tower.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    image : Tensor
        One image (1, channels, H, W).

    Returns
    -------
    str
        Its weight's name; "" if there is none.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import beside_images
    >>> beside_images(torch.nn.Sequential(torch.nn.Linear(2, 3)).eval(), torch.ones(1, 2))
    ''
    """
    rows: dict[str, int] = {}  # those of two images, less twice those of one

    def listen(name: str, times: int) -> Any:
        def hear(_: nn.Module, __: object, output: Tensor) -> None:
            rows[name] = rows.get(name, 0) + times * len(output)

        return hear

    for count, times in ((1, -2), (2, 1)):
        hooks = [layer.register_forward_hook(listen(name, times)) for name, layer in layers(model).items()]
        try:
            model(image.expand(count, *image.shape[1:]).clone())
        finally:
            for hook in hooks:
                hook.remove()
    return next((name for name, left in rows.items() if left), "")


@torch.enable_grad()
def factors(model: nn.Module, x: Batched, estimator: Estimator = "exact", seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Kronecker factors of the Fisher information under the model's own label distribution.

    A = (1/N) sum_i a_i a_i^T               a_i: mean over tokens of the layer's input, with a 1 below if the layer has a bias
    G = (1/N) sum_i sum_y p_iy g_iy g_iy^T  g_iy: sum over tokens of d log p_iy / d output; mc: one label y ~ p_i for each image

    This is K-FAC-reduce, for models with one loss for each image: the gradient is the sum over tokens. So the block of a bias is
    exact, and all of A (x) G is for one image whose inputs are alike. K-FAC-expand takes tokens for images.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    x : Batched
        Images (N, channels, H, W).
    estimator : Estimator, default 'exact'
        Exact expectation over labels, or `mc`, one drawn label.
    seed : int, default 0
        Of the labels that `mc` draws.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        Weight's name -> A (d, d), G (o, o), float64.

    Raises
    ------
    SiteError
        If a layer is not applied to the rows of each image.

    References
    ----------
    Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures, NeurIPS 2023.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import factors
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False)).eval()
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> A, G = factors(model, torch.tensor([[1.0], [2.0]]))["0.weight"]
    >>> A  # mean of x^2
    tensor([[2.5000]], dtype=torch.float64)
    >>> G
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]], dtype=torch.float64)
    """
    found, generator = layers(model), torch.Generator().manual_seed(seed)
    if found and (odd := beside_images(model, next(iter(x.split(1))))):
        expected = "rows of each image. This model has no K-FAC; the diagonal it has"
        said = f"{odd}: found inputs that are no images' rows; expected {expected}"
        raise SiteError(said, told=said)
    double: dict[str, Any] = {"dtype": torch.float64, "device": next((p.device for p in model.parameters()), "cpu")}
    A = {name: torch.zeros(sides(layer)[0], sides(layer)[0], **double) for name, layer in found.items()}
    G = {name: torch.zeros(sides(layer)[1], sides(layer)[1], **double) for name, layer in found.items()}
    for part in x.split(BATCH) if found else ():
        with listening(found, len(part)) as heard:
            log_p = model(part.detach().requires_grad_()).log_softmax(-1)
        outputs = [(name, s) for name, calls in heard.items() for _, s in calls]
        for name, calls in heard.items():
            a = torch.cat([X for X, _ in calls], 1).double().mean(1)
            A[name] += a.T @ a / len(x)
        for y, weight in _labels(log_p.detach().exp(), estimator, generator):
            chosen = log_p.gather(1, y[:, None]).sum()
            gradients = torch.autograd.grad(chosen, [s for _, s in outputs], retain_graph=True, materialize_grads=True)
            for name, g in _summed(found, outputs, gradients, len(part)).items():
                G[name] += (weight[:, None] * g).T @ g / len(x)
    return {name: (A[name], G[name]) for name in found}


def rest(model: nn.Module, x: Batched, estimator: Estimator = "exact", seed: int = 0) -> dict[str, Tensor]:
    """The exact diagonal of the Fisher information for all parameters that K-FAC does not cover.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    x : Batched
        Images (N, channels, H, W).
    estimator : Estimator, default 'exact'
        As of `diagonal`.
    seed : int, default 0
        As of `diagonal`.

    Returns
    -------
    dict[str, Tensor]
        Name -> diagonal, of the parameter's shape.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import rest
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)).eval()
    >>> {name: tuple(diagonal.shape) for name, diagonal in rest(model, torch.ones(3, 2)).items()}
    {'0.weight': (2,), '0.bias': (2,)}
    """
    apart = {name: parameter.detach() for name, parameter in others(model).items()}
    if not apart:
        return {}
    fixed, call = {name: parameter.detach() for name, parameter in model.named_parameters()}, Stateless(model)

    def unflat(theta: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(theta, [tensor.numel() for tensor in apart.values()])
        return {name: piece.view(apart[name].shape) for name, piece in zip(apart, pieces, strict=True)}

    def forward(theta: Tensor, batch: Tensor) -> Tensor:
        logits: Tensor = call(fixed | unflat(theta), batch)
        return logits

    theta = torch.cat([tensor.reshape(-1) for tensor in apart.values()])
    total = torch.zeros_like(theta)
    for number, part in enumerate(x.split(BATCH)):
        total += diagonal(forward, theta, part, estimator, seed + number) * (len(part) / len(x))
    return unflat(total)


def product(A: Tensor, G: Tensor, W: Tensor) -> Tensor:
    """sum_k (A_k (x) G_k) vec(W_k) as a matrix: sum_k G_k W_k A_k, since A is symmetric and vec stacks columns.

    Parameters
    ----------
    A : Tensor
        (K, d, d), symmetric.
    G : Tensor
        (K, o, o), symmetric.
    W : Tensor
        (K, o, d), or (o, d) for the same under all k.

    Returns
    -------
    Tensor
        (o, d).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import product
    >>> A, G = torch.tensor([[[2.0]], [[1.0]]]), torch.tensor([[[1.0]], [[3.0]]])
    >>> product(A, G, torch.ones(2, 1, 1))  # 1 x 1 x 2 + 3 x 1 x 1
    tensor([[5.]])
    """
    return (G @ W @ A).sum(0)


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer in homogeneous coordinates: its bias is one more column of its weight.

    Parameters
    ----------
    weight : Tensor
        (o, ...), the axes after the first are flattened to d.
    bias : Tensor | None
        (o,), or None.

    Returns
    -------
    Tensor
        (o, d), or (o, d + 1) with a bias.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import joined
    >>> joined(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))
    tensor([[1., 2., 3.]])
    """
    return weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)


def _labels(p: Tensor, estimator: Estimator, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (N,) and their weights (N,) in the expectation over p (N, C)."""
    if estimator == "mc":
        yield torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(p.device), torch.ones(len(p)).to(p).double()
        return
    for c in range(p.shape[1]):
        yield torch.full((len(p),), c, device=p.device), p[:, c].double()


@contextmanager
def listening(found: Mapping[str, Layer], N: int) -> Iterator[dict[str, Calls]]:
    """Record inputs and outputs of layers while images go through the model.

    Parameters
    ----------
    found : Mapping[str, Layer]
        Weight's name -> layer.
    N : int
        Images that go through.

    Yields
    ------
    dict[str, Calls]
        Weight's name -> its calls, filled while the context is open.

    Raises
    ------
    SiteError
        In a forward, if a layer is applied to something else than rows of each image.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.curvature.kfac import layers, listening
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).eval()
    >>> with listening(layers(model), N=4) as calls:
    ...     logits = model(torch.ones(4, 2))
    >>> [(inputs, output)] = calls["0.weight"]
    >>> inputs.shape, output.shape
    (torch.Size([4, 1, 3]), torch.Size([4, 1]))
    """
    heard: dict[str, Calls] = {}

    def listen(name: str) -> Any:
        def hear(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if len(output) % N:
                expected = f"rows of each of {N} images. This model has no K-FAC; the diagonal it has"
                said = f"{name}: found an input of shape {tuple(inputs[0].shape)}; expected {expected}"
                raise SiteError(said, told=said)
            heard.setdefault(name, []).append((_rows(layer, inputs[0].detach(), N), output))
            return output.clone()  # what comes after may write into it

        return hear

    hooks = [layer.register_forward_hook(listen(name)) for name, layer in found.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _rows(layer: Layer, x: Tensor, N: int) -> Tensor:
    """Inputs (N, tokens, d), with a 1 at the end of each if the layer has a bias."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
    X = x.reshape(N, -1, x.shape[-1])
    return X if layer.bias is None else torch.cat([X, X.new_ones(*X.shape[:2], 1)], 2)


def _summed(
    found: Mapping[str, Layer], outputs: Sequence[tuple[str, Tensor]], gradients: Sequence[Tensor], N: int
) -> dict[str, Tensor]:
    """Of each layer, its outputs' gradients summed over tokens (N, o), float64."""
    total: dict[str, Tensor] = {}
    for (name, _), g in zip(outputs, gradients, strict=True):
        rows = g.flatten(2).transpose(1, 2) if isinstance(found[name], nn.Conv2d) else g
        total[name] = total.get(name, 0) + rows.reshape(N, -1, rows.shape[-1]).double().sum(1)
    return total
