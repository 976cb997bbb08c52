"""What one method predicts for one batch: the rows of the table, by kind of method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmerge.errors import MethodError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import RunningSum
from fedmerge.merging.coefficients import Coefficients, cap
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, Method, Online, Output, State, Stateful, Static
from fedmerge.merging.per_sample.dispatch import PerSample

STREAM = "stream."
"""Before the names of what a row has seen of its stream, beside what its method remembers."""

SUMS = "sums"
"""Name of the weights of a row's sums of experts, beside what its method remembers."""


class Fixed(Method):
    """A model that no expert's coming or going changes.

    Examples
    --------
    >>> from fedmerge.merging.predict import Fixed
    >>> Fixed(label="fedavg").key, Fixed.kind()
    ('fedavg', 'federated')
    """

    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "1"

    @classmethod
    def kind(cls) -> str:
        """As the table has it."""
        return "federated"


@dataclass(frozen=True)
class RowInfo:
    """One row of the table: what kind of method it is, and what a reader must know about it.

    Attributes
    ----------
    paper : str
        Where the method comes from.
    kind : str
        Static, adaptive, online or output; federated for a model that experts do not change.
    needs : tuple[str, ...]
        What it needs beyond the experts' weights.
    gradient : bool
        Whether it computes gradients at the target.
    ranked : bool
        Whether it is ranked among the others.
    hyper_parameters : dict[str, Any]
        Its fields.
    remark : str
        A sentence, or nothing.
    precomputes : bool, default False
        Whether its coefficients may come from a first pass.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import load_method
    >>> from fedmerge.merging.predict import infos
    >>> info = infos([load_method("ties")], ("axial", "coronal"))["ties"]
    >>> info.kind, info.needs, info.ranked
    ('static', ('theta_0',), True)
    """

    paper: str
    kind: str
    needs: tuple[str, ...]
    gradient: bool
    ranked: bool
    hyper_parameters: dict[str, Any]
    remark: str
    precomputes: bool = False


@dataclass
class Row:
    """One row of the table: a method and what it keeps between batches.

    Attributes
    ----------
    method : Method
        Of the row.
    state : State, optional
        What the method remembers.
    theta : Tensor, optional
        Merged parameters (P,) of a static method.
    statistics : Tensor, optional
        Weights (K,) of their BatchNorm statistics, or None for 1/K.
    cap : float, optional
        Largest coefficient of one expert, in (0, 1].
    model : nn.Module, optional
        Of a method that is `Fixed`.
    add : RunningSum, optional
        What sums the experts, and goes on from the row's sum for the batch before.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.predict import rows_of
    >>> from fedmerge.merging.methods._base import load_method
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> row = rows_of([load_method("mean")], bank)["mean"]
    >>> row.theta
    tensor([1., 1.])
    """

    method: Method
    state: State = field(default_factory=dict)
    theta: Tensor | None = None
    statistics: Tensor | None = None
    cap: float | None = None
    model: nn.Module | None = None
    add: RunningSum = field(default_factory=RunningSum)

    def info(self) -> RowInfo:
        """What the report says of it."""
        method = self.method
        kind = next(kind for kind in (Static, Adaptive, Online, Output) if isinstance(method, kind))
        return RowInfo(
            paper=method.paper,
            kind=kind.__name__.lower(),
            needs=tuple(sorted(method.needed)),
            gradient=method.gradient,
            ranked=method.ranked and not method.transductive,
            hyper_parameters=method.model_dump(mode="json", exclude={"label", "kind"}),
            remark=method.remark,
            precomputes=method.precomputes,
        )


@dataclass(frozen=True)
class Prediction:
    """What one row says of a batch, and what it took.

    Samples whose logits are not finite are predicted uniformly, and counted in the notes.

    Attributes
    ----------
    log_p : Tensor
        log-probabilities (N, C).
    coefficients : Coefficients, optional
        Those behind them, if any.
    forwards : int, default 0
        Of a batch through one model.
    merges : int, default 0
        Of the whole model.
    notes : dict[str, list[float]], optional
        What the method saw on the way.
    theta : Tensor, optional
        The merged parameters (P,), good until the bank's next merge; None where samples have models of their own, or no model was
        merged.
    statistics : Tensor, optional
        Weights (K,) of its BatchNorm statistics, or None for 1/K.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.predict import Prediction
    >>> found = Prediction.of(torch.tensor([[0.0, torch.nan], [0.9, 0.1]]).log())
    >>> found.log_p.exp(), found.notes
    (tensor([[0.5000, 0.5000],
            [0.9000, 0.1000]]), {'not_finite': [1.0]})
    """

    log_p: Tensor
    coefficients: Coefficients | None = None
    forwards: int = 0
    merges: int = 0
    notes: dict[str, list[float]] = field(default_factory=dict)
    theta: Tensor | None = None
    statistics: Tensor | None = None

    @staticmethod
    def of(log_p: Tensor, coefficients: Coefficients | None = None, forwards: int = 0, merges: int = 0) -> Prediction:
        """A prediction from log-probabilities that may hold NaN."""
        notes = dict(coefficients.notes) if coefficients else {}
        broken = torch.isnan(log_p).any(-1)
        if bool(broken.any()):
            log_p = torch.where(broken[:, None], -math.log(log_p.shape[-1]), log_p)
            notes["not_finite"] = [float(broken.sum())]
        return Prediction(log_p, coefficients, forwards, merges, notes)


def rows_of(methods: Sequence[Method], bank: Bank, most: float | None = None) -> dict[str, Row]:
    """The rows of the table that methods stand for; static methods are merged here.

    Parameters
    ----------
    methods : Sequence[Method]
        As a scenario lists them.
    bank : Bank
        The experts.
    most : float, optional
        Largest coefficient of one expert, in (0, 1]; default: no limit.

    Returns
    -------
    dict[str, Row]
        Row's name -> row.

    Raises
    ------
    CheckpointError
        If the bank lacks what a method needs.
    MethodError
        If a static method merges experts to numbers that are not finite.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.predict import rows_of
    >>> from fedmerge.merging.methods._base import load_method
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> list(rows_of([load_method("mean"), load_method("expert")], bank))
    ['mean', 'expert:axial', 'expert:coronal']
    """
    rows = {single.key: Row(single, cap=most) for method in methods for single in method.expand(bank_of(method, bank).names)}
    for row in rows.values():
        its = bank_of(row.method, bank)
        if (once := row.method.merged_once) is not None:
            row.theta, row.statistics = once.merge(its), once.statistics(its)
            if not bool(torch.isfinite(row.theta).all()):
                found = "NaN or infinity in the merged model; expected finite numbers"
                raise MethodError(f"method {row.method.key}: found {found}. Choose hyper-parameters that are less extreme")
        elif isinstance(row.method, Stateful):
            row.state = row.method.start(its)
    return rows


def bank_of(method: Method, bank: Bank) -> Bank:
    """The experts of a row: the bank's, with theta_0 as one of them where the method says so.

    Parameters
    ----------
    method : Method
        Of the row.
    bank : Bank
        The experts.

    Returns
    -------
    Bank
        The bank itself, or one with K + 1 experts.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.predict import bank_of
    >>> from fedmerge.merging.methods._base import load_method
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> bank_of(load_method("mean"), bank) is bank
    True
    """
    return bank.joined if method.with_theta_0 else bank


def evidence_of(method: Method, evidence: Evidence) -> Evidence:
    """What the experts of a row say of the batch.

    Parameters
    ----------
    method : Method
        Of the row.
    evidence : Evidence
        What the bank's experts say.

    Returns
    -------
    Evidence
        The same object, or one with theta_0 as one more expert.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.predict import evidence_of
    >>> from fedmerge.merging.evidence import Evidence
    >>> from fedmerge.merging.methods._base import load_method
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> evidence = Evidence(bank, torch.ones(1, 1))
    >>> evidence_of(load_method("doe"), evidence) is evidence
    True
    """
    return evidence.joined if method.with_theta_0 else evidence


def infos(methods: Sequence[Method], names: tuple[str, ...]) -> dict[str, RowInfo]:
    """What the report says of every row that exists while some of these experts are there.

    Parameters
    ----------
    methods : Sequence[Method]
        As a scenario lists them.
    names : tuple[str, ...]
        All experts, whoever comes and goes.

    Returns
    -------
    dict[str, RowInfo]
        Row's name -> its description.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import load_method
    >>> from fedmerge.merging.predict import infos
    >>> found = infos([load_method("mean"), load_method("expert")], ("axial", "coronal"))
    >>> {name: info.kind for name, info in found.items()}
    {'mean': 'static', 'expert:axial': 'output', 'expert:coronal': 'output'}
    """
    return {
        single.key: Row(single).info()
        for method in methods
        for single in method.expand((*names, "theta_0") if method.with_theta_0 else names)
    }


def carry(rows: dict[str, Row], past: dict[str, Row], before: tuple[str, ...], bank: Bank) -> None:
    """Carry what rows remember over to the rows of a new bank; transductive ones begin anew.

    Parameters
    ----------
    rows : dict[str, Row]
        Of the new bank, whose state is set.
    past : dict[str, Row]
        Of the bank before.
    before : tuple[str, ...]
        Names of the experts of the bank before.
    bank : Bank
        The new bank.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.predict import carry, rows_of
    >>> from fedmerge.merging.methods._base import load_method
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> posterior = [load_method("posterior")]
    >>> past, now = rows_of(posterior, bank), rows_of(posterior, bank)
    >>> past["posterior"].state["pi"] = torch.tensor([0.9, 0.1])
    >>> carry(now, past, before=("axial", "coronal"), bank=bank)
    >>> now["posterior"].state["pi"]
    tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    for key, row in rows.items():
        if key not in past or row.method.transductive:
            continue
        own, seen = _apart(past[key].state)
        there = (*before, "theta_0") if row.method.with_theta_0 else before
        kept = row.method.carried(own, there, bank_of(row.method, bank)) if isinstance(row.method, Stateful) else {}
        row.state = _together(kept, seen)


def predict(row: Row, evidence: Evidence, per_sample: PerSample) -> Prediction:
    """Predict one batch by a row; its state goes on to the next.

    Parameters
    ----------
    row : Row
        The method, and what it remembers.
    evidence : Evidence
        What the experts of the row say of the batch, by `evidence_of`.
    per_sample : PerSample
        How samples with coefficients of their own are merged.

    Returns
    -------
    Prediction
        log-probabilities (N, C), with coefficients and cost.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.evidence import Evidence
    >>> from fedmerge.merging.methods._base import load_method
    >>> from fedmerge.merging.per_sample.dispatch import PerSample
    >>> from fedmerge.merging.predict import predict, rows_of
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), [{"weight": torch.full((2, 1), value)} for value in (1.0, 3.0)])
    >>> row = rows_of([load_method("mean")], bank)["mean"]
    >>> found = predict(row, Evidence(bank, torch.ones(4, 1)), PerSample(bank))
    >>> found.log_p.shape, found.forwards, found.theta
    (torch.Size([4, 2]), 1, tensor([2., 2.]))
    """
    per_sample = per_sample.joined if row.method.with_theta_0 else per_sample
    row.add = row.add.at(row.state.get(SUMS))
    row.state, seen = _apart(row.state)
    found = _predicted(row, evidence, per_sample)
    if row.method.label_prior != "none":
        seen, log_p = row.method.under_labels(row.state, seen, found.log_p)
        row.state, found = _together(row.state, seen), replace(found, log_p=log_p)
    if row.add.past:
        row.state = {**row.state, SUMS: torch.stack(row.add.past)}
    return found


def _apart(state: State) -> tuple[State, State]:
    """What the method remembers, and what the row has seen of its stream's labels."""
    seen = {name.removeprefix(STREAM): value for name, value in state.items() if name.startswith(STREAM)}
    return {name: value for name, value in state.items() if not name.startswith(STREAM) and name != SUMS}, seen


def _together(own: State, seen: State) -> State:
    return own | {STREAM + name: value for name, value in seen.items()}


def _predicted(row: Row, evidence: Evidence, per_sample: PerSample) -> Prediction:
    method = row.method
    match method:
        case Fixed():
            assert row.model is not None
            return Prediction.of(torch.log_softmax(row.model(evidence.batch).float(), -1), forwards=1)
        case Output():
            found = method.predict(evidence) if row.theta is None else method.correct(evidence, row.theta, row.statistics)
            return Prediction.of(found.log())
        case Static():
            assert row.theta is not None
            return _merged(row.theta, evidence, row.statistics)
        case Adaptive():
            row.state, coefficients = method.step(row.state, evidence)
            return _mixed(cap(coefficients, evidence.bank.K, row.cap), evidence, per_sample, row.add)
        case Online():
            row.state, theta = method.step(row.state, evidence)
            return _merged(theta, evidence, merges=1)
    raise TypeError(f"{type(method).__name__} is of no known kind")


def _merged(
    theta: Tensor, evidence: Evidence, statistics: Tensor | None = None, merges: int = 0, found: Coefficients | None = None
) -> Prediction:
    logits = evidence.bank.forward(theta, evidence.batch, statistics)
    done = Prediction.of(torch.log_softmax(logits.float(), -1), found, 1, merges)
    return replace(done, theta=theta, statistics=statistics)


def _mixed(found: Coefficients, evidence: Evidence, per_sample: PerSample, add: RunningSum) -> Prediction:
    """One merge for the batch, or as `PerSample` does it where samples have coefficients of their own, or no merge at all."""
    if found.of == "predictions":
        mixed = evidence.mixture(found.encoder, found.scale)
        return Prediction.of(mixed.to(evidence.bank.like.device, evidence.bank.wide), found)
    if found.encoder.ndim == 1:
        theta = evidence.bank.mix(found.encoder, found.on_one_scale().head, add=add)
        return _merged(theta, evidence, found.encoder, 1, found)
    done = per_sample.predict(evidence.batch, found.on_one_scale(), add)
    return Prediction.of(torch.log_softmax(done.logits.float(), -1), found, done.forwards, done.merges)
