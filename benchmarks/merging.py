"""What merging costs: ratios measured in one run, medians of several repeats.

    python benchmarks/merging.py                 # all of it, about 2 minutes on 2 cores, 4 GiB
    python benchmarks/merging.py --no-large      # without the ViT-B/32 experts

1. t3, one merge for every image, against t3_batch; its prediction against an explicit merge and a forward for every image: by our
   kernels, and as a merged state dict that is loaded (batch 32, two models). Imam et al. report a factor of 31 (3,800 s, 123 s).
2. A linear merge of K = 4 ViT-B/32 experts against a plain copy of as many bytes.
3. Forwards per batch of all static and adaptive methods together, counted, against the number that sharing predicts.
4. Lines of each method's file.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from torch import Tensor

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import METHODS, Adaptive, Static, load_method
from fedmerge.merging.per_sample.dispatch import PerSample


def median(work: Callable[[], object], repeats: int) -> float:
    """Median seconds after one repeat that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def a_bank(name: str, experts: int, **arguments: object) -> Bank:
    """Random experts near one initialization."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=11, **arguments).eval()
    base = model.state_dict()
    near = [{key: value + 0.02 * torch.randn_like(value) for key, value in base.items()} for _ in range(experts)]
    return Bank.of(model, near, base)


def by_state_dict(bank: Bank, batch: Tensor, rows: Tensor) -> Tensor:
    """As the papers' code does it: for every image a merged state dict, loaded into a copy of the model, and a forward."""
    states = [bank.state_dict(row) for row in bank.rows]
    logits = []
    for image, row in zip(batch, rows, strict=True):
        model = copy.deepcopy(bank.model)
        merged = {name: sum(weight * state[name] for weight, state in zip(row, states, strict=True)) for name in states[0]}
        model.load_state_dict(merged)
        logits.append(model(image[None]))
    return torch.cat(logits)


@torch.no_grad()
def per_sample(title: str, bank: Bank, side: int, repeats: int) -> None:
    """Figure 1, for one size of model."""
    batch = torch.randn(32, 3, side, side)
    t3, t3_batch = load_method("t3", generalist="theta_0"), load_method("t3_batch", generalist="theta_0")
    rows = torch.rand(32, bank.K + 1).double()  # no two images alike
    rows = rows / rows.sum(1, keepdim=True)
    spread = Coefficients(rows, rows)
    mixture, samples, auto = (PerSample(bank, way) for way in ("mixture", "samples", "auto"))
    mixture.predict(batch, spread)  # verified once, as in a run
    auto.predict(batch, spread)

    def one_merge() -> Tensor:
        return bank.forward(bank.mix(t3_batch.coefficients(Evidence(bank, batch)).encoder), batch)

    evidence = median(lambda: t3.coefficients(Evidence(bank, batch)), repeats)
    batchwise = median(one_merge, repeats)
    fast = median(lambda: mixture.predict(batch, spread), repeats)
    slow = median(lambda: samples.predict(batch, spread), repeats)
    naive = median(lambda: by_state_dict(bank, batch, rows), repeats)
    print(f"1. {title}, batch 32, two models; `auto` takes '{next(iter(auto.taken))}'")
    print(
        f"   t3 as a whole: one pass {evidence + fast:.4f} s, t3_batch {batchwise:.4f} s, ratio {(evidence + fast) / batchwise:.2f}"
    )
    print(
        f"   its prediction: one pass {fast:.4f} s; a merge and a forward for every image {slow:.4f} s, ratio {slow / fast:.1f};",
        end=" ",
    )
    print(f"a merged state dict loaded for every image {naive:.4f} s, ratio {naive / fast:.1f}")


@torch.no_grad()
def bandwidth(repeats: int) -> None:
    """Figure 2."""
    bank = a_bank("vit_base_patch32_224", 4)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    merge = median(lambda: bank.mix(weights), repeats)
    source, there = bank.theta, torch.empty_like(bank.theta)
    copy = median(lambda: there.copy_(source), repeats)
    moved, copied = bank.merge_bytes, 2 * source.numel() * source.element_size()
    print(f"2. linear merge of 4 ViT-B/32 experts ({bank.P / 1e6:.1f} M parameters)")
    print(f"   merge {merge:.3f} s, {moved / merge / 1e9:.1f} GB/s; copy {copy:.3f} s, {copied / copy / 1e9:.1f} GB/s;", end=" ")
    print(f"share {moved / merge / (copied / copy):.0%} (wanted at least 70%)")


@torch.no_grad()
def sharing() -> None:
    """Figure 3."""
    bank = a_bank("vit_tiny_patch16_224", 3, img_size=32, patch_size=8, embed_dim=96, depth=2)
    bank.counts = (30, 20, 10)
    batch = torch.randn(32, 3, 32, 32)
    methods = [load_method(name) for name in METHODS.names]
    static = [m for m in methods if isinstance(m, Static) and not m.needed & {"fisher", "gram", "gram_rounds", "soup"}]
    adaptive = [m for m in methods if isinstance(m, Adaptive) and m.ranked]
    evidence, merged, alone = Evidence(bank, batch), 0, 0
    chooser = PerSample(bank, "rows")
    for method in static:
        bank.forward(method.merge(bank), batch)
        merged, alone = merged + 1, alone + 1
    views, single = set[str](), set[str]()
    for one in adaptive:
        with evidence.billed() as bill:
            found = one.coefficients(evidence)
        forwards = chooser.predict(batch, found).forwards if found.encoder.ndim == 2 else 1
        merged, alone = merged + forwards, alone + bill.forwards + forwards
        views, single = views | bill.views, single | bill.single
    predicted = bank.K * len(views) + len(single) + merged
    counted = evidence.forwards_run + merged
    print(f"3. {len(static)} static and {len(adaptive)} adaptive methods, K = 3, one stream")
    print(
        f"   forwards per batch: counted {counted}, predicted {predicted} = K x {len(views)} views + {len(single)} + {merged};",
        end=" ",
    )
    print(f"without sharing {alone}")
    assert counted == predicted


def lines() -> None:
    """Figure 4."""
    folder = Path(__file__).resolve().parents[1] / "fedmerge" / "merge" / "methods"
    counts = {name: len((folder / f"{name}.py").read_text().splitlines()) for name in METHODS.names}
    longest = max(counts, key=lambda name: counts[name])
    print(f"4. lines of a method's file: median {statistics.median(counts.values()):.0f}, maximum {counts[longest]} ({longest})")


def main(
    large: Annotated[bool, typer.Option(help="the ViT-B/32 experts too")] = True,
    repeats: Annotated[int, typer.Option(min=2)] = 7,
) -> None:
    """Print the four figures."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    per_sample("ViT-tiny, 224 pixels", a_bank("vit_tiny_patch16_224", 1), 224, repeats)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    per_sample("ViT of the shipped scenarios, 32 pixels", a_bank("vit_tiny_patch16_224", 1, **small), 32, repeats)
    if large:
        bandwidth(repeats)
    sharing()
    lines()


if __name__ == "__main__":
    typer.run(main)
