"""One training run: a model, tensors, a recipe, and a generator. The same bits for the same seed and number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedmerge.data.images import Normalized, at_a_time
from fedmerge.errors import SiteError
from fedmerge.federated.client.augmentation import augment
from fedmerge.federated.messages import Arithmetic, LearningRate, Strength
from fedmerge.federated.model import train_mode
from fedmerge.federated.statistics._base import State
from fedmerge.federated.strategies._base import MOMENTUM, Optimizer


@dataclass(frozen=True)
class Recipe:
    """How one run trains. flips: whether a horizontal flip preserves the label. clip: largest norm of a gradient.

    proximal: mu of a term mu/2 ||theta - theta_0||^2 in the loss (Li et al., FedProx, MLSys 2020, eq. 2), theta_0 the weights that
    the run starts from. before, whole: where these steps are a part of more, how many came before, and all; the schedule of the
    learning rate goes through all of them. name: what is trained. lr_key: where its learning rate stands in a scenario. Both for
    the message of a training that diverges. precision: of the forward and of its loss, the term of `proximal` left out.
    """

    lr: float
    weight_decay: float
    steps: int
    batch_size: int
    optimizer: Optimizer
    schedule: LearningRate
    augment: Strength
    flips: bool
    clip: float = 5.0
    proximal: float = 0.0
    before: int = 0
    whole: int | None = None
    name: str = "a run"
    lr_key: str = "training.diversity.lr"
    precision: Arithmetic = "float32"

    def diverged(self, step: int) -> SiteError:
        """What to say of a loss or weights that are no numbers any more, 0 if they never were; nothing of it is of an image."""
        said = f"training diverged in {self.name}, step {step} (lr {self.lr:g}): lower {self.lr_key}"
        if step == 0:
            said = f"{self.name} has no finite loss before its first step: the weights that it starts from are too large"
        return SiteError(said, told=said)


@dataclass(frozen=True)
class LabeledImages:
    """Normalized images (N, channels, H, W), as a tensor or made batch by batch, and labels (N,)."""

    x: Tensor | Normalized
    y: Tensor


def fit(model: nn.Module, data: LabeledImages, recipe: Recipe, seed: int, visit: Callable[[int], None]) -> None:
    """Train in place for `recipe.steps` steps; `visit(step)` is called after every step, counted from 1.

    Dropout draws from torch's global generator, which is forked here, so that nothing outside changes.
    Raises SiteError as soon as the loss is not finite.
    """
    generator, parameters = torch.Generator().manual_seed(seed), list(model.parameters())
    device = parameters[0].device
    devices = [device] if device.type == "cuda" else []
    halved = recipe.precision == "bfloat16"  # it has the exponents of float32, so gradients need no scale
    last = channels_last(model, recipe.precision)
    with torch.random.fork_rng(devices=devices), _laid_out(model, last):
        optimizer = _optimizer(model, recipe)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step + recipe.before, recipe))
        anchors = [parameter.detach().clone() for parameter in parameters] if recipe.proximal else []
        torch.manual_seed(seed)
        train_mode(model)
        for step, (x, y) in enumerate(_batches(data, recipe, device, generator), start=1):
            with torch.autocast(device.type, torch.bfloat16, enabled=halved):
                loss = F.cross_entropy(model(x), y)
            if anchors:
                away = [(p - anchor).pow(2).sum() for p, anchor in zip(parameters, anchors, strict=True)]
                loss = loss + recipe.proximal / 2 * torch.stack(away).sum()
            if not torch.isfinite(loss):
                raise recipe.diverged(step if step > 1 or recipe.before else 0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, recipe.clip, foreach=True)  # the bits of one after the other
            optimizer.step()
            rate.step()
            if step == recipe.steps and not _finite(model, x):
                raise recipe.diverged(step)
            visit(step)


def channels_last(model: nn.Module, precision: Arithmetic) -> bool:
    """Whether a training has the channels of one place side by side in memory: convolutions then add in another order.

    With bfloat16, where it is faster on a CPU: not for grouped convolutions (`benchmarks/training.py`).
    """
    grouped = any(getattr(module, "groups", 1) > 1 for module in model.modules())
    return precision == "float32_channels_last" or (precision == "bfloat16" and not grouped)


@contextmanager
def _laid_out(model: nn.Module, last: bool) -> Iterator[None]:
    """Channels last, if so; afterwards as before."""
    if not last:
        yield
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)


def state_of(model: nn.Module) -> State:
    """A copy of a model's weights on the CPU, laid out row by row, however they are in training."""
    layout = torch.contiguous_format
    return {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in model.state_dict().items()}


def _batches(data: LabeledImages, recipe: Recipe, device: torch.device, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images and labels of every step. While the model is busy with one batch, a thread makes the next.

    All draws are here, in the order of the steps: what the thread does is the same whenever it does it. A batch is there until the
    next one is asked for.
    """
    order = torch.empty(0, dtype=torch.long)

    def draw() -> Tensor:
        nonlocal order
        if len(order) < min(recipe.batch_size, len(data.y)):
            order = torch.randperm(len(data.y), generator=generator)
        chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
        return chosen

    # Two tensors take turns: new ones for every batch would leave the memory in pieces
    turns = cycle([torch.empty(min(recipe.batch_size, len(data.y)), *data.x.shape[1:]) for _ in range(2)])

    def read(chosen: Tensor, out: Tensor) -> Tensor:
        return data.x.batch(chosen, out) if isinstance(data.x, Normalized) else data.x[chosen]

    with ThreadPoolExecutor(1) as reader:
        chosen = draw()
        ahead = reader.submit(read, chosen, next(turns))
        for step in range(1, recipe.steps + 1):
            x = augment(ahead.result().to(device), recipe.augment, recipe.flips, generator)
            y = data.y[chosen].to(device)
            if step < recipe.steps:
                chosen = draw()
                ahead = reader.submit(read, chosen, next(turns))
            yield x, y


@torch.no_grad()
def _finite(model: nn.Module, x: Tensor) -> bool:
    """Whether a model's weights are finite, and what it says of a batch: weights can be too large for that."""
    return all(bool(torch.isfinite(item).all()) for item in (*model.parameters(), model(x)))


@torch.inference_mode()
def logits_of(model: nn.Module, x: Tensor | Normalized, batch_size: int = 256) -> Tensor:
    """Logits (N, C) in evaluation mode, on the CPU; the model's mode is restored."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    logits = torch.cat([model(part.to(device)).float().cpu() for part in x.split(at_a_time(x, batch_size))])
    for module, mode in modes.items():
        module.training = mode
    return logits


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of right predictions; logits (N, C), y (N,)."""
    return float((logits.argmax(1) == y).double().mean())


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match recipe.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
        case "sgd":
            return torch.optim.SGD(parameters, recipe.lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay)


def _rate(step: int, recipe: Recipe) -> float:
    """Factor of the learning rate: constant, or a tenth of the steps warming up and then half a cosine down to 0."""
    if recipe.schedule == "constant":
        return 1.0
    whole = recipe.whole or recipe.steps
    warm = max(1, whole // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, whole - warm)))
