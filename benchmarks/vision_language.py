"""CPU seconds of a batch for CLIP's ViT-B/16 at 224 px with random weights: T^3_B, one merge, against T^3, one for every image.

python benchmarks/vision_language.py [--images 4] [--batches 2] [--name ViT-B-16] [--methods t3].
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import fedmerge
from fedmerge.federated.model import ClipSpec, build


def main() -> None:
    """Print a line for each method and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--name", default="ViT-B-16")
    parser.add_argument("--methods", default="t3_batch,t3")
    asked = parser.parse_args()
    spec = ClipSpec(name=asked.name)
    model = build(spec, 8)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    expert = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in start.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{asked.name}, {parameters / 1e6:.1f} million parameters leave a hospital, {torch.get_num_threads()} threads")
    side = spec.geometry.size
    for method in asked.methods.split(","):
        adapt = fedmerge.Adapter(model, {"expert": expert}, method=method, base=start, generalist="theta_0")
        seconds = []
        for _ in range(asked.batches):
            batch = torch.rand(asked.images, 3, side, side, generator=generator)
            began = time.process_time()
            adapt(batch)
            seconds.append(time.process_time() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        said = f"{min(seconds):.2f} CPU seconds for {asked.images} images, the best of {asked.batches} batches"
        print(f"{method}: {said}; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
