"""Numbers of a run for tools that are open already, while it goes on: event files of TensorBoard, runs of MLflow in local files.

They hold what the report may show, and no more: hospitals' losses stay with them, so that of their runs there is the accuracy on
their own validation images.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from fedmerge.errors import extras_named
from fedmerge.report.batch_log import Step
from fedmerge.report.records import ANCHORS

Tool = Literal["tensorboard", "mlflow"]

MLRUNS = "mlruns"
"""Folder of MLflow, beside the run folders: one for all of them."""

FINAL = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "nll",
    "ece",
    "brier",
    "forwards_per_batch",
    "merge_bytes_per_batch",
    "seconds",
)
"""Numbers of a summary's methods that are written when the run ends."""


class Writer(ABC):
    """One tool. Numbers come with their names, in folders by `/`, and the step that they belong to."""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write some."""

    @abstractmethod
    def words(self, values: Mapping[str, str]) -> None:
        """What the run is."""

    @abstractmethod
    def close(self, done: bool) -> None:
        """The run has ended, well or not."""


class TensorBoard(Writer):
    """Event files in `tensorboard/` of the run folder: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, out: Path) -> None:
        with extras_named():
            import tensorboard  # noqa: F401 - torch's own message does not name the extra
            from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=0, flush_secs=10)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def words(self, values: Mapping[str, str]) -> None:
        """Texts."""
        for name, value in values.items():
            self.writer.add_text(name, value)

    def close(self, done: bool) -> None:
        """Write what is left."""
        self.writer.close()


class MLflow(Writer):
    """A run of MLflow, below `mlruns` beside the run folder; nothing is sent anywhere, whatever MLFLOW_TRACKING_URI says."""

    def __init__(self, out: Path, scenario: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        with extras_named():
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        self.metric: Any = Metric
        self.client: Any = MlflowClient(tracking_uri=(out.absolute().parent / MLRUNS).as_uri())
        known = self.client.get_experiment_by_name(scenario)
        experiment = known.experiment_id if known else self.client.create_experiment(scenario)
        self.run: str = self.client.create_run(experiment, run_name=out.name).info.run_id

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Metrics."""
        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def words(self, values: Mapping[str, str]) -> None:
        """Tags."""
        for name, value in values.items():
            self.client.set_tag(self.run, name, value)

    def close(self, done: bool) -> None:
        """Say how it ended."""
        self.client.set_terminated(self.run, "FINISHED" if done else "FAILED")


class RunLog:
    """All tools that were asked for, which may be none."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = writers
        self._right, self._seen = Counter[str](), Counter[str]()

    def words(self, **values: str) -> None:
        """What the run is."""
        for writer in self.writers:
            writer.words(values)

    def hospitals(self, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        """Every hospital's training runs: validation accuracy and hyper-parameters of each."""
        for site, own in runs.items():
            for number, run in enumerate(own):
                self._write({f"hospitals/{site}/{name}": value for name, value in run.items()}, number)

    def steps(self, steps: Iterable[Step], there: Sequence[str]) -> None:
        """Batches of the stream. there: names of the experts, in the order of coefficients."""
        for step in steps if self.writers else ():
            name = step.method
            self._right[name] += step.correct
            self._seen[name] += step.n
            values = {
                f"accuracy so far/{name}": self._right[name] / self._seen[name],
                f"accuracy of the batch/{name}": step.correct / step.n,
                f"entropy/{name}": step.entropy,
                f"cost/{name}/seconds": step.seconds,
                f"cost/{name}/forwards": step.forwards,
                f"cost/{name}/merge bytes": step.merge_bytes,
            }
            for part, given in (("encoder", step.encoder), ("head", step.head)):
                names = [*there, *ANCHORS[: len(given) - len(there)]] if given else []
                values |= {f"coefficients/{name}/{part}/{of}": c for of, c in zip(names, given or (), strict=True)}
            self._write(values, step.t)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The numbers of the whole run, and what every method's models cost to send."""
        for name, row in summary["methods"].items():
            values = {f"whole run/{name}/{key}": row[key] for key in FINAL}
            values |= {f"whole run/{name}/{key}": value for key, value in (row.get("cost") or {}).items()}
            self._write(values, 0)

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        plain = {_name(key): float(value) for key, value in values.items() if isinstance(value, int | float)}
        for writer in self.writers:
            writer.numbers(plain, step)


def _name(text: str) -> str:
    """Letters that both tools take in names."""
    return re.sub(r"[^\w/. -]", "_", text)


@contextmanager
def run_log(tools: Sequence[str], out: Path, scenario: str) -> Iterator[RunLog]:
    """A log in these tools, which are opened at once. Raises MissingExtra for one that is not installed."""
    writers: list[Writer] = []
    with ExitStack() as ending:
        for tool in dict.fromkeys(tools):
            writers.append(TensorBoard(out) if tool == "tensorboard" else MLflow(out, scenario))
        done = False
        ending.callback(lambda: [writer.close(done) for writer in writers])
        yield RunLog(writers)
        done = True
