"""What `scenarios/*.yaml` may say; composed from the rooms' own specs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer

from fedmerge.experts.backbone import ModelSpec
from fedmerge.experts.defence import DEFENCES
from fedmerge.experts.initialisation import Initialisation, PublicSource
from fedmerge.experts.statistic import STATISTICS
from fedmerge.experts.train import Training
from fedmerge.folder import Spec, as_written, by_name
from fedmerge.merge.method import METHODS
from fedmerge.merge.per_sample import Way
from fedmerge.site import Site
from fedmerge.stream.schedule import SCHEDULES

AnySchedule: Any = SCHEDULES.union()
AnyMethod: Any = by_name(METHODS)
AnyUpload: Any = by_name(STATISTICS)
AnyDefence: Any = by_name(DEFENCES)
CHECKS = tuple(DEFENCES.load(name)() for name in ("calibration", "norms", "agreement", "patches"))
"""What every scenario defends itself with, unless it says otherwise: it leaves honest federations as they are."""


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
    methods: Annotated[tuple[AnyMethod, ...], PlainSerializer(as_written)] = Field(
        min_length=1, description="what is compared: names, or a name with its hyper-parameters below"
    )
    uploads: Annotated[tuple[AnyUpload, ...], PlainSerializer(as_written)] = Field(
        (), description="statistics that sites upload beside weights, for methods that need them: names, or with fields below"
    )
    defences: Annotated[tuple[AnyDefence, ...], PlainSerializer(as_written)] = Field(
        CHECKS, description="checks of the experts that need no labels: names, or with fields below; [] for none"
    )
    probe: PublicSource | None = Field(None, description="public images for the checks; default: those of a proxy initialisation")
    generalist: Path | None = Field(None, description="safetensors of a model that t3 may fall back on, e.g. a FedAvg model")
    per_sample: Way = Field("auto", description="how merges for single samples are done; auto measures which is cheapest")
    target_deadline_s: float = Field(600, gt=0, description="longest wait for the target's next batches, seconds")


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a scenario or a site, for editors. kind: "scenario" or "site"."""
    models: dict[str, type[Spec]] = {"scenario": Scenario, "site": Site}
    model = models[kind]
    schema = model.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
