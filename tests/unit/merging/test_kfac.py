"""Kronecker products of Fisher information: against matrices written out, gradients one by one, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge.errors import SiteError
from fedmerge.federated.model import ModelSpec, build
from fedmerge.merging.curvature.kfac import factors, joined, layers, others, product, rest
from tests.conftest import TINY, Net

CLASSES = 3


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def perceptron() -> nn.Module:
    """One row for each image; what comes after a layer writes into its output."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES, bias=False)))


def vit() -> nn.Module:
    return seeded(lambda: build(ModelSpec.model_validate(TINY), CLASSES, seed=1))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
    """p_iy / N and d log p_iy / d theta, for every image and label."""
    found, names = [], [name for name, _ in model.named_parameters()]
    for image in x:
        log_p = model(image[None]).log_softmax(-1)[0]
        for value in log_p:
            g = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
            found.append((float(value.detach().exp()) / len(x), dict(zip(names, g, strict=True))))
    return found


def information(model: nn.Module, x: Tensor, weight: str) -> Tensor:
    """The true block of a layer, its bias as the last column: E vec(dW) vec(dW)^T, vec stacking columns."""
    bias = weight.removesuffix("weight") + "bias"
    whole = [(p, joined(g[weight], g.get(bias)).T.reshape(-1)) for p, g in gradients(model, x)]
    return sum(p * torch.outer(g, g) for p, g in whole)  # type: ignore[return-value]


def test_a_layers_factors_are_sums_of_outer_products() -> None:
    model, x = perceptron(), images(40, 4)  # more than are looked at together
    (A_0, G_0), (A_2, G_2) = (factors(model, x)[f"{number}.weight"] for number in (0, 2))
    wide = torch.cat([x, torch.ones(40, 1).double()], 1)
    torch.testing.assert_close(A_0, wide.T @ wide / 40)
    hidden = torch.relu(x @ model[0].weight.T + model[0].bias).detach()  # type: ignore[index]
    torch.testing.assert_close(A_2, hidden.T @ hidden / 40)
    p = model(x).softmax(-1).detach()
    torch.testing.assert_close(G_2, torch.diag(p.mean(0)) - p.T @ p / 40)  # E (e_y - p)(e_y - p)^T
    db = [(weight, g["0.bias"]) for weight, g in gradients(model, x)]
    torch.testing.assert_close(G_0, sum(weight * torch.outer(g, g) for weight, g in db))


def test_of_one_row_it_is_the_fisher_information_itself() -> None:
    model, x = perceptron(), images(1, 4)
    for name, (A, G) in factors(model, x).items():
        torch.testing.assert_close(torch.kron(A, G), information(model, x, name))


def test_tokens_are_summed_so_the_block_of_a_bias_is_exact() -> None:
    model, x = vit(), images(3, 1, 16, 16)
    found = factors(model, x)
    assert found.keys() == {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for name, (A, G) in found.items():
        o = len(G)
        torch.testing.assert_close(A[-1, -1], torch.ones(()).double())
        torch.testing.assert_close(torch.kron(A, G)[-o:, -o:], information(model, x, name)[-o:, -o:])


def test_a_convolution_of_patches_is_a_linear_layer_on_unfolded_patches() -> None:
    class Tokens(nn.Module):
        def __init__(self, unfolded: bool) -> None:
            super().__init__()
            self.stem: nn.Module = nn.Linear(8, 5) if unfolded else nn.Conv2d(2, 5, 2, 2)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.stem, nn.Linear):
                rows = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
                return self.head(torch.tanh(self.stem(rows)).mean(1))
            return self.head(torch.tanh(self.stem(x)).mean((2, 3)))

    conv, linear, x = seeded(lambda: Tokens(False)), seeded(lambda: Tokens(True)), images(4, 2, 6, 6)
    linear.load_state_dict({name: t.flatten(1) if t.ndim == 4 else t for name, t in conv.state_dict().items()})
    for one, other in zip(factors(conv, x)["stem.weight"], factors(linear, x)["stem.weight"], strict=True):
        torch.testing.assert_close(one, other)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_product_is_that_of_the_matrix(d: int, o: int, K: int, seed: int) -> None:
    """sum_k (A_k (x) G_k) vec(W_k) with the Kronecker products written out."""
    rng = torch.Generator().manual_seed(seed)
    A, G = (torch.randn(K, side, side, generator=rng, dtype=torch.float64) for side in (d, o))
    A, G, W = A @ A.mT, G @ G.mT, torch.randn(K, o, d, generator=rng, dtype=torch.float64)
    wanted = sum(torch.kron(a, g) @ w.T.reshape(-1) for a, g, w in zip(A, G, W, strict=True))
    torch.testing.assert_close(product(A, G, W).T.reshape(-1), wanted)
    torch.testing.assert_close(product(A, G, W[0]), product(A, G, W[:1].expand(K, -1, -1)))


@pytest.mark.parametrize("make", [vit, lambda: seeded(lambda: Net(CLASSES))])
def test_the_rest_is_the_exact_diagonal(make: Callable[[], nn.Module]) -> None:
    """Of norms, tokens, positions, and convolutions whose patches overlap; together with layers, of all parameters."""
    model, x = make(), images(34, 1, 16, 16)
    inside = {p for layer in layers(model).values() for p in layer.parameters()}
    assert set(others(model)) == {name for name, p in model.named_parameters() if p not in inside} != set()
    found = rest(model, x)
    assert found.keys() == others(model).keys()
    wanted = gradients(model, x)
    for name, F in found.items():
        torch.testing.assert_close(F, sum(p * g[name] ** 2 for p, g in wanted))


def test_one_drawn_label_is_right_on_average() -> None:
    model, x = perceptron(), images(2, 4)
    exact, drawn = factors(model, x), factors(model, x.repeat(2000, 1), "mc", seed=3)
    for name, (A, G) in exact.items():
        torch.testing.assert_close(drawn[name][0], A)
        torch.testing.assert_close(drawn[name][1], G, rtol=0.1, atol=0.1 * float(G.abs().max()))
    again = factors(model, x.repeat(2000, 1), "mc", seed=3)
    assert all(torch.equal(again[name][1], drawn[name][1]) for name in drawn)
    net, x = seeded(lambda: Net(CLASSES)), images(2, 1, 4, 4)
    for name, F in rest(net, x.repeat(500, 1, 1, 1), "mc").items():
        torch.testing.assert_close(F, rest(net, x)[name], rtol=0.2, atol=0.1 * float(F.abs().max()))


def test_shared_weights_and_layers_that_are_not_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
            self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(torch.tanh(self.twice(self.one(torch.tanh(self.other(x)))))))

    model, x = seeded(Odd), images(1, 4)
    found = factors(model, x)
    assert found.keys() == {"twice.weight", "never.weight", "head.weight"}
    assert set(others(model)) == {"one.weight"}
    assert not any(bool(factor.any()) for factor in found["never.weight"])
    torch.testing.assert_close(found["twice.weight"][1], information(model, x, "twice.weight")[-4:, -4:])  # calls are as tokens
    squares = sum(p * g["one.weight"] ** 2 for p, g in gradients(model, x))
    torch.testing.assert_close(rest(model, x)["one.weight"], squares)
    assert factors(nn.Flatten(), x) == rest(nn.Flatten(), x) == {}


def test_a_layer_of_something_else_than_images_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Linear(2, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.table(torch.ones(1, 2).to(x)))

    for number in (5, 1):  # of one image, its one row would be taken for the image's
        with pytest.raises(
            SiteError, match=r"table\.weight: found inputs that are no images' rows; expected rows of each"
        ) as error:
            factors(seeded(Table), images(number, 4))
        assert error.value.told == str(error.value)
