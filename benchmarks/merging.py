"""What merging costs: ratios measured in one run, medians of several repeats.

    python benchmarks/merging.py                 # all of it, about 5 minutes on 2 cores, 12 GiB
    python benchmarks/merging.py --no-large      # without the ViT-B/32 experts

1. t3, one merge for every image, against t3_batch; its prediction against an explicit merge and a forward for every image: by our
   kernels, and as a merged state dict that is loaded (batch 32, two models). Imam et al. report a factor of 31 (3,800 s, 123 s).
2. A linear merge of K = 4 ViT-B/32 experts against a plain copy of as many bytes.
3. Forwards per batch of all static and adaptive methods together, counted, against the number that sharing predicts.
4. Lines of each method's file.
5. TIES, the Karcher mean and Model Stock of those ViT-B/32 experts as they are, and as one tensor operation after another over
   all columns and experts would have it; each with what it adds to the process's peak of memory, in a process of its own.
"""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable
from itertools import combinations
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

    def noise(value: Tensor) -> Tensor:
        """None for counts; variances stay positive."""
        return 0.02 * torch.randn_like(value) if value.is_floating_point() else torch.zeros_like(value)

    near = [{key: value + noise(value) for key, value in base.items()} for _ in range(experts)]
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


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """Watches this process's memory while the block runs. most: bytes."""

    def __enter__(self) -> Peak:
        self.most, self._done = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


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
        views, single = views | set(bill.views), single | bill.single
    predicted = bank.K * len(views) + len(single) + merged
    counted = evidence.forwards_run + merged
    print(f"3. {len(static)} static and {len(adaptive)} adaptive methods, K = 3, one stream")
    print(
        f"   forwards per batch: counted {counted}, predicted {predicted} = K x {len(views)} views + {len(single)} + {merged};",
        end=" ",
    )
    print(f"without sharing {alone}")
    assert counted == predicted


def plain_ties(bank: Bank) -> Tensor:
    """All task vectors at once, thresholds by kthvalue."""
    rank = bank.P - int(0.2 * bank.P)
    floor = torch.stack([bank.task_vector(k).abs().kthvalue(rank).values for k in range(bank.K)])[:, None]
    tau = bank.tau
    kept = torch.where(tau.abs() >= floor, tau, 0)
    gamma = kept.sum(0).sign()
    gamma = torch.where(gamma == 0, gamma.sum().sign(), gamma)
    same = (kept.sign() == gamma) & (kept != 0)
    return bank.anchor_row("theta_0") + 0.3 * (kept * same).sum(0) / same.sum(0).clamp(min=1)


def plain_karcher(bank: Bank) -> Tensor:
    """Steps on the sphere itself."""
    merged = []
    for columns in bank.slices.values():
        v = bank.theta[:, columns].clone()
        lengths = v.norm(dim=1)
        units = v / lengths[:, None].clamp(min=1e-30)
        u = units.mean(0)
        u = u / u.norm().clamp(min=1e-30)
        for _ in range(10):
            cos = (units @ u).clamp(-1, 1)
            w = cos.acos()
            stretch = torch.where(w.sin() > 1e-6, w / w.sin().clamp(min=1e-12), 1.0)
            T = (stretch[:, None] * (units - cos[:, None] * u)).mean(0)
            if (step := T.norm()) < 1e-5:
                break
            u = torch.cos(step) * u + torch.sin(step) * T / step
        merged.append(lengths.mean() * u)
    return torch.cat(merged)


def plain_stock(bank: Bank) -> Tensor:
    """The cosine of every pair by itself."""
    merged = []
    for columns in bank.slices.values():
        tau = bank.taus(columns)
        pairs = [torch.cosine_similarity(a, b, 0) for a, b in combinations(tau, 2)]
        cos = torch.stack(pairs).mean().clamp(0, 1)
        merged.append(bank.K * cos / (1 + (bank.K - 1) * cos) * tau.mean(0))
    return bank.anchor_row("theta_0") + torch.cat(merged)


RULES = {"ties": ("ties", plain_ties), "karcher": ("slerp", plain_karcher), "model stock": ("model_stock", plain_stock)}


@torch.no_grad()
def rule(name: str, plain: bool, repeats: int) -> tuple[float, float, float]:
    """Seconds of one of `RULES`, GiB that it adds to the peak, and seconds of a copy of all experts."""
    torch.set_num_threads(1)
    bank = a_bank("vit_base_patch32_224", 4)
    method, reference = RULES[name]
    bank.mix(torch.full((4,), 0.25))  # all pages of the bank are there before memory is looked at
    ctypes.CDLL(None).malloc_trim(0)  # what making the bank has left behind does not hide what the rule takes
    before = _resident()
    with Peak() as peak:
        seconds = median(lambda: reference(bank) if plain else load_method(method).merge(bank), 2)
    room = torch.empty_like(bank.theta)
    copied = median(lambda: room.copy_(bank.theta), repeats)
    return seconds, (peak.most - before) / 2**30, copied


def static_rules(repeats: int) -> None:
    """Figure 5, each rule in a process of its own."""
    print("5. rules over 4 ViT-B/32 experts, one thread")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in RULES:
            ours, plain = (pool.apply(rule, (name, way, repeats)) for way in (False, True))
            print(
                f"   {name}: {ours[0]:.2f} s and {ours[1]:.1f} GiB; as plain operations {plain[0]:.2f} s and {plain[1]:.1f} GiB;",
                end=" ",
            )
            print(f"ratio {plain[0] / ours[0]:.1f}; {ours[0] / ours[2]:.1f} copies of the experts")


def lines() -> None:
    """Figure 4."""
    folder = Path(__file__).resolve().parents[1] / "fedmerge" / "merging" / "methods"
    counts = {name: len((folder / f"{name}.py").read_text().splitlines()) for name in METHODS.names}
    longest = max(counts, key=lambda name: counts[name])
    print(f"4. lines of a method's file: median {statistics.median(counts.values()):.0f}, maximum {counts[longest]} ({longest})")


def main(
    large: Annotated[bool, typer.Option(help="the ViT-B/32 experts too")] = True,
    repeats: Annotated[int, typer.Option(min=2)] = 7,
) -> None:
    """Print the figures."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    per_sample("ViT-tiny, 224 pixels", a_bank("vit_tiny_patch16_224", 1), 224, repeats)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    per_sample("ViT of the shipped scenarios, 32 pixels", a_bank("vit_tiny_patch16_224", 1, **small), 32, repeats)
    if large:
        bandwidth(repeats)
    sharing()
    lines()
    if large:
        static_rules(repeats)


if __name__ == "__main__":
    typer.run(main)
