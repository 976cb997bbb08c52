"""Does a bank predict what its models predict? One small model of every family that timm has.

    python benchmarks/architectures.py --out runs/architectures.json

Two experts and their mean are made of noise around one state, BatchNorm statistics included. Their logits from a bank, on two
images of noise, are compared with those of a model that has loaded the same weights, and so are those of two images that are
merged each in its own way. A row says `equal`, `refused` where fedmerge says by name what it does not do, `skipped` where timm
itself cannot run the model here, or `DIFFERENT`, which is a fault: the exit status is then 1. It takes half an hour on two cores.
"""

from __future__ import annotations

import copy
import json
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

from fedmerge.errors import FedmergeError
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.per_sample.mixture import Mixture
from fedmerge.report.terminal import Terminal
from fedmerge.system.process import owners

CLASSES = 5
NOISE = 0.02
"""Deviation of an expert's parameters from the common state."""

CLOSE = 1e-4
"""Largest difference of logits, relative to the largest logit."""

SMALLER = 64
"""Side of the images, where a model takes it."""


def smallest(family: str) -> str | None:
    """The model of a family with the fewest parameters, built without memory; None if none can be.

    In a process of its own: timm keeps some tables for good, and those of a model without memory are of no use to another.
    """
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters())
        except Exception:  # whatever timm's constructors raise: another of the family is taken
            continue
    return min(sizes, key=lambda name: sizes[name], default=None)


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model and two images of noise, as small as it takes them."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    channels, side, _ = model.default_cfg["input_size"]
    for size in (SMALLER, side):
        x = torch.randn(2, channels, size, size, generator=generator)
        try:
            with torch.no_grad():
                logits = model(x)
        except Exception:  # a model of one size only
            if size == side:
                raise
            continue
        if torch.isfinite(logits).all():
            break
    return model, x


def around(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's state with noise on all that is learned."""
    generator = torch.Generator().manual_seed(seed)
    learned = dict(model.named_parameters(remove_duplicate=False))
    state, drawn = {}, dict[int, Tensor]()
    for name, tensor in model.state_dict().items():
        if name in learned:
            own = id(learned[name])  # parameters that are tied stay so
            drawn.setdefault(own, tensor + NOISE * torch.randn(tensor.shape, generator=generator))
            state[name] = drawn[own].clone()
        elif name.endswith(("running_mean", "running_var")):
            state[name] = tensor * (1 + 0.2 * torch.rand(tensor.shape, generator=generator))
        else:
            state[name] = tensor.clone()
    return state


def loaded(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of a model that has loaded the state."""
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(state)
    with torch.no_grad():
        return fresh.eval()(x)  # type: ignore[no-any-return]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def compared(name: str) -> dict[str, Any]:
    """The row of one model."""
    try:
        model, x = built(name)
    except Exception as error:  # timm's own
        return {"verdict": "skipped", "why": (str(error).splitlines() or [type(error).__name__])[0]}
    untouched = copy.deepcopy(model)
    states = [around(model, seed) for seed in (1, 2)]
    try:
        bank = Bank.of(model, states)
        half = torch.tensor([0.5, 0.5])
        with torch.no_grad():
            mean = bank.mix(half)
            found = [bank.row_logits(0, x), bank.row_logits(1, x), bank.forward(mean, x, half), bank.row_logits(0, x)]
        both = [*states, bank.state_dict(mean, half), states[0]]
    except FedmergeError as error:
        return {"verdict": "refused", "why": str(error).splitlines()[0]}
    off = max(apart(a, loaded(untouched, state, x)) for a, state in zip(found, both, strict=True))
    row: dict[str, Any] = {"verdict": "equal" if off <= CLOSE else "DIFFERENT", "off": off, "side": x.shape[-1]}
    rows = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    try:
        Mixture(bank).verify(x, rows, rows)  # as a run does before its first batch
        row["per_sample"] = "equal"
    except FedmergeError as error:
        row["per_sample"] = f"refused: {str(error).splitlines()[0]}"
    return row


def within(seconds: int, name: str) -> dict[str, Any]:
    """The row of one model, or that it took too long."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return compared(name)
    except TimeoutError:
        return {"verdict": "skipped", "why": f"took longer than {seconds} s"}
    finally:
        signal.alarm(0)


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the rows")] = Path("runs/architectures.json"),
    seconds: Annotated[int, typer.Option(help="longest time for one model")] = 120,
    only: Annotated[str, typer.Option(help="families, separated by commas", show_default="all")] = "",
) -> None:
    """Print a line for each family, write the rows, and count them."""
    warnings.simplefilter("ignore")
    terminal = Terminal()
    families = [name for name in only.split(",") if name] or timm.list_modules()
    rows: dict[str, dict[str, Any]] = {}
    terminal.say("looking for the smallest model of each family")
    with owners(1) as process:
        chosen = dict(zip(families, process.map(smallest, families), strict=True))
    for number, family in enumerate(families, 1):
        began = time.monotonic()
        name = chosen[family]
        if name is None:
            continue
        rows[family] = {"model": name, **within(seconds, name)}
        row = rows[family]
        said = row.get("why") or f"off by {row['off']:.0e} at {row['side']} pixels; per image {row['per_sample']}"
        spent = time.monotonic() - began
        terminal.say(f"{number}/{len(families)} {family}: {name}: {row['verdict']} ({said}) {spent:.0f} s")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"timm": timm.__version__, "rows": rows}, indent=2), encoding="utf-8")
    counts = Counter(row["verdict"] for row in rows.values())
    alone = Counter(str(row.get("per_sample", "")).partition(":")[0] for row in rows.values())
    terminal.say(f"{len(rows)} families: {dict(counts)}; per image: {dict(alone)}; written to {out}")
    if counts["DIFFERENT"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
