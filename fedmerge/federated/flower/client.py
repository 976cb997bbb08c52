"""A hospital as a Flower client: it says who it is, trains or measures on its own images, and answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedmerge.errors import SiteError
from fedmerge.federated.client.worker import answer
from fedmerge.federated.flower.progress_files import begin, leave_progress
from fedmerge.federated.messages import Reply, Request, SiteTask, Tick
from fedmerge.federated.security.audit import Seal
from fedmerge.federated.security.signing import VARIABLE
from fedmerge.federated.server.authentication import introduced
from fedmerge.federated.site import Site

PROGRESS = "progress"
"""What a node's own configuration may say beside its site file: where it leaves its progress."""

Said = Mapping[str, Any]
"""A record of a message, or what a node was told when it was started."""


class Identity(Protocol):
    """Which hospital a node is, and what it is asked. said: of the message; node: of the node itself.

    Both raise SiteError, whose `told` is all that leaves the node; `name` is what it would call itself then.
    """

    def name(self, node: Said) -> str: ...

    def site(self, said: Said, node: Said) -> Site: ...

    def task(self, said: Said, node: Said) -> SiteTask: ...


@dataclass(frozen=True)
class Listed:
    """Nodes of a simulation that know every task beforehand: the node's partition number says which hospital it is.

    tasks: as JSON, because Ray carries all of them with every message, and a node reads its own alone.
    """

    tasks: Sequence[str]

    @staticmethod
    def of(tasks: Sequence[SiteTask]) -> Listed:
        """Of these tasks."""
        return Listed([task.model_dump_json() for task in tasks])

    def name(self, node: Said) -> str:
        """Never needed: nothing can go wrong before."""
        return self.site({}, node).name

    def site(self, said: Said, node: Said) -> Site:
        """The hospital of this number."""
        return self.task(said, node).site

    def task(self, said: Said, node: Said) -> SiteTask:
        """Its task."""
        return SiteTask.model_validate_json(self.tasks[int(node["partition-id"])])


def client_app(identity: Identity, ticks: Path | None = None) -> Any:
    """The hospitals' side. ticks: a folder where the server looks for progress, if they share a machine.

    A node may be told of such a folder as `progress` in its own configuration, too.
    """
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    app, keys = ClientApp(), os.environ.get(VARIABLE, "")

    @app.query()  # type: ignore[untyped-decorator]
    def introduce(message: Message, context: Context) -> Message:
        os.environ.setdefault(VARIABLE, keys)
        asked = message.content["ask"]
        try:
            said = introduced(identity.site(asked, context.node_config), str(asked["nonce"]))
        except SiteError as error:
            said = {"site": identity.name(context.node_config), "signature": "", "problem": error.told}
        return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def work(message: Message, context: Context) -> Message:
        os.environ.setdefault(VARIABLE, keys)
        asked = message.content["ask"]
        try:
            task = identity.task(asked, context.node_config)
        except SiteError as error:
            return Message(RecordDict({"said": _said(error.told)}), reply_to=message)
        what, layers = str(asked["what"]), tuple(str(asked["layers"]).split())
        told = context.node_config.get(PROGRESS)
        place = Path(str(told)) if told else ticks
        if place and what == "train":
            begin(place, task.site.name)

        def on_tick(tick: Tick) -> None:
            if place:
                leave_progress(place, tick)

        record = message.content["weights"]  # what becomes a tensor leaves it, and nothing holds the tensors after the answer
        reply = answer(Request(what, task, record.to_torch_state_dict(keep_input=False), layers), on_tick)
        return Message(packed(reply), reply_to=message)

    return app


def packed(reply: Reply) -> Any:
    """A reply as Flower carries it; `decoding.reply_of` is the way back. Weights and statistics leave the reply, one by one."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    upload = reply.upload
    content = RecordDict({"said": _said(reply.reason, upload.seal if upload is not None else Seal())})
    if upload is not None:
        content["weights"] = ArrayRecord(upload.weights, keep_input=False)
        content["scalars"] = MetricRecord(dict(upload.scalars))
        if upload.samples is not None:
            content["samples"] = ArrayRecord({"samples": upload.samples})
        for kind, state in upload.statistics.items():
            content[f"statistic.{kind}"] = ArrayRecord(state, keep_input=False)
    return content


def _said(reason: str, seal: Seal | None = None) -> Any:
    from flwr.app import ConfigRecord

    seal = seal or Seal()
    return ConfigRecord({"reason": reason, "statement": seal.text, "signature": seal.signature})
