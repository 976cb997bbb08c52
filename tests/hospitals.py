"""Small hospitals of the phantom, and theta_0 for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.federated.messages import Initial, Job, SiteTask, Training
from fedmerge.federated.model import ModelSpec
from fedmerge.federated.server.initialization import Proxy, initialize
from fedmerge.federated.site import Site
from tests.conftest import TINY

MODEL = ModelSpec.model_validate(TINY)
FAST = {"runs": 2, "epochs": 2, "optimizer": "adamw", "augment": "light", "diversity": {"lr": {"default": 1e-3, "draw": [2e-3]}}}


@pytest.fixture(scope="session")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Initial:
    source = {"kind": "organ_phantom", "images": 60, "patients": 12}
    spec = Proxy.model_validate({"kind": "proxy", "source": source, "epochs": 1})
    return initialize(spec, MODEL, len(ORGANS), 0, tmp_path_factory.mktemp("pool"), lambda *_: None)


@pytest.fixture
def hospital(initial: Initial) -> Callable[..., SiteTask]:
    def make(name: str, source: dict[str, Any] | None = None, samples: int = 0, **training: Any) -> SiteTask:
        source = source or {"kind": "organ_phantom", "images": 60, "patients": 12}
        return SiteTask(
            site=Site.model_validate({"name": name, "source": source, "samples": samples}),
            model=MODEL,
            training=Training.model_validate({**FAST, **training}),
            classes=ORGANS,
            seed=0,
            initial_sha256=initial.sha256,
            head_init=initial.head_init,
        )

    return make


@pytest.fixture
def job(tmp_path: Path, initial: Initial) -> Callable[..., Job]:
    def make(*tasks: SiteTask, deadline_s: float = 240, folder: str = "run") -> Job:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Job(tasks, initial, tmp_path / folder / "pool", tmp_path / folder / "audit.jsonl", deadline_s)

    return make
