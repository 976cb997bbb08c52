"""What merging costs beside a plain mean, and a step beside its forwards: ratios in one run, compared with committed ones.

    python benchmarks/ratios.py              # under 3 minutes; exit code 1 where something has become slower
    python benchmarks/ratios.py --update     # writes benchmarks/baseline.json
    python benchmarks/ratios.py --model vit_small_patch32_224 --only ties --only dare    # other sizes; nothing is compared

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
from typing import Annotated

import torch
import typer
from merging import Peak, _resident, a_bank

from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.evidence import Evidence
from fedmerge.merging.methods._base import Adaptive, Static, load_method

BASELINE = Path(__file__).with_name("baseline.json")
USUAL = "vit_tiny_patch16_224"
TOLERANCE = 1.5
"""How many times the committed ratio is still no finding. Where ten processes share two cores, ratios differ by more."""
STATIC = ("task_arithmetic", "slerp", "model_stock", "ties", "consensus_ta", "breadcrumbs", "dare", "della")
ADAPTIVE = ("eam", "posterior")


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


def main(
    model: Annotated[str, typer.Option(help="a model of timm; only the usual one is compared")] = USUAL,
    only: Annotated[list[str] | None, typer.Option(help="these methods; default: all")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    update: Annotated[bool, typer.Option(help="commit to what is found now")] = False,
) -> None:
    """Measure, print, and compare."""
    torch.set_num_threads(1)
    found = measured(model, only or [], repeats)
    if model != USUAL:
        return
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
