"""Images a second and core in a hospital's training, by precision and by how images lie in memory: ratios in one run.

    python benchmarks/training.py                                               # the shipped ViT, ResNet-18, EfficientNet-Lite0
    python benchmarks/training.py --model convnext_atto --size 96 --repeats 5   # another model of timm

The steps are those of the project's own `fit`: pixels to floats, augmentation, forward, backward, clipping, Adam. One thread, CPU
seconds of this process, the columns in turns; a ratio is a column's images a second over float32's in the same turn, and the median
of the turns. `*`: what the precision of that name takes.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from fedmerge.data.images import Normalized
from fedmerge.federated.client import trainer
from fedmerge.federated.client.trainer import LabeledImages, Recipe, channels_last, fit
from fedmerge.federated.messages import Arithmetic
from fedmerge.federated.model import ModelSpec, build, normalization

CLASSES, BATCH = 8, 32
COLUMNS: dict[str, tuple[Arithmetic, bool]] = {
    "float32": ("float32", False),
    "channels last": ("float32_channels_last", True),
    "bfloat16": ("bfloat16", False),
    "both": ("bfloat16", True),
}


def shipped() -> list[ModelSpec]:
    """The three models of the table."""
    organs = yaml.safe_load((Path(__file__).parents[1] / "scenarios/organs.yaml").read_text(encoding="utf-8"))
    return [
        ModelSpec.model_validate(organs["model"]),
        *(ModelSpec(name=name, size=96) for name in ("resnet18", "tf_efficientnet_lite0")),
    ]


def images_of(spec: ModelSpec, count: int) -> LabeledImages:
    """Random pixels and labels."""
    rng, (side, channels) = np.random.default_rng(0), spec.geometry
    pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return LabeledImages(
        Normalized(pixels, np.arange(count), *normalization(spec)), torch.from_numpy(rng.integers(0, CLASSES, count))
    )


def seconds(spec: ModelSpec, data: LabeledImages, column: str, steps: int) -> float:
    """CPU seconds of so many steps, from the same weights in every column."""
    precision, last = COLUMNS[column]
    model, rule = build(spec, CLASSES), trainer.channels_last
    recipe = Recipe(1e-4, 0.0, steps, BATCH, "adam", "constant", "full", flips=True, precision=precision)
    trainer.channels_last = lambda *_: last  # the layout of this column, whatever the precision takes
    try:
        began = time.process_time()
        fit(model, data, recipe, 0, lambda _: None)
        return time.process_time() - began
    finally:
        trainer.channels_last = rule


def row(spec: ModelSpec, steps: int, repeats: int) -> None:
    """Measure one model, and print its line."""
    data, found = images_of(spec, BATCH * 8), {column: list[float]() for column in COLUMNS}
    for turn in range(repeats + 1):
        for column, taken in found.items():
            spent = seconds(spec, data, column, steps if turn else 1)
            if turn:  # the first is for what a process does once
                taken.append(spent)
    rate = steps * BATCH / statistics.median(found["float32"])
    model, cells = build(spec, CLASSES), []
    for column, (precision, last) in COLUMNS.items():
        ratio = statistics.median(base / own for base, own in zip(found["float32"], found[column], strict=True))
        cells.append(f"{ratio:.2f}{'*' if channels_last(model, precision) == last else ''}")
    print(f"| {spec.name}, {spec.geometry.size} px | {rate:.0f} | {' | '.join(cells)} |", flush=True)


def main(
    model: Annotated[list[str] | None, typer.Option(help="models of timm; default: three of this project's")] = None,
    size: Annotated[int, typer.Option(min=8, help="side of the images of --model, pixels")] = 96,
    steps: Annotated[int, typer.Option(min=1, help="in each measurement")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="turns of all columns")] = 5,
) -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    capable: Any = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, 1 thread, {capable}, batches of {BATCH}, {repeats} turns of {steps} steps\n")
    print(f"| model | images a second, float32 | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for spec in [ModelSpec(name=name, size=size) for name in model] if model else shipped():
        row(spec, steps, repeats)


if __name__ == "__main__":
    typer.run(main)
