"""What does FedFisher's K-FAC cost a hospital, and where does its descent go, step by step?

    python benchmarks/kfac.py --out runs/federated

The hospitals and experts of `scenarios/organs.yaml`, seed 0; what OUT/pool holds is not trained again. For each merge of the
experts: accuracy on all images of the target, the mean loss on the hospitals' own training images, and two forms
sum_k p_k v^T F_k v of v = theta - theta_k: that of K-FAC over linear layers, which the descent lessens, and that of the true F of
all parameters at once, on 200 images. The last row is K-FAC-expand, which takes tokens for images. Seconds are of this process,
on one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmerge.data.images import to_batch
from fedmerge.experiment.experiment import Overrides, RunOptions, load_experiment
from fedmerge.experiment.training_phase import job_of, load_experts, make_theta_0, site_task
from fedmerge.federated.client.site_training import measured_statistic, open_ward
from fedmerge.federated.client.trainer import LabeledImages, logits_of
from fedmerge.federated.model import normalization
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.statistics._base import STATISTICS
from fedmerge.federated.strategies.fedfisher import STEPS, by_layer, descent, mean
from fedmerge.merging.curvature.kfac import GRADIENTS, INPUTS, Calls, joined, layers, listening, product
from fedmerge.report.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, Tensor]


def expanded(model: nn.Module, x: Tensor) -> State:
    """K-FAC-expand: A = E a a^T over images and tokens, G = E sum_tokens g g^T."""
    found, F = layers(model), {}

    def add(name: str, sums: Tensor) -> None:
        F[name] = F.get(name, 0) + sums.double()

    def tokens(s: Tensor, N: int) -> Tensor:
        return (s.flatten(2).transpose(1, 2) if s.ndim == 4 else s).reshape(N, -1, s.shape[1] if s.ndim == 4 else s.shape[-1])

    for part in torch.split(x, 32):
        heard: dict[str, Calls]
        with listening(found, len(part)) as heard:
            log_p = model(part).log_softmax(-1)
        names, outputs = list(heard), [calls[0][1] for calls in heard.values()]
        for name in names:
            X = heard[name][0][0]
            add(name + INPUTS, X.flatten(0, 1).T @ X.flatten(0, 1) / (len(x) * X.shape[1]))
        for c, column in enumerate(log_p.unbind(1)):
            gradients = torch.autograd.grad(column.sum(), outputs, retain_graph=True)
            for name, g in zip(names, gradients, strict=True):
                rows = tokens(g, len(part))
                add(name + GRADIENTS, torch.einsum("n,nti,ntj->ij", log_p[:, c].detach().exp(), rows, rows) / len(x))
    return F


class Hospitals:
    """Their experts, images and statistics, and the target's images."""

    def __init__(self, out: Path) -> None:
        plan = load_experiment(ROOT / "scenarios" / "organs.yaml", Overrides(seed=0))
        request = RunOptions(out=out / "kfac", pool=out / "pool", quiet=True)
        request.out.mkdir(parents=True, exist_ok=True)
        initial = make_theta_0(plan, request, Terminal(quiet=True))
        tasks = [site_task(plan, number, initial) for number in range(len(plan.sites))]
        LocalBackend().gather(job_of(plan, tuple(tasks), initial, request), lambda _: None)
        experts = load_experts(tasks, request)
        self.theta: list[State] = [dict(expert.weights) for expert in experts]
        n = torch.tensor([float(expert.n) for expert in experts], dtype=torch.float64)
        self.p = n / n.sum()
        wards = [open_ward(task)[0] for task in tasks]
        self.images = [ward.train for ward in wards]
        self.model = open_ward(tasks[0])[1].cpu().eval()
        shown = plan.target.images(plan.scenario.model.geometry, 0)
        self.target = LabeledImages(to_batch(shown.pixels, *normalization(plan.scenario.model)), torch.from_numpy(shown.labels))
        self.F: dict[str, list[State]] = {kind: [] for kind in ("fisher", "kfac", "expand")}
        for k, task in enumerate(tasks):
            self.model.load_state_dict(self.theta[k])
            for kind in ("fisher", "kfac"):
                began = time.perf_counter()
                self.F[kind].append(measured_statistic(task, STATISTICS.load(kind)(), self.model, wards[k], list))
                size = sum(tensor.numel() * 4 for tensor in self.F[kind][-1].values()) / 1e6
                typer.echo(f"{task.site.name}: {kind}: {time.perf_counter() - began:.1f} s, {size:.2f} MB beside the weights")
            self.F["expand"].append(self.F["kfac"][-1] | expanded(self.model, self.images[k].x[:500]))

    def merged(self, kind: str, steps: int) -> State:
        """By FedFisher's descent."""
        F, theta = self.F[kind], self.theta
        found = {n: mean(self.p, [own[n] for own in theta]) for n in theta[0]}
        found |= {n: descent(self.p, [f[n] for f in F], [own[n] for own in theta], steps) for n in theta[0] if n in F[0]}
        for name in layers(self.model) if kind != "fisher" else ():
            found |= by_layer(name, self.p, F, theta, steps)
        return found

    def row(self, name: str, state: State) -> str:
        """Of the table."""
        self.model.load_state_dict({n: tensor.float() for n, tensor in state.items()})
        losses = [float(nn.functional.cross_entropy(logits_of(self.model, own.x), own.y)) for own in self.images]
        right = float((logits_of(self.model, self.target.x).argmax(1) == self.target.y).float().mean())
        forms = [sum(float(p) * of(k, state) for k, p in enumerate(self.p)) for of in (self.of_kfac, self.of_all)]
        return f"| {name} | {100 * right:.1f} | {sum(losses) / len(losses):.3f} | {forms[0]:.4f} | {forms[1]:.4f} |"

    def of_kfac(self, k: int, state: State) -> float:
        """v^T F_k v of the layers' A (x) G."""
        total = 0.0
        for name in layers(self.model):
            bias = name.removesuffix("weight") + "bias"
            V = joined(*(state[n].double() - self.theta[k][n].double() for n in (name, bias)))
            A, G = (self.F["kfac"][k][name + factor].double()[None] for factor in (INPUTS, GRADIENTS))
            total += float((V * product(A, G, V)).sum())
        return total

    def of_all(self, k: int, state: State) -> float:
        """v^T F_k v of the true Fisher information: the mean variance over labels of d z in direction v."""
        own = {name: self.theta[k][name] for name, _ in self.model.named_parameters()}
        v = {name: state[name].float() - tensor for name, tensor in own.items()}
        forward: Callable[[State], Any] = lambda w: functional_call(self.model, w, (self.images[k].x[:200],))  # noqa: E731
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            z, dz = jvp(forward, (own,), (v,))
        p = z.double().softmax(-1)
        return float(((p * dz**2).sum(1) - (p * dz).sum(1) ** 2).mean())


def main(out: Annotated[Path, typer.Option(help="folder of the pool")] = Path("runs/federated")) -> None:
    """Print seconds, bytes and the table."""
    torch.set_num_threads(1)
    there = Hospitals(out.resolve())
    typer.echo("| merge | accuracy | training loss | K-FAC form | true form |\n|---|---|---|---|---|")
    typer.echo(there.row("mean", there.merged("kfac", 0)))
    typer.echo(there.row("diagonal, 2000 steps", there.merged("fisher", STEPS)))
    for steps in (20, 100, 500, STEPS):
        typer.echo(there.row(f"K-FAC, {steps} steps", there.merged("kfac", steps)))
    typer.echo(there.row(f"K-FAC-expand, {STEPS} steps", there.merged("expand", STEPS)))


if __name__ == "__main__":
    typer.run(main)
