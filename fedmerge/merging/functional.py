"""Merging as a library: one model from several experts, once (`merge`) or for every batch (`Adapter`).

Both take the path of a run, `rows_of` and `predict`, so that they give the same bits as a run with the same experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite
from operator import index
from typing import Any, TypeVar, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedmerge.errors import CheckpointError, MethodError, first_line, nearest
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.layout import StateDict, check_mapping, found_as
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Answer, Evidence
from fedmerge.merging.methods._base import METHODS, Method, Stateful, Static
from fedmerge.merging.per_sample.dispatch import PerSample, Way
from fedmerge.merging.predict import Prediction, Row, bank_of, carry, evidence_of, predict, rows_of
from fedmerge.system.notebook import html_table
from fedmerge.system.torch_settings import own_settings

Experts = Sequence[StateDict] | Mapping[str, StateDict]
"""State dicts of the experts; without names they are expert-0, expert-1, ..."""

T = TypeVar("T")

MENDS = {
    "theta_0": "base=..., the state dict that all experts started from",
    "generalist": "generalist=..., the state dict of a model to fall back on",
    "counts": "counts=[...], the number of training images of each expert",
}
"""What gives a method what it needs, beside the statistics of sites."""


@own_settings(gradients=False)
def merge(  # noqa: PLR0913 - all but the experts have defaults
    model: nn.Module,
    experts: Experts,
    method: str | Method = "mean",
    base: StateDict | None = None,
    *,
    counts: Sequence[int] | Mapping[str, int] | None = None,
    statistics: Mapping[str, Experts] | None = None,
    head: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    **hyper_parameters: Any,
) -> dict[str, Tensor]:
    """Merge experts once, by a static method.

    Parameters
    ----------
    model : nn.Module
        The architecture that every state dict fits. It is copied, and never changed.
    experts : sequence or mapping of state dicts
        K experts, by name if a mapping.
    method : str or Method
        A static method: mean, ties, fisher, ... (`fedmerge methods` lists them).
    base : state dict, optional
        theta_0, the initialization that all experts started from, for methods about task vectors.
    counts : sequence or mapping of int, optional
        Training images of each expert, for `weighted_mean`.
    statistics : mapping, optional
        By kind ("fisher", "soup", "gram", "gram_rounds", "centroid"), one mapping of tensors for each expert.
    head : sequence of str, optional
        Names of the classifier's parameters; default: timm's `get_classifier()`, else the last linear layer.
    device : torch.device or str, optional
        Where to merge; default: where the model is.
    **hyper_parameters
        Fields of the method, e.g. `density=0.2` for ties.

    Returns
    -------
    dict of str to Tensor
        A state dict that `model.load_state_dict` accepts, BatchNorm statistics included. Floats are float32.

    Raises
    ------
    MethodError
        For an unknown method, one that needs batches, a wrong hyper-parameter, or something that the method needs and lacks.
    CheckpointError
        For experts that do not fit the model.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Linear(1, 2)
    >>> start = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    >>> a, b = ({name: value + number for name, value in start.items()} for number in (1.0, 3.0))
    >>> fedmerge.merge(model, [a, b])["bias"].tolist()
    [2.0, 2.0]
    >>> fedmerge.merge(model, [a, b], method="task_arithmetic", base=start, scale=0.25)["bias"].tolist()
    [1.0, 1.0]
    """
    chosen = _method(method, hyper_parameters)
    given = _Given(model, base, None, False, head, device)
    named = _experts(experts, counts, None, statistics)
    row = _only_row(chosen, given, named)
    if not isinstance(row, Static):
        raise MethodError(f"method {chosen.key}: found one that needs batches; expected a static one. Use fedmerge.Adapter for it")
    bank = given.bank(named)
    (merged,) = rows_of([row], bank).values()
    assert merged.theta is not None
    return bank.state_dict(merged.theta, merged.statistics)


class Adapter:
    """A merged model that adapts to every batch, by any method of the folder; the state is carried from batch to batch.

    Parameters
    ----------
    model : nn.Module
        The architecture that every state dict fits. It is copied, and never changed; it runs in evaluation mode.
    experts : sequence or mapping of state dicts
        K experts, by name if a mapping.
    method : str or Method
        `fedmerge methods` lists them. Methods that must see the whole stream first are refused.
    base : state dict, optional
        theta_0, the initialization that all experts started from.
    generalist : state dict, optional
        A model that `t3` and `t3_batch` fall back on. A str is their hyper-parameter of that name.
    statistics : mapping, optional
        By kind ("fisher", "soup", "gram", "gram_rounds", "centroid"), one mapping of tensors for each expert.
    counts : sequence or mapping of int, optional
        Training images of each expert.
    temperatures : sequence or mapping of float, optional
        Temperature of each expert, by which calibrated methods divide its logits; default 1.
    flips : bool
        Whether a horizontal flip preserves the label, so that it may serve as a view.
    head : sequence of str, optional
        Names of the classifier's parameters; default: timm's `get_classifier()`, else the last linear layer.
    device : torch.device or str, optional
        Where to run; default: where the model is.
    per_sample : {"auto", "rows", "mixture", "samples"}
        How samples with coefficients of their own are merged.
    **hyper_parameters
        Fields of the method, e.g. `gamma=5` for eam.

    Raises
    ------
    MethodError
        For an unknown method, one that cannot run here, a wrong hyper-parameter, or something that the method needs and lacks.
    CheckpointError
        For experts that do not fit the model.

    Examples
    --------
    >>> import fedmerge, torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> bright = torch.ones(1, 16)
    >>> sure = {"1.weight": torch.cat([bright, -bright]), "1.bias": torch.zeros(2)}
    >>> unsure = {"1.weight": torch.cat([bright, -bright]) / 100, "1.bias": torch.zeros(2)}
    >>> adapt = fedmerge.Adapter(model, {"axial": sure, "coronal": unsure}, method="eam", gamma=5)
    >>> batch = torch.cat([torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)])
    >>> adapt(batch).argmax(1).tolist()
    [0, 1]
    >>> bool(adapt.coefficients.encoder[0] > 0.9)  # axial knows this batch
    True
    """

    @own_settings(gradients=False)
    def __init__(  # noqa: PLR0913 - all but the experts have defaults
        self,
        model: nn.Module,
        experts: Experts,
        method: str | Method = "eam",
        base: StateDict | None = None,
        *,
        generalist: StateDict | str | None = None,
        statistics: Mapping[str, Experts] | None = None,
        counts: Sequence[int] | Mapping[str, int] | None = None,
        temperatures: Sequence[float] | Mapping[str, float] | None = None,
        flips: bool = False,
        head: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        per_sample: Way = "auto",
        **hyper_parameters: Any,
    ) -> None:
        if isinstance(generalist, str):
            hyper_parameters["generalist"], generalist = generalist, None
        elif generalist is not None and isinstance(method, str) and "generalist" in _kind(method).model_fields:
            hyper_parameters["generalist"] = "generalist"
        self.method = _method(method, hyper_parameters)
        given = _Given(model, base, generalist, flips, head, device)
        self._given = replace(given, base=_copied(base), generalist=_copied(generalist))
        if per_sample not in get_args(Way):
            raise MethodError(f"per_sample: found {per_sample!r}; expected one of {', '.join(get_args(Way))}")
        self._way = per_sample
        found = _experts(experts, counts, temperatures, statistics)
        self._settle({name: replace(expert, state=_copied(expert.state)) for name, expert in found.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the coefficients."""
        return self._bank.names

    @property
    def coefficients(self) -> Coefficients | None:
        """Coefficients of the last batch, `encoder` and `head`, each (K,) or (N, K); None where the method has none."""
        return self._last.coefficients if self._last else None

    def _repr_html_(self) -> str:
        """The experts with their coefficients of the last batch, as notebooks show it; of samples, the mean."""
        last = self.coefficients
        parts = [("encoder", last.encoder), ("head", last.head)] if last else []
        shares = [alpha.reshape(-1, alpha.shape[-1]).mean(0).tolist() for _, alpha in parts]
        names = (*self.names, *self._bank.anchors)[: len(shares[0]) if shares else len(self.names)]
        rows = [(name, *(f"{share[k]:.3f}" for share in shares)) for k, name in enumerate(names)]
        caption = f"{self.method.key}, {len(self.names)} experts" + ("" if last else ", no coefficients yet")
        return html_table(caption, ["expert", *(part for part, _ in parts)], rows)

    @own_settings(gradients=False)
    def __call__(self, batch: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict one batch, and go on to the next state.

        Parameters
        ----------
        batch : Tensor
            Normalized images (N, channels, H, W), as the model takes them.
        labels : Tensor, optional
            The true classes (N,), for the method `oracle` alone.

        Returns
        -------
        Tensor
            Log-probabilities (N, C), which serve as logits: those of the merged model, normalized; where a method mixes
            predictions, the logarithm of the mixture. A sample whose logits are not finite is predicted uniformly.

        Raises
        ------
        MethodError
            For a batch that is empty, of whole numbers or without values, or that the model cannot take; for labels that are
            missing, that are no classes, or that the method may not see.
        """
        if not isinstance(batch, Tensor) or batch.ndim == 0 or len(batch) == 0:
            raise MethodError(f"batch: found {found_as(batch)}; expected a tensor (N, channels, H, W) of at least one sample")
        if batch.is_meta:
            raise MethodError("batch: found a tensor on the device 'meta', which holds no values; expected images")
        if not batch.is_floating_point():
            mend = "Give batch.float(), normalized as in the experts' training"
            raise MethodError(f"batch: found values of {batch.dtype}; expected normalized floats. {mend}")
        batch = batch.clone() if batch.is_inference() else batch  # no gradient goes through one of inference mode
        evidence = evidence_of(self._row.method, Evidence(self._bank, batch.to(self._bank.like.device)))
        with self._told(evidence, labels):
            self._last = None
            try:
                self._last = predict(self._row, evidence, self._per_sample)
            except (RuntimeError, ValueError, AssertionError, TypeError):
                self._check_shape(evidence.batch)
                raise
        self._began = True
        return self._last.log_p

    @own_settings(gradients=False)
    def state_dict(self) -> dict[str, Tensor]:
        """The model of the last merge.

        Returns
        -------
        dict of str to Tensor
            A state dict that `model.load_state_dict` accepts. Floats are float32.

        Raises
        ------
        MethodError
            Before the first batch, and for methods that merge no model, or one for each sample.
        """
        row, last = self._row, self._last
        if last is not None and last.theta is not None:
            return self._bank.state_dict(last.theta, last.statistics)
        if row.theta is not None:
            return self._bank.state_dict(row.theta, row.statistics)
        if last is None:
            raise MethodError(f"method {row.method.key}: found no merged model yet; expected a batch first. Call adapt(batch)")
        apart = last.coefficients is not None and last.coefficients.of == "weights"
        what = "one model for each sample" if apart else "predictions and no model"
        raise MethodError(f"method {row.method.key}: found {what}; expected a method with one model for each batch, such as eam")

    @own_settings(gradients=False)
    def reset(self) -> None:
        """Forget all batches: the next is predicted as if it were the first. Experts stay as they are."""
        self._began, self._last = False, None
        method = self._row.method
        self._row.state = method.start(bank_of(method, self._bank)) if isinstance(method, Stateful) else {}

    @own_settings(gradients=False)
    def join(
        self,
        name: str,
        state: StateDict,
        *,
        count: int | None = None,
        temperature: float = 1.0,
        statistics: Mapping[str, StateDict] | None = None,
    ) -> None:
        """Take another expert in, as the last; what the method remembers is carried over, and the newcomer has no past.

        Parameters
        ----------
        name : str
            Its name, which no other has.
        state : state dict
            Its weights, which fit the model.
        count, temperature, statistics
            As in the constructor, of this expert.

        Raises
        ------
        MethodError
            For a name that is taken, or something that the method needs and lacks.
        CheckpointError
            For weights that do not fit the model. The adapter stays as it was.
        """
        _check_name(name)
        if name in self._experts:
            raise MethodError(f"expert '{name}': found one of this name already; expected a new name, or leave('{name}') first")
        check_mapping(f"expert '{name}'", state)
        _check_numbers(name, count, temperature)
        for kind, one in (statistics or {}).items():
            check_mapping(f"statistics['{kind}'] of expert '{name}'", one)
        self._settle({**self._experts, name: _Expert(_copied(state), count, temperature, dict(statistics or {}))})

    @own_settings(gradients=False)
    def leave(self, name: str) -> None:
        """Let an expert go; what the method remembers of the others is carried over.

        Parameters
        ----------
        name : str
            Its name.

        Raises
        ------
        MethodError
            For an unknown name, the last expert, or one that the method cannot do without. The adapter stays as it was.
        """
        _check_name(name)
        if name not in self._experts:
            raise MethodError(
                f"expert '{name}': found no expert of this name; expected one that is here: {nearest(str(name), self._experts)}"
            )
        if len(self._experts) == 1:
            raise MethodError(f"expert '{name}': found it to be the last one; expected at least one that stays")
        self._settle({other: expert for other, expert in self._experts.items() if other != name})

    _began = False
    _row: Row
    _bank: Bank
    _per_sample: PerSample
    _last: Prediction | None

    def _settle(self, experts: dict[str, _Expert]) -> None:
        """Go on with these experts: a new bank, static methods merge again, and what others remember is carried over."""
        single = _only_row(self.method, self._given, experts)
        bank = self._given.bank(experts)
        rows = rows_of([single], bank)
        if self._began:
            carry(rows, {self._row.method.key: self._row}, self._bank.names, bank)
        (self._row,) = rows.values()
        self._experts, self._bank, self._per_sample = experts, bank, PerSample(bank, self._way)
        self._last = None

    def _check_shape(self, batch: Tensor) -> None:
        """Raises MethodError if it is the batch that the model cannot take, whatever its weights."""
        bank = self._bank
        try:
            bank.forward(bank.rows[0], batch)
        except torch.OutOfMemoryError:
            return
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            found = f"{found_as(batch)}, which the model cannot take ({str(error).splitlines()[0] if str(error) else error!r})"
            raise MethodError(f"batch: found {found}; expected (N, channels, H, W) as in the experts' training") from error

    def _told(self, evidence: Evidence, labels: Tensor | None) -> AbstractContextManager[None]:
        """The truth for oracles, nothing for anybody else."""
        key, wanted = self._row.method.key, "labels" in self._row.method.needed
        if not wanted:
            if labels is not None:
                raise MethodError(f"method {key}: found labels; expected none, because it may not see them. Leave labels out")
            return nullcontext()
        if labels is None:
            raise MethodError(f"method {key}: found no labels; expected them, because it is an oracle. Call adapt(batch, labels)")
        if not isinstance(labels, Tensor) or labels.shape != (len(evidence.batch),):
            found = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else found_as(labels)
            raise MethodError(f"labels: found {found}; expected ({len(evidence.batch)},), a tensor with one class for each sample")
        truth = labels.to(evidence.batch.device).long()
        classes = evidence.logits.shape[-1]
        if len(wrong := labels[(labels != labels.long()) | (labels < 0) | (labels >= classes)]):
            expected = f"whole numbers from 0 to {classes - 1}, the model's classes"
            raise MethodError(f"labels: found {wrong[0].item()}; expected {expected}")
        return evidence.opened(Answer(truth, torch.zeros_like(truth)))


@dataclass(frozen=True)
class _Expert:
    """One expert, and what its owner declared."""

    state: StateDict
    count: int | None = None
    temperature: float = 1.0
    statistics: dict[str, StateDict] = field(default_factory=dict)


@dataclass(frozen=True)
class _Given:
    """What a bank is made of beside experts."""

    model: nn.Module
    base: StateDict | None
    generalist: StateDict | None
    flips: bool
    head: Sequence[str] | None
    device: torch.device | str | None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise CheckpointError(f"model: found {found_as(self.model)}; expected an nn.Module that every state dict fits")
        check_mapping("model", self.model.state_dict())
        if not isinstance(self.flips, bool):
            raise MethodError(f"flips: found {self.flips!r}; expected True or False")
        if self.head is not None and not isinstance(self.head, Sequence):
            raise MethodError(f"head: found {self.head!r}; expected a list of the names of the classifier's parameters")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, TypeError) as error:
                found = f"'{self.device}' ({first_line(error)[:120]})"
                raise MethodError(f"device: found {found}; expected one of this machine, such as 'cpu'") from None
        for what, state in (("base", self.base), ("generalist", self.generalist)):
            if state is not None:
                check_mapping(what, state)

    def bank(self, experts: Mapping[str, _Expert]) -> Bank:
        """A bank of these experts."""
        counts = [expert.count for expert in experts.values() if expert.count is not None]
        if len(counts) == len(experts) and not any(counts):
            raise MethodError(f"counts: found 0 of {', '.join(experts)}; expected training images of at least one expert")
        device = self.device or next((parameter.device for parameter in self.model.parameters()), None)
        return Bank.of(
            self.model,
            {name: expert.state for name, expert in experts.items()},
            self.base,
            generalist=self.generalist,
            statistics={kind: [expert.statistics[kind] for expert in experts.values()] for kind in _common(experts)},
            counts=counts if len(counts) == len(experts) else None,
            temperatures=[expert.temperature for expert in experts.values()],
            flips=self.flips,
            head=self.head,
            device=device,
        )

    def has(self, experts: Mapping[str, _Expert]) -> set[str]:
        """What a method may need and finds here; labels come with the batch."""
        anchors = {"theta_0": self.base, "generalist": self.generalist}
        found = {name for name, state in anchors.items() if state is not None} | {"temperature", "labels"} | _common(experts)
        return found | ({"counts"} if all(expert.count is not None for expert in experts.values()) else set())


S = TypeVar("S", StateDict, StateDict | None)


def _copied(state: S) -> S:
    """Tensors of its own: a model that trains on must not change experts that are kept until others join or leave."""
    return None if state is None else {name: tensor.detach().clone() for name, tensor in state.items()}


def _common(experts: Mapping[str, _Expert]) -> set[str]:
    """Kinds of statistics that every expert has."""
    return set.intersection(*(set(expert.statistics) for expert in experts.values()))


def _experts(
    experts: Experts,
    counts: Sequence[int] | Mapping[str, int] | None,
    temperatures: Sequence[float] | Mapping[str, float] | None,
    statistics: Mapping[str, Experts] | None,
) -> dict[str, _Expert]:
    """The experts by name, with what was said of each."""
    if not isinstance(experts, Iterable):
        raise CheckpointError(f"experts: found {found_as(experts)}; expected state dicts in a list, or by name")
    named = dict(experts) if isinstance(experts, Mapping) else {f"expert-{k}": state for k, state in enumerate(experts)}
    if not named:
        raise CheckpointError("experts: found none; expected at least one state dict")
    for name, state in named.items():
        _check_name(name)
        check_mapping(f"expert '{name}'", state)
    found = {name: _Expert(state) for name, state in named.items()}
    for name, count in _by_name("counts", counts, named).items():
        _check_numbers(name, count, 1)
        found[name] = replace(found[name], count=count)
    for name, temperature in _by_name("temperatures", temperatures, named).items():
        _check_numbers(name, None, temperature)
        found[name] = replace(found[name], temperature=temperature)
    if not isinstance(statistics, Mapping | None):
        raise MethodError(f"statistics: found {found_as(statistics)}; expected them by kind, such as {{'fisher': [...]}}")
    for kind, states in (statistics or {}).items():
        for name, one in _by_name(f"statistics['{kind}']", states, named).items():
            check_mapping(f"statistics['{kind}'] of expert '{name}'", one)
            found[name].statistics[kind] = one
    return found


def _check_name(name: object) -> None:
    """Raises MethodError for what is no name of an expert."""
    if not isinstance(name, str) or not name.strip():
        raise MethodError(f"experts: found {name!r} as the name of one; expected a text")


def _check_numbers(name: str, count: Any, temperature: Any) -> None:
    """Raises MethodError for a number of images or a temperature that cannot be."""
    try:
        if count is not None and not 0 <= index(count) < 2**63:
            raise ValueError
    except (TypeError, ValueError):
        raise MethodError(f"counts: found {count!r} of {name}; expected a whole number, 0 or greater") from None
    if isinstance(temperature, str) or not isfinite(temperature) or temperature <= 0:
        raise MethodError(f"temperatures: found {temperature!r} of {name}; expected a number greater than 0")


def _by_name(what: str, given: Sequence[T] | Mapping[str, T] | None, experts: Mapping[str, object]) -> dict[str, T]:
    """What is given for each expert, by its name; nothing if nothing is given."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if set(given) != set(experts):
            raise MethodError(f"{what}: found {', '.join(map(str, given))}; expected one for each of {', '.join(experts)}")
        return dict(given)
    if not isinstance(given, Sized):
        raise MethodError(f"{what}: found {found_as(given)}; expected {len(experts)}, one for each expert")
    if len(given) != len(experts):
        raise MethodError(f"{what}: found {len(given)}; expected {len(experts)}, one for each expert")
    return dict(zip(experts, given, strict=True))


def _kind(name: str) -> type[Method]:
    """The class of a method. Raises MethodError with the nearest name."""
    known = name if name in METHODS.names else METHODS.aliases.get(name, name)
    if known not in METHODS.names:
        raise MethodError(f"method: found '{name}'; expected a known one: {nearest(name, METHODS.names)}")
    return METHODS.load(known)


def _method(method: str | Method, hyper_parameters: dict[str, Any]) -> Method:
    """The method with its hyper-parameters. Raises MethodError for one that is unknown, or out of range."""
    if isinstance(method, Method):
        if hyper_parameters:
            raise MethodError(f"method {method.key}: found {', '.join(hyper_parameters)} beside a Method; expected them inside it")
        return method
    if not isinstance(method, str):
        raise MethodError(f"method: found {method!r}; expected a name such as 'mean', or a Method")
    try:
        return _kind(method)(**hyper_parameters)
    except ValidationError as error:
        lines = [_told_of(method, detail["loc"], detail["input"], detail["msg"]) for detail in error.errors()]
        raise MethodError("\n".join(lines)) from None


def _told_of(method: str, place: tuple[int | str, ...], found: object, message: str) -> str:
    where = ".".join([f"method {method}", *map(str, place)])
    message = message.removeprefix("Value error, ")
    return f"{where}: found {found!r}; {message[:1].lower()}{message[1:]}"


def _only_row(method: Method, given: _Given, experts: Mapping[str, _Expert]) -> Method:
    """The one row that the method stands for. Raises MethodError if there are several, or none, or it cannot run here."""
    names = tuple(experts)
    rows = method.expand(names)
    if not rows:
        raise MethodError(f"method {method.key}: found no expert of that name; expected one of {', '.join(names)}")
    if len(rows) > 1:
        mend = f" Name one: site='{names[0]}'" if "site" in type(method).model_fields else ""
        raise MethodError(f"method {method.key}: found {len(rows)} models, one for each expert; expected one.{mend}")
    (row,) = rows
    if row.transductive:
        raise MethodError(
            f"method {method.key}: found hyper-parameters that need the whole stream before the first prediction; expected "
            "ones with which it goes batch by batch, as an adapter does. Use fedmerge.run for the whole stream"
        )
    if row.with_theta_0 and row.refuses_theta_0:
        raise MethodError(f"method {row.key}: with_theta_0: found True; expected False. {row.refuses_theta_0}")
    for lacking in sorted(row.needed - given.has(experts)):
        mend = MENDS.get(lacking, f"statistics={{'{lacking}': [...]}}, one mapping of tensors for each expert")
        raise MethodError(f"method {method.key}: found no {lacking}; expected {mend}")
    return row
