"""CLIP as a classifier: files of weights, prompts, towers, and what hospitals train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.errors import CheckpointError, ScenarioError, SiteError, UploadRefused
from fedmerge.federated.attacks._base import ATTACKS
from fedmerge.federated.client.site_training import admit_images, model_of, train_site
from fedmerge.federated.flower.node_identity import agreed
from fedmerge.federated.messages import Initial, SiteTask, Training
from fedmerge.federated.model import AnyModel, ClipSpec, answering, build, normalization, try_out
from fedmerge.federated.model.building import NEVER
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.security.audit import Declaration, inspect
from fedmerge.federated.server.clip_start import prompts_of
from fedmerge.federated.server.initialization import Checkpoint, Pretrained, Proxy, initialize
from fedmerge.federated.site import Site
from fedmerge.federated.statistics._base import STATISTICS, Ground
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.methods._base import load_method
from fedmerge.merging.per_sample.mixture import Mixture
from tests.clips import MODEL, RESNET, VIT, WORDS, random_clip, saved

if TYPE_CHECKING:
    import open_clip

EVERYONE = ("liver", "heart", "spleen")


def spec(**changes: Any) -> ClipSpec:
    return ClipSpec.model_validate(MODEL | changes)


def begun(model: ClipSpec, classes: tuple[str, ...] = EVERYONE, target: tuple[str, ...] = ()) -> Initial:
    return initialize(Pretrained(kind="pretrained"), model, len(classes), 0, Path(), lambda *_: None, classes, target)


def zero_shot(clip: open_clip.CLIP, x: Tensor, classes: tuple[str, ...] = EVERYONE) -> Tensor:
    """Logits as Radford et al. have them, by the library's own functions."""
    from open_clip import SimpleTokenizer

    read = SimpleTokenizer(context_length=16)
    rows = []
    for name in classes:
        each = clip.encode_text(read([t.replace("{}", WORDS[name]) for t in MODEL["templates"]]), normalize=True)
        rows.append(F.normalize(each.mean(0), dim=0))
    return clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ torch.stack(rows).T


@pytest.mark.parametrize("tune", ["image", "both"])
@pytest.mark.parametrize(("name", "config"), [("ViT-B-32", VIT), ("RN50", RESNET)])
def test_zero_shot_logits_are_the_librarys(tmp_path: Path, name: str, config: dict[str, Any], tune: str) -> None:
    clip = random_clip(config)
    model = spec(name=name, kwargs=config, weights=saved(tmp_path / "w.pt", clip.state_dict()), tune=tune)
    ours = build(model, 3).eval()
    ours.load_state_dict(begun(model).weights)
    x = torch.rand(4, 3, *[model.geometry.size] * 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), zero_shot(clip, x), rtol=1e-4, atol=1e-4)
    assert try_out(model, 3) == []


def test_layouts_of_files(tmp_path: Path) -> None:
    """Safetensors, a checkpoint of open_clip's training, text towers under their own name, half precision."""
    state = random_clip().state_dict()
    wanted = begun(spec(weights=saved(tmp_path / "plain.pt", state))).weights
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    in_training = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    saved(tmp_path / "epoch_3.pt", in_training)
    custom = {name if name.split(".")[0] in ("visual", "logit_scale") else f"text.{name}": t for name, t in state.items()}
    saved(tmp_path / "custom.bin", custom)
    for file in ("w.safetensors", "epoch_3.pt", "custom.bin"):
        found = begun(spec(weights=str(tmp_path / file))).weights
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), file
    saved(tmp_path / "half.pt", {name: tensor.half() for name, tensor in state.items()})
    assert all(tensor.dtype == torch.float32 for tensor in begun(spec(weights=str(tmp_path / "half.pt"))).weights.values())


class _Jit(nn.Module):
    """What `torch.jit.script` makes an archive of: OpenAI's files are such, with three numbers beside the weights."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        for name, tensor in {**clip.state_dict(), "input_resolution": torch.tensor(16), "vocab_size": torch.tensor(49408)}.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if step not in dict(owner.named_children()):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_openai_archives_want_their_activation(tmp_path: Path) -> None:
    clip = random_clip(VIT | {"quick_gelu": True})
    torch.jit.script(_Jit(clip)).save(tmp_path / "ViT.pt")
    model = spec(weights=str(tmp_path / "ViT.pt"), kwargs=VIT | {"quick_gelu": True})
    ours = build(model, 3).eval()
    ours.load_state_dict(begun(model).weights)
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), zero_shot(clip, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"ViT.pt: found a TorchScript archive.*QuickGELU; expected a model with it: name: "):
        begun(spec(weights=str(tmp_path / "ViT.pt")))


def test_biomedclips_layout(tmp_path: Path) -> None:
    """A folder with its configuration: an image tower of timm, a text tower of transformers, and the words that it knows."""
    from open_clip import CustomTextCLIP
    from transformers import BertConfig, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "scan", "of", "the", ".",
                                                   "liver", "heart", "spleen"]))  # fmt: skip
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 13}
    BertConfig(**small).save_pretrained(tmp_path)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
        "text_cfg": {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_proj_type": "mlp",
                     "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 16},
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    no_files = {"text_cfg": config["text_cfg"] | {"hf_model_pretrained": False}}
    clip = CustomTextCLIP(**config | no_files).eval()
    saved(tmp_path / "open_clip_pytorch_model.bin", clip.state_dict())
    model = spec(name=f"local-dir:{tmp_path}", kwargs={}, weights=str(tmp_path / "open_clip_pytorch_model.bin"))
    weights = begun(model).weights
    assert weights["head.weight"].shape == (3, 16)
    assert torch.equal(weights["visual.trunk.cls_token"], clip.visual.trunk.cls_token)
    assert len(torch.unique(weights["head.weight"], dim=0)) == 3


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", random_clip(RESNET).state_dict())
    with pytest.raises(CheckpointError, match=r"model.weights: w.pt \(of ViT-B-32\) does not fit the model"):
        begun(spec(weights=file))
    with pytest.raises(
        CheckpointError,
        match=r"model.weights: .*gone.pt: found nothing .*No such file.*expected a safetensors file of ViT-B-32, or one of PyTorch",
    ):
        begun(spec(weights=str(tmp_path / "gone.pt")))
    with pytest.raises(
        CheckpointError, match=r"model.weights: found 'laion', no file here; expected a file, or a tag of ViT-B-32: "
    ):
        begun(spec(weights="laion"))
    torch.save(["no", "dictionary"], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list.pt: found list in it; expected .*Save its weights alone"):
        begun(spec(weights=str(tmp_path / "list.pt")))
    (tmp_path / "cut.pt").write_bytes(Path(file).read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut.pt: found a file that was cut off"):
        begun(spec(weights=str(tmp_path / "cut.pt")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "ViT-B-23"}, "model.name: found 'ViT-B-23'; expected a model of open_clip; did you mean 'ViT-B-32'"),
        ({"name": "local-dir:/nowhere"}, "model.name: found 'local-dir:/nowhere' .*; expected a folder with open_clip_config.json"),
        ({"kwargs": {"vision_cfg": {"wdith": 3}}}, "model.kwargs: .*wdith.*expected a configuration of open_clip"),
    ],
)
def test_architectures_that_are_none(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        try_out(spec(**changes), 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"words": WORDS | {"heart": " LIVER"}}, "'heart' and 'liver' have one prompt, 'liver': expected one of its own"),
        ({"templates": ["a scan"]}, "expected one {} for the word of a class.*found 0 in 'a scan'"),
        ({"templates": []}, "at least 1 item"),
        ({"tune": "both", "head": "ft"}, "head: ft with tune: both: a trained head has no text tower"),
        ({"tune": "text"}, "'image' or 'both'"),
    ],
)
def test_prompts_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(**changes)


def test_prompts_that_differ_too_late(tmp_path: Path) -> None:
    long = "a scan " + "of the abdomen " * 8
    model = spec(templates=[long + "{}"])
    with pytest.raises(ScenarioError, match=r"found one prompt for 'liver' and 'heart' within 16 tokens"):
        prompts_of(model, ("liver", "heart"))
    few = spec(kwargs=VIT | {"text_cfg": VIT["text_cfg"] | {"vocab_size": 100}})
    with pytest.raises(ScenarioError, match=r"text_cfg.vocab_size: found 100; expected more than 49407"):
        prompts_of(few, ("liver",))


def test_a_model_of_timm_stays_as_it_was() -> None:
    read = TypeAdapter(AnyModel).validate_python
    plain = read({"name": "resnet18"})
    assert plain == read({"kind": "timm", "name": "resnet18"})
    assert "kind" not in plain.model_dump()
    with pytest.raises(ValidationError, match=r"words: only a model that reads text has them. Say 'kind: clip'"):
        read({"name": "resnet18", "words": WORDS})
    assert isinstance(read(MODEL), ClipSpec) and read(json.loads(read(MODEL).model_dump_json())) == read(MODEL)


def test_pixels_are_those_that_the_weights_expect() -> None:
    assert normalization(spec())[0][0] == pytest.approx(0.4815, abs=1e-4)
    assert normalization(spec(name="ViT-B-16-SigLIP", kwargs={}))[0] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet with attention pooling"])
def test_every_sample_may_have_a_merge_of_its_own(config: dict[str, Any]) -> None:
    """The law of per-sample merging: as explicit merges, to rounding, also for other BatchNorm statistics."""
    model = build(spec(kwargs=config), 3).double()
    generator = torch.Generator().manual_seed(0)

    def moved(name: str, tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor + 0.2 * noise if tensor.is_floating_point() else tensor

    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = [{name: moved(name, tensor) for name, tensor in base.items()} for _ in range(3)]
    bank = Bank.of(model, experts, base, dtype=torch.float64)
    assert set(bank.parts.head) == {"head.weight", "head.logit_scale"}
    side = spec(kwargs=config).geometry.size
    x = torch.rand(5, 3, side, side, generator=generator, dtype=torch.float64)
    rows = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    rows /= rows.sum(1, keepdim=True)
    heads = rows.flip(0)
    wanted = [bank.forward(bank.mix(a, b), x[i : i + 1], a)[0] for i, (a, b) in enumerate(zip(rows, heads, strict=True))]
    torch.testing.assert_close(Mixture(bank).forward(x, rows, heads), torch.stack(wanted), rtol=1e-10, atol=1e-10)


def test_the_logit_scale_is_merged_before_its_exponential(tmp_path: Path) -> None:
    model = spec(weights=saved(tmp_path / "w.pt", random_clip().state_dict()))
    base = begun(model).weights
    experts = [base | {"head.logit_scale": torch.tensor(s)} for s in (1.0, 3.0)]
    bank = Bank.of(build(model, 3), experts, base)
    merged = bank.state_dict(load_method("mean").merge(bank))  # type: ignore[attr-defined]
    assert float(merged["head.logit_scale"]) == 2.0
    x = torch.rand(2, 3, 16, 16)
    ratio = bank.forward(load_method("mean").merge(bank), x) / bank.row_logits(0, x)  # type: ignore[attr-defined]
    torch.testing.assert_close(ratio, torch.full((2, 3), 2.718282), rtol=1e-4, atol=0)


def test_heads_follow_merged_text_towers(tmp_path: Path) -> None:
    """tune: both: the head is that of the merged text tower, not the mean of heads."""
    files = [saved(tmp_path / f"{seed}.pt", random_clip(seed=seed).state_dict()) for seed in (0, 1)]
    states = [begun(spec(weights=file, tune="both")).weights for file in files]
    bank = Bank.of(build(spec(tune="both"), 3), states)
    merged = random_clip()
    both = [random_clip(seed=seed).state_dict() for seed in (0, 1)]
    merged.load_state_dict({name: (both[0][name] + both[1][name]) / 2 for name in both[0]})
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        wanted = zero_shot(merged, x)
    torch.testing.assert_close(bank.forward(load_method("mean").merge(bank), x), wanted, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


def hospital(model: ClipSpec, initial: Initial, classes: tuple[str, ...] = EVERYONE) -> SiteTask:
    training = {
        "runs": 1,
        "epochs": 2,
        "optimizer": "adamw",
        "augment": "none",
        "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}},
    }
    return SiteTask(
        site=Site.model_validate({"name": "axial", "source": {"kind": "organ_phantom", "images": 80, "patients": 16}}),
        model=model.as_sent,
        training=Training.model_validate(training),
        classes=classes,
        seed=0,
        initial_sha256=initial.sha256,
        head_init=initial.head_init,
    )


@pytest.mark.parametrize(
    ("changes", "moves", "stays"),
    [
        ({}, "visual.proj", "head.weight head.logit_scale"),
        ({"head": "ft"}, "visual.proj head.weight head.logit_scale", ""),
        ({"head": "lp_ft"}, "visual.proj head.weight", ""),
        ({"tune": "both"}, "visual.proj head.text.text_projection head.logit_scale", "head.tokens"),
    ],
)
def test_what_hospitals_train_and_what_leaves(tmp_path: Path, changes: dict[str, Any], moves: str, stays: str) -> None:
    model = spec(weights=saved(tmp_path / "w.pt", random_clip().state_dict()), **changes)
    initial = begun(model)
    upload = train_site(hospital(model, initial), initial.weights, lambda *_: None)
    assert upload.classes == EVERYONE
    for name in moves.split():
        assert not torch.equal(upload.weights[name], initial.weights[name]), name
    for name in stays.split():
        assert torch.equal(upload.weights[name], initial.weights[name]), name
    text = [name for name in upload.weights if ".text." in name]
    assert bool(text) == (model.tune == "both")
    declared = Declaration.of("axial", initial.weights, 1, 0, (16, 16, 3))
    assert {item.item for item in inspect(upload, declared)} >= set(initial.weights)
    if not text:
        upload.weights["head.text.text_projection"] = torch.zeros(16, 16)
        with pytest.raises(UploadRefused, match=r"arrays: found undeclared \['head.text.text_projection'\]"):
            inspect(upload, declared)


def test_who_trains_is_told_no_file_and_no_word(tmp_path: Path) -> None:
    sent = spec(weights=str(tmp_path / "w.pt")).as_sent
    assert sent.weights is None and sent.words == {}
    assert spec(weights="laion2b_s34b_b79k").as_sent.weights == "laion2b_s34b_b79k"


def test_the_target_has_a_head_of_its_own_classes(tmp_path: Path) -> None:
    model = spec(weights=saved(tmp_path / "w.pt", random_clip().state_dict()))
    initial = begun(model, ("liver", "heart"), ("bladder", "liver"))
    assert torch.equal(initial.target_head["head.weight"][1], initial.weights["head.weight"][0])
    assert begun(model, ("liver", "heart"), ("liver", "heart")).target_head == {}
    both = begun(model.model_copy(update={"tune": "both"}), ("liver", "heart"), ("bladder", "liver"))
    assert set(both.target_head) == {"head.tokens"}  # the experts' text towers stay theirs


def test_a_proxy_is_trained_on_captions_once(tmp_path: Path) -> None:
    source = {"kind": "organ_phantom", "images": 40, "patients": 8}
    proxy = Proxy.model_validate({"kind": "proxy", "source": source, "epochs": 1, "batch_size": 16})
    steps: list[int] = []

    def start(model: ClipSpec) -> Initial:
        return initialize(proxy, model, 2, 0, tmp_path, lambda done, *_: steps.append(done), ("liver", "heart"))

    first = start(spec())
    assert steps == [1, 2]
    assert start(spec(templates=["the {}"])).sha256 != first.sha256  # other prompts of the same towers
    assert start(spec()).sha256 == first.sha256
    assert steps == [1, 2]
    wrong = proxy.model_copy(update={"captions": ("a {wrod}",)})
    with pytest.raises(ScenarioError, match=re.escape("initialization.captions: found 'a {wrod}'; expected a text of {word}")):
        initialize(wrong, spec(), 2, 0, tmp_path, lambda *_: None, ("liver", "heart"))


def test_a_checkpoint_is_a_file_of_the_same_layouts(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", random_clip().state_dict())
    start = Checkpoint(kind="checkpoint", path=file)
    found = initialize(start, spec(), 3, 0, tmp_path, lambda *_: None, EVERYONE)
    assert found.weights.keys() == begun(spec(weights=file)).weights.keys()
    assert found.sha256 == begun(spec(weights=file)).sha256
    assert set(ORGANS) == set(WORDS)


@pytest.mark.parametrize("kind", ["centroid", "class_counts", "fisher", "gram", "kfac", "soup"])
@pytest.mark.parametrize("change", [{}, {"head": "ft"}, {"tune": "both"}, {"name": "RN50", "kwargs": RESNET}], ids=str)
def test_statistics_of_a_clip_are_those_of_its_layout(kind: str, change: dict[str, Any]) -> None:
    model = build(ClipSpec.model_validate(MODEL | change), 4).eval()
    side = 32 if change.get("name") else 16
    x, statistic = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0)), STATISTICS.load(kind)()
    ground = Ground(model, x, torch.arange(8) % 4, lambda: [dict(model.state_dict())], (), 0)
    if why := statistic.unfit(model, x[:1]):  # four classes in two templates are eight prompts: as many rows as images
        assert (kind, change, "sees no images" in why) == ("kfac", {"tune": "both"}, True)
        with pytest.raises(SiteError, match="found inputs that are no images' rows"):
            statistic.measure(ground)
        return
    found = statistic.measure(ground)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(statistic.layout(model))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert kind != "class_counts" or found["counts"].tolist() == [2, 2, 2, 2]


def test_a_hospital_with_a_task_of_its_own_trains_as_if_there_were_no_other(tmp_path: Path) -> None:
    """The softmax of its classes alone, in the head of all: the tower is that of a hospital whose head has no other rows."""
    model, own = spec(weights=saved(tmp_path / "w.pt", random_clip().state_dict())), ("liver", "spleen")
    every, few = begun(model, EVERYONE), begun(model, own)
    task = hospital(model, every).model_copy(update={"own": own})
    ward = admit_images(task)
    assert ward.images.classes == EVERYONE and set(ward.images.labels.tolist()) == {0, 2}
    net, x = model_of(task).eval(), torch.rand(4, 3, 16, 16)
    net.load_state_dict(every.weights)
    assert set(net(x).argmax(1).tolist()) <= {0, 2} and bool((net(x)[:, 1] == NEVER).all())
    found, wanted = (
        train_site(task, every.weights, lambda *_: None),
        train_site(hospital(model, few, own), few.weights, lambda *_: None),
    )
    for name in wanted.weights:
        if name.startswith("visual."):
            torch.testing.assert_close(found.weights[name], wanted.weights[name], rtol=1e-3, atol=1e-5)
    assert found.scalars["validation_accuracy"] == wanted.scalars["validation_accuracy"]
    assert found.scalars["temperature"] == pytest.approx(wanted.scalars["temperature"], rel=1e-2)
    assert torch.equal(found.weights["head.weight"], every.weights["head.weight"])
    assert fingerprint(task) != fingerprint(hospital(model, every))
    assert agreed(task, task.site) == task
    attacker = task.site.model_copy(update={"attack": ATTACKS.load("shuffled_labels")()})
    assert set(admit_images(task.model_copy(update={"site": attacker})).images.labels.tolist()) == {0, 2}


@pytest.mark.parametrize("kind", ["fisher", "gram", "kfac"])
def test_statistics_among_own_classes_are_finite(kind: str) -> None:
    model = answering(build(spec(), 4).eval(), [True, False, True, False])
    statistic = STATISTICS.load(kind)()
    found = statistic.measure(Ground(model, torch.randn(8, 3, 16, 16), torch.arange(8) % 2 * 2, list, (), 0))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict(statistic.layout(model))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    if kind == "fisher":
        assert not found["head.weight"][1].any() and found["head.weight"][0].any()  # rows of other classes decide nothing
