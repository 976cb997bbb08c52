"""What a step costs on a GPU: `python benchmarks/gpu.py`. Weights and images are random, so that cost alone is real.

The stream is of the size of PACS (9,991 images of 224 px, ViT-B/32, K = 3, batches of 32), through the target as runs have it.
Each figure that compares is a ratio within this run. Without a GPU it says so, and `--smoke` tries the code on a CPU.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from torch import Tensor

from fedmerge.adaptation.expert_loader import Holding
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import Contribution, TargetTask
from fedmerge.data.images import Images
from fedmerge.federated.model import ModelSpec
from fedmerge.federated.site import Site
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.recorded import Recorded
from fedmerge.merging.coefficients import Coefficients
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.per_sample.dispatch import PerSample
from fedmerge.stream.schedules._base import SCHEDULES

K, BATCH, CLASSES, SIDE, PACS = 3, 32, 7, 224, 9991
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def main(
    out: Path = Path("gpu.json"),
    images: int = PACS,
    smoke: Annotated[bool, typer.Option(help="tiny models and few images")] = False,
    parts: str = "ceilings,same,stream,ways,t3,profile",
    methods: str = "ensemble,eam,eam-entropy,posterior,posterior-weights,posterior-batch,t3_batch,t3,mean",
) -> None:
    """Every part, in order; what was found so far is in --out after each."""
    if DEVICE == "cpu" and not smoke:
        raise typer.BadParameter("no GPU is here; --smoke tries the code without one")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__}
    for part in parts.split(","):
        began = time.perf_counter()
        more = (methods.split(","),) if part == "stream" else ()
        found[part] = PARTS[part](smoke, 96 if smoke else images, *more)
        typer.echo(f"{part}, {time.perf_counter() - began:.0f} s: {json.dumps(found[part], indent=1)}")
        out.write_text(json.dumps(found, indent=1))


def ceilings(smoke: bool, _: int) -> dict[str, float]:
    """Rates that this card reaches: a copy in memory, bytes read and written; a large product of matrices."""
    size, n = (2**20, 256) if smoke else (2**30, 8192)
    a, b = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
    found = {"copy_GB_s": 2 * size / _seconds(lambda: b.copy_(a)) / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n, n, device=DEVICE).to(dtype)
        found[f"{str(dtype).removeprefix('torch.')}_TFLOP_s"] = 2 * n**3 / _seconds(lambda x=x: x @ x) / 1e12  # type: ignore[misc]
    return found


def same(smoke: bool, _: int) -> dict[str, Any]:
    """Largest difference between recorded and ordinary forwards, and whether recording was refused."""
    found = {}
    for name, side in [("vit_tiny_patch16_224", 224), ("resnet18", 96), ("tf_efficientnet_lite0", 96), ("convnext_atto", 96)]:
        for dtype in (torch.float32, torch.bfloat16):
            bank = _bank(name, side, dtype)
            x, worst = torch.randn(8, 3, side, side, device=DEVICE).to(dtype), 0.0
            shares = torch.rand(8, K, dtype=torch.float64).softmax(1)
            runs = {
                "experts": lambda x, bank=bank: bank.expert_logits(x),
                "merged": lambda x, bank=bank, s=shares: bank.forward(bank.mix(s[0]), x),
                "mixture": lambda x, bank=bank, s=shares: PerSample(bank, "mixture").predict(x, Coefficients(s, s)).logits,
            }
            with torch.no_grad():
                for run in runs.values():
                    for given in (x, x, x, torch.randn_like(x)):
                        plain = _unrecorded(bank, partial(run, given))
                        worst = max(worst, float((run(given) - plain).abs().max() / plain.abs().max()))
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = {"difference": worst, "refused": bank.recorded.refusal}
    return found | {"one that cannot be recorded": _refused()}


def _refused() -> str:
    """Why; afterwards all goes on as before."""
    recorded, x = Recorded(), torch.ones(4, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            assert float(recorded("waits", lambda x: x * float(x.sum()), x)[0]) == 4
        torch.randn(4, device=DEVICE)
        again = Recorded()
        for _ in range(3):
            assert bool((again("does not", lambda x: x + 1, x) == 2).all())
    return recorded.refusal


def stream(smoke: bool, images: int, methods: list[str]) -> dict[str, Any]:
    """Seconds of the whole stream and peak memory, one method at a time, and what of the card's rate that is."""
    found: dict[str, Any] = {}
    with _pixels(images, 32 if smoke else SIDE) as known:
        for method in methods:
            found[f"{method}, bfloat16"] = _streamed(known, "bfloat16", True, method, smoke)
        some = known.subset(np.arange(len(known) // 5))
        for precision, recorded in [("float32", True), ("bfloat16", False)]:
            found[f"eam, {precision}{'' if recorded else ', not recorded'}"] = _streamed(some, precision, recorded, "eam", smoke)
    eam = found["eam, bfloat16"]["images_s"]
    for told in found.values():
        told["in_eam"] = eam / told["images_s"]
    return found


def ways(smoke: bool, _: int) -> list[dict[str, Any]]:
    """Milliseconds of a batch whose samples have models of their own, by one pass and by rows: where the rule should change."""
    shapes = [
        ("vit_tiny_patch16_224", 224), ("vit_base_patch32_224", 224), ("vit_base_patch16_224", 224),
        ("resnet18", 96), ("resnet50", 224), ("tf_efficientnet_lite0", 96), ("convnext_tiny", 224),
    ]  # fmt: skip
    found = []
    for name, side in [("vit_tiny_patch16_224", 32)] if smoke else shapes:
        for dtype in (torch.bfloat16, torch.float32)[: 1 + (name in ("vit_base_patch32_224", "resnet50"))]:
            bank = _bank(name, side, dtype)
            x = torch.randn(BATCH, 3, side, side, device=DEVICE).to(dtype)
            for distinct in (BATCH, 8, 2):
                row = torch.rand(distinct, K, dtype=torch.float64).softmax(1)
                shares = row[torch.arange(BATCH) % distinct]
                timed = {}
                for way in ("mixture", "rows"):
                    merger = PerSample(bank, way, _checked=True)  # type: ignore[arg-type] # logits are nearly 0
                    with torch.no_grad():
                        timed[way] = 1e3 * _seconds(lambda m=merger, s=shares, x=x: m.predict(x, Coefficients(s, s)), 5)  # type: ignore[misc]
                    uses = merger._uses_of(x)
                with torch.no_grad():
                    one = 1e3 * _seconds(lambda b=bank, x=x, r=row: b.forward(b.mix(r[0]), x), 5)  # type: ignore[misc]
                quotient = BATCH * uses * (K - 1) / (distinct * (K + 1))
                what = {"model": name, "dtype": str(dtype), "distinct": distinct, "quotient": quotient, "one_merge": one}
                found.append(what | timed)
    return found


def t3(smoke: bool, images: int) -> dict[str, Any]:
    """T^3 per image against T^3 per batch: ViT-B/16, two models, random weights."""
    found = {}
    with _pixels(min(images, 2048), 32 if smoke else SIDE) as known:
        for method in ("t3_batch", "t3"):
            found[method] = _streamed(known, "bfloat16", True, method, smoke, "vit_base_patch16_224")
    found["ratio"] = {"s": found["t3"]["s"] / found["t3_batch"]["s"]}
    return found


def profile(smoke: bool, images: int) -> dict[str, Any]:
    """Of one step: seconds, seconds in which the GPU works, operations named by Python, waits for the GPU, longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    with _pixels(BATCH * 30, 32 if smoke else SIDE) as known:
        for method in ("eam", "posterior-weights"):
            site = _site(known, "bfloat16", method, smoke)
            site.advance(12)
            _wait()
            began = time.perf_counter()
            site.advance(8)
            _wait()
            seconds = (time.perf_counter() - began) / 8
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                site.advance(4)
                _wait()
            kernels = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
            by_name = {event.key: event.count for event in seen.key_averages()}
            longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:6]
            found[method] = {
                "step_ms": 1e3 * seconds,
                "gpu_ms": sum(event.self_device_time_total for event in kernels) / 4e3,
                "launches": sum(by_name.get(name, 0) for name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) / 4,
                "waits": sum(by_name.get(name, 0) for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")) / 4,
                "longest": {event.key[:60]: event.self_device_time_total / 4e3 for event in longest},
                "python": {e.key[:40]: e.self_cpu_time_total / 4e3 for e in _slowest(seen)},
            }
    return found


PARTS: dict[str, Callable[..., Any]] = {
    "ceilings": ceilings,
    "same": same,
    "stream": stream,
    "ways": ways,
    "t3": t3,
    "profile": profile,
}


def _slowest(seen: Any) -> list[Any]:
    return sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)[:8]


def _streamed(
    known: Images, precision: str, recorded: bool, method: str, smoke: bool, model: str = "vit_base_patch32_224"
) -> dict[str, Any]:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    site = _site(known, precision, method, smoke, model)
    if not recorded:
        site.bank.recorded.refusal = "as asked"
    _wait()
    began, forwards = time.perf_counter(), 0
    while steps := site.advance(1):
        forwards += sum(step.forwards * step.n for step in steps)
    _wait()
    seconds = time.perf_counter() - began
    return {
        "s": seconds,
        "images_s": len(known) / seconds,
        "forwards": forwards / len(known),
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0,
        "TFLOP_s": forwards * 2 * _uses(site) / seconds / 1e12,
        "refused": site.bank.recorded.refusal,
        "ways": site.per_sample_ways(),
    }


def _uses(site: TargetSite) -> float:
    x = torch.zeros(1, *site.images.pixels.shape[3:], *site.images.pixels.shape[1:3], device=DEVICE)
    return PerSample(site.bank)._uses_of(x) * site.bank.P


def _site(known: Images, precision: str, method: str, smoke: bool, model: str = "vit_base_patch32_224") -> TargetSite:
    side = known.pixels.shape[1]
    spec = ModelSpec(name="vit_tiny_patch16_224" if smoke else model, kwargs={"img_size": side, "num_classes": CLASSES})
    spec = ModelSpec(name=spec.name, kwargs={"img_size": side})
    base, experts = _experts(spec.name, side)
    ward = Site.model_validate({"name": "target", "source": {"kind": "image_folder", "root": "/nowhere"}})
    given, _, variant = method.partition("-")
    methods = (load_method(given, **VARIANTS[variant]),)
    order = SCHEDULES.load("iid")(batch_size=BATCH)
    task = TargetTask(ward, spec, known.classes, order, methods, 0, torch.get_num_threads(), precision=precision)  # type: ignore[arg-type]
    return TargetSite(task, Holding.of(task, experts, base, known), base)


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "batch": {"granularity": "batch"},
    "entropy": {"scorer": "entropy_only"},
    "weights": {"fallback": "none"},
}
"""What follows a method's name: one view instead of three for eam; never predictions in place of weights for posterior."""


@cache
def _experts(name: str, side: int) -> tuple[dict[str, Any], list[Contribution]]:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES, img_size=side)
    base = {key: tensor.numpy() for key, tensor in net.state_dict().items()}
    return base, [Contribution(f"hospital-{k}", _near(base, k), 1000, 1.0) for k in range(K)]


def _near(base: dict[str, Any], k: int) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    return {
        name: array + 0.02 * rng.standard_normal(array.shape, np.float32) if array.dtype.kind == "f" else array
        for name, array in base.items()
    }


def _bank(name: str, side: int, dtype: torch.dtype) -> Bank:
    arguments = {"img_size": side} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=CLASSES, **arguments)
    base = net.state_dict()
    states = [
        {key: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value for key, value in base.items()}
        for _ in range(K)
    ]
    return Bank.of(net, states, base, device=DEVICE, dtype=dtype)


def _unrecorded(bank: Bank, run: Callable[[], Tensor]) -> Tensor:
    bank.recorded, kept = Recorded(), bank.recorded
    bank.recorded.refusal = "as asked"
    try:
        return run()
    finally:
        bank.recorded = kept


@contextmanager
def _pixels(count: int, side: int) -> Iterator[Images]:
    """Random images on disk, as decoded ones lie."""
    with tempfile.TemporaryDirectory() as folder:
        shape = (count, side, side, 3)
        rows = np.lib.format.open_memmap(Path(folder) / "rows.npy", "w+", np.uint8, shape)
        block = np.random.default_rng(0).integers(0, 256, (min(count, 256), side, side, 3), np.uint8)
        for start in range(0, count, len(block)):
            rows[start : start + len(block)] = block[: count - start]
        rows.flush()
        labels, zeros = np.arange(count) % CLASSES, np.zeros(count, np.int64)
        names = tuple(f"class-{c}" for c in range(CLASSES))
        yield Images(np.load(Path(folder) / "rows.npy", mmap_mode="r"), labels, zeros, np.arange(count), names, ("all",), False)


def _seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        run()
    timed = []
    for _ in range(repeats):
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        timed.append(time.perf_counter() - began)
    return statistics.median(timed)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
