"""What does it cost, and what does it save, to spread the experts over several Ray actors? The target alone, without a pool.

    python benchmarks/shards.py                                        # 3 to 100 tiny experts, shards 1, 2, 4
    python benchmarks/shards.py --experts 20 --shards 1,2 --embed 192 --depth 12 --batches 3

Experts are made up: theta_0 and noise. Each row is one target of its own: seconds for each batch (the least, and the median), from
the driver, with everything that travels; and the memory of the target's process and of the largest shard after the last batch
(Linux: RssAnon of /proc, which is their own, without pages of files).
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer


def main(  # noqa: PLR0913 - one parameter per option of the command line
    experts: Annotated[str, typer.Option(help="how many, separated by commas")] = "3,20,100",
    shards: Annotated[str, typer.Option(help="how many, separated by commas")] = "1,2,4",
    batches: Annotated[int, typer.Option(min=2)] = 4,
    size: Annotated[int, typer.Option(min=1, help="images of a batch")] = 32,
    embed: Annotated[int, typer.Option(min=8, help="width of the model")] = 96,
    depth: Annotated[int, typer.Option(min=1)] = 4,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "mean,ensemble",
    threads: Annotated[int, typer.Option(min=0, help="of one target process; shards divide them; 0 for all cores")] = 0,
) -> None:
    """One line for each number of experts and shards."""
    for count in (int(text) for text in experts.split(",")):
        first: list[Any] = []
        for number in (int(text) for text in shards.split(",") if int(text) <= count):
            shape = {"embed_dim": embed, "depth": depth}
            task = task_of(number, batches, size, shape, methods.split(","))
            task = replace(task, threads=threads or task.threads)
            row, steps = one(task, count, batches)
            first = first or steps
            most = max(float(np.abs(a.probabilities - b.probabilities).max()) for a, b in zip(first, steps, strict=True))
            typer.echo(f"experts {count:4d}  shards {number}  {row}  off by {most:.0e}")


def task_of(shards: int, batches: int, size: int, shape: dict[str, int], methods: list[str]) -> Any:
    """A target of the phantom."""
    from fedmerge.adaptation.tasks import TargetTask
    from fedmerge.data.datasets.organ_phantom import ORGANS
    from fedmerge.federated.model import ModelSpec
    from fedmerge.federated.site import Site
    from fedmerge.merging.methods._base import load_method
    from fedmerge.stream.schedules._base import SCHEDULES

    model = ModelSpec(name="vit_tiny_patch16_224", kwargs={"img_size": 32, "patch_size": 4, "num_heads": 4, "in_chans": 1, **shape})
    source = {"kind": "organ_phantom", "images": batches * size, "patients": batches * size}
    site, stream = Site.model_validate({"name": "mercy", "source": source}), SCHEDULES.load("iid")(batch_size=size)
    threads = len(os.sched_getaffinity(0))
    return TargetTask(site, model, ORGANS, stream, tuple(load_method(name) for name in methods), 0, threads, "rows", shards=shards)


def one(task: Any, count: int, batches: int) -> tuple[str, list[Any]]:
    """Seconds and MiB in words, and the steps."""
    from fedmerge.adaptation.ray.actor import RemoteTarget
    from fedmerge.adaptation.ray.waiting import wait
    from fedmerge.adaptation.tasks import Contribution
    from fedmerge.federated.model import build

    model = build(task.model, len(task.classes), seed=0)
    base = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def made_up(number: int) -> Any:
        rng = np.random.default_rng(number)
        weights = {name: array + 0.02 * rng.standard_normal(array.shape, np.float32) for name, array in base.items()}
        return Contribution(f"site{number:03d}", weights, 32, 1.0)

    began = time.perf_counter()
    with RemoteTarget(task, [made_up(number) for number in range(count)], base, 600) as target:
        opened = time.perf_counter() - began
        seconds, steps = [], []
        for _ in range(batches):
            began = time.perf_counter()
            steps += target.advance(1)
            seconds.append(time.perf_counter() - began)
        held = [_own(wait(actor.process.remote(), "its number", 60)) for actor in target._shards.actors]
        said = f"open {opened:5.1f} s  batch {min(seconds):.3f} s (median {statistics.median(seconds):.3f})"
        return f"{said}  target {_own(target.process()):4.0f} MiB  largest shard {max(held, default=0):4.0f} MiB", steps


def _own(process: int) -> float:
    """MiB of a process's own memory."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


if __name__ == "__main__":
    typer.run(main)
