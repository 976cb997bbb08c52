"""What merging costs beside a plain mean, and a step beside its forwards: ratios in one run, compared with committed ones.

    python benchmarks/ratios.py              # under 3 minutes; exit code 1 where something has become slower
    python benchmarks/ratios.py --update     # writes benchmarks/baseline.json
    python benchmarks/ratios.py --model vit_small_patch32_224 --only ties --only dare    # other sizes; nothing is compared
    python benchmarks/ratios.py --images                             # models per image, every architecture, K = 3 and 8
    python benchmarks/ratios.py --side-by-side                       # K experts in one pass by vmap, and one after another

Never an absolute time: a rule's CPU seconds over those of what it is compared with, before it and after it in the same process,
one thread, the median of the repeats. CPU seconds, because those who share the machine disturb them less than the clock's.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from merging import Peak, _resident, a_bank
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, Static, load_method
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.merging.predict import predict, rows_of

BASELINE = Path(__file__).with_name("baseline.json")
USUAL = "vit_tiny_patch16_224"
TOLERANCE = 1.5
"""How many times the committed ratio is still no finding. Where ten processes share two cores, ratios differ by more."""
STATIC = ("task_arithmetic", "slerp", "model_stock", "ties", "consensus_ta", "breadcrumbs", "dare", "della")
ADAPTIVE = ("eam", "posterior")
BATCH = 32
"""Images that have models of their own."""
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "shipped ViT, 32 px": ("vit_tiny_patch16_224", SMALL_VIT, 32),
    "EfficientNet-Lite0, 96 px": ("tf_efficientnet_lite0", {}, 96),
    "ResNet-18, 96 px": ("resnet18", {}, 96),
    "ConvNeXt-Atto, 96 px": ("convnext_atto", {}, 96),
    "ViT-Tiny, 224 px": ("vit_tiny_patch16_224", {}, 224),
}
"""Title -> timm's name, its arguments, and the side of the images."""
FIXED = ("shipped ViT, 32 px", "EfficientNet-Lite0, 96 px")
"""Those that are compared, with K = 3."""


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def ratio(work: Callable[[], object], beside: Callable[[], object], repeats: int) -> float:
    """Median of what the work takes over what is beside it, which runs before it and after it."""
    work()
    found = []
    for _ in range(repeats):
        before, taken, after = seconds(beside), seconds(work), seconds(beside)
        found.append(2 * taken / (before + after))
    return statistics.median(found)


def added(rule: Static, bank: Bank) -> float:
    """What a rule adds to the peak of memory beside its result, as a share of the bank."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    with Peak() as peak:
        theta = rule.merge(bank)
    return (peak.most - before - theta.nbytes) / bank.rows.nbytes


@torch.no_grad()
def measured(model: str, only: list[str], repeats: int) -> dict[str, float]:
    """Ratios by method, printed as they come."""
    bank = a_bank(model, 4)
    mean = load_method("mean")
    assert isinstance(mean, Static)
    print(f"torch {torch.__version__}, 1 thread, {model}: {bank.P / 1e6:.1f} M parameters, K = 4, {repeats} repeats")
    found = {}
    for name in (one for one in STATIC if not only or one in only):
        rule = load_method(name)
        assert isinstance(rule, Static)
        rule.merge(bank)
        room = added(rule, bank)
        found[name] = ratio(lambda rule=rule: rule.merge(bank), lambda: mean.merge(bank), repeats)  # type: ignore[misc]
        print(f"{name:16} {found[name]:7.2f} means, {room:+5.0%} of the bank at the peak", flush=True)
    batch = torch.randn(4, 3, 224, 224)
    for name in (one for one in ADAPTIVE if not only or one in only):
        found[name] = ratio(lambda name=name: _step(name, bank, batch), lambda: _forwards(bank, batch), repeats)  # type: ignore[misc]
        print(f"{name:16} {found[name]:7.2f} times K + 1 forwards of its batch", flush=True)
    return found


def _step(name: str, bank: Bank, batch: torch.Tensor) -> torch.Tensor:
    method = load_method(name)
    assert isinstance(method, Adaptive)
    _, found = method.step(method.start(bank), Evidence(bank, batch))
    return bank.forward(bank.mix(found.encoder if found.encoder.ndim == 1 else found.encoder.mean(0)), batch)


def _forwards(bank: Bank, batch: torch.Tensor) -> None:
    for k in (*range(bank.K), 0):
        bank.row_logits(k, batch)


def rows_of_images(n: int, experts: int) -> Coefficients:
    """Coefficients of which no two rows are alike, theta_0's share among them."""
    rows = torch.rand(n, experts + 1, generator=torch.Generator().manual_seed(0)).double()
    rows = rows / rows.sum(1, keepdim=True)
    return Coefficients(rows, rows)


def step_of(name: str, bank: Bank, batch: Tensor, **arguments: Any) -> Callable[[], object]:
    """A first step of a method as a run takes it, its prediction included."""
    method, chooser = load_method(name, **arguments), PerSample(bank)
    return lambda: predict(rows_of([method], bank)[name], Evidence(bank, batch), chooser)


@torch.no_grad()
def per_image(title: str, experts: int, repeats: int) -> dict[str, float]:
    """Steps per image over steps per batch, and a pass of images with models of their own over what it consists of."""
    name, arguments, side = ARCHITECTURES[title]
    bank = a_bank(name, experts, **arguments)
    batch, given, chooser = torch.randn(BATCH, 3, side, side), rows_of_images(BATCH, experts), PerSample(bank)
    posterior = {"shrink": "half", "fallback": "none"}  # otherwise made-up experts decide whether and what is merged
    ways: dict[str, Callable[[], object]] = {
        "pass": lambda: chooser.predict(batch, given),
        "forward": lambda: bank.forward(bank.mix(given.encoder[0]), batch),
        "posterior": step_of("posterior", bank, batch, **posterior),
        "posterior by batch": step_of("posterior", bank, batch, granularity="batch", **posterior),
        "t3": step_of("t3", bank, batch),
        "t3 by batch": step_of("t3_batch", bank, batch),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, work in ways.items():
            spent = seconds(work)
            if turn:  # the first warms up
                taken[way].append(spent)
    times = {way: statistics.median(spent) for way, spent in taken.items()}
    found = {way: times[way] / times[f"{way} by batch"] for way in ("posterior", "t3")}
    found["pass"] = times["pass"] / times["forward"]
    said = f"a step per image over one per batch: posterior {found['posterior']:.2f}, t3 {found['t3']:.2f}"
    print(f"{title:26} K = {experts}, {next(iter(chooser.taken))}: {said}; the pass {found['pass']:.2f} forwards", flush=True)
    return {f"{way} per image, {title}": value for way, value in found.items()}


@torch.no_grad()
def side_by_side(title: str, experts: int, repeats: int) -> None:
    """K experts in one pass, as `torch.func.vmap` runs stacked weights, over one after another, as a run has them."""
    name, arguments, side = ARCHITECTURES[title]
    bank = a_bank(name, experts, **arguments)
    weights = {key: bank.theta[:, columns].reshape(experts, *bank.shapes[key]) for key, columns in bank.slices.items()}
    fixed = {key: value for key, value in bank.model.named_buffers() if key not in weights}
    together = torch.func.vmap(
        lambda one, batch: torch.func.functional_call(bank.model, {**one, **fixed}, (batch,)), in_dims=(0, None)
    )
    for count in (BATCH, BATCH // 4):
        batch = torch.randn(count, 3, side, side)
        found = ratio(lambda batch=batch: together(weights, batch), lambda batch=batch: bank.expert_logits(batch), repeats)  # type: ignore[misc]
        print(f"{title:26} K = {experts}, {count:2} images: one pass takes {found:.2f} times as long", flush=True)


def main(
    model: Annotated[str, typer.Option(help="a model of timm; only the usual one is compared")] = USUAL,
    only: Annotated[list[str] | None, typer.Option(help="these methods; default: all")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    images: Annotated[bool, typer.Option("--images", help="models per image alone; --only: titles; nothing is compared")] = False,
    beside: Annotated[
        bool, typer.Option("--side-by-side", help="experts in one pass alone; --only: titles; nothing is compared")
    ] = False,
    update: Annotated[bool, typer.Option(help="commit to what is found now")] = False,
) -> None:
    """Measure, print, and compare."""
    torch.set_num_threads(1)
    if images or beside:
        for title in only or ARCHITECTURES:
            for experts in (3, 8):
                (per_image if images else side_by_side)(title, experts, repeats)
        return
    found = measured(model, only or [], repeats)
    if model != USUAL:
        return
    for title in FIXED if not only else ():
        found |= per_image(title, 3, repeats)
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if update:
        BASELINE.write_text(json.dumps(known | {name: round(value, 2) for name, value in found.items()}, indent=2) + "\n")
        return
    slower = [name for name, value in found.items() if value > TOLERANCE * known.get(name, value)]
    for name in slower:
        print(f"slower: {name} takes {found[name]:.2f}; expected {known[name]:.2f}, and at most {TOLERANCE} times that")
    raise typer.Exit(int(bool(slower)))


if __name__ == "__main__":
    typer.run(main)
