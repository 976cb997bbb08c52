"""Weights that were made elsewhere: a file as it comes, and what is done so that it fits the model of a scenario."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import CheckpointError, nearest
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.tensor_file import HALF_SAVED, kind_of, opened_file, read_safetensors
from fedmerge.federated.site import OwnExpert
from fedmerge.federated.statistics._base import State
from fedmerge.merging.bank.layout import StateDict, check_state, head_names, usual_prefix

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "module", "net", "network", "weights", "params")
"""Keys below which checkpoints keep a state dict, the likeliest first."""

SORTED = "safetensors"
"""The format that does not keep the order of tensors."""

DEEPEST = 3
"""Mappings within one another, and prefixes before one another, that are taken off."""

ONLY_WEIGHTS = "Save its weights alone: torch.save({'state_dict': model.state_dict()}, FILE)"


@dataclass(frozen=True)
class Brought:
    """What a file holds. form: its format. done: what was done to it, in words."""

    form: str
    state: State
    done: tuple[str, ...] = ()

    @property
    def keeps_order(self) -> bool:
        """Whether tensors stand as they were saved: safetensors sorts them."""
        return self.form != SORTED


def expected_of(model: ModelSpec) -> str:
    """What a file of a model's weights should be, in words."""
    return f"expected a safetensors file of {model.name}, or one of PyTorch"


def read_state(path: str | Path, key: str, model: ModelSpec, classes: int) -> dict[str, Tensor]:
    """A whole state that fits the model and its classes. Raises CheckpointError, naming the key and every difference."""
    found = read_weights(path, key, expected_of(model)).state
    check_state(found, build(model, classes).state_dict(), f"{key}: {Path(path).name}")
    return found


def read_weights(path: str | Path, key: str, expected: str = "expected weights: safetensors, or .pth of PyTorch") -> Brought:
    """The tensors of a file of safetensors or of PyTorch, which runs no code. Raises CheckpointError, naming the key."""
    file, head = opened_file(path, key, expected)
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        state = read_safetensors(file, head, key, expected)
        return Brought(SORTED, state)
    form = "PyTorch, zip" if head.startswith(b"PK") else "PyTorch, pickle"
    try:
        with warnings.catch_warnings():  # what torch warns of there, the one error below says
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's bytes break in there
        raise CheckpointError(f"{key}: {file}: found {_refused(file, head, error)}; {expected}") from None
    state, done = _unwrapped(content, f"{key}: {file}", expected)
    return Brought(form, state, tuple(done))


def _refused(file: Path, head: bytes, error: Exception) -> str:
    """Why PyTorch does not read a file."""
    said = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", said):
        return f"Python objects in it ({named[1]}), which are not read, as they could run code. {ONLY_WEIGHTS}"
    if "TorchScript" in said:
        return f"a program of TorchScript. {ONLY_WEIGHTS}, with model = torch.jit.load(FILE)"
    other = kind_of(file, head)
    if other and ".pth" not in other:
        return other
    if lacking := re.search(r"failed locating file (\S+):", said):
        return f"a zip of PyTorch that lacks {HALF_SAVED.format(lacking[1])}"
    if "cut off" in other or not isinstance(error, pickle.UnpicklingError):
        return "a file that was cut off, or that PyTorch has not written: copy it again"
    return f"a pickle that is not read: {said.splitlines()[0][:120]}. {ONLY_WEIGHTS}"


def _unwrapped(content: Any, where: str, expected: str, depth: int = 0) -> tuple[State, list[str]]:
    """The state dict in what a file holds, and words about where it was."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: found {type(content).__name__} in it; {expected}. {ONLY_WEIGHTS}")
    tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    inner = [name for name, value in content.items() if _holds_tensors(value)]
    chosen = next((name for name in WRAPPERS if name in inner), inner[0] if len(inner) == 1 and not tensors else None)
    if chosen is not None and depth < DEEPEST:
        state, done = _unwrapped(content[chosen], where, expected, depth + 1)
        others = [f"'{name}'" for name in inner if name != chosen]
        return state, [f"taken from '{chosen}'" + (f" (also there: {', '.join(others)})" if others else ""), *done]
    if not tensors:
        keys = ", ".join(f"'{name}'" for name in list(content)[:6]) or "nothing"
        many = f", several of which hold tensors ({', '.join(map(str, inner))})" if len(inner) > 1 else ""
        raise CheckpointError(f"{where}: found {keys} in it{many}; {expected}. {ONLY_WEIGHTS}")
    left = [str(name) for name in content if name not in tensors]
    return tensors, [f"left out what is no tensor: {', '.join(left[:4])}"] if left else []


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > DEEPEST:
        return False
    return any(isinstance(item, Tensor) or _holds_tensors(item, depth + 1) for item in value.values())


def fitting(owner: str, own: OwnExpert, model: nn.Module, classes: Sequence[str], theta_0: StateDict | None = None) -> Brought:
    """What a hospital brings, as the model has it. Raises CheckpointError, naming the owner."""
    try:
        found = read_weights(own.checkpoint, f"{owner}: expert.checkpoint")
    except CheckpointError as error:
        raise CheckpointError(str(error), "its expert cannot be read; the hospital's own log says why") from None
    return fitted(found, model, classes, own.classes, f"{owner}: expert.checkpoint: {own.file.name}", theta_0)


def fitted(
    weights: Brought,
    model: nn.Module,
    classes: Sequence[str],
    outputs: Sequence[str | None] | None,
    owner: str,
    theta_0: StateDict | None = None,
) -> Brought:
    """The state as the model has it: without prefixes, the head under its name and in the order of the classes, in its dtypes.

    outputs: the class of each output of the file's head, in its order, None for one that is not used; default: the classes.
    theta_0: whose counters it takes, which nothing trains. Raises CheckpointError, naming the owner and every difference.
    """
    wanted, done = model.state_dict() if theta_0 is None else theta_0, list(weights.done)
    state = _without_prefix(weights.state, wanted, done)
    heads = head_names(model)
    state = _own_head(state, wanted, heads, done)
    state = _in_order(state, wanted, heads, classes, outputs, owner, done)
    counters = [name for name in wanted if not wanted[name].is_floating_point()]
    lacking = [name for name in counters if name.endswith("num_batches_tracked") or name not in state]
    state |= {name: wanted[name] for name in lacking}
    other = sorted({str(state[name].dtype).removeprefix("torch.") for name in state if _other_dtype(state, wanted, name)})
    if other:
        done.append(f"{', '.join(other)} made {str(next(iter(wanted.values())).dtype).removeprefix('torch.')}")
    whole = {name: t.to(wanted[name].dtype) if _other_dtype(state, wanted, name) else t for name, t in state.items()}
    try:
        check_state(whole, wanted, owner)
    except CheckpointError as error:
        raise CheckpointError(str(error), "its expert does not fit the model; the hospital's own log says why") from None
    return Brought(weights.form, {name: whole[name].contiguous() for name in wanted}, tuple(done))


def _other_dtype(state: StateDict, wanted: StateDict, name: str) -> bool:
    if name not in wanted or state[name].is_floating_point() != wanted[name].is_floating_point():
        return False
    return state[name].dtype != wanted[name].dtype


def _without_prefix(state: StateDict, wanted: StateDict, done: list[str]) -> State:
    """Names without what wrappers of a model have put before them."""
    found = dict(state)
    for _ in range(DEEPEST):
        missing = [name for name in wanted if name not in found]
        prefix, count = usual_prefix([name for name in found if name not in wanted], missing)
        if 2 * count <= len(missing):
            break
        found = {name if (short := name.removeprefix(prefix)) in found else short: tensor for name, tensor in found.items()}
        done.append(f"prefix '{prefix}' stripped")
    return found


def _own_head(state: State, wanted: StateDict, heads: Sequence[str], done: list[str]) -> State:
    """The file's classifier under the model's name, where it is the only one that can be meant."""
    extra = [name for name in state if name not in wanted]
    if any(name in state for name in heads) or not extra:
        return state
    last = {name.rpartition(".")[2]: name for name in heads}
    places: dict[str, list[str]] = {}
    for name in extra:
        place, _, leaf = name.rpartition(".")
        if leaf in last and state[name].shape[1:] == wanted[last[leaf]].shape[1:]:
            places.setdefault(place, []).append(name)
    fit = [names for names in places.values() if len(names) == len(last)]
    if len(fit) != 1 or len(last) != len(heads):
        return state
    renamed = {name: last[name.rpartition(".")[2]] for name in fit[0]}
    here, there = fit[0][0].rpartition(".")[0], heads[0].rpartition(".")[0]
    done.append(f"head '{here}' taken as '{there}'")
    return {renamed.get(name, name): tensor for name, tensor in state.items()}


def _in_order(
    state: State,
    wanted: StateDict,
    heads: Sequence[str],
    classes: Sequence[str],
    outputs: Sequence[str | None] | None,
    owner: str,
    done: list[str],
) -> State:
    """The head's rows as the classes are ordered. Raises CheckpointError for outputs that are not the classes."""
    rows = {len(state[name]) for name in heads if name in state and state[name].ndim}
    if len(rows) != 1:
        return state
    (count,) = rows
    given = list(classes) if outputs is None else list(outputs)
    if len(given) != count:
        mend = "Say with 'classes' of 'expert' what each output is, in their order (null for one that is not used)"
        found = f"found a head of {count} outputs" + (
            f" and {len(given)} names for them in 'classes'" if outputs is not None else ""
        )
        raise _misnamed(owner, f"{found}; expected {len(given) if outputs is None else count}. {mend}")
    if outputs is None:
        done.append(f"outputs taken in the order {', '.join(classes)}")
        return state
    if wrong := [name for name in given if name is not None and name not in classes]:
        raise _misnamed(owner, f"classes: found '{wrong[0]}'; expected a class of the scenario: {nearest(wrong[0], classes)}")
    if odd := [f"'{name}' {given.count(name)} times" for name in classes if given.count(name) != 1]:
        raise _misnamed(owner, f"classes: found {', '.join(odd)}; expected every class of the scenario once")
    order = torch.tensor([given.index(name) for name in classes])
    if order.tolist() != list(range(count)):
        unused = f", {count - len(classes)} of them not used" if count > len(classes) else ""
        done.append(f"{count} outputs put into the order of the classes{unused}")
    return state | {name: state[name][order] for name in heads if name in state and len(wanted[name]) == len(classes)}


def _misnamed(owner: str, text: str) -> CheckpointError:
    return CheckpointError(f"{owner}: {text}", "the classes of its expert are not those of the scenario")
