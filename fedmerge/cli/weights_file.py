"""The verb `fedmerge inspect`: what a file of weights is, and whether it fits a model or a scenario."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedmerge.errors import CheckpointError, first_of, quoted
from fedmerge.federated.model import ModelSpec, build
from fedmerge.federated.pool.checkpoint import Brought, fitted, read_weights
from fedmerge.merging.bank.layout import all_finite, check_mapping
from fedmerge.system.files import at_home, file_digest

SHOWN = 3
"""Names that a line lists."""


def told_of(file: Path, model: str | None, scenario: Path | None) -> Iterator[str]:
    """Lines about a file, one by one. model: a name of timm. Raises CheckpointError if it holds no weights, or does not fit."""
    found = read_weights(file, "inspect")
    check_mapping(f"inspect: {file}", found.state)
    numbers = sum(tensor.numel() for tensor in found.state.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in found.state.values())
    yield f"{file}: {found.form}, {at_home(file).stat().st_size:,} bytes, sha256 {file_digest(at_home(file))}"
    yield from found.done
    each = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield f"{len(found.state)} tensors of {numbers:,} numbers: {each}"
    if broken := [name for name, tensor in found.state.items() if not all_finite(tensor)]:
        yield f"NaN or infinity in {first_of([*map(quoted, broken)], SHOWN)}"
    head = head_of(found)
    yield f"head: {head[0]}, {head[1]} outputs of {head[2]} features" if head else "head: none that could be told by its shape"
    if model:
        if head and not head[1]:
            raise CheckpointError(
                f"inspect: {file}: {head[0]}: found a head of 0 outputs; expected one for each class, as {model} has"
            )
        outputs = [str(number) for number in range(head[1] if head else 1)]
        fit = fitted(found, build(ModelSpec(name=model), len(outputs)), outputs, outputs, f"{file.name}, as {model},")
        yield f"fits {model} with {len(outputs)} classes{_done(found, fit)}"
    if scenario:
        yield _in_scenario(file, found, scenario)


def head_of(found: Brought) -> tuple[str, int, int] | None:
    """The last matrix with a bias of as many rows: its name, rows and columns. A guess, which a model would settle."""
    for name, tensor in reversed(found.state.items()):
        bias = found.state.get(f"{name.removesuffix('weight')}bias")
        if name.endswith("weight") and tensor.ndim == 2 and (bias is None or bias.shape == tensor.shape[:1]):
            return name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1]
    return None


def _in_scenario(file: Path, found: Brought, path: Path) -> str:
    """How it fits a scenario; a site that names this very file also says what its outputs are."""
    from fedmerge.experiment.experiment import Overrides, load_each

    experiment = load_each(path, Overrides())[0]
    named = [site for site in experiment.sites if site.expert and site.expert.file.resolve() == at_home(file).resolve()]
    outputs = named[0].expert.classes if named and named[0].expert else None
    spec, classes = experiment.scenario.model, experiment.classes
    fit = fitted(
        found, build(spec, len(classes)), classes, outputs, f"{file.name}, in {path}: {spec.name} of {len(classes)} classes,"
    )
    return f"fits {path}: {spec.name}, classes {', '.join(classes)}{_done(found, fit)}"


def _done(found: Brought, fit: Brought) -> str:
    said = fit.done[len(found.done) :]
    return f": {'; '.join(said)}" if said else ""
