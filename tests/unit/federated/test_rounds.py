"""Federated competitors: every strategy against its formula, rounds that stop and go on, and who is asked."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge.errors import FolderError, ScenarioError, SiteError
from fedmerge.experiment.experiment import RunOptions as RunRequest
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.overrides import Overrides
from fedmerge.experiment.stream_phase import read_generalist
from fedmerge.experiment.training_phase import job_of, site_task
from fedmerge.federated.client.round import Share, recipe
from fedmerge.federated.client.site_training import open_ward, steps_of
from fedmerge.federated.client.trainer import LabeledImages, Recipe, _rate, fit
from fedmerge.federated.client.worker import answer
from fedmerge.federated.messages import Initial, Job, Reply, Request, SiteTask, Training
from fedmerge.federated.pool.global_models import GlobalPool
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.initialization import kept_theta_0
from fedmerge.federated.server.rounds import all_rounds, asked_in, compete
from fedmerge.federated.strategies._aggregation import Aggregation
from fedmerge.federated.strategies._base import STRATEGIES, Strategy
from fedmerge.federated.strategies.fedfisher import closed_form, descent
from fedmerge.federated.strategies.fednova import nova, path_length
from fedmerge.rng import seed_of
from tests.front_door import SCENARIO, done, read, world

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]
N = (10.0, 30.0, 20.0)


def named(name: str, **fields: Any) -> Strategy:
    return STRATEGIES.load(name)(**fields)


def states(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Small float32 states, with an integer that nothing trains."""
    rng = torch.Generator().manual_seed(seed)
    return [
        {"b": torch.randn(3, generator=rng), "a": torch.randn(2, 3, generator=rng), "count": torch.tensor(7)} for _ in range(count)
    ]


def uploads(of: Sequence[dict[str, Tensor]], steps: Sequence[float] = (4, 4, 4)) -> list[Upload]:
    return [
        Upload(f"site{k}", dict(reversed(state.items())), {"n": N[k], "steps": steps[k], "validation_accuracy": 0.5})
        for k, state in enumerate(of)
    ]


def aggregated(strategy: Strategy, before: dict[str, Tensor], *rounds: list[Upload]) -> dict[str, Tensor]:
    aggregation, theta = Aggregation(strategy, before), before
    for number, given_ in enumerate(rounds, 1):
        theta = aggregation.round(number, theta, given_)
    return theta


def wide(of: Sequence[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.stack([state[name].double().numpy() for state in of])


def weighted(of: Sequence[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.average(wide(of, name), axis=0, weights=N)


def test_what_the_server_makes_of_one_round_is_the_formula() -> None:
    (before,), sent = states(1, 0), states(3, 1)
    expected: dict[str, Callable[[str], np.ndarray]] = {
        "fedavg": lambda name: weighted(sent, name),
        "fedprox": lambda name: weighted(sent, name),
        "fednova": lambda name: weighted(sent, name),  # equal steps everywhere
        "fedmedian": lambda name: np.median(wide(sent, name), 0),
        "fedtrimmedavg": lambda name: np.sort(wide(sent, name), 0)[1],
    }
    for name, formula in expected.items():
        found = aggregated(named(name), before, uploads(sent))
        for key in ("a", "b"):
            np.testing.assert_allclose(found[key].numpy(), formula(key), rtol=0, atol=2e-7, err_msg=name)
        assert found["count"].dtype == torch.int64
        assert int(found["count"]) == 7
        assert list(found) == list(before)


def test_flower_does_not_warn_of_what_is_not_the_users() -> None:
    """Its strategies say that they do not evaluate, and FedProx that a mu of 0 is FedAvg."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flwr").addHandler(handler)
    try:
        for name, fields in (("fedavg", {}), ("fedprox", {"mu": 0})):
            Aggregation(STRATEGIES.load(name)(**fields), {})
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    assert not heard


def test_krum_takes_the_one_among_the_others() -> None:
    (before,), (near,) = states(1, 0), states(1, 1)
    moved = [near, {**near, "a": near["a"] + 0.1}, {**near, "a": near["a"] + 5}]
    found = aggregated(named("krum"), before, uploads(moved))
    assert any(torch.equal(found["a"], one["a"]) for one in moved[:2])


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("malicious", [0, 1])
def test_krum_sees_how_far_small_steps_lead(step: float, malicious: int) -> None:
    """Weights of which a round moves little, by loops in float64."""
    rng, K = np.random.default_rng(7), 5
    start = rng.standard_normal(20_000)
    moved = [np.float32(start + step * size * rng.standard_normal(len(start))) for size in (1.1, 0.9, 1.3, 0.7, 3)]
    score = [sum(sorted(float(((np.float64(a) - b) ** 2).sum()) for b in moved)[1 : K - malicious - 1]) for a in moved]
    sent = [Upload(f"site{k}", {"a": torch.from_numpy(one)}, {"n": 1.0, "steps": 1.0}) for k, one in enumerate(moved)]
    found = aggregated(named("krum", malicious=malicious), {"a": torch.from_numpy(np.float32(start))}, sent)
    assert torch.equal(found["a"], sent[int(np.argmin(score))].weights["a"])


def test_servers_that_remember() -> None:
    (before,), first, second = states(1, 0), states(3, 1), states(3, 2)
    start = before["a"].double().numpy()
    found = aggregated(named("fedavgm", momentum=0.5, server_lr=0.7), before, uploads(first), uploads(second))
    v = start - weighted(first, "a")
    middle = start - 0.7 * v
    v = 0.5 * v + middle - weighted(second, "a")
    np.testing.assert_allclose(found["a"].numpy(), middle - 0.7 * v, rtol=0, atol=1e-6)
    found = aggregated(named("fedadam", server_lr=0.1, tau=0.01), before, uploads(first))
    delta = weighted(first, "a") - start
    m, s = 0.1 * delta, 0.01 * delta**2
    eta = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # Flower's Adam is corrected for its start, and counts this as step 2
    np.testing.assert_allclose(found["a"].numpy(), start + eta * m / (np.sqrt(s) + 0.01), atol=1e-5)
    found = aggregated(named("fedyogi", server_lr=0.1, tau=0.01), before, uploads(first))
    np.testing.assert_allclose(found["a"].numpy(), start + 0.1 * m / (np.sqrt(s) + 0.01), atol=1e-5)


@given(st.floats(0, 0.95), st.integers(1, 60))
def test_the_length_of_a_way_is_the_sum_of_its_steps(rho: float, steps: int) -> None:
    """a_i = 1 + rho + .. + rho^(tau - 1 - i): how much of gradient i is in the last weights."""
    a = [sum(rho**j for j in range(steps - i)) for i in range(steps)]
    assert path_length(steps, rho) == pytest.approx(sum(a), rel=1e-9)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fednova", "fedmedian"])
def test_what_no_hospital_has_trained_stays(name: str) -> None:
    """As the statistics of BatchNorm: the mean of equal numbers differs from them by rounding, and Adam makes steps of that."""
    draw = torch.Generator().manual_seed(0)
    theta_0 = {"weight": torch.randn(4, generator=draw), "variance": torch.rand(200, generator=draw) * 1e-3}
    fields = {"tau": 1e-8} if name in ("fedadam", "fedyogi") else {}
    aggregation, theta = Aggregation(STRATEGIES.load(name)(**fields), theta_0), theta_0
    for number in range(1, 4):
        moved = [theta["weight"] + 0.1 * torch.randn(4, generator=draw) for _ in range(3)]
        told = [{"n": float(n), "steps": 2.0} for n in (17, 29, 53)]
        sent = [Upload("north", {**theta, "weight": w}, scalars) for w, scalars in zip(moved, told, strict=True)]
        theta = aggregation.round(number, theta, sent)
    assert torch.equal(theta["variance"], theta_0["variance"])
    assert not torch.equal(theta["weight"], theta_0["weight"])


def test_nova_goes_the_mean_length_in_the_mean_direction() -> None:
    found = nova(np.zeros(1), [np.array([-1.0]), np.array([-3.0])], [1, 1], [1, 3])
    assert found.tolist() == [-2.0]
    assert nova(np.ones(1), [np.ones(1), np.zeros(1)], [1, 1], [0, 2]).tolist() == [0.75]  # who took no step has gone nowhere


def test_fedfisher_finds_its_minimum() -> None:
    p, theta = torch.tensor([0.5, 0.5], dtype=torch.float64), [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0])]
    F = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]
    assert closed_form(p, F, theta).tolist() == [1.0, 2.0]
    assert descent(p, F, theta, 20_000)[0] == pytest.approx(1, abs=0.02)  # its last steps have a length of their own
    assert descent(p, F, theta)[1] == 2


def test_the_proximal_term_is_half_mu_times_the_squared_distance() -> None:
    """One hospital, a linear model, plain steps: each step's gradient has mu (theta - theta_0) in it, and nothing else is new."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    model = nn.Linear(3, 2)
    start = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    plain = Recipe(0.1, 0.0, 3, 8, "sgd", "constant", "none", False, clip=1e9, proximal=0.5)
    fit(model, LabeledImages(x, y), plain, 0, lambda _: None)
    theta = {name: p.clone().requires_grad_() for name, p in start.items()}
    velocity = {name: torch.zeros_like(p) for name, p in start.items()}
    for _ in range(3):
        loss = nn.functional.cross_entropy(x.double() @ theta["weight"].T + theta["bias"], y)
        loss = loss + 0.25 * sum(((theta[name] - start[name]) ** 2).sum() for name in theta)
        gradients = torch.autograd.grad(loss, list(theta.values()))
        velocity = {name: 0.9 * velocity[name] + g for name, g in zip(theta, gradients, strict=True)}
        theta = {name: (p - 0.1 * velocity[name]).detach().requires_grad_() for name, p in theta.items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), theta[name].detach(), rtol=0, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(10, 300))
def test_rounds_share_out_the_steps_of_a_hospitals_own_training(rounds: int, epochs: int, images: int) -> None:
    training, strategy = Training(runs=3, epochs=epochs), named("fedavg", rounds=rounds)
    shares = [Share.of(strategy, number, training, images) for number in range(1, rounds + 1)]
    assert sum(share.steps for share in shares) == 3 * steps_of(training, images)[1] == shares[0].whole
    assert [share.before for share in shares[1:]] == [share.before + share.steps for share in shares[:-1]]


def test_the_learning_rate_goes_through_all_rounds() -> None:
    whole = Recipe(1, 0, 30, 8, "sgd", "cosine", "none", False)
    part = replace(whole, steps=10, before=10, whole=30)
    assert [_rate(step + part.before, part) for step in range(10)] == [_rate(step, whole) for step in range(10, 20)]


def with_strategies(*tasks: SiteTask, strategies: Sequence[Strategy]) -> list[SiteTask]:
    return [task.model_copy(update={"federated": tuple(strategies)}) for task in tasks]


def test_alone_a_hospital_trains_as_by_itself_whatever_the_strategy(hospital: Hospital, job: Jobs) -> None:
    alone = [named(name, rounds=1, optimizer="adamw", lr=1e-3) for name in ("fedavg", "fednova", "fedmedian")]
    alone += [named("fedprox", rounds=1, mu=0.0)]
    (task,) = with_strategies(hospital("north"), strategies=alone)
    asked = job(task)
    assert LocalBackend().compete(asked, lambda _: None) == {}
    ward, model = open_ward(task)
    model.load_state_dict(asked.initial.weights)
    hyper = task.training.diversity.hyper_parameters(0, "north", 0)
    share = Share.of(alone[0], 1, task.training, len(ward.train.y))
    fit(model, ward.train, recipe(alone[0], 1, share, task, hyper, ward), seed_of(0, "round", "north", 1), lambda _: None)
    pool = GlobalPool(asked.pool, asked.tasks)
    for strategy in alone:
        theta = pool.model(strategy).stand.theta
        for name, tensor in model.state_dict().items():
            if strategy.kind() == "fednova":
                torch.testing.assert_close(theta[name], tensor, rtol=0, atol=1e-6)
            else:
                assert torch.equal(theta[name], tensor), (strategy.key, name)


def test_without_its_term_fedprox_is_fedavg_and_the_ledger_adds_up(hospital: Hospital, job: Jobs) -> None:
    both = (named("fedavg", rounds=2), named("fedprox", rounds=2, mu=0.0), named("fedprox", rounds=2, mu=10.0, label="held"))
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=both))
    assert LocalBackend().compete(asked, lambda _: None) == {}
    pool = GlobalPool(asked.pool, asked.tasks)
    avg, prox, held = (pool.model(one) for one in both)
    assert all(torch.equal(avg.stand.theta[name], tensor) for name, tensor in prox.stand.theta.items())

    def away(theta: dict[str, Tensor]) -> float:
        return sum(float((theta[name] - t).square().sum()) for name, t in asked.initial.weights.items())

    assert away(held.stand.theta) < away(avg.stand.theta)
    record = avg.as_record()
    size = sum(tensor.numel() * tensor.element_size() for tensor in asked.initial.weights.values())
    assert record["sites"]["north"] == {"rounds": 2, "steps": 2 * 2, "up": 2 * (size + 3 * 8), "down": 2 * size}
    lines = [json.loads(line) for line in asked.audit.read_text().splitlines()]
    sent = sum(line["bytes"] for line in lines if line["site"] == "north" and line["kind"] != "statement")
    assert sent == 3 * record["sites"]["north"]["up"]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_rounds_that_are_cut_off_go_on_to_the_same_bits(name: str, hospital: Hospital, job: Jobs) -> None:
    strategy = named(name, rounds=4)
    tasks = with_strategies(hospital("north"), hospital("south"), strategies=[strategy])
    whole, cut = job(*tasks, folder="whole"), job(*tasks, folder="cut")
    LocalBackend().compete(whole, lambda _: None)

    def dies(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        if requests[0].layers[1] == "3":
            raise KeyboardInterrupt
        yield from (answer(request, lambda _: None) for request in requests)

    with pytest.raises(KeyboardInterrupt):
        all_rounds(cut, strategy, dies)
    pool = GlobalPool(cut.pool, cut.tasks)
    assert not pool.has(strategy)
    assert pool.last(strategy).rounds == 2  # type: ignore[union-attr]
    began: list[str] = []
    LocalBackend().compete(cut, lambda tick: began.append(tick.text))
    assert not any("round 1/" in text or "round 2/" in text for text in began)
    expected = GlobalPool(whole.pool, whole.tasks).model(strategy).stand
    found = pool.model(strategy).stand
    assert all(torch.equal(found.theta[key], tensor) for key, tensor in expected.theta.items())
    assert found.turns == expected.turns
    file = next(pool.entry(strategy).glob("round-*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(FolderError, match=r"Delete .* to run them again"):
        pool.model(strategy)


def test_a_bad_answer_is_refused_and_named(hospital: Hospital, job: Jobs) -> None:
    strategy = named("fedavg", rounds=2)
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=[strategy]))

    def broken(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        good, bad = (answer(request, lambda _: None) for request in requests)
        yield good
        assert bad.upload is not None
        spoilt = {name: tensor * float("nan") for name, tensor in bad.upload.weights.items()}
        yield replace(bad, upload=replace(bad.upload, weights=spoilt))

    failed = compete(asked, broken)
    assert "round 1: found 1 answers; expected at least 2: site 'south': its upload was refused" in failed["fedavg-2"]
    assert not GlobalPool(asked.pool, asked.tasks).has(strategy)
    assert compete(replace(asked, at_least=1), broken) == {}
    model = GlobalPool(asked.pool, asked.tasks).model(strategy)
    assert [turn.site for turn in model.stand.turns] == ["north", "north"]
    assert [(one["round"], one["site"]) for one in model.as_record()["absent"]] == [(1, "south"), (2, "south")]
    assert all(one.reason.startswith("its upload was refused") for one in model.stand.absences)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedavgm"])
@pytest.mark.parametrize("server_lr", [1e6, 1e39])
def test_a_server_that_steps_too_far_is_told(name: str, server_lr: float, hospital: Hospital, job: Jobs) -> None:
    """Also after the last round. Hospitals need not find that their loss is not finite, or be refused for the server's weights."""
    strategy = named(name, rounds=1, server_lr=server_lr)
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=[strategy]))
    said = LocalBackend().compete(asked, lambda _: None)[f"{name}-1"]
    assert said.startswith("round 1: ")
    assert said.endswith(f". Lower {name}-1.server_lr")
    assert not GlobalPool(asked.pool, asked.tasks).last(strategy)


def test_the_pool_keeps_the_audit_of_every_round(hospital: Hospital, job: Jobs) -> None:
    strategy = named("fedavg", rounds=3)
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=[strategy]))
    LocalBackend().compete(asked, lambda _: None)
    run = [json.loads(line) for line in asked.audit.read_text().splitlines()]
    entry = GlobalPool(asked.pool, asked.tasks).entry(strategy)
    kept = [json.loads(line) for line in (entry / "audit.jsonl").read_text().splitlines()]
    assert {(line["site"], line["round"]) for line in run} == {(s, f"fedavg-3 {r}") for s in ("north", "south") for r in (1, 2, 3)}
    assert [{**line, "time": ""} for line in kept] == [{**line, "time": ""} for line in run]


def test_what_lies_beside_rounds_disturbs_nobody(hospital: Hospital, job: Jobs) -> None:
    """A copy that somebody has made, and the draft of a process that was killed, which is cleared away."""
    strategy = named("fedavg", rounds=1)
    asked = job(*with_strategies(hospital("north"), strategies=[strategy]))
    pool = GlobalPool(asked.pool, asked.tasks)
    (pool.entry(strategy) / "round-0001.bak").mkdir(parents=True)
    for name, age in (("killed", 7200), ("busy", 0)):
        (pool.entry(strategy) / f".round-{name}").mkdir()
        os.utime(pool.entry(strategy) / f".round-{name}", (time.time() - age,) * 2)
    assert LocalBackend().compete(asked, lambda _: None) == {}
    assert pool.model(strategy).stand.rounds == 1
    assert sorted(path.name for path in pool.entry(strategy).iterdir()) == [
        ".round-busy",
        "audit.jsonl",
        "round-0001",
        "round-0001.bak",
    ]


def test_a_damaged_round_stops_its_own_strategy_alone(hospital: Hospital, job: Jobs) -> None:
    both = (named("fedavg", rounds=2), named("fedmedian", rounds=1))
    asked = job(*with_strategies(hospital("north"), hospital("south"), strategies=both))
    pool = GlobalPool(asked.pool, asked.tasks)
    (pool.entry(both[0]) / "round-0001").mkdir(parents=True)
    failed = LocalBackend().compete(asked, lambda _: None)
    assert list(failed) == ["fedavg-2"]
    assert "to run them again" in failed["fedavg-2"]
    assert pool.has(both[1])


def test_who_is_asked_is_drawn_anew_in_every_round(hospital: Hospital, job: Jobs) -> None:
    half = named("fedavg", rounds=8, fraction=0.5)
    asked = job(*with_strategies(*(hospital(f"h{number}") for number in range(4)), strategies=[half]))
    drawn = [[task.site.name for task in asked_in(asked, half, number)] for number in range(1, 9)]
    assert all(len(names) == 2 and names == sorted(names) for names in drawn)
    assert len({tuple(names) for names in drawn}) > 2
    assert drawn[0] == [task.site.name for task in asked_in(asked, half, 1)]
    renamed = half.model_copy(update={"label": "half"})
    assert GlobalPool(asked.pool, asked.tasks).entry(renamed) == GlobalPool(asked.pool, asked.tasks).entry(half)
    assert drawn == [[task.site.name for task in asked_in(asked, renamed, number)] for number in range(1, 9)]


def test_a_strategy_that_cannot_be_is_told_before_anything_starts(tmp_path: Path) -> None:
    file = world(tmp_path)
    cases = {
        "federated[0].fedavg.rounds": [{"fedavg": {"rounds": 0}}],
        "federated[0].fraction: found 0.2, which selects no hospital of 2; expected at least 0.5": [{"fedavg": {"fraction": 0.2}}],
        "no such strategy: did you mean 'fedavg'": ["fedavgg"],
        "'krum-5', which would have 2 hospitals in a round; expected at least 3 hospitals in each round": ["krum"],
        "'mean' 2 times": [{"fedavg": {"label": "mean"}}],
        "federated[0].fedprox.mu": [{"fedprox": {"mu": -1}}],
        "federated[0].fedavg.lr": [{"fedavg": {"lr": float("inf")}}],
        "federated[0].fedavg.label": [{"fedavg": {"label": "expert:north"}}],
        "federated[0].fedavg.rounds: found True": [{"fedavg": {"rounds": True}}],
        "federated[0].fedavg.epochs: found True": [{"fedavg": {"epochs": True}}],
        "federated[0].fedfisher.rounds: found True": [{"fedfisher": {"rounds": True}}],
        "federated[0].fedfisher.rounds: found 2": [{"fedfisher": {"rounds": 2}}],
        "federated[0].fedfisher.samples: found True": [{"fedfisher": {"samples": True}}],
        "federated[0].krum.malicious: found True": [{"krum": {"malicious": True}}],
        "federated[0].fedprox.mu: found inf": [{"fedprox": {"mu": float("inf")}}],
        "federated[0].fedadam.server_lr: found inf": [{"fedadam": {"server_lr": float("inf")}}],
        "federated[0].fedavgm.server_lr: found nan": [{"fedavgm": {"server_lr": float("nan")}}],
    }
    for words, federated in cases.items():
        file.write_text(yaml.safe_dump({**SCENARIO, "federated": federated}))
        with pytest.raises(ScenarioError) as error:
            load_experiment(file, Overrides())
        assert words in str(error.value), str(error.value)


def test_rounds_must_be_possible_with_as_few_hospitals_as_are_enough(tmp_path: Path) -> None:
    file = world(tmp_path)
    file.write_text(yaml.safe_dump({**SCENARIO, "min_sites": 1, "federated": [{"fedavg": {"fraction": 0.5}}]}))
    with pytest.raises(
        ScenarioError, match=r"fraction: found 0\.5, which selects no hospital of 1 \(the fewest that min_sites allows\)"
    ):
        load_experiment(file, Overrides())


def test_hospitals_that_join_are_not_enough_for_rounds(tmp_path: Path) -> None:
    """They count for min_sites, and come too late for the rounds."""
    file = world(tmp_path)
    scenario = {**SCENARIO, "sites": ["north", "south", "east"], "events": [{"at": 1, "join": "west"}], "federated": ["krum"]}
    (tmp_path / "sites" / "west.yaml").write_text((tmp_path / "sites" / "north.yaml").read_text().replace("north", "west"))
    file.write_text(yaml.safe_dump({**scenario, "min_sites": 4}))
    load_experiment(file, Overrides())
    file.write_text(yaml.safe_dump({**scenario, "min_sites": 3}))
    with pytest.raises(ScenarioError, match=r"'krum-5', which would have 2 hospitals in a round \(the fewest that min"):
        load_experiment(file, Overrides())


def test_a_generalist_that_is_nowhere_names_those_that_are(tmp_path: Path) -> None:
    file = world(tmp_path)
    t3 = {"t3": {"generalist": "generalist"}}
    cases = {"fedavg-7": "does not exist", ".": "a folder", "fedavg-2": "", "absent.safetensors": "does not exist"}
    for named_, found in cases.items():
        scenario = {**SCENARIO, "methods": ["mean", t3], "federated": [{"fedavg": {"rounds": 2}}, "fednova"], "generalist": named_}
        file.write_text(yaml.safe_dump(scenario))
        load_experiment(file, at_target=False)  # who only gathers experts needs no generalist
        if not found:
            assert read_generalist(load_experiment(file)) is None
            continue
        with pytest.raises(ScenarioError) as error:
            load_experiment(file)
        said = str(error.value)
        assert "tiny.yaml, line " in said and f": generalist: found '{named_}'" in said and found in said
        assert "expected a safetensors file, or a row of 'federated': fedavg-2, fednova-5" in said
        assert ("did you mean 'fedavg-2'?" in said) == (named_ == "fedavg-7")
    file.write_text(yaml.safe_dump({**SCENARIO, "methods": ["mean", t3], "generalist": "absent.safetensors"}))
    with pytest.raises(ScenarioError, match=r"which does not exist; expected a safetensors file$"):
        load_experiment(file)


def test_every_row_has_a_name_of_its_own(tmp_path: Path) -> None:
    file = world(tmp_path)
    cases: dict[str, dict[str, Any]] = {
        "methods[1]: found the name 'mean' 2 times (methods[0], methods[1])": {"methods": ["mean", "mean"]},
        "federated[0]: found the name 'mean' 2 times (methods[0], federated[0])": {"federated": [{"fedavg": {"label": "mean"}}]},
        "federated[1]: found the name 'fedavg-5' 2 times": {"federated": ["fedavg", {"fedavg": {"fraction": 0.5}}]},
        "methods[1]: found the name 'expert:north' 2 times": {"methods": ["expert", {"expert": {"site": "north"}}]},
        "methods[1]: found the name 'expert:east' 2 times": {
            "methods": ["expert", {"expert": {"site": "east"}}],
            "events": [{"at": 1, "join": "east"}],
        },
        "methods[0].mean.label: found 'expert:north'": {"methods": [{"mean": {"label": "expert:north"}}]},
        "methods[0].mean.label: found '[red]'": {"methods": [{"mean": {"label": "[red]"}}]},
    }
    for words, changes in cases.items():
        file.write_text(yaml.safe_dump({**SCENARIO, **changes}))
        with pytest.raises(ScenarioError) as error:
            load_experiment(file)
        assert words in str(error.value) and "1 problem\n" in str(error.value), str(error.value)
    file.write_text(yaml.safe_dump({**SCENARIO, "methods": ["expert", {"expert": {"site": "north", "label": "guest-1.0"}}]}))
    assert [method.key for method in load_experiment(file).scenario.methods] == ["expert", "guest-1.0"]


def test_too_few_for_a_strategy_is_no_crash() -> None:
    (before,), sent = states(1, 0), states(3, 1)
    with pytest.raises(SiteError, match="round 1: found no answer of any hospital"):
        aggregated(named("fedavg"), before, [])
    broken = [{**sent[0], "a": sent[0]["a"] * float("inf")}, *sent[1:]]
    with pytest.raises(SiteError, match="found NaN or infinity in a of the global model"):
        aggregated(named("fedavg"), before, uploads(broken))


@pytest.mark.slow
def test_global_models_stand_in_the_same_table(first: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = first
    file = folder / "scenarios" / "rounds.yaml"
    kfac = {"fedfisher": {"information": "kfac", "samples": 16}}
    some = {"fedavg": {"rounds": 1, "fraction": 0.5, "label": "half"}}
    same = [{"fedavg": {"rounds": 1, "label": label}} for label in ("all", "again")]
    federated = [{"fedavg": {"rounds": 2}}, "fedfisher", kfac, {"fedadam": {"rounds": 2}}, some, *same]
    t3 = {"t3": {"generalist": "generalist"}}
    scenario = {**SCENARIO, "name": "rounds", "federated": federated, "generalist": "fedavg-2", "methods": ["mean", "eam", t3]}
    file.write_text(yaml.safe_dump(scenario))
    said = done(folder, "scenarios/rounds.yaml")
    rows = ["fedavg-2", "fedfisher-1", "fedfisher-kfac", "fedadam-2", "half", "all", "again"]
    assert f"federated: {', '.join(rows)} in rounds" in said
    run = folder / "runs" / "rounds-3"
    summary, manifest = read(run / "summary.json"), read(run / "manifest.json")
    assert list(summary["methods"]) == ["mean", "eam", "t3", *rows]
    assert not any(site["trained"] for site in summary["sites"])
    row, mean = summary["methods"]["fedavg-2"], summary["methods"]["mean"]
    assert (row["kind"], row["ranked"], row["forwards_per_batch"]) == ("federated", True, 1)
    assert (row["cost"]["rounds"], mean["cost"]["rounds"]) == (2, 1)
    assert row["cost"]["steps"] == mean["cost"]["steps"]
    assert row["cost"]["down"] == 2 * mean["cost"]["down"]
    half, whole, again = (summary["methods"][name]["cost"] for name in rows[4:])
    assert half["up"] == whole["up"] / 2 > 0  # one of two hospitals is asked, and the mean is over both
    assert half["steps"] < whole["steps"] == mean["cost"]["steps"]
    assert again == whole  # one model by two names, which nobody waits for
    assert summary["methods"]["fedfisher-1"]["cost"]["up"] > 1.9 * mean["cost"]["up"]
    sent = [line for line in map(json.loads, (run / "audit.jsonl").read_text().splitlines()) if line["kind"] == "kfac"]
    beside = summary["methods"]["fedfisher-kfac"]["cost"]["up"] - summary["methods"]["fedavg-2"]["cost"]["up"] / 2
    assert beside == sum(line["bytes"] for line in sent) / 2 > 0
    assert 'id="rounds"' in (run / "report.html").read_text()
    # The plain loop makes the same bits.
    plan = load_experiment(file, Overrides())
    weights = kept_theta_0(manifest["initial_sha256"], folder / "pool")
    assert weights is not None
    initial = Initial(weights, manifest["initial_sha256"], "shared_random", "", ())
    tasks = tuple(site_task(plan, number, initial) for number in range(2))
    there = RunRequest(out=tmp_path, pool=tmp_path / "there", quiet=True)
    assert LocalBackend().compete(job_of(plan, tasks, initial, there), lambda _: None) == {}
    pool = GlobalPool(there.pool, tasks)
    for strategy in plan.scenario.federated:
        assert pool.model(strategy).as_record()["sha256"] == manifest["federated"][strategy.key]["sha256"]
