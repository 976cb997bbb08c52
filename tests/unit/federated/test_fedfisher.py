"""FedFisher with Kronecker products: its minimum, what a hospital sends for it, and how it stands beside the diagonal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.overrides import Overrides
from fedmerge.federated.client.site_training import admit_images, model_of
from fedmerge.federated.client.worker import answer
from fedmerge.federated.messages import Job, Reply, Request, SiteTask
from fedmerge.federated.model import build
from fedmerge.federated.pool.global_models import GlobalPool
from fedmerge.federated.server.rounds import compete
from fedmerge.federated.strategies._base import STRATEGIES, Strategy
from fedmerge.federated.strategies.fedfisher import by_layer, descent
from fedmerge.merging.curvature.kfac import factors, rest
from tests.clips import MODEL as CLIP
from tests.front_door import SCENARIO, world

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]
State = dict[str, Tensor]
P = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
NAME = "layer.weight"


def fedfisher(**fields: Any) -> Strategy:
    return STRATEGIES.load("fedfisher")(**fields)


def clients(count: int, same: bool = False) -> tuple[list[State], list[State]]:
    """F_k of full rank and theta_k of a layer of 3 inputs, 2 outputs and a bias."""
    rng = torch.Generator().manual_seed(0)

    def information() -> State:
        rows = [torch.randn(9, side, generator=rng, dtype=torch.float64) for side in (4, 2)]
        return dict(zip((f"{NAME}.A", f"{NAME}.G"), (X.T @ X / 9 for X in rows), strict=True))

    F = [information() for _ in range(count)]
    theta = [{NAME: torch.randn(2, 3, generator=rng), "layer.bias": torch.randn(2, generator=rng)} for _ in range(count)]
    return [F[0]] * count if same else F, theta


def vec(state: State) -> Tensor:
    """Columns of [W b], one below the other."""
    return torch.cat([state[NAME].double(), state["layer.bias"].double()[:, None]], 1).T.reshape(-1)


def matrix(F: State) -> Tensor:
    return torch.kron(F[f"{NAME}.A"], F[f"{NAME}.G"])


def gradient(F: Sequence[State], theta: Sequence[State], at: Tensor) -> float:
    return float(sum(p * matrix(one) @ (at - vec(own)) for p, one, own in zip(P, F, theta, strict=True)).norm())


def test_the_descent_goes_to_the_minimum_of_the_matrices_written_out() -> None:
    F, theta = clients(3)
    start, found = vec(by_layer(NAME, P, F, theta, 0)), vec(by_layer(NAME, P, F, theta, 20_000))
    torch.testing.assert_close(start, sum(p * vec(own) for p, own in zip(P, theta, strict=True)))
    left = sum(p * matrix(one) for p, one in zip(P, F, strict=True))
    right = sum(p * matrix(one) @ vec(own) for p, one, own in zip(P, F, theta, strict=True))
    least = torch.linalg.solve(left, right)
    assert gradient(F, theta, least) < 1e-12
    assert gradient(F, theta, found) < 0.02 * gradient(F, theta, start)
    assert float((found - least).norm()) < 0.02 * float((start - least).norm())


def test_with_one_metric_it_is_the_weighted_mean_and_alone_the_hospitals_own() -> None:
    F, theta = clients(3, same=True)
    mean = sum(p * vec(own) for p, own in zip(P, theta, strict=True))
    torch.testing.assert_close(vec(by_layer(NAME, P, F, theta)), mean, rtol=0, atol=1e-9)
    alone = by_layer(NAME, torch.ones(1).double(), F[:1], theta[:1])
    torch.testing.assert_close(vec(alone), vec(theta[0]), rtol=0, atol=1e-9)
    assert (alone[NAME].shape, alone["layer.bias"].shape) == ((2, 3), (2,))


def test_the_descents_are_those_of_the_authors_written_out() -> None:
    """Both for factors without mixed terms, so that one vector shows both: what is added to s lies inside the root with K-FAC."""
    F, theta = clients(3)
    F = [{name: tensor.diag().diag() for name, tensor in one.items()} for one in F]
    flat, own = [matrix(one).diag() for one in F], [vec(one) for one in theta]
    for found, inside in ((vec(by_layer(NAME, P, F, theta, 300)), True), (descent(P, flat, own, 300), False)):
        at = sum(p * x for p, x in zip(P, own, strict=True)).numpy()
        m, s = 0 * at, 0 * at
        for _ in range(300):
            v = sum(float(p) * f.numpy() * (at - x.numpy()) for p, f, x in zip(P, flat, own, strict=True))
            m, s = v + 0.9 * m, v**2 + 0.99 * s
            at = at - 0.01 * m / ((s + 0.01) ** 0.5 if inside else s**0.5 + 0.01)
        torch.testing.assert_close(found, torch.tensor(at))


def with_strategies(*tasks: SiteTask, strategies: Sequence[Strategy]) -> list[SiteTask]:
    return [task.model_copy(update={"federated": tuple(strategies)}) for task in tasks]


def test_what_a_hospital_sends_is_of_what_it_has_trained(hospital: Hospital, job: Jobs) -> None:
    strategy = fedfisher(information="kfac", samples=10_000)
    (task,) = with_strategies(hospital("north"), strategies=[strategy])
    task = task.model_copy(update={"uploads": strategy.statistics})
    upload = answer(Request("round", task, job(task).initial.weights, (strategy.key, "1")), lambda _: None).upload
    assert upload is not None
    sent = upload.statistics["kfac"]
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == strategy.statistics[0].layout(model_of(task))
    model = build(task.model, len(task.classes)).eval()
    model.load_state_dict(upload.weights)
    x = admit_images(task).train.x[:]
    model, x = model.double(), x.double()
    for name, (A, G) in factors(model, x).items():
        torch.testing.assert_close(sent[f"{name}.A"].double(), A, rtol=1e-3, atol=1e-5 * float(A.abs().max()))
        torch.testing.assert_close(sent[f"{name}.G"].double(), G, rtol=1e-3, atol=1e-4 * float(G.abs().max()))
    for name, F in rest(model, x).items():
        torch.testing.assert_close(sent[name].double(), F, rtol=1e-3, atol=1e-8)


def test_a_whole_round_stands_beside_the_diagonal(hospital: Hospital, job: Jobs) -> None:
    """theta is where the descent goes from the hospitals' own weights; the ledger has the bytes of all factors."""
    both = (fedfisher(samples=16), fedfisher(information="kfac", samples=16))
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=both))
    kept: dict[str, list[Reply]] = {}

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            reply = answer(request, lambda _: None)
            kept.setdefault(request.layers[0], []).append(reply)
            yield reply

    assert compete(asked, ask) == {}
    uploads = [reply.upload for reply in kept["fedfisher-kfac"]]
    n, F, theta = zip(*((u.scalars["n"], u.statistics["kfac"], u.weights) for u in uploads if u is not None), strict=True)
    p = torch.tensor(n, dtype=torch.float64) / sum(n)
    pool = GlobalPool(asked.pool, asked.tasks)
    model = pool.model(both[1])
    wanted = {name: descent(p, [f[name] for f in F], [own[name] for own in theta]) for name in theta[0] if name in F[0]}
    for name in (factor.removesuffix(".A") for factor in F[0] if factor.endswith(".A")):
        wanted |= by_layer(name, p, F, theta)
    assert wanted.keys() == model.stand.theta.keys()
    assert all(torch.equal(model.stand.theta[name], tensor.float()) for name, tensor in wanted.items())
    assert any(not torch.equal(pool.model(both[0]).stand.theta[name], tensor) for name, tensor in model.stand.theta.items())
    size = sum(tensor.numel() * tensor.element_size() for state in (F[0], theta[0]) for tensor in state.values())
    assert model.as_record()["sites"]["north"]["up"] == size + 3 * 8
    lines = [json.loads(line) for line in asked.audit.read_text().splitlines()]
    items = [line for line in lines if line["site"] == "north" and line["kind"] == "kfac"]
    assert {line["item"] for line in items} == {f"kfac.{name}" for name in F[0]}


@pytest.mark.parametrize(
    ("factor", "spoil", "said"),
    [
        ("head.weight.G", lambda G: G + torch.ones_like(G).triu(1), "kfac.head.weight.G: found a matrix that is not symmetric"),
        ("blocks.0.attn.qkv.weight.A", lambda A: -A, "kfac.blocks.0.attn.qkv.weight.A: found a negative element on the diagonal"),
        ("norm.weight", lambda F: F - 1, "kfac.norm.weight: found a negative number"),
        ("pos_embed", lambda F: F / 0, "kfac.pos_embed: found NaN or infinity"),
    ],
)
def test_factors_that_cannot_be_right_are_refused(
    factor: str, spoil: Callable[[Tensor], Tensor], said: str, hospital: Hospital, job: Jobs
) -> None:
    strategy = fedfisher(information="kfac", samples=4)
    asked = job(*with_strategies(hospital("north"), strategies=[strategy]))

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            reply = answer(request, lambda _: None)
            assert reply.upload is not None
            sent = reply.upload.statistics["kfac"]
            spoilt = {"kfac": {**sent, factor: spoil(sent[factor])}}
            yield replace(reply, upload=replace(reply.upload, statistics=spoilt))

    assert said in compete(asked, ask)["fedfisher-kfac"]
    assert not GlobalPool(asked.pool, asked.tasks).has(strategy)


def test_the_diagonal_and_kfac_are_two_strategies() -> None:
    plain, kfac = fedfisher(), fedfisher(information="kfac")
    assert plain.fields() == fedfisher(information="diagonal").fields() == {**kfac.fields(), "information": "diagonal"}
    assert kfac.digest("theta_0", ["a"]) != plain.digest("theta_0", ["a"])
    assert (plain.key, kfac.key, fedfisher(information="kfac", label="mine").key) == ("fedfisher-1", "fedfisher-kfac", "mine")
    assert STRATEGIES.load("fedfisher").model_validate(kfac.model_dump()) == kfac


def test_what_kfac_has_not_is_told(tmp_path: Path) -> None:
    file = world(tmp_path)
    for field, value, words in (("solve", "closed", "expected descent"), ("estimator", "fb_compat", "expected exact or mc")):
        federated = [{"fedfisher": {"information": "kfac", field: value}}]
        file.write_text(yaml.safe_dump({**SCENARIO, "federated": federated}))
        with pytest.raises(ScenarioError) as error:
            load_experiment(file, Overrides())
        assert len(error.value.problems) == 1
        assert f"federated[0].fedfisher.{field}" in str(error.value), str(error.value)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ({**CLIP, "tune": "both"}, "head.text.transformer.resblocks.0.mlp.c_fc.weight"),
        (
            {"name": "swinv2_tiny_window8_256", "size": 32, "kwargs": {"img_size": 32, "window_size": 4, "in_chans": 1}},
            "cpb_mlp.0.weight",
        ),
    ],
    ids=["text tower", "relative positions"],
)
def test_a_model_that_has_no_kfac_is_told_before_anything_trains(tmp_path: Path, model: dict[str, Any], layer: str) -> None:
    file = world(tmp_path)
    kinds = ["fedavg", "fedfisher", {"fedfisher": {"information": "kfac"}}]
    file.write_text(yaml.safe_dump({**SCENARIO, "model": model, "federated": kinds}))
    with pytest.raises(
        ScenarioError, match=r"federated\[2\]: found 'fedfisher-kfac', and a model whose layer '.*' sees no images"
    ) as error:
        load_experiment(file, Overrides())
    assert len(error.value.problems) == 1
    assert f"{layer}' sees" in str(error.value)
