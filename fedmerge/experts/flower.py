"""The Flower seam: the coordinator's and the hospitals' side of the federation. No other file names flwr.

Run as `python -m fedmerge.experts.flower FOLDER`, with the job in the folder; progress and the last word are left there.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedmerge.errors import FedmergeError, SiteError
from fedmerge.experts.asking import START_GRACE_S, Ask, Job, Reply, Request
from fedmerge.experts.carriage import failure, reply_of
from fedmerge.experts.gather import collect, incomplete, probe_head
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.introduction import Claim, introduced, judge
from fedmerge.experts.lifeline import end_with_parent
from fedmerge.experts.limits import Limits
from fedmerge.experts.local import answer
from fedmerge.experts.marks import begin, begun, tell
from fedmerge.experts.signature import VARIABLE
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Seal


def main(folder: Path) -> None:
    """Coordinator: read the job, run the federation, say how it ended. The last word is written whole or not at all."""
    from safetensors.torch import load_file, save_file

    read = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    initial = Initial(load_file(folder / "initial.safetensors"), **read["initial"])
    tasks = tuple(SiteTask.model_validate(task) for task in read["tasks"])
    pool, audit, limits = Path(read["pool"]), Path(read["audit"]), Limits(**read["limits"])
    job = Job(tasks, initial, pool, audit, read["deadline_s"], read["at_least"], limits)
    said: dict[str, Any] = {"failure": "", "outcomes": {}}
    asked = list(tasks) if read["what"] == "probe" else incomplete(job)

    def program(ask: Ask) -> None:
        """Say the last word here: after this, Flower waits for ever for a client that is stuck."""
        try:
            if read["what"] == "gather":
                found = {name: replace(one, tries=begun(folder / "ticks", name)) for name, one in collect(job, ask).items()}
                said["outcomes"] = {name: asdict(outcome) for name, outcome in found.items()}
            else:
                probed = probe_head(job, ask)
                save_file({name: tensor.contiguous() for name, tensor in probed.weights.items()}, read["keep"])
                said["sha256"] = probed.sha256
        except FedmergeError as error:
            said["failure"] = str(error)
        (folder / "said.draft").write_text(json.dumps(said), encoding="utf-8")
        (folder / "said.draft").replace(folder / "said.json")

    simulate(job, asked, client_app(asked, folder / "ticks"), program)


def simulate(job: Job, asked: list[SiteTask], client: Any, program: Callable[[Ask], None]) -> None:
    """Flower's simulation with one SuperNode for each site; `program` is the server's whole story, `client` the hospitals'."""
    import torch
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def story(grid: Grid, context: Context) -> None:
        program(_asking(grid, asked, job))

    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() / min(len(asked), cores) if torch.cuda.is_available() else 0.0
    # Ray counts all cores of a node for clients, so nothing else may reserve one. A client that is killed starts anew, and Ray
    # asks it again as often as declared; every hospital may use that up, and the process must still be there for the others.
    retries = asked[0].training.retries
    restarts = 4 + (retries + 1) * len(asked)
    resources = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": restarts, "max_task_retries": retries}
    arguments = {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False}
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(asked),
        backend_config={
            "client_resources": resources,
            "init_args": {} if os.environ.get("RAY_ADDRESS") else arguments | {"address": "local"},
        },
    )


def client_app(tasks: Sequence[SiteTask], ticks: Path) -> Any:
    """The hospitals' side: the node's partition number says which hospital it is."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    app, keys = ClientApp(), os.environ.get(VARIABLE, "")

    @app.query()  # type: ignore[untyped-decorator]
    def introduce(message: Message, context: Context) -> Message:
        os.environ.setdefault(VARIABLE, keys)
        site = tasks[int(context.node_config["partition-id"])].site
        said = ConfigRecord(introduced(site, str(message.content["ask"]["nonce"])))
        return Message(RecordDict({"said": said}), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def work(message: Message, context: Context) -> Message:
        os.environ.setdefault(VARIABLE, keys)
        task = tasks[int(context.node_config["partition-id"])]
        asked = message.content["ask"]
        weights = message.content["weights"].to_torch_state_dict()
        request = Request(str(asked["what"]), task, weights, tuple(str(asked["layers"]).split()))
        if request.what == "train":
            begin(ticks, task.site.name)
        reply = answer(request, lambda tick: tell(ticks, tick))
        return Message(packed(reply), reply_to=message)

    return app


def packed(reply: Reply) -> Any:
    """A reply as Flower carries it; `carriage.reply_of` is the way back."""
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    upload = reply.upload
    seal = upload.seal if upload is not None else Seal()
    said = {"reason": reply.reason, "statement": seal.text, "signature": seal.signature}
    content = RecordDict({"said": ConfigRecord(said)})
    if upload is not None:
        content["weights"] = ArrayRecord(upload.weights)
        content["scalars"] = MetricRecord(dict(upload.scalars))
        if upload.samples is not None:
            content["samples"] = ArrayRecord({"samples": upload.samples})
        for kind, state in upload.statistics.items():
            content[f"statistic.{kind}"] = ArrayRecord(state)
    return content


def _asking(grid: Any, tasks: list[SiteTask], job: Job) -> Ask:
    """Ask by Flower messages, one to the node of each site; which node is whose, the nodes say first."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    whose: dict[str, int] = {}
    doubts: dict[str, str] = {}

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        began = time.monotonic()
        if not whose:
            found, unproven = judge(_claims(grid, len(tasks), deadline_s), tasks, job)
            whose.update(found)
            doubts.update(unproven)
        waiting: dict[str, Request] = {}
        for request in requests:
            asked = ConfigRecord({"what": request.what, "layers": " ".join(request.layers)})
            content = RecordDict({"ask": asked, "weights": ArrayRecord(dict(request.weights))})
            node = whose.get(request.task.site.name)
            if node is None:
                reason = doubts.get(request.task.site.name, "its client did not start")
                yield Reply(request.task, None, reason, time.monotonic() - began)
                continue
            (sent,) = grid.push_messages([Message(content, dst_node_id=node, message_type=MessageType.TRAIN)])
            waiting[sent] = request
        while waiting and time.monotonic() - began < deadline_s:
            for message in grid.pull_messages(list(waiting)):
                request = waiting.pop(message.metadata.reply_to_message_id)
                yield _reply(message, request.task, time.monotonic() - began)
            time.sleep(0.05)

    return ask


def _claims(grid: Any, count: int, deadline_s: float) -> list[Claim]:
    """Who the nodes say that they are, of all that answer in time; each is given a number of its own to sign."""
    from flwr.app import ConfigRecord, Message, MessageType, RecordDict

    began = time.monotonic()
    nonces = {node: secrets.token_hex(16) for node in _nodes(grid, count, deadline_s)}
    messages = [
        Message(RecordDict({"ask": ConfigRecord({"nonce": nonce})}), dst_node_id=node, message_type=MessageType.QUERY)
        for node, nonce in nonces.items()
    ]
    waiting = set(grid.push_messages(messages))
    found: list[Claim] = []
    while waiting and time.monotonic() - began < min(deadline_s, START_GRACE_S):
        for message in grid.pull_messages(list(waiting)):
            waiting.discard(message.metadata.reply_to_message_id)
            if not message.has_error():
                node = message.metadata.src_node_id
                found.append(Claim.of(node, nonces[node], message.content))
        time.sleep(0.05)
    return found


def _nodes(grid: Any, count: int, deadline_s: float) -> list[int]:
    began = time.monotonic()
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() - began > min(deadline_s, START_GRACE_S):
            raise SiteError(f"{len(nodes)} of {count} hospitals have connected after {START_GRACE_S:g} s")
        time.sleep(0.1)
    return nodes


def _reply(message: Any, task: SiteTask, seconds: float) -> Reply:
    if message.has_error():
        return Reply(task, None, failure(message.error.reason), seconds)
    return reply_of(message.content, task, seconds)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
