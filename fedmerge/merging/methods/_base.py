"""The kinds of merging method. A method is one file in `merging/methods/`; its fields are its hyper-parameters.

Axes everywhere in `merging/`: K experts, P parameters, N samples of a batch, C classes. Natural logarithms.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from fedmerge.errors import ScenarioError, nearest
from fedmerge.merging.bank.bank import Bank, merged_by
from fedmerge.merging.bank.blockwise import Sizes
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.scoring.latent import label_shares, under
from fedmerge.registry import Folder, Label, Plugin

State = dict[str, Tensor]
"""What a method remembers between batches: named tensors only, so that it can be saved and restored."""


LARGEST = 2**63 - 1


class Method(Plugin):
    """Base of every method. `label` distinguishes two entries of the same method in one scenario.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import load_method
    >>> method = load_method("ties", label="ties-half", keep=0.5)
    >>> method.key, sorted(method.needed), method.transductive
    ('ties-half', ['theta_0'], False)
    """

    paper: ClassVar[str]
    """Where the method comes from, e.g. "Wortsman et al., Model soups, ICML 2022"."""
    cost: ClassVar[str]
    """Forwards of a batch through one model if it runs alone with default hyper-parameters, by the number of experts: "3K + 1"."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it needs beyond the experts' weights: theta_0, counts, temperature, labels, or a statistic that sites upload."""
    gradient: ClassVar[bool] = False
    """Whether it computes gradients at the target."""
    ranked: ClassVar[bool] = True
    """Whether it may be ranked among the others; oracles may not."""

    exceptions: ClassVar[dict[str, str]] = {}
    """Laws of merging that the method does not keep by design, and why."""

    label: Label | None = Field(None, description="name of the row in tables; default: the method's name")
    label_prior: Literal["none", "batch", "stream"] = Field(
        "none",
        description="shares of labels under which images are predicted. batch: those of the batch, if BIC accepts "
        "their parameters; stream: those of the stream so far, if they have predicted its batches better"
        " than equal ones; default: as the model predicts",
    )

    with_theta_0: bool = Field(
        False, description="theta_0 is one more expert of this row, the last one: for a CLIP the zero-shot model"
    )

    @field_validator("*", mode="after")
    @classmethod
    def _fits_into_64_bits(cls, value: Any) -> Any:
        """Tensors and their generators take no larger whole number."""
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"a whole number of at most {LARGEST}")
        return value

    @property
    def key(self) -> str:
        """The method's name in tables and records: its label, else the name of its file."""
        return self.label or self.kind()

    @property
    def needed(self) -> frozenset[str]:
        """What it needs with these hyper-parameters."""
        return self.needs

    @property
    def refuses_theta_0(self) -> str:
        """Why theta_0 cannot be one more of its experts, or nothing."""
        lacks = sorted(self.needed - {"temperature", "labels", "generalist"})
        if "theta_0" in lacks:
            return "The method starts from theta_0 already"
        return f"The start, theta_0, has no {lacks[0]}, which the method needs of every expert" if lacks else ""

    @property
    def built_on(self) -> Method:
        """The method whose model it starts from; itself, if it makes its own."""
        return self

    @property
    def merged_once(self) -> Static | None:
        """The static method whose model a row of this one keeps, if it keeps one."""
        return None

    @property
    def transductive(self) -> bool:
        """Whether it must see the whole stream before its first prediction; such a row is marked, and not ranked."""
        return False

    @property
    def precomputes(self) -> bool:
        """Whether its coefficients may come from a first pass over the images, so that a second pass costs one forward."""
        return False

    @property
    def remark(self) -> str:
        """What a reader of the table must know about this row, or nothing."""
        return "sees the whole stream before it predicts" if self.transductive else ""

    def expand(self, names: tuple[str, ...]) -> tuple[Method, ...]:
        """The rows of the table that one YAML entry stands for, given the experts' names; `expert` gives K of them."""
        return (self,)

    def working_bytes(self, sizes: Sizes) -> int:
        """Memory that it needs at once beside the experts' rows and a few models, bytes, where parameters are float32."""
        return 0

    @property
    def whole(self) -> bool:
        """Whether it needs all parameters of all experts, or as much again of each, in one place at once."""
        return False

    def under_labels(self, state: State, seen: State, log_p: Tensor) -> tuple[State, Tensor]:
        """Predictions under the shares of labels that `label_prior` asks for, and what has been seen of the stream's labels.

        state: what the method remembers. seen: of the stream before this batch. log_p: (N, C). See `label_shares`.
        """
        batch, stream, seen = label_shares(log_p, seen)
        return seen, under(batch if self.label_prior == "batch" else stream, log_p)

    def forwards_alone(self, asked: int, experts: int) -> int:
        """Forwards of a batch that this method would need if it ran alone, given those it asked for."""
        return asked


class Static(Method):
    """Merges once per set of experts.

    head_policy: the method's rule also for the head, or the mean of the heads. Averaging the logits of K heads on the merged
    encoder is that mean too, because a head is linear. Where sites did not start from one head, task vectors of heads mean
    nothing, so a rule about theta_0 falls back to the mean there.

    Examples
    --------
    >>> import fedmerge, torch
    >>> from fedmerge.merging.methods._base import Static
    >>> class Largest(Static):
    ...     paper = "an example"
    ...
    ...     def rule(self, bank):
    ...         return bank.theta.amax(0)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([row])} for row in ([1.0, 4.0], [3.0, 0.0]))
    >>> fedmerge.merge(model, [a, b], Largest())["weight"]
    tensor([[3., 4.]])
    """

    cost: ClassVar[str] = "1"

    head_policy: Literal["same", "mean"] = Field("same", description="how heads are merged: by the same rule, or by their mean")

    @property
    def merged_once(self) -> Static:
        """This one."""
        return self

    @abstractmethod
    def rule(self, bank: Bank) -> Tensor:
        """theta (P,) by the method's rule, encoder and head alike."""

    def merge(self, bank: Bank) -> Tensor:
        """The merged parameters theta (P,), a tensor of its own that carries the weights of its BatchNorm statistics.

        Raises CheckpointError if the bank lacks what it needs.
        """
        theta = self.rule(bank).to(bank.like)
        if self.head_policy == "mean" or ("theta_0" in self.needed and not bank.shared_head):
            theta[bank.head] = bank.columns(bank.head).mean(0)
        return merged_by(theta, self.statistics(bank))

    def statistics(self, bank: Bank) -> Tensor | None:
        """Convex weights (K,) or (K + A,) for BatchNorm statistics; None is 1/K each, for rules that are not convex."""
        return None


Of = str | dict[str, dict[str, Any]]
"""A static method that another builds on, as YAML writes it: `ties`, or `{ties: {keep: 0.5}}`."""


class Building(Method):
    """Builds on the model of a static method, and needs what that needs.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import load_method
    >>> method = load_method("lines", of={"ties": {"keep": 0.5}})
    >>> method.built_on.keep, sorted(method.needed)
    (0.5, ['theta_0'])
    """

    of: Of = Field("mean", description="static method that merges first: ties, or {ties: {keep: 0.5}}")

    @field_validator("of", mode="before")
    @classmethod
    def _one_model(cls, of: Any) -> Any:
        static_method(of)
        return of if isinstance(of, str) else {name: fields or {} for name, fields in of.items()}

    @property
    def built_on(self) -> Static:
        """The static method."""
        return static_method(self.of)

    @property
    def needed(self) -> frozenset[str]:
        """What both need."""
        return self.needs | self.built_on.needed

    @property
    def whole(self) -> bool:
        """As the static method."""
        return self.built_on.whole

    def working_bytes(self, sizes: Sizes) -> int:
        """As the static method."""
        return self.built_on.working_bytes(sizes)


class Stateful(Method):
    """May remember something between batches.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.methods._base import load_method
    >>> bank = Bank.of(torch.nn.Linear(2, 2, bias=False), {name: {"weight": torch.eye(2)} for name in ("axial", "coronal")})
    >>> load_method("posterior").start(bank)["pi"]  # shares of the sites
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def start(self, bank: Bank) -> State:
        """The state before the first batch."""
        return {}

    def carried(self, state: State, before: tuple[str, ...], bank: Bank) -> State:
        """The state for the next batch when experts have come or gone since the last: from those named `before` to the bank's.

        A newcomer starts with no past, and what a leaver had is no longer there. Here nobody has a past, as before the first batch:
        right for what keeps nothing. A method that remembers says what remains of it. Not asked of a transductive method, which
        sees the whole stream again with the new experts, nor before the first batch, where everybody starts.
        """
        return self.start(bank)


class Adaptive(Stateful):
    """Chooses coefficients for every batch, from forward passes alone.

    Examples
    --------
    >>> import fedmerge, torch
    >>> from fedmerge.merging.coefficients import Coefficients
    >>> from fedmerge.merging.methods._base import Adaptive
    >>> class Surest(Adaptive):
    ...     paper, cost = "an example", "K + 1"
    ...
    ...     def coefficients(self, evidence):
    ...         alpha = torch.softmax(-10 * evidence.batch_entropies(), 0)
    ...         return Coefficients(alpha, alpha)
    >>> sure, unsure = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.1, 0.2]))
    >>> adapt = fedmerge.Adapter(torch.nn.Linear(1, 2, bias=False), [sure, unsure], Surest())
    >>> adapt(torch.ones(4, 1)).argmax(1), adapt.coefficients.encoder
    (tensor([0, 0, 0, 0]), tensor([0.9976, 0.0024]))
    """

    def survey(self, state: State, evidence: Evidence) -> State:
        """One batch of a first pass over the whole stream; called for every batch if the method is transductive."""
        return state

    @abstractmethod
    def coefficients(self, evidence: Evidence) -> Coefficients:
        """Coefficients for this batch alone, with no past."""

    def step(self, state: State, evidence: Evidence) -> tuple[State, Coefficients]:
        """Coefficients for this batch given the past, and the state for the next."""
        return state, self.coefficients(evidence)


class Online(Stateful):
    """Keeps parameters of its own between batches.

    Examples
    --------
    >>> import fedmerge, torch
    >>> from fedmerge.merging.methods._base import Online
    >>> class Slow(Online):
    ...     paper, cost = "an example", "1"
    ...
    ...     def start(self, bank):
    ...         return {"theta": bank.theta[0].clone()}
    ...
    ...     def step(self, state, evidence):
    ...         theta = 0.5 * state["theta"] + 0.5 * evidence.bank.theta.mean(0)
    ...         return {"theta": theta}, theta
    >>> a, b = ({"weight": torch.full((2, 1), value)} for value in (0.0, 4.0))
    >>> adapt = fedmerge.Adapter(torch.nn.Linear(1, 2, bias=False), [a, b], Slow())
    >>> for batch in torch.ones(2, 4, 1):
    ...     logits = adapt(batch)
    >>> adapt.state_dict()["weight"].T
    tensor([[1.5000, 1.5000]])
    """

    @abstractmethod
    def start(self, bank: Bank) -> State:
        """The state before the first batch."""

    @abstractmethod
    def step(self, state: State, evidence: Evidence) -> tuple[State, Tensor]:
        """The parameters theta (P,) for this batch, and the state for the next."""


class Output(Method):
    """Mixes predictions, not weights; or, where it keeps a model that is `merged_once`, corrects that model's predictions.

    Examples
    --------
    >>> import fedmerge, torch
    >>> from fedmerge.merging.methods._base import Output
    >>> class Boldest(Output):
    ...     paper, cost = "an example", "K"
    ...
    ...     def predict(self, evidence):
    ...         return torch.nn.functional.normalize(evidence.log_p().exp().amax(0), p=1, dim=1)
    >>> a, b = ({"weight": torch.tensor(p).log()[:, None]} for p in ([0.9, 0.1], [0.5, 0.5]))
    >>> fedmerge.Adapter(torch.nn.Linear(1, 2, bias=False), [a, b], Boldest())(torch.ones(1, 1)).exp()
    tensor([[0.6429, 0.3571]])
    """

    @abstractmethod
    def predict(self, evidence: Evidence) -> Tensor:
        """Class probabilities (N, C)."""

    def correct(self, evidence: Evidence, theta: Tensor, statistics: Tensor | None) -> Tensor:
        """Class probabilities (N, C) from the model that was merged once, theta (P,) and weights of its BatchNorm statistics."""
        return self.predict(evidence)


METHODS: Folder[Method] = Folder("fedmerge.merging.methods", Method, "method")


def load_method(name: str, **hyper_parameters: Any) -> Method:
    """A merging method, by the name of its file.

    Parameters
    ----------
    name : str
        One of `METHODS.names`.
    **hyper_parameters
        Its fields, e.g. `gamma=5` for eam.

    Returns
    -------
    Method
        A frozen pydantic model.

    Raises
    ------
    ScenarioError
        For an unknown name, with the nearest.
    pydantic.ValidationError
        For an unknown hyper-parameter, or one out of range.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import load_method
    >>> load_method("ties", keep=0.5).keep
    0.5
    """
    return METHODS.load(name)(**hyper_parameters)


def static_method(of: Any) -> Static:
    """The static method that another method builds on.

    Parameters
    ----------
    of : Any
        A name, or a mapping of one name to its hyper-parameters, as YAML writes it.

    Returns
    -------
    Static
        The method.

    Raises
    ------
    ValueError
        In one line, for what is no static method, or stands for more than one model.

    Examples
    --------
    >>> from fedmerge.merging.methods._base import static_method
    >>> static_method({"ties": {"keep": 0.5}}).keep
    0.5
    """
    wanted = "expected a static method: ties, or {ties: {keep: 0.5}}"
    name, fields = next(iter(of.items())) if isinstance(of, dict) and len(of) == 1 else (of, {})
    if not isinstance(name, str) or not isinstance(fields or {}, dict):
        raise ValueError(wanted)
    try:
        method = load_method(METHODS.aliases.get(name, name), **(fields or {}))
    except ValidationError as error:
        said = error.errors()[0]
        raise ValueError(f"{'.'.join([name, *map(str, said['loc'])])} is {said['input']!r}: {said['msg']}") from None
    except ScenarioError:
        raise ValueError(f"{wanted}; {nearest(name, METHODS.names)}") from None
    if not isinstance(method, Static) or method.expand(()) != (method,):
        raise ValueError(f"{name} is not one model that is merged once; {wanted}")
    return method
