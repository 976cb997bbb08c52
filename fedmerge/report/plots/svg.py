"""Plots as SVG: one style, and colors that are readable on white and on dark paper, with contrasts as WCAG 2.2 counts them.

A plot is drawn for white paper. On a page it carries rules that a browser follows where its reader prefers a dark one.
"""

from __future__ import annotations

import io
import re
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fedmerge",
    "svg.fonttype": "none",
}
"""Settings of matplotlib under which every plot is drawn and written."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C68900", "#4B9DCB", "#7A5195", "#8C6D31")
"""Okabe & Ito, Color universal design, 2008; their orange and light blue darker, so that lines are seen on white (3 : 1)."""

QUIET = "#949494"
"""Of what a plot compares with: single experts, the mean."""

ON_BRIGHT, ON_DIM = "#111111", "#ffffff"
"""Of numbers on the fields of a heat map, which are the same on every paper."""

WHITE, DARK = "#ffffff", "#17181b"
"""Papers; the dark one as in style.css."""

LINES, LETTERS = 3.0, 4.5
"""Least contrasts with the paper."""

STEPS = 100


def contrast_ratio(color: str, paper: str) -> float:
    """Between 1 and 21, of two colors like "#0072b2".

    >>> from fedmerge.report.plots.svg import contrast_ratio
    >>> round(contrast_ratio("#000000", "#ffffff"))
    21
    """
    low, high = sorted((_luminance(color), _luminance(paper)))
    return (high + 0.05) / (low + 0.05)


@cache
def readable(color: str, paper: str = WHITE, least: float = LETTERS) -> str:
    """The color itself, or as little darker (on white) or lighter (on dark paper) as makes it readable.

    >>> from fedmerge.report.plots.svg import readable
    >>> readable("#0072B2"), readable("#4B9DCB")
    ('#0072b2', '#3b7ca0')
    """
    end = 0 if _luminance(paper) > 0.2 else 255
    mixes = ("#" + "".join(f"{round(part + (end - part) * k / STEPS):02x}" for part in _parts(color)) for k in range(STEPS + 1))
    return next(mix for mix in mixes if contrast_ratio(mix, paper) >= least)


def as_svg(figure: Figure) -> str:
    """The figure as the text of an SVG file, with no date in it."""
    text = io.StringIO()
    figure.savefig(
        text, format="svg", metadata={"Date": None, "Creator": "fedmerge"}, transparent=True, bbox_inches="tight", dpi=150
    )
    return text.getvalue()


def as_source(svg: str) -> str:
    """The plot as the source of an image on a page: without what nobody sees, and with its colors on dark paper."""
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", _shortened, text))
    text = text.replace("<defs>", f"<style>{_dark(text)}</style><defs>", 1)
    return "data:image/svg+xml," + quote(text, safe=" =:/;,().-")


def _shortened(tag: re.Match[str]) -> str:
    numbers = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag[0])
    return re.sub(r"\s+", " ", numbers)


def _dark(svg: str) -> str:
    """Rules for lines, areas and letters. Letters without a color are black."""
    rules = ["text{fill:#e9e9ec}"]
    for color in sorted({found.lower() for found in re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", svg)} - {ON_BRIGHT}):
        area, letters = readable(color, DARK, LINES), readable(color, DARK, LETTERS)
        for what in ("fill", "stroke"):
            if area != color and f"{what}: {color}" in svg:
                rules.append(f'[style*="{what}: {color}"]{{{what}:{area}!important}}')
        if letters != color:
            rules.append(f'text[style*="fill: {color}"]{{fill:{letters}!important}}')
    return f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}"


def _parts(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _luminance(color: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (p / 255 for p in _parts(color))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
