"""What sites upload beside weights: right numbers, the same by every road, audited, refused when they cannot be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmerge.errors import FolderError
from fedmerge.federated.client.site_training import admit_images
from fedmerge.federated.client.worker import answer
from fedmerge.federated.messages import Ask, Job, Reply, Request, SiteTask
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.experts import Expert, ExpertPool
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.server.collect import collect, incomplete
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.server.statistics import Rounds, blocks
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import load_method
from tests.conftest import TINY

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]

ALL = ({"kind": "fisher", "samples": 20}, {"kind": "gram", "samples": 24}, {"kind": "gram_rounds", "samples": 24}, {"kind": "soup"})


def asked_for(task: SiteTask, *entries: dict[str, object]) -> SiteTask:
    return task.model_copy(
        update={"uploads": tuple(STATISTICS.load(str(entry["kind"])).model_validate(entry) for entry in entries)}
    )


def loaded(job: Job) -> list[Expert]:
    known = StatisticPool(ExpertPool(job.pool), job.tasks)
    return [known.with_statistics(known.pool.load(task), task) for task in job.tasks]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def sites(hospital: Hospital) -> tuple[SiteTask, ...]:
    return tuple(asked_for(hospital(name), *ALL) for name in ("north", "south"))


def test_they_are_of_the_expert_on_the_sites_own_images(sites: tuple[SiteTask, ...], job: Jobs) -> None:
    asked = job(*(asked_for(task, {"kind": "fisher", "samples": 10_000}, {"kind": "gram", "samples": 10_000}) for task in sites))
    LocalBackend().gather(asked, lambda _: None)
    for task, expert in zip(asked.tasks, loaded(asked), strict=True):
        x = admit_images(task).train.x[:].double()
        model = build(task.model, len(task.classes)).double().eval()
        model.load_state_dict(expert.weights)
        F = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for image in x:
            log_p = model(image[None]).log_softmax(-1)[0]
            for c in range(len(log_p)):
                gradients = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True)
                for name, g in zip(F, gradients, strict=True):
                    F[name] += log_p[c].detach().exp() * g**2 / len(x)
        for name, wanted in F.items():
            torch.testing.assert_close(expert.statistics["fisher"][name].double(), wanted, rtol=1e-3, atol=1e-8)
        with torch.no_grad():
            features = model.forward_head(model.forward_features(x), pre_logits=True)
        wanted = features.T @ features / len(x)
        torch.testing.assert_close(expert.statistics["gram"]["head.weight"].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [False, True])
def test_centroids_are_those_of_theta_0_with_training_or_later(hospital: Hospital, job: Jobs, later: bool) -> None:
    tasks = tuple(asked_for(hospital(name), {"kind": "centroid"}) for name in ("north", "south"))
    if later:  # experts are in the pool, and hospitals are asked for the statistic alone
        LocalBackend().gather(job(*(asked_for(task) for task in tasks)), lambda _: None)
    asked = job(*tasks)
    LocalBackend().gather(asked, lambda _: None)
    for task, expert in zip(asked.tasks, loaded(asked), strict=True):
        model = build(task.model, len(task.classes)).double().eval()
        model.load_state_dict(asked.initial.weights)
        with torch.no_grad():
            features = model.forward_head(model.forward_features(admit_images(task).train.x[:].double()), pre_logits=True)
        mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(expert.statistics["centroid"]["centroid"].double(), mean / mean.norm(), rtol=1e-4, atol=1e-6)
        assert [line["item"] for line in expert.audit if "centroid" in str(line)]


def test_rounds_send_inputs_through_what_is_merged(hospital: Hospital, job: Jobs) -> None:
    """RegMean++ written out: for every block, inputs through the merged model up to it and the site's own block."""
    kwargs = {**TINY["kwargs"], "depth": 2}  # type: ignore[dict-item]
    model = build(ModelSpec.model_validate({**TINY, "kwargs": kwargs}), 3).double().eval()
    generator = torch.Generator().manual_seed(0)
    noisy = [{n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()} for _ in range(2)]
    images = [torch.randn(9, 1, 16, 16, generator=generator).double() for _ in noisy]
    assert [prefix for prefix, _ in blocks(model, (1, 16, 16))] == ["blocks.0", "blocks.1", "head"]
    rounds = Rounds(model, noisy, (1, 16, 16), 0.9, 1e-6)
    kept: list[dict[str, Tensor]] = [{}, {}]
    wanted = {name: (noisy[0][name] + noisy[1][name]) / 2 for name in noisy[0]}
    for (prefix, names), (layers, states) in zip(blocks(model, (1, 16, 16)), rounds, strict=True):
        assert layers == names
        for k, state in enumerate(states):
            model.load_state_dict(state)
            kept[k].update(_grams(model, images[k], layers))
            own = {name: noisy[k][name] if name.startswith(f"{prefix}.") else wanted[name] for name in wanted}
            model.load_state_dict(own)
            torch.testing.assert_close(kept[k][layers[0]], _grams(model, images[k], layers)[layers[0]], rtol=1e-5, atol=1e-7)
        for name in layers:
            G = [0.9 * one[name].double() + 0.1 * one[name].double().diag().diag() for one in kept]
            ridge = 1e-6 * (G[0] + G[1]).trace() / len(G[0])
            mean = (noisy[0][name] + noisy[1][name]).double() / 2
            right = sum(g @ noisy[k][name].double().T for k, g in enumerate(G)) + ridge * mean.T
            wanted[name] = torch.linalg.solve(G[0] + G[1] + ridge * torch.eye(len(G[0])), right).T
        rounds.merge([{name: one[name] for name in layers} for one in kept])
    bank = Bank.of(model, noisy, statistics={"gram_rounds": kept}, dtype=torch.float64)
    theta = load_method("regmean_pp", ratio=0.9).merge(bank)  # type: ignore[attr-defined]
    for name, columns in bank.slices.items():
        torch.testing.assert_close(theta[columns].reshape(bank.shapes[name]), wanted[name].double(), rtol=1e-4, atol=1e-5)


def _grams(model: torch.nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = []
    for name in layers:

        def hear(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            X = inputs[0].reshape(-1, inputs[0].shape[-1])
            found[name] = X.T @ X / len(X)

        hooks.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hear))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: G.float() for name, G in found.items()}


def _spoiling(kind: str, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Ask:
    """The plain loop with sites that send something else for one kind."""

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            reply = answer(request, lambda _: None)
            assert reply.upload is not None
            statistics = {key: spoil(state) if key == kind else state for key, state in reply.upload.statistics.items()}
            yield replace(reply, upload=replace(reply.upload, statistics=statistics))

    return ask


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("fisher", lambda F: {n: -t - 1 for n, t in F.items()}, "negative"),
        ("gram", lambda G: {n: t + torch.ones_like(t).triu(1) for n, t in G.items()}, "not symmetric"),
        ("gram", lambda G: dict(list(G.items())[1:]), "missing"),
        ("gram_rounds", lambda G: {n: -t for n, t in G.items()}, "negative element on the diagonal"),
        ("soup", lambda S: {n: t / 0 for n, t in S.items()}, "NaN or infinity"),
        ("centroid", lambda C: {n: 2 * t for n, t in C.items()}, "found a vector of length 2; expected 1"),
        ("centroid", lambda C: {n: t[1:] for n, t in C.items()}, "shape of centroid"),
        ("fisher", lambda F: {**F, "images": torch.zeros(3)}, "undeclared ['images']"),
    ],
)
def test_what_cannot_be_right_is_refused(
    kind: str, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, hospital: Hospital, job: Jobs
) -> None:
    asked = job(asked_for(hospital("north"), {"kind": kind}))
    outcome = collect(asked, _spoiling(kind, spoil))["north"]
    assert said in outcome.reason
    assert "north" in outcome.reason
    assert incomplete(asked) == list(asked.tasks)


def test_a_damaged_file_is_named(hospital: Hospital, job: Jobs) -> None:
    asked = job(asked_for(hospital("north"), {"kind": "soup"}))
    LocalBackend().gather(asked, lambda _: None)
    (file,) = asked.pool.rglob("soup-*.safetensors")
    whole = file.read_bytes()
    for position in [*range(0, len(whole), len(whole) // 61), len(whole) - 1]:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(FolderError, match="Delete this file and the site computes it again"):
            loaded(asked)


def test_a_new_site_means_new_rounds_and_nothing_else(hospital: Hospital, job: Jobs) -> None:
    kinds = ({"kind": "gram", "samples": 8}, {"kind": "gram_rounds", "samples": 8})
    two = [asked_for(hospital(name), *kinds) for name in ("north", "south")]
    LocalBackend().gather(job(*two), lambda _: None)
    three = job(*two, asked_for(hospital("east"), *kinds))
    known = StatisticPool(ExpertPool(three.pool), three.tasks)
    by_kind = {one.kind(): [task.site.name for task in known.lacking(one)] for one in three.tasks[0].uploads}
    assert by_kind == {"gram": ["east"], "gram_rounds": ["north", "south", "east"]}
