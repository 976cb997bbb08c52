"""A model as a function of its state: nothing that it computed from one state is there in the next call."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

CONTAINERS = (dict, list, set)

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of a bare module: its registries of parameters, buffers, modules and hooks."""


class Stateless:
    """Calls `model` with a state of the caller's.

    Some models keep what they have computed from their parameters: timm's TinyViT, LeViT and EfficientFormer index a table of
    attention biases once, and in evaluation mode every later call would run with the biases of the first state. So whatever a
    module holds beside parameters, persistent buffers and modules is put back, after each call, to what it was when this was made:
    attributes, also numbers and flags, what containers and plain objects below them hold, and what tensors beside the state
    hold, non-persistent buffers among them.

    Parameters
    ----------
    model : nn.Module
        Any model; its parameters and buffers are left as they are.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.stateless import Stateless
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> call = Stateless(model)
    >>> call({"weight": torch.tensor([[1.0], [3.0]])}, torch.ones(1, 1))
    tensor([[1., 3.]])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not model.training:
            model.train().eval()  # timm's models drop what they have computed when they are set to train
        held = list(_holders(model))
        self._kept = [(holder, _content(holder)) for holder in held]
        tensors = {id(item): item for _, content in self._kept for item in _items(content) if isinstance(item, Tensor)}
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors.values() if not tensor.is_meta]
        self._versions = [_version(tensor) for tensor, _ in self._tensors]

    def __call__(self, state: dict[str, Tensor], batch: Tensor) -> Any:
        """The model's output on a batch."""
        try:
            return functional_call(self.model, state, (batch,))
        finally:
            self._forget()

    def _forget(self) -> None:
        for holder, content in self._kept:
            _put_back(holder, content)
        for number, (tensor, values) in enumerate(self._tensors):
            if _version(tensor) != self._versions[number]:
                with torch.no_grad():
                    tensor.copy_(values)
                self._versions[number] = _version(tensor)


def _holders(model: nn.Module) -> Iterator[Any]:
    """Modules, and all containers and plain objects that they hold beside the state, each once."""
    found: list[Any] = list(model.modules())
    seen = {id(holder) for holder in found}
    for holder in found:  # it grows
        yield holder
        for item in _items(_content(holder)):
            if id(item) not in seen and (isinstance(item, (*CONTAINERS, tuple)) or _plain(item)):
                seen.add(id(item))
                found.append(item)


def _plain(item: object) -> bool:
    """Whether something is an object with attributes of its own that a model may keep things in."""
    return hasattr(item, "__dict__") and not isinstance(item, nn.Module | Tensor | ModuleType | type) and not callable(item)


def _content(holder: Any) -> Any:
    """What a holder holds now: a copy of a container, or attributes by name; of a module, also its non-persistent buffers."""
    if isinstance(holder, tuple):
        return holder
    if isinstance(holder, CONTAINERS):
        return holder.copy()
    if not isinstance(holder, nn.Module):
        return dict(vars(holder))
    own = {name: value for name, value in vars(holder).items() if name not in OF_TORCH}
    return own | {(name,): holder._buffers.get(name) for name in holder._non_persistent_buffers_set}


def _items(content: Any) -> list[Any]:
    return list(content.values() if isinstance(content, dict) else content)


def _put_back(holder: Any, content: Any) -> None:
    now = _content(holder)
    if _same(now, content):
        return
    if isinstance(holder, CONTAINERS):
        holder.clear()
        holder.extend(content) if isinstance(holder, list) else holder.update(content)
        return
    for name in now.keys() - content.keys():
        del vars(holder)[name]
    for name, value in content.items():
        if isinstance(name, tuple):
            holder._buffers[name[0]] = value
        else:
            vars(holder)[name] = value


def _same(now: Any, content: Any) -> bool:
    """Whether a container holds the same objects, in the same places."""
    if len(now) != len(content):
        return False
    if isinstance(now, dict):
        return all(key in content and content[key] is held for key, held in now.items())
    return isinstance(now, set) or all(a is b for a, b in zip(now, content, strict=True))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, where torch counts it."""
    return 0 if tensor.is_inference() else int(tensor._version)
