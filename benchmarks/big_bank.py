"""How long do experts that do not go into memory take, and how much memory do they take? The target alone, without Ray or a pool.

    python benchmarks/big_bank.py --experts 200 --max-bytes 1000 --check

Experts of 5 million parameters are made up as they are asked for: theta_0 and noise. Memory is that of this process, read from
/proc all the while (Linux): RssAnon is its own, RssFile are pages of files, the bank's among them, which the system may drop.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

SAMPLE_S = 0.05


class Peak:
    """The most MiB of every kind since it was last asked."""

    def __init__(self) -> None:
        self.most: dict[str, float] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def tell(self) -> str:
        """The peaks in words, and begin anew."""
        said = ", ".join(f"{kind} {value:.0f} MiB" for kind, value in self.most.items())
        self.most = {}
        return said

    def _look(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith(("RssAnon", "RssFile")):
                    kind, value = line.split(":")
                    self.most[kind] = max(self.most.get(kind, 0.0), int(value.split()[0]) / 1024)
            time.sleep(SAMPLE_S)


def main(
    experts: Annotated[int, typer.Option(min=2)] = 200,
    max_bytes: Annotated[int, typer.Option(help="the target's limit, MB; 0 for none")] = 1000,
    batches: Annotated[int, typer.Option(min=1)] = 3,
    size: Annotated[int, typer.Option(min=1, help="images of a batch")] = 8,
    methods: Annotated[str, typer.Option(help="separated by commas")] = "mean,ensemble,eam",
    check: Annotated[bool, typer.Option("--check", help="also in memory, and compare; takes all the rows' memory")] = False,
) -> None:
    """Hold the experts, consume a few batches, tell seconds and memory."""
    limits = [max_bytes * 10**6 or None] + ([None] if check else [])
    peak, found = Peak(), []
    for limit in limits:
        began = time.perf_counter()
        site = target(experts, limit, batches, size, methods.split(","))
        rows = site.describe().bank
        typer.echo(f"{experts} experts of {site.bank.P / 1e6:.2f} M parameters, {rows['bytes'] / 1e9:.2f} GB, {rows['rows']}")
        typer.echo(f"  made up, written and merged in {time.perf_counter() - began:.0f} s; peak {peak.tell()}")
        steps = []
        for _ in range(batches):
            began = time.perf_counter()
            steps += site.advance(1)
            typer.echo(f"  a batch of {size}: {time.perf_counter() - began:.1f} s; peak {peak.tell()}")
        found.append(steps)
        del site
    if check:
        same = all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(*found, strict=True))
        most = max(float(np.abs(a.probabilities - b.probabilities).max()) for a, b in zip(*found, strict=True))
        typer.echo(f"from disk and from memory: {'the same bits' if same else f'largest difference of a probability {most:.1e}'}")


def target(experts: int, limit: int | None, batches: int, size: int, methods: list[str]) -> Any:
    """A target site that has taken all experts, one at a time."""
    from fedmerge.adaptation.expert_loader import Holding
    from fedmerge.adaptation.target_site import TargetSite
    from fedmerge.adaptation.tasks import Contribution, TargetTask
    from fedmerge.data.datasets.organ_phantom import ORGANS
    from fedmerge.federated.model import ModelSpec, build
    from fedmerge.federated.site import Site
    from fedmerge.merging.methods._base import load_method
    from fedmerge.stream.schedules._base import SCHEDULES

    model = ModelSpec(name="vit_tiny_patch16_224", kwargs={"img_size": 32, "patch_size": 8, "in_chans": 1})
    source = {"kind": "organ_phantom", "images": batches * size, "patients": batches * size}
    site = Site.model_validate({"name": "mercy", "source": source})
    stream = SCHEDULES.load("iid")(batch_size=size)
    threads = len(os.sched_getaffinity(0))
    task = TargetTask(site, model, ORGANS, stream, tuple(load_method(name) for name in methods), 0, threads, max_bytes=limit)
    base = {name: tensor.numpy() for name, tensor in build(model, len(ORGANS), seed=0).state_dict().items()}

    def made_up() -> Iterator[Contribution]:
        for number in range(experts):
            rng = np.random.default_rng(number)
            weights = {name: a + 0.02 * rng.standard_normal(a.shape, np.float32) for name, a in base.items()}
            yield Contribution(f"site{number:03d}", weights, 32, 1.0)

    holding = Holding(task, base, experts)
    for expert in made_up():
        holding.admit(expert)
    return TargetSite(task, holding, base)


if __name__ == "__main__":
    typer.run(main)
