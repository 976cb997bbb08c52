"""A hospital as a Flower client: it says who it is, trains or measures on its own images, and answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmerge.experts.asking import Reply, Request
from fedmerge.experts.introduction import introduced
from fedmerge.experts.local import answer
from fedmerge.experts.marks import begin, tell
from fedmerge.experts.signature import VARIABLE
from fedmerge.experts.train import SiteTask
from fedmerge.experts.upload import Seal


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
