"""Differential privacy of uploads: the accountant against integrals, clipping, noise, and what a noised upload lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from scipy.stats import kstest, norm

from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.federated.client.site_training import model_of
from fedmerge.federated.messages import Job, SiteTask
from fedmerge.federated.pool.experts import ExpertPool, fingerprint
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.security.privacy import Privacy, delta_of, gaussian, noised, protect
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.merging.bank.layout import Parts
from fedmerge.rng import generator
from tests.conftest import Net, expert_states
from tests.front_door import SCENARIO, world

PARTS = Parts.of(Net())


def integrated(epsilon: float, sensitivity: float, sigma: float) -> float:
    """The definition of delta, to 40 digits: what density p of N(sensitivity, sigma^2) has above e^epsilon q, q of N(0, sigma^2).

    p is above from x = sensitivity / 2 + epsilon sigma^2 / sensitivity on.
    """
    with mp.workdps(40):
        s, e, mean = mp.mpf(sigma), mp.mpf(epsilon), mp.mpf(sensitivity)
        start = mean / 2 + e * s * s / mean
        stops = [start + s * step for step in (0, 0.02, 0.1, 0.5, 1, 2, 4, 8, 16, 40, 300)]
        return float(mp.quad(lambda x: mp.npdf(x, mean, s) - mp.exp(e) * mp.npdf(x, 0, s), stops))


@pytest.mark.parametrize("z", [0.1, 0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(z: float, delta: float) -> None:
    clip = 3.0
    epsilon = Privacy(clip=clip, noise_multiplier=z, delta=delta).epsilon
    assert epsilon is not None
    assert integrated(epsilon, 2 * clip, z * clip) == pytest.approx(delta, rel=1e-6)
    assert integrated(epsilon * 0.99, 2 * clip, z * clip) > delta
    assert delta_of(epsilon, 2 / z) == pytest.approx(delta, rel=1e-6)


def test_delta_at_epsilon_0_is_the_total_variation_and_nothing_overflows() -> None:
    assert delta_of(0.0, 2.0) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-12)
    assert delta_of(500.0, 0.001) == 0.0
    assert delta_of(500.0, 200.0) == pytest.approx(1.0)


def test_another_accountant_gives_no_less() -> None:
    """Renyi accounting, as it is used for DP-SGD, is a looser bound on the same mechanism.

    The divergence of order a is a mu^2 / 2 (Mironov 2017, corollary 3); its epsilon is that of Canonne, Kamath & Steinke 2020.
    """
    delta, orders = 1e-5, [1 + x / 10 for x in range(1, 100)] + list(range(11, 64))
    for z in (0.5, 1.0, 4.0):
        loose = min(a * (2 / z) ** 2 / 2 + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders)
        exact = Privacy(clip=1, noise_multiplier=z).epsilon
        assert exact is not None
        assert exact < loose < 1.5 * exact


def test_noise_that_promises_nothing_says_so() -> None:
    weak = Privacy(clip=1, noise_multiplier=0.01)
    assert weak.epsilon is None
    assert "above 500, which promises nothing" in weak.said()
    assert Privacy(clip=1, noise_multiplier=1e6).epsilon == 0
    assert "can be drawn again from the scenario's seed" in weak.said()
    assert "drawn again" not in Privacy(clip=1, noise_multiplier=1, noise_from="system").said()


@settings(max_examples=25)
@given(clip=st.floats(1e-3, 1e3), scale=st.floats(0, 100), seed=st.integers(0, 3))
def test_no_task_vector_is_longer_than_the_clip(clip: float, scale: float, seed: int) -> None:
    theta_0, other = expert_states(2, seed)
    state = {name: theta_0[name] + scale * (other[name] - theta_0[name]) for name in theta_0}
    sent = noised(state, theta_0, PARTS, clip, 0.0, generator(0).bytes)
    names = (*PARTS.encoder, *PARTS.head)
    tau, kept = ({n: (s[n].double() - theta_0[n].double()) for n in names} for s in (state, sent))
    before = float(torch.cat([tau[n].flatten() for n in names]).norm())
    after = float(torch.cat([kept[n].flatten() for n in names]).norm())
    assert after == pytest.approx(min(before, clip), rel=1e-3, abs=1e-4)
    for name in names:  # its direction is kept
        torch.testing.assert_close(kept[name] * before, tau[name] * after, rtol=1e-3, atol=1e-3 * max(1.0, before * after))


def test_the_noise_is_gaussian_of_the_promised_width_and_buffers_are_theta_0s() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 200))
    theta_0 = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 7 for name, tensor in theta_0.items()}
    upload = Upload("north", state, {"n": 40.0, "temperature": 2.0})
    privacy = Privacy(clip=2.0, noise_multiplier=0.5)
    sent = protect(upload, theta_0, Parts.of(model), privacy, 0)
    assert sent.scalars == {}
    for name in theta_0:
        if "running" in name or "num_batches" in name:
            assert torch.equal(sent.weights[name], theta_0[name])
    exact = noised(state, theta_0, Parts.of(model), 2.0, 0.0, generator(0).bytes)
    noise = torch.cat([(sent.weights[n] - exact[n]).flatten().double() for n in ("3.weight", "0.weight", "0.bias", "3.bias")])
    assert kstest(noise.numpy(), norm(scale=1.0).cdf).pvalue > 1e-3  # z C = 1
    again = protect(upload, theta_0, Parts.of(model), privacy, 0)
    assert all(torch.equal(again.weights[name], sent.weights[name]) for name in state)
    for other, seed in ((privacy.model_copy(update={"noise_from": "system"}), 0), (privacy, 1)):
        assert not torch.equal(protect(upload, theta_0, Parts.of(model), other, seed).weights["3.weight"], sent.weights["3.weight"])


def test_draws_reach_far_and_are_finite() -> None:
    extremes = gaussian(2, lambda count: b"\x00" * 8 + b"\xff" * 8).numpy()
    assert extremes[0] == pytest.approx(-extremes[1])
    assert 8 < extremes[1] < 9


def test_a_noised_upload_is_admitted_without_numbers_and_its_audit_names_epsilon(
    hospital: Callable[..., SiteTask], job: Callable[..., Job]
) -> None:
    exact = hospital("north", runs=1)
    task = exact.model_copy(update={"privacy": Privacy(clip=1, noise_multiplier=0.5)})
    assert fingerprint(task) != fingerprint(exact)
    asked = job(task)
    assert LocalBackend().gather(asked, lambda _: None)["north"].reason == ""
    expert = ExpertPool(asked.pool).load(task)
    assert (expert.n, expert.validation_accuracy, expert.temperature, expert.runs) == (None, None, 1.0, [])
    lines = [json.loads(line) for line in asked.audit.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"weights", "statement"}
    assert all("noised: epsilon 24.4 at delta 1e-05" in line["verdict"] for line in lines)
    tau = torch.cat([(expert.weights[n] - asked.initial.weights[n]).flatten() for n, _ in model_of(task).named_parameters()])
    assert float(tau.std()) == pytest.approx(0.5, rel=0.1)


def test_a_scenario_may_not_send_anything_beside_the_noise(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    asked = {"privacy": {"clip": 1, "noise_multiplier": 1}, "uploads": ["gram"]}
    start = {**SCENARIO["initialization"], "head_init": "fed_lp"}  # type: ignore[dict-item]
    file.write_text(yaml.safe_dump({**SCENARIO, **asked, "initialization": start}))
    with pytest.raises(ScenarioError) as error:
        load_experiment(file)
    told = str(error.value)
    for word in ("uploads: found gram", "head_init", "methods[1]", "site 'north': samples: found 1", "site 'south': samples"):
        assert word in told
    assert "5 problems" in told
