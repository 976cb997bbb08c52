"""Per-sample merging against explicit merges in float64, for every family of backbones, and the traps on the way."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.errors import PerSampleRefused
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.layout import head_names
from fedmerge.merging.bank.recorded import Recorded
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.per_sample.dispatch import PerSample, Way, prefers_mixture
from fedmerge.merging.per_sample.mixture import Mixture
from tests.conftest import Net, expert_states

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
SMALL_CONVNEXT = {"depths": (2, 1, 2, 1), "dims": (16, 32, 64, 128)}
BACKBONES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit with LayerScale": ("vit_tiny_patch16_224", {**SMALL_VIT, "init_values": 0.1}, 32),
    "convnext": ("convnext_atto", SMALL_CONVNEXT, 32),
    "convnext v2": ("convnextv2_atto", SMALL_CONVNEXT, 32),
    "resnet18": ("resnet18", {"channels": (16, 32, 64, 128)}, 32),
    "resnet50": ("resnet50", {"layers": (2, 1, 1, 1), "channels": (16, 32, 64, 128)}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, **SMALL_SWIN}, 56),
    "swin v2": ("swinv2_tiny_window8_256", {"img_size": 64, **SMALL_SWIN}, 64),
    "beit": ("beit_base_patch16_224", SMALL_VIT, 32),
    "standardized convolutions": ("resnetv2_50x1_bit", {"channels": (128, 128, 256, 256), "stem_chs": 32}, 32),
    "squeeze and excite": ("mobilenetv3_small_050", {}, 32),
    "tied weights": ("coat_lite_tiny", {"img_size": 32, "embed_dims": (16, 32, 64, 80)}, 32),
}  # fmt: skip


def perturbed(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Float tensors moved at random, BatchNorm statistics among them; tables as they are, and tied weights moved together."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        owner = id(parameters.get(name, tensor))
        if owner not in moved:
            noise = 0.05 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            free = name in parameters or "running" in name
            value = tensor.double() + noise if free else tensor
            moved[owner] = value.abs() + 0.3 if name.endswith("running_var") else value
        state[name] = moved[owner]
    return state


def a_world(name: str, experts: int = 3, n: int = 4) -> tuple[Bank, Tensor, Tensor, Tensor]:
    timm_name, arguments, size = BACKBONES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(timm_name, num_classes=5, **arguments).eval()
    bank = Bank.of(model, [perturbed(model, seed) for seed in range(experts)], perturbed(model, 9), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    encoder, head = torch.rand(2, n, experts, generator=generator, dtype=torch.float64)
    return bank, x, encoder / encoder.sum(1, keepdim=True), head / head.sum(1, keepdim=True)


def explicit(bank: Bank, x: Tensor, encoder: Tensor, head: Tensor) -> Tensor:
    return torch.cat([bank.forward(bank.mix(e, h), x[i : i + 1], e) for i, (e, h) in enumerate(zip(encoder, head, strict=True))])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_sample_is_what_its_own_merge_predicts(name: str) -> None:
    bank, x, encoder, head = a_world(name)
    assert error(Mixture(bank).forward(x, encoder, head), explicit(bank, x, encoder, head)) < (
        1e-10 if "standard" in name else 1e-12
    )


@pytest.mark.parametrize("name", ["vit with LayerScale", "resnet18", "swin"])
def test_one_hot_rows_equal_rows_one_sample_and_anchors(name: str) -> None:
    bank, x, encoder, _ = a_world(name)
    mixture = Mixture(bank)
    one_hot = torch.eye(3, dtype=torch.float64)[[2, 0, 1, 1]]
    alone = bank.expert_logits(x)[[2, 0, 1, 1], torch.arange(4)]
    assert error(mixture.forward(x, one_hot, one_hot), alone) < 1e-12
    same = encoder[:1].expand(4, -1)
    assert error(mixture.forward(x, same, same), bank.forward(bank.mix(encoder[0]), x, encoder[0])) < 1e-12
    assert error(mixture.forward(x[:1], encoder[:1], encoder[:1]), explicit(bank, x[:1], encoder[:1], encoder[:1])) < 1e-12
    with_theta_0 = torch.cat([0.7 * encoder, torch.full((4, 1), 0.3, dtype=torch.float64)], 1)
    assert error(mixture.forward(x, with_theta_0, with_theta_0), explicit(bank, x, with_theta_0, with_theta_0)) < 1e-12


def test_the_variance_of_a_mixture_is_merged_before_it_divides() -> None:
    states = expert_states(3, 1)
    rows = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], dtype=torch.float64)
    x = torch.randn(2, 1, 10, 10, dtype=torch.float64)
    for policy in ("linear", "moment"):
        bank = Bank.of(Net(), states, dtype=torch.float64, variance=policy)
        assert error(Mixture(bank).forward(x, rows, rows), explicit(bank, x, rows, rows)) < 1e-12


def test_float32_and_bfloat16_are_as_good_as_they_can_be() -> None:
    bank, x, encoder, head = a_world("vit with LayerScale")
    wanted = explicit(bank, x, encoder, head)
    states = [bank.state_dict(row) for row in bank.theta]
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        narrow = Bank.of(bank.model, states, dtype=dtype)
        assert error(Mixture(narrow).forward(x.to(dtype), encoder, head).double(), wanted) < limit


class Odd(Net):
    """Net with one more thing that is done with a parameter."""

    def __init__(self, odd: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.odd = odd
        self.extra = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(super().forward(x), self.extra)


def an_odd_bank(odd: Callable[[Tensor, nn.Parameter], Tensor]) -> Bank:
    model = Odd(odd).double()
    states = [{name: t + k if name == "extra" else t for name, t in model.state_dict().items()} for k in range(2)]
    return Bank.of(model, states, dtype=torch.float64, head=["head.weight", "head.bias"])


ROWS = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x, w: x * w.clamp(max=1.6).exp(),
        lambda x, w: x + F.softplus(w).cumsum(0),
        lambda x, w: x @ torch.outer(w, w),
        lambda x, w: F.prelu(x, w),
        lambda x, w: torch.cat([x[:, :1], x[:, 1:] * w[1:]], 1),
        lambda x, w: w / (1 + x**2),
        lambda x, w: x.mul_(w),
        lambda x, w: F.rms_norm(x, (3,), w),
        lambda x, w: torch.addcmul(x, w, x),
    ],
)  # fmt: skip
def test_what_is_not_linear_in_a_parameter_is_merged_first(odd: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
    bank, x = an_odd_bank(odd), torch.randn(3, 1, 10, 10, dtype=torch.float64)
    assert error(Mixture(bank).forward(x, ROWS, ROWS), explicit(bank, x, ROWS, ROWS)) < 1e-12


def test_an_operation_without_an_exact_form_is_named_with_its_parameter() -> None:
    x = torch.randn(3, 1, 10, 10, dtype=torch.float64)
    with pytest.raises(PerSampleRefused, match="operation 'index_add' on extra has no exact form"):
        Mixture(an_odd_bank(lambda x, w: torch.index_add(x, 1, torch.arange(3), w.expand(3, 3)))).forward(x, ROWS, ROWS)
    with pytest.raises(PerSampleRefused, match="extra took no part"):
        Mixture(an_odd_bank(lambda x, w: x)).forward(x, ROWS, ROWS)


def test_a_model_that_couples_samples_is_found_out() -> None:
    bank, x = an_odd_bank(lambda x, w: w * (x - x.mean(0))), torch.randn(3, 1, 10, 10, dtype=torch.float64)
    with pytest.raises(PerSampleRefused, match="differs from its explicit merge"):
        Mixture(bank).verify(x, ROWS, ROWS)


def test_the_two_ways_agree_and_the_choice_follows_the_shapes() -> None:
    bank, x, encoder, head = a_world("vit with LayerScale", n=6)
    both = Coefficients(encoder, head)
    found = {way: PerSample(bank, way).predict(x, both) for way in get_args(Way)}
    for done in found.values():
        assert error(done.logits, explicit(bank, x, encoder, head)) < 1e-12
    assert {way: done.merges for way, done in found.items()} == {"auto": 0, "mixture": 0, "rows": 6, "samples": 6}
    assert torch.equal(found["rows"].logits, found["samples"].logits)
    assert torch.equal(found["auto"].logits, found["mixture"].logits)
    twice = Coefficients(encoder[[0, 1, 0, 1, 0, 0]], head[[0, 1, 0, 1, 0, 0]])
    assert PerSample(bank, "rows").predict(x, twice).merges == 2
    assert prefers_mixture(uses=17, experts=3, samples=32, distinct=32)
    assert not prefers_mixture(uses=17, experts=3, samples=32, distinct=8)
    assert prefers_mixture(uses=197, experts=2, samples=32, distinct=32)  # weights of layers are merged first
    assert not prefers_mixture(uses=197, experts=2, samples=32, distinct=32, merges_layers=False)
    assert prefers_mixture(uses=227, experts=3, samples=32, distinct=8, device="cuda")
    assert not prefers_mixture(uses=227, experts=3, samples=32, distinct=2, device="cuda")


def test_the_uses_of_a_parameter_are_counted_by_shape() -> None:
    """A ViT of 32 px and patches of 8 has 16 tokens and one for the class; the table of positions is not multiplied."""
    bank, x, _, _ = a_world("vit with LayerScale")
    assert 14 < PerSample(bank)._uses_of(x) < 18


def test_uses_are_counted_in_a_forward_that_runs_also_where_one_was_recorded() -> None:
    """A replay names no operation, so that its count would be 0, and the mixture would always be taken."""

    class Replayed(Recorded):
        def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            return function(*inputs) if self.refusal else torch.zeros(len(inputs[0]), bank.C)

    bank, x, _, _ = a_world("vit with LayerScale")
    counted, bank.recorded = PerSample(bank)._uses_of(x), Replayed()
    assert PerSample(bank)._uses_of(x) == counted


def test_where_the_mixture_is_refused_rows_are_merged_and_the_reason_is_kept() -> None:
    bank, x = an_odd_bank(lambda x, w: w * (x - x.mean(0))), torch.randn(3, 1, 10, 10, dtype=torch.float64)
    chooser = PerSample(bank)
    done = chooser.predict(x, Coefficients(ROWS, ROWS))
    assert done.way == "rows"
    assert "differs from its explicit merge" in chooser.refusal
    with pytest.raises(PerSampleRefused):
        PerSample(bank, "mixture").predict(x, Coefficients(ROWS, ROWS))


HEADS = {
    "vit_base_patch32_224": ("head.weight", "head.bias"),
    "convnext_tiny": ("head.fc.weight", "head.fc.bias"),
    "resnet18": ("fc.weight", "fc.bias"),
    "resnet50": ("fc.weight", "fc.bias"),
    "swin_tiny_patch4_window7_224": ("head.fc.weight", "head.fc.bias"),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_every_family_is_found_and_lies_last(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    assert head_names(model) == HEADS[name]


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"), [("vit_base_patch32_224", 87_463_691, 50), ("vit_base_patch16_224", 85_807_115, 197)]
)
def test_vits_of_real_size_have_the_shape_and_the_cost_they_should(name: str, parameters: int, tokens: int) -> None:
    """11 classes; P and the merge's traffic to the byte, without the memory: shapes alone."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=11)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.shape == (1, tokens, 768)


def test_methods_run_on_every_family() -> None:
    for name in ("convnext", "resnet18", "swin"):
        bank, x, _, _ = a_world(name)
        for method in ("ties", "slerp", "model_stock", "task_arithmetic"):
            logits = bank.forward(load_method(method).merge(bank), x)
            assert torch.isfinite(logits).all(), (name, method)
            merged = bank.state_dict(load_method(method).merge(bank))
            assert all((value > 0).all() for key, value in merged.items() if key.endswith("running_var"))


class _Odd(nn.Module):
    """Takes plain tensors alone for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc.weight) not in (Tensor, nn.Parameter):
            raise RuntimeError("no such thing")
        return self.fc(x)  # type: ignore[no-any-return]


def test_a_model_that_fails_with_weights_of_samples_is_refused_and_runs_row_by_row() -> None:
    """Whatever it raises: a run goes on with one merge for each distinct row."""
    bank = Bank.of(_Odd(), [_Odd().state_dict(), _Odd().state_dict()])
    x, rows = torch.randn(2, 4), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    with pytest.raises(PerSampleRefused, match="no exact form"):
        Mixture(bank).forward(x, rows, rows)
    assert PerSample(bank, "auto").predict(x, Coefficients(rows, rows)).way == "rows"
