"""theta_0, which all hospitals share: pretrained weights, a checkpoint, or a proxy trained on public data by the server."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from fedmerge.data.datasets._base import SOURCES
from fedmerge.data.images import Normalized
from fedmerge.data.scanner import Scanner
from fedmerge.errors import CheckpointError, first_line
from fedmerge.federated.client.trainer import LabeledImages, Recipe, fit
from fedmerge.federated.messages import HeadInit, Initial
from fedmerge.federated.model import ClipSpec, ModelSpec, build, normalization, on_the_hub, renew_head
from fedmerge.federated.pool import tensor_file
from fedmerge.federated.pool.checkpoint import expected_of, read_weights
from fedmerge.federated.security.audit import state_digest
from fedmerge.federated.server.clip_start import prompt_head, read_towers, start_of, train_towers
from fedmerge.federated.site import Site
from fedmerge.merging.bank.layout import check_state, head_names
from fedmerge.registry import Spec
from fedmerge.rng import seed_of
from fedmerge.system.files import at_home, atomic, see_that_writable
from fedmerge.system.offline import cached_weights, hub_is_found
from fedmerge.system.process import one_thread

VERSION = 2
"""Raise it whenever the same specification would give other weights."""

PUBLIC = "public"
"""Owner of the proxy's images: no hospital, so no hospital's patients."""

OnProgress = Callable[[int, int, str], None]


class _Initialization(Spec):
    head_init: HeadInit = Field(
        "shared_random",
        description="head from which hospitals start. shared_random: one draw from a truncated normal for all; "
        "fed_lp: linear probing by FedAvg with the encoder frozen; per_site_random: a draw for each "
        "hospital; zero: zeros; text: that of the class prompts, for a CLIP, which allows no other",
    )


class Pretrained(_Initialization):
    """timm's pretrained weights: from the cache if they are there, else from its hub; of a CLIP, its `model.weights`."""

    kind: Literal["pretrained"]
    cache: str | None = Field(
        None,
        min_length=1,
        description="the hub's cache, a folder that can be copied to a machine without a network; may begin with ~ and name "
        "environment variables as ${NAME}. Default: HF_HUB_CACHE, else ~/.cache/huggingface/hub",
    )


class Checkpoint(_Initialization):
    """A file of weights, of safetensors or as PyTorch writes it. A head of another number of classes is replaced.

    Of a CLIP, any file that `model.weights` may name.
    """

    kind: Literal["checkpoint"]
    path: str = Field(description="the file; may begin with ~ and name environment variables as ${NAME}")
    match: Literal["names", "order"] = Field(
        "names",
        description="how tensors of the file are matched. names: they have the names of timm's model; order: they "
        "have other names but the model's order; their number, kinds (weight, bias, running_mean, ...) "
        "and shapes are checked",
    )


def _public_source(value: Any) -> Any:
    """The phantom's name alone stands for its public patients in all planes."""
    return {"kind": value, "images": 3000, "patients": 375} if value == "organ_phantom" else value


PublicSource: Any = Annotated[SOURCES.union(), BeforeValidator(_public_source)]


CAPTIONS = ("a {domain} slice of the {word}, {noise} noise", "a {noise} noise scan of the {word}", "a scan of the {word}")
"""What public images are called where a scenario does not say it."""


class Proxy(_Initialization):
    """Trained once on public data, by default the phantom's public scanner with patients of no hospital."""

    kind: Literal["proxy"]
    source: PublicSource = Field(description="public images; `organ_phantom` without fields has patients that no hospital has")
    scanner: Scanner = Field(default_factory=lambda: Scanner(noise=0.05), description="scanner of the public images")
    epochs: int = Field(5, ge=1, description="passes over the public images")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    batch_size: int = Field(32, ge=1, description="images per training batch")
    captions: tuple[str, ...] | None = Field(
        None, min_length=1, description="of a CLIP: texts of the public images, made from {word}, {domain} and {noise} (low, high)"
    )


Initialization = Annotated[Pretrained | Checkpoint | Proxy, Field(discriminator="kind")]


def initialize(  # noqa: PLR0913 - names and target are for prompts alone
    spec: Pretrained | Checkpoint | Proxy | None,
    model: ModelSpec,
    classes: int,
    seed: int,
    folder: Path,
    on_progress: OnProgress,
    names: Sequence[str] = (),
    target: Sequence[str] = (),
) -> Initial:
    """theta_0 with the head that `head_init` asks for; a proxy's encoder is kept in `folder` and trained once.

    names, target: the classes of hospitals and target, for prompts.
    Without a spec the layout of a model alone, for hospitals that all bring their experts.
    Raises CheckpointError if weights cannot be had or do not fit.
    """
    if spec is None:
        weights = dict(build(model, classes, seed=seed).state_dict())
        said = "not known: all hospitals bring experts that were trained elsewhere"
        return Initial(weights, state_digest(weights), "shared_random", said, head_names(build(model, classes)), known=False)
    if isinstance(model, ClipSpec):
        return _of_prompts(spec, model, seed, folder, on_progress, names, target)
    match spec:
        case Pretrained():
            weights = _pretrained(spec, model, classes, seed)
            description = f"timm's pretrained weights of {model.name}"
        case Checkpoint():
            weights = _checkpoint(spec, model, classes, seed)
            description = f"checkpoint {Path(os.path.expandvars(spec.path)).name}"
            description += ", matched by order" if spec.match == "order" else ""
        case Proxy():
            encoder = _kept(spec, model, seed, folder, lambda: _proxy_of(spec, model, seed, on_progress))
            weights = {**build(model, classes, seed=seed).state_dict(), **encoder}
            description = f"proxy: {spec.epochs} epochs on public images of '{spec.source.kind()}'"
    heads = head_names(build(model, classes, seed=seed))
    how = "zero" if spec.head_init == "zero" else "random"
    weights = renew_head(weights, heads, how, seed_of(seed, "head"))
    return Initial(weights, state_digest(weights), spec.head_init, f"{description}; head: {spec.head_init}", heads)


OF_CLASSES = ("head.weight", "head.tokens")
"""What of a CLIP's head is its classes': a text tower that hospitals have tuned, and the scale, are theirs at every target."""


def _of_prompts(
    spec: Pretrained | Checkpoint | Proxy,
    model: ClipSpec,
    seed: int,
    folder: Path,
    on_progress: OnProgress,
    names: Sequence[str],
    target: Sequence[str],
) -> Initial:
    """theta_0 of a CLIP, zero-shot: image tower and prompts; and the target's own head, if it has other classes."""
    match spec:
        case Pretrained():
            towers = read_towers(model, str(model.weights), "model.weights")
            description = f"weights {Path(str(model.weights)).name} of {model.name}"
        case Checkpoint():
            towers = read_towers(model, spec.path, "initialization.path")
            description = f"checkpoint {Path(spec.path).name}"
        case Proxy():
            towers = _kept(spec, model, seed, folder, lambda: _captioned(spec, model, seed, on_progress))
            description = f"proxy: {spec.epochs} epochs on captions of public images of '{spec.source.kind()}'"
    weights = start_of(model, towers, names)
    whole = prompt_head(model, towers, target) if target and tuple(target) != tuple(names) else {}
    other = {name: tensor for name, tensor in whole.items() if name in OF_CLASSES}
    said = f"{description}; head: {len(model.templates)} prompts for each class"
    heads = tuple(name for name in weights if name.startswith("head.") and name != "head.tokens")
    return Initial(weights, state_digest(weights), "text", said, heads, other)


def _captioned(spec: Proxy, model: ClipSpec, seed: int, on_progress: OnProgress) -> dict[str, Tensor]:
    images = spec.scanner.scan(spec.source.load(model.geometry, PUBLIC, seed), PUBLIC, seed)
    recipe = {"epochs": spec.epochs, "lr": spec.lr, "batch_size": spec.batch_size}
    return train_towers(
        model,
        images,
        spec.captions or CAPTIONS,
        recipe,
        seed,
        lambda done, all_: on_progress(done, all_, "CLIP on public captions"),
    )


def keep_theta_0(initial: Initial, folder: Path) -> None:
    """Leave theta_0 in the pool, so that what experts have learned can be told from where they started."""
    file = _file_of(initial.sha256, folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as draft:
            tensor_file.save(draft, initial.weights)


def kept_theta_0(sha256: str, folder: Path) -> dict[str, Tensor] | None:
    """theta_0 by its digest, or None if the pool has it not, or not undamaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = dict(load_file(_file_of(sha256, folder)))
    except (OSError, SafetensorError):
        return None
    return weights if state_digest(weights) == sha256 else None


def _file_of(sha256: str, folder: Path) -> Path:
    return folder / "initializations" / f"theta_0-{sha256[:16]}.safetensors"


def _pretrained(spec: Pretrained, model: ModelSpec, classes: int, seed: int) -> dict[str, Tensor]:
    """Weights from the cache, without asking anybody; else from the hub. Raises CheckpointError where neither has them."""
    at = on_the_hub(model)
    if at is None:
        build(model, classes, seed=seed)  # a name that timm does not know is another mistake
        raise CheckpointError(
            f"initialization: found no pretrained weights of '{model.name}' in timm; expected a model that has some "
            "(python -c 'import timm; print(timm.list_pretrained())'), or {kind: checkpoint, path: FILE}"
        )
    cache = at_home(spec.cache) if spec.cache else None
    hub, name = at
    file = cached_weights(hub, name, cache)
    try:
        if file is None and hub and not hub_is_found():
            raise OSError("huggingface.co is not found from this machine")
        known: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file), "custom_load": False}} if file else {}
        return dict(build(model, classes, pretrained={"cache_dir": cache, **known}, seed=seed).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        where = f"'{cache}'" if cache else "the hub's cache"
        said = first_line(error)
        fetch = f"fetch them where there is one{f' (hf download {hub})' if hub else ''}"
        raise CheckpointError(
            f"initialization: found no pretrained weights of '{model.name}' in {file or where} ({said}); expected them there, or a "
            f"network. Without one: {fetch}, copy the cache and say {{kind: pretrained, cache: FOLDER}}, or the file alone and "
            "say {kind: checkpoint, path: FILE.safetensors}"
        ) from None


def _checkpoint(spec: Checkpoint, model: ModelSpec, classes: int, seed: int) -> dict[str, Tensor]:
    read = read_weights(spec.path, "initialization.path", expected_of(model))
    found = read.state
    skeleton = build(model, classes, seed=seed)
    wanted, heads = skeleton.state_dict(), head_names(skeleton)
    owner = f"initialization.path: {Path(os.path.expandvars(spec.path)).name}"
    renamed = _by_order(found, wanted, heads) if read.keeps_order else "safetensors files keep no order, only names"
    if spec.match == "order":
        if isinstance(renamed, str):
            raise CheckpointError(f"{owner} does not fit the model in its order: {renamed}")
        found = renamed
    state = {**{name: found[name] for name in found if name not in heads}, **{name: wanted[name] for name in heads}}
    try:
        check_state(state, wanted, owner)
    except CheckpointError as error:
        if spec.match == "order" or isinstance(renamed, str):
            raise
        mend = "its tensors are called otherwise, and are in order of the model's number, kinds and shapes: say 'match: order'"
        raise CheckpointError(f"{error}\n  {mend}") from None
    return {name: state[name].to(wanted[name].dtype) for name in wanted}


def _by_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], heads: Sequence[str]) -> dict[str, Tensor] | str:
    """The tensors under the model's names, each by its place; or why that cannot be. A head may have another number of classes."""
    if len(found) != len(wanted):
        return f"found {len(found)} tensors, expected {len(wanted)}"
    for place, ((name, here), (ours, there)) in enumerate(zip(found.items(), wanted.items(), strict=True), start=1):
        if not isinstance(here, Tensor):
            return f"found {type(here).__name__} under '{name}', expected a tensor"
        kind, expected = name.rpartition(".")[2], ours.rpartition(".")[2]
        first = 1 if ours in heads else 0
        if kind != expected or here.shape[first:] != there.shape[first:] or here.ndim != there.ndim:
            found_here = f"'{name}' {tuple(here.shape)}"
            return f"tensor {place} is {found_here}, expected one for '{ours}' {tuple(there.shape)}"
    return dict(zip(wanted, found.values(), strict=True))


def _kept(spec: Proxy, model: ModelSpec, seed: int, folder: Path, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The proxy's encoder, or towers, from disk, or trained now."""
    file = kept_proxy(spec, model, seed, folder)
    if not file.exists():
        see_that_writable(folder, "--pool")
        with one_thread():  # as hospitals train
            tensor_file.put(file, train())
    return tensor_file.take(file, "delete this file and the proxy is trained again")[0]


def kept_proxy(spec: Proxy, model: ModelSpec, seed: int, folder: Path) -> Path:
    """Where the encoder of a proxy is kept, whether it is there or not."""
    untold = {"captions"} if spec.captions is None else set[str]()
    of_hospitals = {"weights", "templates", "tune", "head"} if isinstance(model, ClipSpec) else set[str]()
    determined: dict[str, Any] = {
        "version": VERSION,
        "proxy": spec.model_dump(mode="json", exclude={"head_init"} | untold),
        "images": spec.source.identity(PUBLIC, seed),
        "model": model.model_dump(mode="json", exclude=of_hospitals),
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "initializations" / f"proxy-{key}.safetensors"


def _proxy_of(spec: Proxy, model: ModelSpec, seed: int, on_progress: OnProgress) -> dict[str, Tensor]:
    """The encoder of a classifier of the public images."""
    images = Site(name=PUBLIC, source=spec.source, scanner=spec.scanner).images(model.geometry, seed)
    x = Normalized(images.pixels, np.arange(len(images)), *normalization(model))
    data = LabeledImages(x, torch.from_numpy(images.labels))
    net = build(model, len(images.classes), seed=seed)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    steps = spec.epochs * max(1, len(images) // spec.batch_size)
    recipe = Recipe(
        spec.lr, 0.0, steps, spec.batch_size, "adamw", "cosine", "light", images.flips, name="the proxy", lr_key="initialization.lr"
    )
    fit(net, data, recipe, seed_of(seed, "proxy"), lambda step: on_progress(step, steps, "proxy on public images"))
    heads = head_names(net)
    return {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items() if name not in heads}
