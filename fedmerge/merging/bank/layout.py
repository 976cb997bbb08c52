"""Which tensor of a model is encoder, head, or buffer: decided once, by module and name, never by dtype alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fedmerge.errors import CheckpointError

StateDict = Mapping[str, Tensor]

SHOWN = 4
"""Differences of one kind that an error message lists."""


@dataclass(frozen=True)
class Parts:
    """Names of a model's tensors, in the order of `state_dict()`.

    Attributes
    ----------
    encoder : tuple[str, ...]
        Trainable float parameters, but for the classifier's.
    head : tuple[str, ...]
        Parameters of the classifier.
    statistics : tuple[tuple[str, str], ...]
        BatchNorm running means and variances, by pairs (mean, variance).
    fixed : tuple[str, ...]
        Everything else in the state: counters, index tables, masks.
    aliases : dict[str, str], optional
        Other names of tied parameters, by name.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import Parts
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    >>> parts = Parts.of(model)
    >>> parts.encoder, parts.head
    (('0.weight', '0.bias', '1.weight', '1.bias'), ('2.weight', '2.bias'))
    >>> parts.statistics, parts.fixed
    ((('1.running_mean', '1.running_var'),), ('1.num_batches_tracked',))
    """

    encoder: tuple[str, ...]
    head: tuple[str, ...]
    statistics: tuple[tuple[str, str], ...]
    fixed: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> tuple[str, ...]:
        """What a state holds beside parameters."""
        return (*(name for pair in self.statistics for name in pair), *self.fixed)

    @staticmethod
    def of(model: nn.Module, head: Sequence[str] | None = None) -> Parts:
        """The parts of `model`; `head` names the classifier's parameters where they cannot be found.

        Raises CheckpointError if `head` names no parameter, or if there is no classifier to be found.
        """
        heads = set(head_names(model, head))
        parameters = [name for name, _ in model.named_parameters()]
        statistics = tuple(
            (f"{prefix}running_mean", f"{prefix}running_var")
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
            for prefix in [f"{name}." if name else ""]
        )
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        every = dict(model.named_parameters(remove_duplicate=False))
        aliases = {name: first[id(parameter)] for name, parameter in every.items() if name not in set(parameters)}
        claimed = {*parameters, *aliases, *(name for pair in statistics for name in pair)}
        return Parts(
            encoder=tuple(name for name in parameters if name not in heads),
            head=tuple(name for name in parameters if name in heads),
            statistics=statistics,
            fixed=tuple(name for name in model.state_dict() if name not in claimed),
            aliases=aliases,
        )


def head_names(model: nn.Module, head: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the final classifier's parameters: as given, else timm's `get_classifier()`, else the last linear layer.

    Parameters
    ----------
    model : nn.Module
        The architecture.
    head : Sequence[str], optional
        Names that the caller gives; default: they are looked for.

    Returns
    -------
    tuple[str, ...]
        Names, in the model's order.

    Raises
    ------
    CheckpointError
        If a given name is no parameter, or no classifier is found.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import head_names
    >>> head_names(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    ('1.weight', '1.bias')
    """
    parameters = dict(model.named_parameters())
    if head is not None:
        unknown = [head] if isinstance(head, str) else sorted(set(head) - set(parameters))
        if unknown:
            raise CheckpointError(
                f"head: found {unknown}; expected a list of parameters, of which the model's last are {list(parameters)[-4:]}"
            )
        return tuple(head)
    classifiers = _classifiers(model)
    owned = {id(parameter) for module in classifiers for parameter in module.parameters()}
    names = tuple(name for name, parameter in parameters.items() if id(parameter) in owned)
    if not names:
        raise CheckpointError("head: found no final classifier in the model; expected one. Name its parameters with head=[...]")
    return names


def _classifiers(model: nn.Module) -> list[nn.Module]:
    getter = getattr(model, "get_classifier", None)
    if getter is not None:
        found = getter()
        return [item for item in (found if isinstance(found, tuple | list) else [found]) if isinstance(item, nn.Module)]
    linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1:]


def describe_mismatch(found: StateDict, wanted: StateDict) -> list[str]:
    """Describe how the tensors of one state dict differ from those of another.

    Parameters
    ----------
    found : StateDict
        The state dict in question.
    wanted : StateDict
        The state dict that it should look like.

    Returns
    -------
    list[str]
        One line for each difference; empty if names, shapes and dtypes agree.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import describe_mismatch
    >>> describe_mismatch(found={"weight": torch.zeros(2)}, wanted={"weight": torch.zeros(3)})
    ['shape of weight: found (2,), expected (3,)']
    """
    lines = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in found]
    lines += [f"unexpected: {name} {tuple(found[name].shape)}" for name in found if name not in wanted]
    for name in wanted:
        if name not in found:
            continue
        here, there = found[name], wanted[name]
        if here.shape != there.shape:
            why = _why_other_shape(name, here.shape, there.shape)
            lines.append(f"shape of {name}: found {tuple(here.shape)}, expected {tuple(there.shape)}{why}")
        elif here.is_floating_point() != there.is_floating_point():
            lines.append(f"dtype of {name}: found {here.dtype}, expected {there.dtype}")
    return lines


def found_as(found: object) -> str:
    """Describe what was found in place of something else, for an error message.

    Parameters
    ----------
    found : object
        Any object.

    Returns
    -------
    str
        A phrase such as `a list` or `an array of shape (3, 4)`.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import found_as
    >>> found_as([1, 2]), found_as(torch.zeros(3, 4))
    ('list', 'a tensor of shape (3, 4)')
    """
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def check_mapping(owner: str, state: object) -> None:
    """Check that an object maps names to tensors that have values.

    Parameters
    ----------
    owner : str
        Whose it is, for the error message.
    state : object
        The object.

    Raises
    ------
    CheckpointError
        If it does not; the message names the owner.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.errors import CheckpointError
    >>> from fedmerge.merging.bank.layout import check_mapping
    >>> check_mapping("expert 'axial'", {"weight": torch.zeros(2)})
    >>> try:
    ...     check_mapping("expert 'axial'", torch.nn.Linear(1, 2))
    ... except CheckpointError as error:
    ...     print(error)
    expert 'axial': found Linear; expected a state dict. Give module.state_dict()
    """
    if not isinstance(state, Mapping):
        mend = "Give module.state_dict()" if isinstance(state, nn.Module) else "Give several experts in a list, or by name"
        raise CheckpointError(f"{owner}: found {found_as(state)}; expected a state dict. {mend}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{owner}: found the key {name!r}; expected names of tensors. Give module.state_dict()")
        if not isinstance(value, Tensor):
            mend = f"Give the state dict inside, checkpoint['{name}']" if isinstance(value, Mapping) else "Give tensors alone"
            raise CheckpointError(f"{owner}: found {found_as(value)} under '{name}'; expected a tensor. {mend}")
        if is_lazy(value):
            found, mend = f"{name}, which has no shape before its first batch", "Call the model once on a batch of images"
            raise CheckpointError(f"{owner}: found {found}; expected weights. {mend}")
        if value.is_meta:
            raise CheckpointError(f"{owner}: found {name} on the device 'meta', which holds no values; expected loaded weights")
        if value.layout != torch.strided:
            mend = "Give tensor.to_dense()"
            raise CheckpointError(f"{owner}: found {name} as a sparse tensor ({value.layout}); expected a dense one. {mend}")
        if value.is_quantized or value.is_nested:
            found, mend = (
                ("quantized", "Give tensor.dequantize()") if value.is_quantized else ("nested", "Give its tensors by name")
            )
            raise CheckpointError(f"{owner}: found {name} as a {found} tensor; expected one array of numbers. {mend}")


def check_state(state: StateDict, wanted: StateDict, owner: str) -> None:
    """Check that a state dict fits the model, that all its values are finite, and that no variance is negative.

    Parameters
    ----------
    state : StateDict
        The state dict.
    wanted : StateDict
        The model's own state dict.
    owner : str
        Whose it is, for the error message.

    Raises
    ------
    CheckpointError
        If it does not fit, or holds a NaN, an infinity or a negative variance; the message names the owner and every difference.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.errors import CheckpointError
    >>> from fedmerge.merging.bank.layout import check_state
    >>> try:
    ...     check_state({"weight": torch.tensor([torch.nan])}, wanted={"weight": torch.zeros(1)}, owner="expert 'axial'")
    ... except CheckpointError as error:
    ...     print(error)
    expert 'axial' does not fit the model:
      values of weight: found NaN or infinity, expected finite numbers
    """
    check_mapping(owner, state)
    ties = tied(wanted)
    lines = _prefixed(state, wanted) or [*describe_mismatch(state, wanted), *untied(state, ties)]
    one_only = [(a, b) for a, b in ties.items() if (a in state) != (b in state)]
    lines += [f"tied: {a} is {b} in this model; give its tensor under both names" for a, b in one_only]
    lines += [
        f"values of {name}: found NaN or infinity, expected finite numbers"
        for name, tensor in state.items()
        if not all_finite(tensor)
    ]
    lines += [f"values of {name}: found a negative variance, expected 0 or more" for name in negative_variances(state)]
    if lines:
        raise CheckpointError("\n".join([f"{owner} does not fit the model:", *_shortened(lines)]))


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity.

    Parameters
    ----------
    tensor : Tensor
        (...), of any dtype.

    Returns
    -------
    bool
        True for whole numbers.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import all_finite
    >>> all_finite(torch.tensor([0.0, torch.inf])), all_finite(torch.ones(2).to(torch.float8_e4m3fn))
    (False, True)
    """
    narrow = tensor.is_floating_point() and tensor.element_size() == 1  # torch has no isfinite for these
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


def negative_variances(state: StateDict) -> list[str]:
    """Find BatchNorm variances below 0, of which a model takes the root.

    Parameters
    ----------
    state : StateDict
        A state dict, or a part of one.

    Returns
    -------
    list[str]
        Their names.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import negative_variances
    >>> negative_variances({"1.running_mean": torch.tensor([-1.0]), "1.running_var": torch.tensor([-1.0])})
    ['1.running_var']
    """
    variances = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] == "running_var"}
    return [name for name, tensor in variances.items() if bool((tensor < 0).any())]


def tied(wanted: StateDict) -> dict[str, str]:
    """Find the parameters that a model ties: two names of one tensor.

    Parameters
    ----------
    wanted : StateDict
        The model's state dict.

    Returns
    -------
    dict[str, str]
        Second name -> first name.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import tied
    >>> model = torch.nn.ModuleDict({"embed": torch.nn.Linear(2, 3), "head": torch.nn.Linear(2, 3)})
    >>> model["head"].weight = model["embed"].weight
    >>> tied(model.state_dict())
    {'head.weight': 'embed.weight'}
    """
    first: dict[tuple[int, torch.Size], str] = {}
    places = {name: (t.data_ptr(), t.shape) for name, t in wanted.items() if t.numel() and t.data_ptr()}
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def untied(state: StateDict, ties: Mapping[str, str]) -> list[str]:
    """Find tensors that the model ties and that differ in a state dict, where one of the two would be lost.

    Parameters
    ----------
    state : StateDict
        The state dict.
    ties : Mapping[str, str]
        Second name -> first name, as `tied` finds them.

    Returns
    -------
    list[str]
        One line for each pair that differs.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.layout import untied
    >>> untied({"embed": torch.zeros(1), "head": torch.ones(1)}, ties={"head": "embed"})
    ['untied: head and embed are one tensor of this model, and differ here by up to 1']
    """
    lines = []
    for name, other in ties.items():
        here, there = state.get(name), state.get(other)
        if (
            here is not None
            and there is not None
            and here.shape == there.shape
            and not torch.equal(here.nan_to_num(), there.nan_to_num())
        ):
            off = float((here.double() - there.double()).abs().max())
            lines.append(f"untied: {name} and {other} are one tensor of this model, and differ here by up to {off:.2g}")
    return lines


def _why_other_shape(name: str, here: torch.Size, there: torch.Size) -> str:
    """What commonly lies behind a tensor of another shape, in brackets; empty if nothing is known."""
    if len(here) == len(there):
        apart = [axis for axis, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        if "pos_embed" in name or "relative_position" in name or "attention_bias" in name:
            return " (a position embedding of another img_size or patch_size)" if apart != [len(here) - 1] else ""
        if apart == [0] and len(here) <= 2 and name.rpartition(".")[0].split(".")[0] in ("head", "heads", "fc", "classifier"):
            return f" (a head of {here[0]} classes)"
        if apart == [1] and len(here) == 4 and here[1] in (1, 3, 4) and there[1] in (1, 3, 4):
            return f" (made for images of {here[1]} channels: in_chans)"
    return ""


def _prefixed(state: StateDict, wanted: StateDict) -> list[str]:
    """A line about a prefix that most names have too much, as wrappers of a model leave it, or too little."""
    unexpected, missing = [n for n in state if n not in wanted], [n for n in wanted if n not in state]
    prefix, count = usual_prefix(unexpected, missing)
    lacking, short = usual_prefix(missing, unexpected)
    if 2 * count > len(missing):
        every = all(name.startswith(prefix) for name in unexpected)
        kept, who = ("", "all") if every else (f" if name.startswith('{prefix}')", "most")
        strip = f"{{name.removeprefix('{prefix}'): tensor for name, tensor in state.items(){kept}}}"
        return [f"names: {who} begin with '{prefix}', which the model's do not; strip it: {strip}"]
    if 2 * short > len(missing):
        return [f"names: the model's all begin with '{lacking}', and none here; put it in front of each"]
    return []


def usual_prefix(longer: Sequence[str], shorter: Sequence[str]) -> tuple[str, int]:
    """The prefix, up to a dot, by which most names of one list differ from names of another.

    Parameters
    ----------
    longer : Sequence[str]
        Names that may have a prefix.
    shorter : Sequence[str]
        Names without it.

    Returns
    -------
    tuple[str, int]
        The prefix, and how many names have it.

    Examples
    --------
    >>> from fedmerge.merging.bank.layout import usual_prefix
    >>> usual_prefix(["module.stem", "module.head"], ["stem", "head"])
    ('module.', 2)
    """
    known, found = set(shorter), Counter[str]()
    for name in longer:
        steps = name.split(".")
        found.update(".".join(steps[:n]) + "." for n in range(1, len(steps)) if ".".join(steps[n:]) in known)
    return found.most_common(1)[0] if found else ("", 0)


def _shortened(lines: list[str]) -> list[str]:
    """A few lines of every kind (missing, unexpected, shape, ...), so that no kind hides another."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(line.split()[0], []).append(line)
    shown: list[str] = []
    for same in kinds.values():
        shown += [f"  {line}" for line in same[:SHOWN]]
        if len(same) > SHOWN:
            shown.append(f"  ... and {len(same) - SHOWN} more of these")
    return shown
