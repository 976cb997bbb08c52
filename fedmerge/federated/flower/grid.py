"""Requests and replies as Flower messages, for whatever program the coordinator runs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmerge.errors import SiteError
from fedmerge.federated.flower.decoding import failure, reply_of
from fedmerge.federated.messages import START_GRACE_S, Ask, Job, Reply, Request, SiteTask
from fedmerge.federated.server.authentication import Claim, judge


def asking(grid: Any, tasks: list[SiteTask], job: Job) -> Ask:
    """Ask by Flower messages, one to the node of each site; which node is whose, the nodes say first."""
    whose: dict[str, int] = {}
    doubts: dict[str, str] = {}

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        began = time.monotonic()
        if not whose:
            nodes = _nodes(grid, len(tasks), deadline_s)
            found, unproven = judge(claims(grid, [(node, {}) for node in nodes], deadline_s), tasks, job)
            whose.update(found)
            doubts.update(unproven)
        waiting: dict[str, Request] = {}
        for request in requests:
            node = whose.get(request.task.site.name)
            if node is None:
                reason = doubts.get(request.task.site.name, "its client did not start")
                yield Reply(request.task, None, reason, time.monotonic() - began)
                continue
            waiting[push(grid, node, request, {})] = request
        while waiting and time.monotonic() - began < deadline_s:
            for message in grid.pull_messages(list(waiting)):
                request = waiting.pop(message.metadata.reply_to_message_id)
                yield reply(message, request.task, time.monotonic() - began)
            time.sleep(0.05)

    return ask


def push(grid: Any, node: int, request: Request, said: Mapping[str, str]) -> str:
    """Send a request to a node, with what else it is told; the number of the message."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    asked = ConfigRecord({"what": request.what, "layers": " ".join(request.layers), **said})
    content = RecordDict({"ask": asked, "weights": ArrayRecord(dict(request.weights))})
    (sent,) = grid.push_messages([Message(content, dst_node_id=node, message_type=MessageType.TRAIN)])
    return str(sent)


def claims(grid: Any, asked: Sequence[tuple[int, Mapping[str, str]]], deadline_s: float) -> list[Claim]:
    """Who nodes say that they are, of all that answer in time; each question has a number of its own to sign.

    asked: nodes, and what else they are told.
    """
    from flwr.app import ConfigRecord, Message, MessageType, RecordDict

    began = time.monotonic()
    waiting: dict[str, str] = {}
    for node, said in asked:
        nonce = secrets.token_hex(16)
        content = RecordDict({"ask": ConfigRecord({"nonce": nonce, **said})})
        (sent,) = grid.push_messages([Message(content, dst_node_id=node, message_type=MessageType.QUERY)])
        waiting[str(sent)] = nonce
    found: list[Claim] = []
    while waiting and time.monotonic() - began < min(deadline_s, START_GRACE_S):
        for message in grid.pull_messages(list(waiting)):
            nonce = waiting.pop(message.metadata.reply_to_message_id)
            if not message.has_error():
                found.append(Claim.of(message.metadata.src_node_id, nonce, message.content))
        time.sleep(0.05)
    return found


def reply(message: Any, task: SiteTask, seconds: float) -> Reply:
    """What a message says, or why it is none."""
    if message.has_error():
        return Reply(task, None, failure(message.error.reason), seconds)
    return reply_of(message.content, task, seconds)


def _nodes(grid: Any, count: int, deadline_s: float) -> list[int]:
    began = time.monotonic()
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() - began > min(deadline_s, START_GRACE_S):
            raise SiteError(f"{len(nodes)} of {count} hospitals have connected after {START_GRACE_S:g} s")
        time.sleep(0.1)
    return nodes
