"""theta_0 of a CLIP: both towers from a file or trained on public captions, and the heads that class prompts make of them.

Text is read here, at the server, and nowhere else: hospitals and the target are sent embeddings, or prompts as numbers.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge.data.images import Images, to_batch
from fedmerge.errors import CheckpointError, Problem, ScenarioError, extras_named, first_line
from fedmerge.federated.model import ClipSpec, normalization
from fedmerge.federated.model.clip_classifier import configuration, context_length, embedded, tower
from fedmerge.federated.pool.checkpoint import expected_of, read_weights
from fedmerge.federated.pool.tensor_file import opened_file
from fedmerge.federated.statistics._base import State
from fedmerge.merging.bank.layout import check_state
from fedmerge.rng import generator, seed_of
from fedmerge.system.files import at_home

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "logit_bias", "text.transformer.embeddings.position_ids")
"""What files of some layouts hold beside weights, and a bias of all logits alike, which softmax does not see."""

CLEAREST = math.log(100)
"""Largest logit scale in training, as Radford et al. clip it."""

GRADES = {"low": 0.02, "high": 0.12}
"""Noise that is added to public images, as a share of their range, and what captions call it."""


class Towers(nn.Module):
    """A whole CLIP under open_clip's names: both towers and the logit scale."""

    def __init__(self, spec: ClipSpec, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "model"))
            self.visual, self.text = tower(spec, "vision"), tower(spec, "text")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def read_towers(spec: ClipSpec, path: str, key: str) -> State:
    """Both towers and the logit scale from a file, or by one of open_clip's tags; float32.

    Raises CheckpointError for a file that is not there, is none, or has weights of another architecture.
    """
    found = _tensors(spec, path, key)
    if any(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    towers = Towers(spec)
    found = _open_clip_names(towers, found)
    found = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    wanted = towers.state_dict()
    if "logit_scale" in found:
        found["logit_scale"] = found["logit_scale"].reshape(())
    check_state(found, wanted, f"{key}: {Path(path).name} (of {spec.name})")
    return {name: found[name].contiguous() for name in wanted}


def _tensors(spec: ClipSpec, path: str, key: str) -> State:
    with extras_named():
        import open_clip
    file = at_home(path)
    tags = [] if ":" in spec.name else open_clip.list_pretrained_tags_by_model(spec.name)
    if path in tags and not file.exists():
        known = open_clip.get_pretrained_cfg(spec.name, path)
        _same_gelu(spec, bool(known.get("quick_gelu")), f"{key}: {path}")
        try:
            return _in_file(open_clip.download_pretrained(known), key, spec)
        except (OSError, RuntimeError) as error:
            found = f"found no way to '{path}' ({first_line(error)})"
            raise CheckpointError(f"{key}: {found}; expected a network, or a file in its place") from None
    if not file.exists() and tags and file.parent == Path():
        raise CheckpointError(f"{key}: found '{path}', no file here; expected a file, or a tag of {spec.name}: {', '.join(tags)}")
    return _in_file(path, key, spec)


def _in_file(path: str | Path, key: str, spec: ClipSpec) -> State:
    """The tensors of a file, also of TorchScript, as OpenAI's: no program in it is run."""
    file, _ = opened_file(path, key, expected_of(spec))
    if not _is_archive(file):
        return read_weights(path, key, expected_of(spec)).state
    found = "a TorchScript archive, as OpenAI's, whose weights were trained with QuickGELU"
    _same_gelu(spec, True, f"{key}: {file}", found)
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # torch would have no new archives made
            return dict(torch.jit.load(file, map_location="cpu").state_dict())  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise CheckpointError(
            f"{key}: {file}: found a damaged TorchScript archive ({first_line(error)}); expected a whole one. Download it again"
        ) from None


def _is_archive(file: Path) -> bool:
    """Whether it is one of TorchScript, which holds a program beside tensors."""
    try:
        with zipfile.ZipFile(file) as opened:
            return any(name.endswith("constants.pkl") for name in opened.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _same_gelu(spec: ClipSpec, quick: bool, what: str, found: str = "weights that were trained with QuickGELU") -> None:
    """Weights under the other activation would run, and be wrong."""
    if quick and not configuration(spec).get("quick_gelu"):
        raise CheckpointError(
            f"{what}: found {found}; expected a model with it: name: {spec.name}-quickgelu, or kwargs: {{quick_gelu: true}}"
        )


def _open_clip_names(towers: Towers, found: State) -> State:
    """The layouts of OpenAI, of older files of open_clip, and of Apple's as open_clip names them now; positions for this size."""
    from open_clip import convert
    from open_clip import model as open_clip_model

    with suppress(
        KeyError, AttributeError
    ):  # of a layout that only looks like one to be converted: a check later tells what is odd
        found = convert.convert_state_dict(towers, found)
    found = open_clip_model.convert_to_custom_text_state_dict(found)
    found = {name: tensor for name, tensor in found.items() if name not in NOT_WEIGHTS}
    if "visual.positional_embedding" in found and hasattr(towers.visual, "grid_size"):
        open_clip_model.resize_pos_embed(found, towers)
    return found


def tokens_of(spec: ClipSpec, texts: Sequence[str], seen_as: str) -> Tensor:
    """Texts as numbers (n, length). seen_as: the key that they come from. Raises ScenarioError, or CheckpointError."""
    with extras_named():
        import open_clip
    try:
        length, tokenizer = context_length(spec), spec.kwargs.get("text_cfg", {}).get("hf_tokenizer_name")
        read = open_clip.HFTokenizer(tokenizer, length) if tokenizer else open_clip.get_tokenizer(spec.name, context_length=length)
        tokens: Tensor = read(list(texts))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{seen_as}: found no tokenizer of {spec.name} ({first_line(error)}); expected it in the cache, or a network"
        ) from None
    vocabulary = configuration(spec)["text_cfg"].get("vocab_size", 49408)
    if not configuration(spec)["text_cfg"].get("hf_model_name") and int(tokens.max()) >= vocabulary:
        expected = f"more than {int(tokens.max())}, the largest number of {seen_as}"
        raise ScenarioError([Problem("scenario", "model.kwargs.text_cfg.vocab_size", str(vocabulary), expected)])
    return tokens


def prompts_of(spec: ClipSpec, classes: Sequence[str]) -> Tensor:
    """Prompts (C, templates, length) of classes. Raises ScenarioError where two are the same, as behind a text that is too long."""
    texts = [template.replace("{}", spec.words[name]) for name in classes for template in spec.templates]
    tokens = tokens_of(spec, texts, "model.words").reshape(len(classes), len(spec.templates), -1)
    for number, name in enumerate(classes):
        for other in range(number):
            if torch.equal(tokens[number], tokens[other]):
                found = f"one prompt for '{classes[other]}' and '{name}' within {tokens.shape[-1]} tokens"
                raise ScenarioError([Problem("scenario", "model.words", found, "a prompt of its own for each class")])
    return tokens


def start_of(spec: ClipSpec, towers: State, classes: Sequence[str]) -> State:
    """theta_0: the image tower, and the head of these classes."""
    visual = {name: tensor for name, tensor in towers.items() if name.startswith("visual.")}
    return visual | prompt_head(spec, towers, classes)


def prompt_head(spec: ClipSpec, towers: State, classes: Sequence[str]) -> State:
    """The head of a classifier of these classes: embeddings of their prompts, or the text tower and the prompts as numbers."""
    tokens = prompts_of(spec, classes)
    scale = {"head.logit_scale": towers["logit_scale"].clone()}
    text_state = {name.removeprefix("text."): tensor for name, tensor in towers.items() if name.startswith("text.")}
    if spec.tune == "both":
        return {f"head.text.{name}": tensor for name, tensor in text_state.items()} | scale | {"head.tokens": tokens.long()}
    text = tower(spec, "text").eval()
    text.load_state_dict(text_state)
    with torch.no_grad():
        rows = [
            embedded(text, part).float() for part in torch.split(tokens, 16)
        ]  # (C, width): of few classes at a time, for memory
    return {"head.weight": torch.cat(rows)} | scale


def captions_of(spec: ClipSpec, templates: Sequence[str], images: Images, key: str) -> tuple[list[str], Tensor]:
    """Every caption that public images may have, and which (N, grades, templates) of them each image has."""
    texts: dict[str, int] = {}
    which = torch.empty(len(images), len(GRADES), len(templates), dtype=torch.long)
    for i, (label, domain) in enumerate(zip(images.labels, images.domains, strict=True)):
        word = spec.words[images.classes[label]]
        for g, grade in enumerate(GRADES):
            for t, template in enumerate(templates):
                try:
                    text = template.format(word=word, domain=images.domain_names[domain], noise=grade)
                except (LookupError, ValueError):
                    expected = "a text of {word}, {domain} and {noise}"
                    raise ScenarioError([Problem("scenario", key, f"'{template}'", expected)]) from None
                which[i, g, t] = texts.setdefault(text, len(texts))
    return list(texts), which


def train_towers(
    spec: ClipSpec,
    images: Images,
    captions: Sequence[str],
    recipe: Mapping[str, Any],
    seed: int,
    on_step: Callable[[int, int], None],
) -> State:
    """A CLIP from scratch (Radford et al., 2021): images are near their captions. recipe: epochs, lr, batch_size.

    Every image comes with noise of one of two grades and a caption that is true of it. Images of a batch that have one caption are
    all its own, in both directions of the loss (as Yang et al., UniCL, CVPR 2022, have it): one text is no negative of itself.
    """
    texts, which = captions_of(spec, captions, images, "initialization.captions")
    tokens = tokens_of(spec, texts, "initialization.captions")
    towers, rng = Towers(spec, seed).train(), generator(seed, "captions")
    x = to_batch(images.pixels, *normalization(spec))
    spread = torch.tensor([1 / s for s in normalization(spec)[1]]).view(1, -1, 1, 1)
    noises, size = torch.tensor(list(GRADES.values())), recipe["batch_size"]
    steps = recipe["epochs"] * max(1, len(x) // size)
    optimizer = torch.optim.AdamW(towers.parameters(), recipe["lr"], weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps + 1, pct_start=0.1)
    draws = torch.Generator().manual_seed(seed_of(seed, "noise"))
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < min(size, len(x)):
            order = torch.from_numpy(rng.permutation(len(x)))
        chosen, order = order[:size], order[size:]
        grade = torch.from_numpy(rng.integers(len(GRADES), size=len(chosen)))
        template = torch.from_numpy(rng.integers(len(captions), size=len(chosen)))
        batch = x[chosen] + torch.randn(x[chosen].shape, generator=draws) * noises[grade].view(-1, 1, 1, 1) * spread
        there, row = torch.unique(which[chosen, grade, template], return_inverse=True)
        loss = _contrast(towers, batch, tokens[there], row)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        rate.step()
        with torch.no_grad():
            towers.logit_scale.clamp_(0, CLEAREST)
        on_step(step, steps)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in towers.state_dict().items()}


def _contrast(towers: Towers, batch: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
    """Cross-entropy from images (N) to texts (U) and back; row: the text of each image."""
    image, text = F.normalize(towers.visual(batch), dim=-1), F.normalize(towers.text(tokens), dim=-1)
    logits = towers.logit_scale.exp() * image @ text.T
    own = F.one_hot(row, len(tokens)).to(logits)
    back = -(own / own.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (F.cross_entropy(logits, row) + back) / 2
