"""The library's two calls: the bits of a run for every method, the naive merge for BatchNorm, and errors that help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedmerge
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask, tensors
from fedmerge.data.images import to_batch
from fedmerge.errors import CheckpointError, FedmergeError, MethodError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.statistics import BY_LAYER
from fedmerge.merging.curvature.gram import linear_layers
from fedmerge.merging.methods._base import METHODS, load_method
from fedmerge.merging.scoring.features import width_of
from tests.banks import a_batch, statistics
from tests.conftest import Net, expert_states
from tests.targets import MODEL, base, experts

Targets = Callable[..., TargetTask]
SAID: dict[str, dict[str, Any]] = {"expert": {"site": "south"}}
"""What a method must be told to stand for one row."""

VARIANTS = [
    ("fisher", {"mode": "target", "samples": 20}),
    ("dawin", {"scope": "prefix"}),
    ("eam", {"ema": "entropy"}),
    ("adamerging", {"level": "layer"}),
    ("t3", {"generalist": "theta_0"}),
    ("oracle", {"by": "batch"}),
]
CASES = [(name, SAID.get(name, {})) for name in METHODS.names] + VARIANTS
NORTH, SOUTH, WEST = expert_states(3)
NAMED = {"north": NORTH, "south": SOUTH}
START = expert_states(1, 9)[0]


def complete(model: torch.nn.Module) -> list[Contribution]:
    """The experts with every statistic that sites may upload."""
    generator = torch.Generator().manual_seed(1)

    def drawn(shape: torch.Size) -> np.ndarray:
        return torch.rand(shape, generator=generator).numpy()

    found = []
    for expert in experts():
        flat = {kind: {name: drawn(p.shape) for name, p in model.named_parameters()} for kind in ("fisher", "soup")}
        layers = linear_layers(model).items()
        grams = {name: np.eye(layer.in_features, dtype=np.float32) + drawn(layer.weight.shape[1:]) for name, layer in layers}
        grams = {name: G @ G.T for name, G in grams.items()}
        f = drawn(torch.Size([width_of(model)])) - 0.5
        centroid = {"centroid": {"centroid": f / np.linalg.norm(f)}}
        found.append(replace(expert, statistics=flat | dict.fromkeys(BY_LAYER, grams) | centroid))
    return found


def an_adapter(run: TargetSite, given: list[Contribution], name: str, **hyper_parameters: Any) -> fedmerge.Adapter:
    kinds = given[0].statistics
    return fedmerge.Adapter(
        build(run.task.model, len(run.task.classes), seed=0),
        {one.site: tensors(one.weights) for one in given},
        name,
        tensors(run.base),
        statistics={kind: {one.site: tensors(one.statistics[kind]) for one in given} for kind in kinds},
        counts=[one.n for one in given if one.n is not None],
        temperatures=[one.temperature for one in given],
        flips=run.images.flips,
        **hyper_parameters,
    )


def batches(site: TargetSite, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the site sees them, and their labels."""
    for t in range(first, last):
        yield (
            to_batch(site.gallery.pixels(site.stream.batches[t]), *site.normalization),
            torch.from_numpy(site.stream.truth_of(t)[0]),
        )


def the_same_bits(site: TargetSite, adapt: fedmerge.Adapter, first: int, last: int) -> None:
    oracle = "labels" in adapt.method.needed
    for step, (x, labels) in zip(site.advance(last - first), batches(site, first, last), strict=True):
        logits = adapt(x, labels if oracle else None)
        assert np.array_equal(logits.exp().numpy(), step.probabilities)
        used = adapt.coefficients
        assert (used is None) == (step.encoder is None)
        if used is not None and used.encoder.ndim == 1:
            assert tuple(used.encoder.tolist()) == step.encoder
            assert tuple(used.head.tolist()) == step.head


@pytest.mark.parametrize(("name", "said"), CASES, ids=str)
def test_every_method_gives_the_bits_of_a_run(target: Targets, name: str, said: dict[str, Any]) -> None:
    given = complete(build(MODEL, 11, seed=0))
    site = TargetSite(target(load_method(name, **said)), given, base())
    the_same_bits(site, an_adapter(site, given, name, **said), 0, 3)


@pytest.mark.parametrize("name", ["mean", "eam", "t3_batch", "adamerging", "dawin"])
def test_an_expert_that_joins_or_leaves_does_what_it_does_in_a_run(target: Targets, name: str) -> None:
    north, south, west = experts()
    site = TargetSite(target(name), [north, south], base())
    adapt = an_adapter(site, [north, south], name)
    the_same_bits(site, adapt, 0, 2)
    site.change(("north", "south", "west"), [west])
    adapt.join("west", tensors(west.weights), count=west.n, temperature=west.temperature)
    the_same_bits(site, adapt, 2, 4)
    site.change(("south", "west"), [])
    adapt.leave("north")
    assert adapt.names == ("south", "west")
    the_same_bits(site, adapt, 4, 6)


def test_batch_norm_gives_the_bits_of_a_run_and_the_naive_merge(target: Targets) -> None:
    spec = ModelSpec.model_validate({"name": "resnet18", "kwargs": {"in_chans": 1, "channels": [16, 32, 64, 128]}, "size": 32})
    model = build(spec, 11, seed=0)
    generator = torch.Generator().manual_seed(0)

    def moved() -> dict[str, np.ndarray]:
        noise = {n: 0.01 * torch.rand(t.shape, generator=generator) for n, t in model.state_dict().items() if t.is_floating_point()}
        return {name: (tensor + noise.get(name, 0)).numpy() for name, tensor in model.state_dict().items()}

    given = [Contribution(site=name, weights=moved(), n=10, temperature=1.0) for name in ("north", "south")]
    for name in ("mean", "weighted_mean", "eam", "t3"):
        site = TargetSite(replace(target(name), model=spec), given, moved())
        adapt = an_adapter(site, given, name)
        the_same_bits(site, adapt, 0, 2)
        if name == "mean":
            ((x, _),) = batches(site, 1, 2)
            states = [tensors(one.weights) for one in given]
            model.load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
            with torch.no_grad():
                torch.testing.assert_close(adapt(x), model.eval()(x).log_softmax(-1))


def test_one_hot_coefficients_are_that_expert_to_the_last_bit() -> None:
    states = [state | {"norm.num_batches_tracked": torch.tensor(5 + k)} for k, state in enumerate([NORTH, SOUTH, WEST])]
    x = a_batch(dtype=torch.float32)
    model = Net().eval()
    model.load_state_dict(states[1])
    found = fedmerge.merge(Net(), states, "weighted_mean", counts=[0, 9, 0])
    assert all(torch.equal(found[name], tensor) for name, tensor in states[1].items())
    adapt = fedmerge.Adapter(Net(), states, "weighted_mean", counts=[0, 9, 0])
    assert torch.equal(adapt(x), model(x).log_softmax(-1))
    assert all(torch.equal(adapt.state_dict()[name], tensor) for name, tensor in states[1].items())
    chosen = fedmerge.Adapter(Net(), states, "oracle", by="select", per_sample="rows")
    labels = model(x).argmax(1)
    logits = chosen(x, labels)
    alone = torch.stack([fedmerge.Adapter(Net(), states, "expert", site=f"expert-{k}")(x) for k in range(3)])
    for i, k in enumerate(chosen.coefficients.encoder.argmax(1).tolist()):
        torch.testing.assert_close(logits[i], alone[k, i])


def test_a_method_by_hand_runs_with_the_statistics_of_its_rule() -> None:
    bank = Bank.of(Net(), [NORTH, SOUTH, WEST], START, counts=[8, 1, 1])
    x = a_batch(dtype=torch.float32)
    for name in ("weighted_mean", "mixup", "wise_ft", "ties"):
        theta, model = load_method(name).merge(bank), Net().eval()
        model.load_state_dict(fedmerge.merge(Net(), [NORTH, SOUTH, WEST], name, START, counts=[8, 1, 1]))
        assert torch.equal(bank.forward(theta, x), model(x))
        assert all(torch.equal(bank.state_dict(theta)[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["mean", "eam", "adamerging", "ties"])
def test_the_state_dict_is_the_model_that_predicted(name: str) -> None:
    adapt = fedmerge.Adapter(Net(), [NORTH, SOUTH, WEST], name, START)
    x, model = a_batch(dtype=torch.float32), Net().eval()
    logits = adapt(x)
    model.load_state_dict(adapt.state_dict())
    torch.testing.assert_close(logits, model(x).log_softmax(-1))


@pytest.mark.parametrize("with_theta_0", [False, True])
@pytest.mark.parametrize(("name", "more"), [("eam", {"gamma": 5, "ema_init": "uniform"}), ("posterior", {})])
def test_a_reset_adapter_begins_anew(name: str, more: dict[str, Any], with_theta_0: bool) -> None:
    first, second = (a_batch(dtype=torch.float32, seed=seed) for seed in (1, 2))
    adapt = fedmerge.Adapter(Net(), {"a": NORTH, "b": SOUTH}, name, base=START, with_theta_0=with_theta_0, **more)
    began = adapt(first)
    adapt(second)
    assert not torch.equal(adapt(first), began)
    adapt.reset()
    assert adapt.coefficients is None
    assert torch.equal(adapt(first), began)


@pytest.mark.parametrize("name", [name for name in METHODS.names if METHODS.load(name)().model_dump().get("head_policy")])
def test_merge_is_the_static_methods_model(name: str) -> None:
    states = [NORTH, SOUTH, WEST]
    beside = {"counts": [1, 2, 3], "statistics": statistics([0, 1, 2], states)}
    state = fedmerge.merge(Net(), states, name, START, **beside)
    model, x = Net().eval(), a_batch(dtype=torch.float32)
    model.load_state_dict(state)
    wanted = fedmerge.Adapter(Net(), states, name, START, **beside)(x)
    torch.testing.assert_close(model(x).log_softmax(-1), wanted)
    assert list(state) == list(Net().state_dict())


def test_the_share_that_ties_keeps_has_two_names() -> None:
    found = [fedmerge.merge(Net(), [NORTH, SOUTH], "ties", START, **{key: 0.5}) for key in ("keep", "density")]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert load_method("ties", density=0.5).model_dump()["keep"] == 0.5


def test_a_state_dict_as_generalist_is_what_t3_falls_back_on() -> None:
    x = a_batch(dtype=torch.float32)
    by_state, by_name = (fedmerge.Adapter(Net(), [NORTH, SOUTH], "t3", START, generalist=g) for g in (START, "theta_0"))
    torch.testing.assert_close(by_state(x), by_name(x))


def test_no_field_of_a_method_is_hidden_by_a_parameter() -> None:
    taken = {*signature(fedmerge.Adapter).parameters, *signature(fedmerge.merge).parameters} - {"generalist"}
    assert [name for name in METHODS.names if taken & set(METHODS.load(name).model_fields)] == []


BOTH = [NORTH, SOUTH]
WHOLE = {name: parameter.detach().abs() for name, parameter in Net().named_parameters()}
NORMED = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))


class Probe(torch.nn.Module):
    """What is no classifier: one logit, no axis of classes, logits in a mapping, a second input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, torch.nn.Linear(4, 1 if kind == "one" else 2)

    def forward(self, *inputs: Tensor) -> Any:
        if self.kind == "two" and len(inputs) < 2:
            raise TypeError("forward() missing 1 required positional argument: 'mask'")
        logits = self.fc(inputs[0])
        return {"one": logits, "none": logits[:, 0], "dict": {"logits": logits}}[self.kind]


def probed(kind: str, method: str) -> Tensor:
    model = Probe(kind)
    return fedmerge.Adapter(model, [model.state_dict(), model.state_dict()], method)(torch.ones(5, 4))


WRONG: dict[str, tuple[Callable[[], Any], type[FedmergeError], str]] = {
    "unknown method": (lambda: fedmerge.merge(Net(), BOTH, "meen"), MethodError, "found 'meen'.*did you mean 'mean'"),
    "unknown key": (lambda: fedmerge.merge(Net(), BOTH, "ties", START, kep=1), MethodError, "ties.kep: found 1.*'keep'"),
    "out of range": (lambda: fedmerge.Adapter(Net(), BOTH, gamma=-1), MethodError, "eam.gamma: found -1.*greater than"),
    "a truth for a number": (lambda: fedmerge.Adapter(Net(), BOTH, gamma=True), MethodError, "eam.gamma: found True.*valid number"),
    "no number": (lambda: fedmerge.Adapter(Net(), BOTH, gamma=float("nan")), MethodError, "eam.gamma: found nan"),
    "a draw without end": (lambda: fedmerge.merge(Net(), BOTH, "mixup", a=1e308), MethodError, "mixup.a: found 1e.308.*less than"),
    "too sharp": (lambda: fedmerge.Adapter(Net(), BOTH, "posterior", beta=1e308), MethodError, "posterior.beta: found 1e.308"),
    "more than 64 bits": (
        lambda: fedmerge.Adapter(Net(), BOTH, "dawin", seed=2**63),
        MethodError,
        "dawin.seed: found 9223372036854775808; a whole number of at most 9223372036854775807",
    ),
    "an extreme number": (
        lambda: fedmerge.merge(Net(), BOTH, "fisher", statistics={"fisher": [WHOLE, WHOLE]}, m=1e300),
        MethodError,
        "method fisher: found NaN or infinity in the merged model; expected finite numbers.*less extreme",
    ),
    "a word for a truth": (
        lambda: fedmerge.Adapter(Net(), BOTH, flips="no"),
        MethodError,
        "flips: found 'no'; expected True or False",
    ),
    "a negative variance": (
        lambda: fedmerge.merge(NORMED, [NORMED.state_dict(), {**NORMED.state_dict(), "0.running_var": torch.tensor([1.0, -1e-3])}]),
        CheckpointError,
        r"expert-1 does not fit the model:\n  values of 0.running_var: found a negative variance, expected 0 or more",
    ),
    "a negative square": (
        lambda: fedmerge.merge(Net(), BOTH, "fisher", statistics={"fisher": [WHOLE, {n: -0.9 * x for n, x in WHOLE.items()}]}),
        CheckpointError,
        "statistic 'fisher' of expert-1: found a negative number; expected means of squares, 0 or more",
    ),
    "one logit": (lambda: probed("one", "mean"), CheckpointError, r"found a tensor of shape \(5, 1\)"),
    "no classes": (lambda: probed("none", "posterior"), CheckpointError, r"of shape \(5,\)"),
    "a mapping": (lambda: probed("dict", "dcs"), CheckpointError, "found dict as its output"),
    "two inputs": (lambda: probed("two", "eam"), MethodError, "cannot take .*missing 1 required"),
    "theta_0 twice": (
        lambda: fedmerge.merge(Net(), BOTH, "ties", START, with_theta_0=True),
        MethodError,
        "ties: with_theta_0: found True; expected False. The method starts from theta_0 already",
    ),
    "no count of theta_0": (
        lambda: fedmerge.merge(Net(), BOTH, "weighted_mean", START, counts=[1, 2], with_theta_0=True),
        MethodError,
        "weighted_mean: with_theta_0: found True; expected False. The start, theta_0, has no counts",
    ),
    "no shape yet": (
        lambda: fedmerge.Adapter(torch.nn.Sequential(torch.nn.LazyLinear(3)), [{}]),
        CheckpointError,
        "model: found 0.weight, which has no shape before its first batch; expected weights. Call the model once",
    ),
    "no values": (
        lambda: fedmerge.Adapter(Net(), BOTH)(torch.ones(2, 3, 4, 4, device="meta")),
        MethodError,
        "batch: found a tensor on the device 'meta', which holds no values",
    ),
    "no text": (
        lambda: fedmerge.merge(Net(), [{1: torch.zeros(1)}]),
        CheckpointError,
        "found the key 1; expected names",
    ),
    "a name of a number": (
        lambda: fedmerge.Adapter(Net(), {1: NORTH, 2: NORTH}),
        MethodError,
        "experts: found 1 as the name of one; expected a text",
    ),
    "no list of names": (lambda: fedmerge.Adapter(Net(), BOTH, head=3), MethodError, "head: found 3; expected a list of the names"),
    "eight bits with a NaN": (
        lambda: fedmerge.merge(Net(), [NORTH | {"head.bias": torch.full((3,), torch.nan).to(torch.float8_e4m3fn)}]),
        CheckpointError,
        "values of head.bias: found NaN or infinity",
    ),
    "no base": (lambda: fedmerge.merge(Net(), BOTH, "ties"), MethodError, "ties: found no theta_0; expected base="),
    "no counts": (lambda: fedmerge.merge(Net(), BOTH, "weighted_mean"), MethodError, "found no counts; expected counts="),
    "no statistic": (lambda: fedmerge.merge(Net(), BOTH, "fisher"), MethodError, "found no fisher; expected statistics="),
    "no generalist": (lambda: fedmerge.Adapter(Net(), BOTH, "t3", generalist="generalist"), MethodError, "expected generalist="),
    "needs batches": (lambda: fedmerge.merge(Net(), BOTH, "eam"), MethodError, "Use fedmerge.Adapter"),
    "target fisher": (lambda: fedmerge.merge(Net(), BOTH, "fisher", mode="target"), MethodError, "Use fedmerge.Adapter"),
    "whole stream": (
        lambda: fedmerge.Adapter(Net(), BOTH, "dawin", scope="full"),
        MethodError,
        "need the whole stream before the first prediction",
    ),
    "several rows": (
        lambda: fedmerge.Adapter(Net(), BOTH, "expert"),
        MethodError,
        "found 2 models, one for each expert; expected one.*site='expert-0'",
    ),
    "no such site": (lambda: fedmerge.Adapter(Net(), BOTH, "expert", site="x"), MethodError, "expected one of expert-0"),
    "several draws": (lambda: fedmerge.merge(Net(), BOTH, "mixup", draws=3), MethodError, "found 3 models"),
    "no expert": (lambda: fedmerge.merge(Net(), []), CheckpointError, "found none"),
    "one state": (lambda: fedmerge.merge(Net(), NORTH), CheckpointError, "found a tensor.*Give several experts"),
    "modules": (lambda: fedmerge.merge(Net(), [Net()]), CheckpointError, "state_dict()"),
    "checkpoint": (lambda: fedmerge.merge(Net(), [{"net": NORTH}]), CheckpointError, r"Give the state dict inside.*'net'"),
    "base": (lambda: fedmerge.Adapter(Net(), BOTH, base=Net()), CheckpointError, "base: found Net; expected a state dict"),
    "cold": (lambda: fedmerge.Adapter(Net(), BOTH, temperatures=[1, 0]), MethodError, "found 0 of expert-1"),
    "odd gram": (
        lambda: fedmerge.merge(Net(), BOTH, "regmean", statistics={"gram": [{"head.weight": torch.eye(4)}, {}]}),
        CheckpointError,
        "statistic 'gram' of expert-1: found a difference at head.weight",
    ),
    "misfit": (lambda: fedmerge.merge(Net(4), BOTH), CheckpointError, "expert-0 does not fit.*\n.*head.weight"),
    "odd counts": (lambda: fedmerge.Adapter(Net(), BOTH, counts=[1]), MethodError, "counts: found 1; expected 2"),
    "odd names": (lambda: fedmerge.Adapter(Net(), BOTH, counts={"a": 1}), MethodError, "expected one for each of expert-0"),
    "method twice": (lambda: fedmerge.Adapter(Net(), BOTH, load_method("eam"), gamma=1), MethodError, "gamma beside a Method"),
    "empty batch": (lambda: fedmerge.Adapter(Net(), BOTH)(a_batch(0)), MethodError, "at least one sample"),
    "no labels": (lambda: fedmerge.Adapter(Net(), BOTH, "oracle")(a_batch()), MethodError, "adapt\\(batch, labels\\)"),
    "labels": (lambda: fedmerge.Adapter(Net(), BOTH)(a_batch(), torch.zeros(6)), MethodError, "may not see them"),
    "few labels": (lambda: fedmerge.Adapter(Net(), BOTH, "oracle")(a_batch(), torch.zeros(5)), MethodError, r"expected \(6,\)"),
    "false labels": (
        lambda: fedmerge.Adapter(Net(), BOTH, "oracle")(a_batch(), torch.tensor([0, 1, 2, 9, 0, 0])),
        MethodError,
        "labels: found 9; expected whole numbers from 0 to",
    ),
    "half labels": (
        lambda: fedmerge.Adapter(Net(), BOTH, "oracle")(a_batch(), torch.full((6,), 0.5)),
        MethodError,
        "labels: found 0.5; expected whole numbers",
    ),
    "list of labels": (
        lambda: fedmerge.Adapter(Net(), BOTH, "oracle")(a_batch(), [0] * 6),
        MethodError,
        r"found list; expected \(6,\)",
    ),
    "bytes": (
        lambda: fedmerge.Adapter(Net(), BOTH)(a_batch().byte()),
        MethodError,
        "found values of torch.uint8; expected normalized",
    ),
    "one image": (lambda: fedmerge.Adapter(Net(), BOTH, "mean")(a_batch()[0, 0]), MethodError, "which the model cannot take"),
    "model": (lambda: fedmerge.merge(NORTH, BOTH), CheckpointError, "model: found .*dict; expected an nn.Module"),
    "empty model": (lambda: fedmerge.merge(Net().to("meta"), BOTH), CheckpointError, "model: found .* on the device 'meta'"),
    "no list": (lambda: fedmerge.merge(Net(), None), CheckpointError, "experts: found NoneType; expected state dicts"),
    "no method": (lambda: fedmerge.merge(Net(), BOTH, None), MethodError, "method: found None; expected a name"),
    "sparse": (
        lambda: fedmerge.merge(Net(), [{**NORTH, "head.weight": NORTH["head.weight"].to_sparse()}, SOUTH]),
        CheckpointError,
        "expert-0.: found head.weight as a sparse tensor .*Give tensor.to_dense",
    ),
    "beyond float32": (
        lambda: fedmerge.merge(Net(), [{**NORTH, "head.weight": NORTH["head.weight"].double() + 1e300}, SOUTH]),
        CheckpointError,
        r"expert-0 does not fit the model:\n  values of head.weight: found numbers above 3.4e\+38",
    ),
    "device": (lambda: fedmerge.merge(Net(), BOTH, device="gpu"), MethodError, "device: found 'gpu' .*such as 'cpu'"),
    "way": (lambda: fedmerge.Adapter(Net(), BOTH, per_sample="row"), MethodError, "per_sample: found 'row'; expected one of auto"),
    "head": (
        lambda: fedmerge.merge(Net(), BOTH, head="head.weight"),
        CheckpointError,
        r"\['head.weight'\]; expected a list of parameters",
    ),
    "one count": (lambda: fedmerge.merge(Net(), BOTH, counts=3), MethodError, "counts: found int; expected 2, one for each"),
    "lost counts": (lambda: fedmerge.merge(Net(), BOTH, counts=[float("nan"), 2]), MethodError, "found nan of expert-0; .*whole"),
    "less than none": (lambda: fedmerge.merge(Net(), BOTH, counts=[2, -1]), MethodError, "found -1 of expert-1; expected a whole"),
    "no images": (lambda: fedmerge.merge(Net(), BOTH, counts=[0, 0]), MethodError, "counts: found 0 of expert-0, expert-1"),
    "warm text": (lambda: fedmerge.Adapter(Net(), BOTH, temperatures=["1", 1]), MethodError, "found '1' of expert-0"),
    "cold newcomer": (lambda: fedmerge.Adapter(Net(), BOTH).join("west", WEST, temperature=0), MethodError, "found 0 of west"),
    "odd newcomer": (lambda: fedmerge.Adapter(Net(), BOTH).join("west", WEST, count=-1), MethodError, "found -1 of west"),
    "no kinds": (lambda: fedmerge.merge(Net(), BOTH, "fisher", statistics=BOTH), MethodError, "statistics: found list; .*by kind"),
    "no tensors": (
        lambda: fedmerge.merge(Net(), BOTH, "fisher", statistics={"fisher": ["a", "b"]}),
        CheckpointError,
        r"statistics\['fisher'\] of expert 'expert-0': found str",
    ),
    "lost fisher": (
        lambda: fedmerge.merge(
            Net(), BOTH, "fisher", statistics={"fisher": [WHOLE, {**WHOLE, "head.bias": WHOLE["head.bias"] / 0}]}
        ),
        CheckpointError,
        "statistic 'fisher' of expert-1: found NaN or infinity",
    ),
    "small fisher": (
        lambda: fedmerge.merge(Net(), BOTH, "fisher", statistics={"fisher": [WHOLE, {**WHOLE, "head.bias": torch.ones(9)}]}),
        CheckpointError,
        r"statistic 'fisher' of expert-1: found \(9,\) for head.bias; expected",
    ),
    "small gram": (
        lambda: fedmerge.merge(
            Net(), BOTH, "regmean", statistics={"gram": [{"head.weight": torch.eye(4)}, {"head.weight": torch.eye(3)}]}
        ),
        CheckpointError,
        r"statistic 'gram' of expert-1: found \(3, 3\) for head.weight; expected a square matrix",
    ),
    "too early": (
        lambda: fedmerge.Adapter(Net(), BOTH).state_dict(),
        MethodError,
        "found no merged model yet; expected a batch first",
    ),
    "taken name": (lambda: fedmerge.Adapter(Net(), BOTH).join("expert-0", WEST), MethodError, "one of this name already"),
    "unknown name": (lambda: fedmerge.Adapter(Net(), BOTH).leave("expert-9"), MethodError, "did you mean"),
    "last one": (lambda: fedmerge.Adapter(Net(), [NORTH]).leave("expert-0"), MethodError, "found it to be the last one"),
    "needed one": (
        lambda: fedmerge.Adapter(Net(), BOTH, "expert", site="expert-0").leave("expert-0"),
        MethodError,
        "found no expert of that name; expected one of expert-1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_clear_error(case: str) -> None:
    work, kind, text = WRONG[case]
    with pytest.raises(kind, match=text) as caught:
        work()
    assert "scenario" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("ensemble", "predictions and no model"), ("t3", "one model for each sample")])
def test_what_is_no_model_has_no_state_dict(name: str, text: str) -> None:
    adapt = fedmerge.Adapter(Net(), BOTH, name)
    adapt(a_batch(dtype=torch.float32))
    with pytest.raises(MethodError, match=text):
        adapt.state_dict()


def test_after_a_refused_change_the_adapter_is_as_it_was() -> None:
    adapt, x = fedmerge.Adapter(Net(), BOTH), a_batch(dtype=torch.float32)
    before = adapt(x)
    with pytest.raises(CheckpointError, match="late does not fit"):
        adapt.join("late", {"head.weight": torch.zeros(1)})
    assert adapt.names == ("expert-0", "expert-1")
    assert torch.equal(adapt(x), before)


def test_a_model_that_trains_on_does_not_change_the_adapters_experts() -> None:
    own, x = {name: tensor.clone() for name, tensor in NORTH.items()}, a_batch(dtype=torch.float32)
    adapt, wanted = (fedmerge.Adapter(Net(), [state, SOUTH], "mean") for state in (own, NORTH))
    own["head.weight"].zero_()
    for one in (adapt, wanted):
        one.join("west", WEST)
    assert torch.equal(adapt(x), wanted(x))


def fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_and_merging_needs_torch_alone() -> None:
    fresh(
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import fedmerge\n"
        "assert dict(os.environ) == before\n"
        "assert not {'flwr', 'ray', 'timm', 'matplotlib', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "import torch\n"
        "threads = torch.get_num_threads()\n"
        "model = torch.nn.Linear(2, 2)\n"
        "fedmerge.merge(model, [model.state_dict()] * 2)\n"
        "fedmerge.Adapter(model, [model.state_dict()] * 2, 'dawin')(torch.zeros(3, 2))\n"
        "assert not {'flwr', 'ray', 'timm', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
        "assert torch.get_num_threads() == threads and dict(os.environ) == before\n"
    )


@pytest.mark.parametrize("name", ["mean", "slerp", "mixup", "dawin", "dawin_sample", "ensemble", "dcs", "eam", "t3"])
def test_theta_0_may_be_one_more_expert(name: str) -> None:
    """The same bits as with theta_0 among the experts, under its name."""
    batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    beside = fedmerge.Adapter(Net(), {"north": NORTH, "south": SOUTH}, method=name, base=START, with_theta_0=True)
    among = fedmerge.Adapter(Net(), {"north": NORTH, "south": SOUTH, "theta_0": START}, method=name, base=START)
    for _ in range(2):
        assert torch.equal(beside(batch), among(batch))
    with pytest.raises(CheckpointError, match="theta_0: found a bank that was made without it"):
        fedmerge.Adapter(Net(), {"north": NORTH}, method=name, with_theta_0=True)(batch)


def test_a_method_that_compares_views_names_a_batch_that_is_not_of_images() -> None:
    model = torch.nn.Linear(3, 2)
    experts = {"a": model.state_dict(), "b": torch.nn.Linear(3, 2).state_dict()}
    rows = torch.ones(4, 3)
    with pytest.raises(
        MethodError, match=r"batch: found shape \(4, 3\); expected images \(N, channels, H, W\).*choose one without"
    ):
        fedmerge.Adapter(model, experts, method="eam")(rows)
    assert fedmerge.Adapter(model, experts, method="dcs")(rows).shape == (4, 2)


@pytest.mark.parametrize(("name", "said"), CASES, ids=str)
def test_inference_mode_changes_nothing(name: str, said: dict[str, Any]) -> None:
    """Wherever an adapter is made, and wherever it is called."""

    def logits(made: bool, called: bool) -> Tensor:
        with torch.inference_mode(made):
            states = {one: {key: value.clone() for key, value in state.items()} for one, state in NAMED.items()}
            measured = {kind: dict(zip(states, given, strict=True)) for kind, given in statistics([0, 1], [NORTH, SOUTH]).items()}
            said_now = {"generalist": START} | said if "generalist" in METHODS.load(name).model_fields else said
            adapt = fedmerge.Adapter(Net(), states, name, START, statistics=measured, counts=[3, 4], **said_now)
        with torch.inference_mode(called):
            x = a_batch(dtype=torch.float32).clone()
            labels = torch.zeros(len(x)).long() if "labels" in adapt.method.needed else None
            adapt(x, labels)
            found = adapt(x, labels)
            adapt.leave("north")
            adapt.join("west", WEST, count=5, statistics={kind: given["south"] for kind, given in measured.items()})
        return torch.stack([found, adapt(a_batch(dtype=torch.float32), labels)])

    for made, called in ((True, False), (False, True), (True, True)):
        assert torch.equal(logits(made, called), logits(False, False))


@pytest.mark.parametrize("name", ["mean", "dare", "model_stock", "lame", "posterior", "dawin", "adamerging"])
def test_what_pytorch_makes_by_default_changes_nothing(name: str) -> None:
    x = a_batch(dtype=torch.float32)

    def logits() -> Tensor:
        adapt = fedmerge.Adapter(model, NAMED, name, START)
        adapt(x)
        return adapt(x)

    model = Net()
    expected = logits()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(logits(), expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(logits(), expected)
        assert torch.zeros(1).is_meta
