"""The Flower seam: the coordinator's and the hospitals' side of the federation. No other file names flwr.

Run as `python -m fedmerge.experts.flower FOLDER`, with the job in the folder; progress and the last word are left there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmerge.errors import FedmergeError, SiteError
from fedmerge.experts.gather import START_GRACE_S, Ask, Job, Reply, Tick, collect, probe_head
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.local import answer
from fedmerge.experts.pool import ExpertPool
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Upload


def main(folder: Path) -> None:
    """Coordinator: read the job, run the federation, say how it ended. The last word is written whole or not at all."""
    from safetensors.torch import load_file, save_file

    read = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    initial = Initial(load_file(folder / "initial.safetensors"), **read["initial"])
    tasks = tuple(SiteTask.model_validate(task) for task in read["tasks"])
    job = Job(tasks, initial, Path(read["pool"]), Path(read["audit"]), read["deadline_s"])
    said: dict[str, Any] = {"failure": "", "outcomes": {}}
    pool = ExpertPool(job.pool)
    asked = [task for task in tasks if read["what"] == "probe" or not pool.has(task)]

    def program(ask: Ask) -> None:
        """Say the last word here: after this, Flower waits for ever for a client that is stuck."""
        try:
            if read["what"] == "gather":
                said["outcomes"] = {name: asdict(outcome) for name, outcome in collect(job, ask).items()}
            else:
                probed = probe_head(job, ask)
                save_file({name: tensor.contiguous() for name, tensor in probed.weights.items()}, read["keep"])
                said["sha256"] = probed.sha256
        except FedmergeError as error:
            said["failure"] = str(error)
        (folder / "said.draft").write_text(json.dumps(said), encoding="utf-8")
        (folder / "said.draft").replace(folder / "said.json")

    _simulate(asked, folder, program)


def _simulate(asked: list[SiteTask], folder: Path, program: Callable[[Ask], None]) -> None:
    """Flower's simulation with one SuperNode for each site; `program` is the server's whole story."""
    import torch
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        program(_asking(grid, asked))

    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() / min(len(asked), cores) if torch.cuda.is_available() else 0.0
    # Ray counts all cores of a node for clients, so nothing else may reserve one; a client that is killed starts anew.
    resources = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 4, "max_task_retries": 1}
    arguments = {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False}
    run_simulation(
        server_app=server,
        client_app=client_app(asked, folder / "ticks"),
        num_supernodes=len(asked),
        backend_config={
            "client_resources": resources,
            "init_args": {} if os.environ.get("RAY_ADDRESS") else arguments | {"address": "local"},
        },
    )


def client_app(tasks: Sequence[SiteTask], ticks: Path) -> Any:
    """The hospitals' side: the node's partition number says which hospital it is."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        task = tasks[int(context.node_config["partition-id"])]
        weights = message.content["theta_0"].to_torch_state_dict()
        reply = answer(str(message.content["ask"]["what"]), task, weights, lambda tick: _tell(ticks, tick))
        content = RecordDict({"said": ConfigRecord({"site": task.site.name, "reason": reply.reason})})
        if reply.upload is not None:
            content["weights"] = ArrayRecord(reply.upload.weights)
            content["scalars"] = MetricRecord(dict(reply.upload.scalars))
            if reply.upload.samples is not None:
                content["samples"] = ArrayRecord({"samples": reply.upload.samples})
        return Message(content, reply_to=message)

    return app


def _tell(ticks: Path, tick: Tick) -> None:
    """Leave this site's progress where the coordinator looks; on another machine there is no such folder, and no progress."""
    with suppress(OSError):
        draft = ticks / f"{tick.site}.draft"
        draft.write_text(json.dumps(asdict(tick)), encoding="utf-8")
        draft.replace(ticks / f"{tick.site}.json")


def _asking(grid: Any, tasks: list[SiteTask]) -> Ask:
    """Ask by Flower messages: every node the same, and each answers for its own hospital."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    def ask(what: str, _: Sequence[SiteTask], weights: dict[str, Tensor], deadline_s: float) -> Iterator[Reply]:
        began = time.monotonic()
        nodes = _nodes(grid, len(tasks), deadline_s)
        content = RecordDict({"ask": ConfigRecord({"what": what}), "theta_0": ArrayRecord(dict(weights))})
        messages = [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
        waiting = set(grid.push_messages(messages))
        answered: set[str] = set()
        failures: list[str] = []
        while waiting and time.monotonic() - began < deadline_s:
            for message in grid.pull_messages(list(waiting)):
                waiting.discard(message.metadata.reply_to_message_id)
                if message.has_error():
                    failures.append(_reason(message.error.reason))
                else:
                    reply = _reply(message, tasks, time.monotonic() - began)
                    answered.add(reply.task.site.name)
                    yield reply
            time.sleep(0.2)
        # An error that Flower made itself does not say whose it is; when all but the failed have answered, it is known.
        silent = [task for task in tasks if task.site.name not in answered]
        for task, failure in zip(silent, failures, strict=False):
            whose = failure if len(failures) == len(silent) == 1 or not waiting else f"{failure} (or another silent site)"
            yield Reply(task, None, whose, time.monotonic() - began)

    return ask


def _nodes(grid: Any, count: int, deadline_s: float) -> list[int]:
    began = time.monotonic()
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() - began > min(deadline_s, START_GRACE_S):
            raise SiteError(f"{len(nodes)} of {count} hospitals have connected after {START_GRACE_S:g} s")
        time.sleep(0.1)
    return nodes


def _reply(message: Any, tasks: list[SiteTask], seconds: float) -> Reply:
    said = message.content["said"]
    task = next(task for task in tasks if task.site.name == said["site"])
    if said["reason"]:
        return Reply(task, None, str(said["reason"]), seconds)
    weights = dict(message.content["weights"].to_torch_state_dict())
    scalars = {name: float(value) for name, value in message.content["scalars"].items()}
    shown = message.content["samples"].to_torch_state_dict()["samples"] if "samples" in message.content else None
    return Reply(task, Upload(task.site.name, weights, scalars, shown), "", seconds)


def _reason(text: str) -> str:
    """The last line of what a client died of, without colours, quotes and paths."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.replace("\\n", "\n"))
    lines = [line.strip(" '\">") for line in plain.splitlines() if line.strip(" '\">")]
    last = re.sub(r"(/[\w.\-]+)+", "...", lines[-1] if lines else "no reason given")
    return f"its client failed: {last[:300]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
