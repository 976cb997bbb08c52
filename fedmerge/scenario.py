"""What `scenarios/*.yaml` may say; composed from the rooms' own specs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from fedmerge.errors import nearest
from fedmerge.experts.backbone import ModelSpec
from fedmerge.experts.initialisation import Initialisation
from fedmerge.experts.statistic import STATISTICS
from fedmerge.experts.train import Training
from fedmerge.folder import Folder, Plugin, Spec
from fedmerge.merge.method import METHODS
from fedmerge.merge.per_sample import Way
from fedmerge.site import Site
from fedmerge.stream.schedule import SCHEDULES


def _by_name(folder: Folder[Any]) -> Any:
    """A plug-in of a folder as scenarios write it: `eam`, or `{eam: {gamma: 10}}`; errors are reported below the name."""

    def entry(value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        name: Any = value
        fields: Any = {}
        if isinstance(value, dict) and len(value) == 1:
            ((name, fields),) = value.items()
        if not isinstance(name, str) or not isinstance(fields or {}, dict):
            raise ValueError(f"a {folder.what} is its name, or one name with a mapping of its fields below it")
        if name not in folder.names:
            raise ValueError(f"no such {folder.what}: {nearest(name, folder.names)}")
        return {"kind": name, **(fields or {})}

    one = {
        "type": "object",
        "properties": {name: folder.load(name).model_json_schema() for name in folder.names},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    schema = {"anyOf": [{"enum": list(folder.names)}, one]}
    return Annotated[folder.union(), BeforeValidator(entry), WithJsonSchema(schema)]


def _as_written(entries: Sequence[Plugin]) -> list[Any]:
    return [{entry.kind(): entry.model_dump(mode="json", exclude={"kind"})} for entry in entries]


AnySchedule: Any = SCHEDULES.union()
AnyMethod: Any = _by_name(METHODS)
AnyUpload: Any = _by_name(STATISTICS)


class Scenario(Spec):
    """One experiment: which hospitals, which model, which target, which stream, which methods."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,59}$", description="names the run folder")
    question: str = Field("", description="what the scenario asks, one line for the report")
    seed: int = Field(0, ge=0, description="root of all randomness")
    model: ModelSpec = Field(description="the backbone, by its timm name")
    initialisation: Initialisation = Field(description="theta_0, which all hospitals share")
    sites: tuple[str, ...] = Field(min_length=1, description="hospitals that train: names of files in sites/, or paths")
    training: Training = Field(default_factory=Training, description="how each hospital trains its runs")
    target: str = Field(description="the unseen hospital: name of a file in sites/, or a path")
    stream: AnySchedule = Field(description="order in which the target's images arrive")
    methods: Annotated[tuple[AnyMethod, ...], PlainSerializer(_as_written)] = Field(
        min_length=1, description="what is compared: names, or a name with its hyper-parameters below"
    )
    uploads: Annotated[tuple[AnyUpload, ...], PlainSerializer(_as_written)] = Field(
        (), description="statistics that sites upload beside weights, for methods that need them: names, or with fields below"
    )
    generalist: Path | None = Field(None, description="safetensors of a model that t3 may fall back on, e.g. a FedAvg model")
    per_sample: Way = Field("auto", description="how merges for single samples are done; auto measures which is cheapest")
    target_deadline_s: float = Field(600, gt=0, description="longest wait for the target's next batches, seconds")


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a scenario or a site, for editors. kind: "scenario" or "site"."""
    models: dict[str, type[Spec]] = {"scenario": Scenario, "site": Site}
    model = models[kind]
    schema = model.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
