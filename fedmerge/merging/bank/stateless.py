"""A model as a function of its state: nothing that it computed from one state is there in the next call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

CONTAINERS = (dict, list, set)

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of a bare module: its registries of parameters, buffers, modules and hooks."""


class Stateless:
    """Calls `model` with a state of the caller's.

    Some models keep what they have computed from their parameters: timm's TinyViT, LeViT and EfficientFormer index a table of
    attention biases once, and in evaluation mode every later call would run with the biases of the first state. So whatever a
    module holds beside parameters, buffers and modules is put back, after each call, to what it was when this was made: what a
    container held, what an attribute pointed to, and that it was not there at all. Numbers and flags are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not model.training:
            model.eval()  # timm's models drop what they have computed when their mode is set
        self._modules = [(module, frozenset(vars(module))) for module in model.modules()]
        self._kept: list[tuple[nn.Module, str, Any, Any]] = [
            (module, name, value, value.copy() if isinstance(value, CONTAINERS) else None)
            for module, _ in self._modules
            for name, value in vars(module).items()
            if name not in OF_TORCH and (value is None or isinstance(value, (*CONTAINERS, Tensor)))
        ]

    def __call__(self, state: dict[str, Tensor], batch: Tensor) -> Any:
        """The model's output on a batch."""
        try:
            return functional_call(self.model, state, (batch,))
        finally:
            self._forget()

    def _forget(self) -> None:
        for module, names in self._modules:
            held = vars(module)
            if len(held) != len(names):
                for name in [name for name in held if name not in names]:
                    del held[name]
        for module, name, value, content in self._kept:
            vars(module)[name] = value
            if content is not None and not _same(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)


def _same(value: Any, content: Any) -> bool:
    """Whether a container holds the same objects, in the same places."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(key in content and content[key] is held for key, held in value.items())
    return isinstance(value, set) or all(a is b for a, b in zip(value, content, strict=True))
