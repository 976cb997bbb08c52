"""What `scenarios/*.yaml` may say; composed from the rooms' own specs."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from fedmerge.adaptation.tasks import Precision
from fedmerge.federated.defenses._base import DEFENSES
from fedmerge.federated.messages import Training
from fedmerge.federated.model import AnyModel
from fedmerge.federated.security.limits import Limits
from fedmerge.federated.security.privacy import Privacy
from fedmerge.federated.server.initialization import Initialization, PublicSource
from fedmerge.federated.site import Site
from fedmerge.federated.statistics._base import STATISTICS, Statistic
from fedmerge.federated.strategies._base import STRATEGIES
from fedmerge.merging.methods._base import METHODS
from fedmerge.merging.per_sample.dispatch import Way
from fedmerge.registry import Schema, Spec, as_written, by_name, renamed
from fedmerge.stream.events import Event
from fedmerge.stream.schedules._base import SCHEDULES


def _beside_experts(statistic: Statistic) -> Statistic:
    if not statistic.for_experts:
        raise ValueError("no method needs it, so no expert comes with it; strategies below 'federated' ask for it themselves")
    return statistic


AnySchedule: Any = SCHEDULES.union()
AnyMethod: Any = by_name(METHODS)
AnyUpload: Any = Annotated[by_name(STATISTICS), AfterValidator(_beside_experts)]
AnyDefense: Any = by_name(DEFENSES)
AnyStrategy: Any = by_name(STRATEGIES)
CHECKS = tuple(DEFENSES.load(name)() for name in ("calibration", "norms", "agreement", "patches"))
"""What every scenario defends itself with, unless it says otherwise: it leaves honest federations as they are."""


def _class_names(value: Any, expected: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise PydanticCustomError("classes", "{expected}", {"expected": expected})
    return tuple(value)


def _classes_of_hospitals(value: Any) -> Any:
    if value is None or value == OWN:
        return value
    if not isinstance(value, dict):
        return _class_names(value, f"a list of two classes or more, a mapping from sites to such lists, or '{OWN}'")
    return {site: _class_names(names, f"a list of two classes or more of '{site}'") for site, names in value.items()}


def _classes_of_target(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return _class_names(value, "a list of two classes or more, or a site of the scenario, whose classes they are")


OWN = "own"
"""Word for the classes of each hospital's own images, which may be others at others."""


class Target(Spec):
    """The unseen hospital, and what it has. In YAML its site's name alone stands for it."""

    site: str = Field(description="name of a file in sites/, or a path; each: every site in turn, while the others train")
    classes: Annotated[tuple[str, ...] | str | None, BeforeValidator(_classes_of_target)] = Field(
        None,
        description="with a CLIP: classes among which images are predicted, also classes that no hospital trains on;"
        " or the name of a hospital: only the classes of that hospital (the task is known). Default: all"
        " classes of its images",
    )
    max_bytes: ByteSize | None = Field(
        None, gt=0, description="limit of the target's memory, e.g. 2GB; experts that do not fit stay on disk"
    )
    precision: Precision | None = Field(
        None, description="number format of weights and forwards; bfloat16 halves memory and is fast on a GPU; default float32"
    )
    shards: int | None = Field(None, ge=1, le=1000, description="number of processes over which the experts are spread")
    gpus: float | None = Field(None, ge=0, description="GPUs of the target's process; default: one, if the machine has one")
    resource: str | None = Field(
        None, min_length=1, description="resource of the Ray cluster node for the target; default: 'target', if a node declares it"
    )

    @property
    def limits(self) -> dict[str, Any]:
        """What was set beside the site."""
        return self.model_dump(mode="json", exclude={"site", "classes"}, exclude_none=True)


LIMITS = frozenset(Target.model_fields) - {"site", "classes"}
"""Keys below `target` beside the site."""


def _named(value: Any) -> Any:
    return {"site": value} if isinstance(value, str | int | float | date) else value  # words that lack quotes are told as such


AnyTarget: Any = Annotated[
    Target, BeforeValidator(_named), Schema(lambda: {"anyOf": [{"type": "string"}, Target.model_json_schema()]})
]


PROTOCOLS: dict[str, dict[str, Any]] = {
    "eam": {
        "model": {"name": "vit_base_patch32_224"},
        "initialization": {"kind": "pretrained", "head_init": "shared_random"},
        "training": {
            "runs": 20,  # DiWA: one with default hyper-parameters, and draws
            "epochs": 50,
            "max_steps": 5001,
            "batch_size": 32,
            "evaluations": 50,  # DomainBed: every 100 steps of 5001
            "select": "best",
            "optimizer": "adam",
            "schedule": "constant",
            "augment": "full",
            "diversity": {"space": "mild"},
            "deadline_s": 7 * 86400,
        },
        "stream": {"kind": "dirichlet_batch", "delta": 0.1, "batch_size": 32},
        "methods": ["mean", "expert", "ensemble", "task_arithmetic", "ties", "slerp", "dawin", "t3_batch", "eam"],
    },
    "quick": {
        "model": {
            "name": "vit_tiny_patch16_224",
            "kwargs": {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4},
        },
        "initialization": {"kind": "proxy", "source": "organ_phantom", "epochs": 3},
        "training": {
            "runs": 1,
            "epochs": 20,
            "max_steps": 300,
            "batch_size": 32,
            "evaluations": 5,
            "select": "best",
            "optimizer": "adamw",
            "schedule": "cosine",
            "augment": "light",
            "diversity": {"lr": {"default": 1e-3, "draw": [7e-4, 1e-3, 1.5e-3]}},
        },
        "stream": {"kind": "dirichlet_batch", "delta": 0.1, "batch_size": 32},
        "methods": ["mean", "expert", "ensemble", "eam"],
        "backend": "local",
    },
}
"""Values for what a scenario leaves out. eam: as Ambekar et al., with DiWA's ranges and DomainBed's steps; quick: for 2 cores.

Both hold out what the site files say, 20 % by default, select on it alone, and stream all of the target.
"""


def filled(content: Any) -> tuple[Any, list[str]]:
    """A scenario with the values of its protocol for the keys that it leaves out, and their names.

    Of `training` every key is filled alone; of other mappings, all keys if they do not say of what name or kind they are.
    """
    content = renamed(content)
    name = content.get("protocol") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in PROTOCOLS:
        return content, []
    whole, names = dict(content), []
    for key, value in PROTOCOLS[name].items():
        given = content.get(key)
        if key == "training" and isinstance(given, dict):
            given = renamed(given)
            whole[key] = value | given
            names += [f"{key}.{inner}" for inner in value if inner not in given]
        elif isinstance(given, dict) and isinstance(value, dict) and not {"name", "kind"} & given.keys():
            whole[key] = _completed(given, value)
            names.append(key)
        elif given is None:
            whole[key] = value
            names.append(key)
    return whole, names


def _of_prompts(content: Any) -> Any:
    """A scenario of a CLIP with what it begins with: its own weights, and the head of its prompts."""
    content = renamed(content)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not (model.get("kind") == "clip" or "weights" in model):
        return content
    start = content.get("initialization", {"kind": "pretrained"} if model.get("weights") else None)
    return {**content, "initialization": {"head_init": "text", **start}} if isinstance(start, dict) else content


def _completed(given: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _completed(item, value[key]) for key, item in given.items() if _both_mappings(item, value.get(key))}
    return value | given | inner


def _both_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


class Scenario(Spec):
    """One experiment: which hospitals, which model, which target, which stream, which methods."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$", description="name of the scenario; the run folder has it")
    question: str = Field("", description="question that the scenario asks, in one line for the report")
    seed: int = Field(0, ge=0, description="seed of everything that is random")
    protocol: Literal["eam", "quick"] | None = Field(
        None,
        description="fills keys that are left out (model, initialization, training, stream, methods). eam: a pretrained "
        "ViT-B/32, batches of 32, 20 runs in the ranges of DiWA, 5,001 steps or 50 epochs; quick: a tiny ViT, 2 cores, minutes",
    )
    model: AnyModel = Field(
        description="model of all hospitals: a timm classifier, or with kind: clip a CLIP of open_clip with its prompts"
    )
    initialization: Initialization | None = Field(
        None,
        description="theta_0, the weights that all hospitals start from; may be left out if every site file brings an 'expert'",
    )
    sites: tuple[str, ...] = Field(min_length=1, description="hospitals that train: names of files in sites/, or paths")
    training: Training = Field(default_factory=Training, description="how each hospital trains its runs")
    classes: Annotated[tuple[str, ...] | dict[str, tuple[str, ...]] | str | None, BeforeValidator(_classes_of_hospitals)] = Field(
        None,
        description="with a CLIP: classes that hospitals train on; images of other classes are not used. If each "
        "hospital has its own task: a mapping from each site to its classes, or 'own' for the classes of"
        " its images. Default: all classes, the same at all hospitals",
    )
    target: AnyTarget = Field(
        description="the new hospital whose images are predicted: name of a file in sites/, or a mapping. each: "
        "every one of `sites` in turn, while the others train; run it by `fedmerge sweep`, or by "
        "`--target NAME` for one of them"
    )
    stream: AnySchedule = Field(description="order in which the target's images arrive")
    methods: Annotated[tuple[AnyMethod, ...], PlainSerializer(as_written)] = Field(
        min_length=1, description="methods that are compared: a name, or {name: {hyper-parameters}}"
    )
    uploads: Annotated[tuple[AnyUpload, ...], PlainSerializer(as_written)] = Field(
        (), description="statistics that sites upload beside weights, for methods that need them: a name, or {name: {fields}}"
    )
    priors: Literal["as_trained", "uniform", "declared", "estimated"] = Field(
        "as_trained",
        description="shares of labels that the heads assume. as_trained: those of each hospital's images; uniform: "
        "equal ones, computed from the uploads 'class_counts'; declared: the 'prevalences' in the "
        "target's site file; estimated: those of the stream so far, if they have predicted its batches "
        "better than equal ones",
    )
    federated: Annotated[tuple[AnyStrategy, ...], PlainSerializer(as_written)] = Field(
        (), description="competitors with rounds, each with one global model: a name, or {name: {fields}}"
    )
    limits: Limits = Field(default_factory=Limits, description="bounds on uploaded weights; an upload outside them is refused")
    privacy: Privacy | None = Field(
        None, description="clipping and noise that make uploads differentially private; default: neither"
    )
    defenses: Annotated[tuple[AnyDefense, ...], PlainSerializer(as_written)] = Field(
        CHECKS, description="checks of the experts without labels: a name, or {name: {fields}}; [] switches all off"
    )
    probe: PublicSource | None = Field(None, description="public images for the checks; default: those of a proxy initialization")
    generalist: Path | None = Field(
        None,
        description="generalist model of the method t3: a safetensors file, or the name of a row of `federated`, e.g. fedavg-5",
    )
    events: tuple[Event, ...] = Field((), description="hospitals that join, leave or replace their expert while the stream runs")
    min_sites: int | None = Field(
        None,
        ge=1,
        description="number of experts that is enough if hospitals fail or do not answer; default: all are needed",
    )
    target_restarts: int = Field(
        3, ge=0, le=100, description="how often a target process that has died is started again, from its last saved batch"
    )
    per_sample: Way = Field("auto", description="how merges for single images are computed; auto chooses by the model's shapes")
    backend: Literal["local", "simulation", "deployment"] = Field(
        "simulation",
        description="where hospitals and target run. local: in this process and its workers; simulation: Flower "
        "clients and a Ray target; deployment: a SuperLink, and a SuperNode for each site, on this "
        "machine. The results have the same bits",
    )
    jobs: int | None = Field(
        None, ge=1, description="number of worker processes of backend local; 1: only this process; default: one for each core"
    )
    target_deadline_s: float = Field(
        600,
        gt=0,
        description="longest wait for the target's next batch, seconds; twenty times the slowest batch before, if that is longer",
    )

    @property
    def has_tasks(self) -> bool:
        """Whether hospitals may have classes that others do not have."""
        return self.classes == OWN or isinstance(self.classes, dict)

    def trains_on(self, site: Site) -> tuple[str, ...]:
        """The classes that a hospital trains on; none where it is not said."""
        if isinstance(self.classes, dict):
            return tuple(self.classes.get(site.name, ()))
        return tuple(site.source.classes() if self.classes in (None, OWN) else self.classes)

    @model_validator(mode="before")
    @classmethod
    def _by_protocol(cls, value: Any) -> Any:
        """What the protocol says of keys that are left out, and before and after it what a CLIP begins with."""
        return _of_prompts(filled(_of_prompts(value))[0])

    @model_validator(mode="before")
    @classmethod
    def _flat_limits(cls, value: Any) -> Any:
        """`target_max_bytes` and its like, as they were written once, stand below `target` now."""
        flat = {f"target_{key}": key for key in LIMITS}
        if not isinstance(value, dict) or not flat.keys() & value.keys():
            return value
        if not isinstance(target := _named(value.get("target")), dict):
            return value
        nested = {flat[key]: item for key, item in value.items() if key in flat and item is not None}
        return {key: item for key, item in value.items() if key not in flat} | {"target": nested | target}


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a scenario or a site, for editors. kind: "scenario" or "site"."""
    models: dict[str, type[Spec]] = {"scenario": Scenario, "site": Site}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **models[kind].model_json_schema()}
