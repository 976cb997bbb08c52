"""Small plots of a stream that is still running: SVG written by hand, since matplotlib would take time from the run.

Both go from the first batch of the stream to its last, so that they grow to the right. Their colors are those of a page's paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from fedmerge.report.plots.svg import DARK, LINES, PALETTE, QUIET, readable

WIDTH, HEIGHT = 720, 120
"""Of the field, without what is written beside it."""

LEFT, RIGHT, BELOW, ABOVE = 36, 8, 20, 6


def shades(names: Sequence[str], quiet: Sequence[str] = ()) -> dict[str, str]:
    """A color in CSS for each name: gray for the quiet ones."""
    loud = [name for name in names if name not in quiet]
    own = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(loud)}
    return {name: _on_both(own.get(name, QUIET)) for name in names}


def river(at: NDArray[np.float64], shares: NDArray[np.float64], names: Sequence[str], batches: int, title: str) -> Markup:
    """Shares (B, K), stacked to their sum, at the batches `at` (B,)."""
    x, field = _across(at, batches), _stairs(shares)
    areas = []
    for k, color in enumerate(shades(names).values()):
        top, bottom = field[:, k + 1], field[:, k]
        there = [f"{a:.1f},{b:.1f}" for a, b in zip(x, top, strict=True)]
        back = [f"{a:.1f},{b:.1f}" for a, b in zip(x[::-1], bottom[::-1], strict=True)]
        areas.append(f'<polygon points="{" ".join(there + back)}" style="fill:{color}"/>')
    return _framed("".join(areas), batches, title, {"0": 0.0, "1": 1.0})


def lines(rows: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], batches: int, title: str) -> Markup:
    """Accuracies in [0, 1] at batches, by name; the field ends a little below the lowest."""
    low = max(0.0, np.floor(10 * min((y.min() for _, y in rows.values() if len(y)), default=0.0)) / 10 - 0.05)
    quiet = [name for name in rows if name.startswith("expert")]
    drawn = []
    for name, color in shades(list(rows), quiet).items():
        at, y = rows[name]
        height = HEIGHT * (1 - (y - low) / (1 - low))
        points = " ".join(f"{a:.1f},{b + ABOVE:.1f}" for a, b in zip(_across(at, batches), height, strict=True))
        dash = ' stroke-dasharray="5 4"' if name in quiet else ""
        drawn.append(f'<polyline points="{points}" style="fill:none;stroke:{color}" stroke-width="2"{dash}/>')
    return _framed("".join(drawn), batches, title, {f"{100 * low:.0f}": 0.0, "100": 1.0})


def _stairs(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Heights (B, K + 1) between the areas, in pixels from above; what extrapolates below 0 is drawn as nothing."""
    positive = np.clip(shares, 0, None)
    sums = np.concatenate([np.zeros((len(shares), 1)), positive.cumsum(1)], 1)
    whole: NDArray[np.float64] = ABOVE + HEIGHT * (1 - sums / np.maximum(1.0, sums[:, -1:]))
    return whole


def _across(at: NDArray[np.float64], batches: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = LEFT + WIDTH * np.asarray(at, dtype=np.float64) / max(1, batches - 1)
    return found


def _framed(inside: str, batches: int, title: str, ticks: Mapping[str, float]) -> Markup:
    whole = f"0 0 {LEFT + WIDTH + RIGHT} {ABOVE + HEIGHT + BELOW}"
    foot = ABOVE + HEIGHT
    axis = f'<path d="M{LEFT} {ABOVE}V{foot}H{LEFT + WIDTH}" class="axis"/>'
    words = [
        f'<text x="{LEFT - 6}" y="{foot - HEIGHT * place + 4:.0f}" text-anchor="end">{text}</text>' for text, place in ticks.items()
    ]
    words += [
        f'<text x="{LEFT}" y="{foot + 15}">0</text>',
        f'<text x="{LEFT + WIDTH / 2:.0f}" y="{foot + 15}" text-anchor="middle">batch</text>',
        f'<text x="{LEFT + WIDTH}" y="{foot + 15}" text-anchor="end">{max(0, batches - 1)}</text>',
    ]
    return Markup(
        f'<svg class="live" viewBox="{whole}" role="img" aria-label="{escape(title)}">{inside}{axis}{"".join(words)}</svg>'
    )


def _on_both(color: str) -> str:
    return f"light-dark({color.lower()},{readable(color, DARK, LINES)})"
