"""`--log`: numbers of a run in event files of TensorBoard and in local files of MLflow; one message where a package is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge.report.batch_log import Step
from fedmerge.report.run_log import run_log
from tests.front_door import done, fedmerge, read

NONE = np.empty((0, 2), np.float32)


def written(tool: str, out: Path) -> None:
    """A run of two batches, as tool writes it."""
    out.mkdir()
    with run_log([tool], out, "tiny") as log:
        log.words(target="mercy")
        log.hospitals({"north": [{"lr": 1e-3, "validation_accuracy": 0.5}, {"lr": 2e-3, "validation_accuracy": 0.75}]})
        log.steps([Step(t, "eam", 8, 4 + 2 * t, NONE, 0.3, 7, 0.5, (0.25, 0.75)) for t in range(2)], ("north", "south"))
        log.steps([Step(0, "expert:north", 8, 2, NONE, 0.3, 1, 0.1)], ("north", "south"))


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()

    def values(name: str) -> list[tuple[int, float]]:
        return [(one.step, one.value) for one in events.Scalars(name)]

    assert values("hospitals/north/validation_accuracy") == [(0, 0.5), (1, 0.75)]
    assert values("accuracy so far/eam") == [(0, 0.5), (1, 0.625)]
    assert values("accuracy of the batch/eam") == [(0, 0.5), (1, 0.75)]
    assert values("coefficients/eam/encoder/south") == [(0, 0.75), (1, 0.75)]
    assert values("cost/eam/forwards") == [(0, 7), (1, 7)]
    assert values("accuracy so far/expert_north") == [(0, 0.25)]


def test_mlflow_reads_what_was_written_and_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in ("a", "b"):
        written("mlflow", tmp_path / name)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "b"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert runs[0].data.metrics["accuracy so far/eam"] == 0.625
    assert runs[0].data.tags["target"] == "mercy"
    history = client.get_metric_history(runs[0].info.run_id, "coefficients/eam/encoder/north")
    assert [(one.step, one.value) for one in history] == [(0, 0.25), (1, 0.25)]


def test_a_run_that_fails_is_told_so(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    with pytest.raises(ValueError, match="ours"), run_log(["mlflow"], tmp_path / "run", "tiny"):
        raise ValueError("ours")
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert client.search_runs([client.get_experiment_by_name("tiny").experiment_id])[0].info.status == "FAILED"


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_its_extra_before_anybody_trains(
    first: tuple[Path, str], tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = first
    for name in [name for name in sys.modules if name.partition(".")[0] == tool]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tool, None)
    ended = fedmerge(folder, "simulate", "scenarios/tiny.yaml", "--out", "new", "--pool", "new-pool", "--log", tool)
    assert ended.returncode == 2
    assert ended.stderr.endswith(f"the package '{tool}' is not installed; install it with: pip install 'fedmerge[{tool}]'\n")
    assert not (folder / "new-pool").exists()
    ended = fedmerge(folder, "simulate", "scenarios/tiny.yaml", "--log", "wandb")
    assert ended.returncode == 2
    assert "tensorboard" in ended.stderr


def test_a_real_run_has_the_numbers_of_its_summary(first: tuple[Path, str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = first
    done(folder, "--out", "logged", "--log", "tensorboard")
    events = EventAccumulator(str(folder / "logged/tensorboard")).Reload()
    summary = read(folder / "logged/summary.json")
    for name, row in summary["methods"].items():
        tag = name.replace(":", "_")
        assert events.Scalars(f"whole run/{tag}/accuracy")[0].value == pytest.approx(row["accuracy"])
        so_far = events.Scalars(f"accuracy so far/{tag}")
        assert len(so_far) == summary["stream"]["batches"]
        assert so_far[-1].value == pytest.approx(row["accuracy"])
