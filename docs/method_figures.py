"""One small figure for each method, drawn while the pages are built: what it does with the same three experts on the same stream.

Handwritten digits of 8 x 8 pixels; three hospitals whose scanners differ (as they are, negative, upside down) trained one expert
each, from the same theta_0. The stream drifts from the first hospital's images over the second's to the third's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from fedmerge import Adapter
from fedmerge.merging.curvature.fisher import diagonal
from fedmerge.merging.curvature.gram import grams
from fedmerge.merging.methods._base import METHODS, Static
from fedmerge.merging.scoring.features import center_of

State = dict[str, Tensor]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {"north": lambda x: x, "east": lambda x: 1 - x, "south": lambda x: x.flip(-2)}
COLORS = ("#0072b2", "#e69f00", "#009e73")
"""Of the experts; told apart by people who are color-blind, too."""
BATCHES, SIZE = 24, 20
WIDTH, HEIGHT = 360, 96
EXTRA: dict[str, dict[str, Any]] = {"expert": {"site": "north"}, "mixup": {"draws": 1}}
"""What is said of a method that otherwise stands for several rows."""


@dataclass(frozen=True)
class World:
    """Experts by name, what they started from, and the stream: a batch with its labels, and its shares of the three scanners."""

    model: nn.Module
    theta_0: State
    experts: dict[str, State]
    statistics: dict[str, dict[str, State]]
    batches: list[tuple[Tensor, Tensor]]
    shares: NDArray[np.float64]


@cache
def world() -> World:
    """The same for all methods; a second or two."""
    torch.manual_seed(0)
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    x = torch.tensor(digits.images[order], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[order])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    everywhere = torch.cat([view(x[:250]) for view in VIEWS.values()])
    theta_0 = _trained(model, everywhere, y[:250].repeat(3), 6)
    experts, statistics = (
        dict[str, State](),
        {kind: dict[str, State]() for kind in ("fisher", "gram", "gram_rounds", "soup", "centroid")},
    )
    for name, view in VIEWS.items():
        runs = []
        for part in (slice(250, 1000), slice(250, 625)):
            model.load_state_dict(theta_0)
            runs.append(_trained(model, view(x[part]), y[part], 8))
        experts[name], other = runs
        statistics["soup"][name] = {key: (value + other[key]) / 2 for key, value in experts[name].items()}
        model.load_state_dict(experts[name])
        statistics["fisher"][name] = _fisher(model, view(x[250:450]))
        seen = view(x[250:1000])
        statistics["gram"][name] = statistics["gram_rounds"][name] = grams(model.eval(), [seen])
        model.load_state_dict(theta_0)
        statistics["centroid"][name] = {"centroid": center_of(model, (seen,))}
    shares = np.maximum(0, 1 - abs(np.arange(3) - np.linspace(0, 2, BATCHES)[:, None]))
    batches = []
    for number, chances in enumerate(shares):
        rows = range(1000 + SIZE * number, 1000 + SIZE * (number + 1))
        kinds = rng.choice(list(VIEWS), SIZE, p=chances)
        batches.append(
            (torch.cat([VIEWS[kind](x[row : row + 1]) for row, kind in zip(rows, kinds, strict=True)]), y[rows.start : rows.stop])
        )
    return World(model, theta_0, experts, statistics, batches, shares)


def _trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> State:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _fisher(model: nn.Module, x: Tensor) -> State:
    """The diagonal, by parameter."""
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def forward(theta: Tensor, batch: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        state = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, state, (batch,))

    found = diagonal(forward, parameters_to_vector(model.parameters()).detach(), x)
    parts = found.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def figure(name: str) -> str:
    """An SVG, and a sentence that says what it shows."""
    here, kind = world(), METHODS.load(name)
    adapt = Adapter(
        here.model, here.experts, name, here.theta_0, statistics=here.statistics, counts=[750] * 3, **EXTRA.get(name, {})
    )
    if issubclass(kind, Static):
        return _path(_flat(adapt.state_dict()))
    needs_labels = "labels" in kind.needs
    rows, right = [], []
    for x, y in here.batches:
        log_p = adapt(x, y) if needs_labels else adapt(x)
        right.append(float((log_p.argmax(1) == y).float().mean()))
        if adapt.coefficients is not None:
            rows.append(adapt.coefficients.encoder.reshape(-1, adapt.coefficients.encoder.shape[-1]).mean(0).numpy())
    if not rows:
        return _line(right)
    widest = max(map(len, rows))  # theta_0 has a part in some batches, or in none
    return _river(np.array([np.pad(row, (0, widest - len(row))) for row in rows]))


def _flat(state: State) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()]).double()


def _path(merged: Tensor) -> str:
    """Where a merged model lies: along the way from theta_0 to the mean, and how far off it."""
    here = world()
    experts = torch.stack([_flat(state) for state in here.experts.values()])
    theta_0, mean = _flat(here.theta_0), experts.mean(0)
    unit = (mean - theta_0).norm()

    def place(point: Tensor) -> tuple[float, float]:
        along = (point - theta_0) @ (mean - theta_0) / unit**2
        off = (point - theta_0 - along * (mean - theta_0)).norm() / unit
        return float(along), float(off)

    places = [place(point) for point in (*experts, merged)]
    scale = min(150.0, (WIDTH - 90) / max(1.0, *(a for a, _ in places)), 110 / max(0.5, *(b for _, b in places)))
    x, y = 30.0, 125.0

    def at(along: float, off: float) -> tuple[float, float]:
        return x + scale * along, y - scale * off

    parts = [f'<path d="M{x},{y}h{scale:.0f}" stroke="currentColor" stroke-opacity=".5"/>']
    parts += [_dot(at(0, 0), "currentColor", 3), _words((x - 12, y + 16), "θ₀")]
    parts += [_dot(at(1, 0), "currentColor", 3), _words((x + scale - 22, y + 16), "mean")]
    parts += [_dot(at(*one), color, 4) for one, color in zip(places, COLORS, strict=False)]
    ring = at(*places[-1])
    parts.append(f'<circle cx="{ring[0]:.1f}" cy="{ring[1]:.1f}" r="7" fill="none" stroke="#d55e00" stroke-width="2.5"/>')
    said = f"The merged model (ring) is {places[-1][0]:.2f} of the way from theta_0 to the mean, and {places[-1][1]:.2f} off it, "
    return _svg(parts, 146, said + "in lengths of that way. Dots: the experts, north (blue), east (orange), south (green).")


def _river(rows: NDArray[np.float64]) -> str:
    """Coefficients of the encoder, batch by batch, in layers; what is neither expert's (theta_0, say) is left white."""
    shares = np.clip(rows[:, :3], 0, None)
    ends = np.concatenate([np.zeros((len(rows), 1)), shares.cumsum(1)], axis=1)
    ends /= max(1.0, ends.max())
    x = np.linspace(0, WIDTH, len(rows))
    parts = []
    for expert, color in enumerate(COLORS):
        lower = [f"{a:.0f},{HEIGHT * (1 - b):.0f}" for a, b in zip(x, ends[:, expert], strict=True)]
        upper = [f"{a:.0f},{HEIGHT * (1 - b):.0f}" for a, b in zip(x, ends[:, expert + 1], strict=True)]
        parts.append(f'<polygon points="{" ".join([*lower, *reversed(upper)])}" fill="{color}"/>')
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="currentColor" stroke-opacity=".4"/>')
    return _svg(parts, HEIGHT, "Coefficients of north (blue), east (orange) and south (green), batch by batch.")


def _line(right: Sequence[float]) -> str:
    """Accuracy batch by batch, beside that of the mean."""
    here = world()
    adapt = Adapter(here.model, here.experts, "mean")
    mean = [float((adapt(x).argmax(1) == y).float().mean()) for x, y in here.batches]
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="currentColor" stroke-opacity=".4"/>']
    for shares, color in ((mean, "currentColor"), (right, "#d55e00")):
        x = np.linspace(0, WIDTH, len(shares))
        points = " ".join(f"{a:.0f},{HEIGHT * (1 - share):.0f}" for a, share in zip(x, shares, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    return _svg(
        parts, HEIGHT, "It merges no model with coefficients: its accuracy (red) and the mean's (black or white), batch by batch."
    )


def _dot(at: tuple[float, float], color: str, radius: int) -> str:
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}" fill="{color}"/>'


def _words(at: tuple[float, float], text: str) -> str:
    return f'<text x="{at[0] + 8:.1f}" y="{at[1] + 4:.1f}" font-size="11" fill="currentColor">{text}</text>'


def _svg(parts: Sequence[str], height: int, said: str) -> str:
    """With its caption. In the text's own color, so that it is read in light and dark."""
    box = f'viewBox="0 0 {WIDTH} {height}" style="display:block;max-width:{WIDTH}px;width:100%" role="img" aria-label="{said}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>\n\n<small>{said}</small>'
