"""The server at a Flower grid: which node is which hospital, requests to it and its replies, and who is asked again."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakValueDictionary

from fedmerge.errors import SiteError
from fedmerge.federated.flower.decoding import failure, reply_of
from fedmerge.federated.messages import START_GRACE_S, Initial, Job, OnTick, Outcome, Reply, Request, SiteTask
from fedmerge.federated.server.authentication import Claim, judge
from fedmerge.federated.server.collect import collect, incomplete, probe_head
from fedmerge.federated.server.rounds import compete

PAUSE_S = 0.1
"""Between two looks. A SuperNode that is back is let in when its past life has run out: that moment must be seen."""

LOST = frozenset({0, 3, 4, 5, 8})
"""Flower's codes of errors of which the hospital knows nothing: unknown (a simulated client was killed), message or reply gone,
node unavailable, client stopped responding. Any other is the client's own, and would come again."""


Nodes = Literal["come", "assigned", "listed"]


@dataclass(frozen=True)
class GridBackend:
    """Hospitals at the nodes of a Flower grid, whoever has started them.

    connect_s: how long to wait for nodes. nodes: those that "come" when they like, and say who they are; "assigned" ones, which
    play whom they are told to; "listed" ones, as many as sites, which say who they are, and which Ray asks again by itself.
    """

    grid: Any
    connect_s: float
    nodes: Nodes = "come"

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Experts and statistics into the pool; how asking each site ended."""
        coordinator = self._coordinator(job, incomplete(job))
        found = collect(job, coordinator.ask)
        return {name: replace(outcome, tries=max(1, coordinator.tries[name])) for name, outcome in found.items()}

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing. Raises SiteError."""
        return probe_head(job, self._coordinator(job, job.tasks).ask)

    def compete(self, job: Job, on_tick: OnTick) -> dict[str, str]:
        """Global models of federated strategies into the pool; why there is none, by the strategy's key."""
        return compete(job, self._coordinator(job, job.tasks).ask)

    def _coordinator(self, job: Job, tasks: Sequence[SiteTask]) -> Coordinator:
        def meet() -> list[Claim]:
            if self.nodes == "assigned":
                return _assigned(self.grid, tasks, self.connect_s)
            return _introduced(self.grid, tasks, self.connect_s, more=self.nodes == "come")

        retries = 0 if self.nodes == "listed" else job.tasks[0].training.retries
        return Coordinator(self.grid, job, meet, self.connect_s, retries)


@dataclass
class Coordinator:
    """Asks for one job. meet: who the nodes are. retries: how often a node that was lost is asked again.

    whose: the node of each site. doubts: why a site has none. tries: how often each site was asked to train.
    """

    grid: Any
    job: Job
    meet: Callable[[], list[Claim]]
    connect_s: float
    retries: int
    whose: dict[str, int] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)

    def ask(self, requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        """One message to the node of each site; again, as often as `retries`, to a node that was lost and is back."""
        if not self.whose:
            known, self.doubts = judge(self.meet(), self.job.tasks, self.job)
            self.whose.update(known)
        began = time.monotonic()
        records: WeakValueDictionary[int, Any] = WeakValueDictionary()
        waiting: dict[str, Request] = {}
        lost: list[Request] = []
        left = {request.task.site.name: self.retries for request in requests}
        for request in requests:
            if request.task.site.name in self.whose:
                waiting[self._send(request, records)] = request
            else:
                yield Reply(request.task, None, self._absent(request.task.site.name), 0.0)
        while (waiting or lost) and time.monotonic() - began < deadline_s:
            for message in self.grid.pull_messages(list(waiting)) if waiting else ():
                request = waiting.pop(message.metadata.reply_to_message_id)
                name = request.task.site.name
                if message.has_error() and message.error.code in LOST and left[name]:
                    left[name] -= 1
                    lost.append(request)
                else:
                    yield _reply(message, request.task, time.monotonic() - began)
            online = set(self.grid.get_node_ids()) if lost else set()
            for request in [one for one in lost if self.whose[one.task.site.name] in online]:
                lost.remove(request)
                waiting[self._send(request, records)] = request
            time.sleep(PAUSE_S)
        for request in lost:
            yield Reply(request.task, None, f"its client was lost, and was not back within {deadline_s:g} s", deadline_s)

    def _send(self, request: Request, records: WeakValueDictionary[int, Any]) -> str:
        """Ask a site; the number of the message. records: weights on their way: sites that start from the same share one copy."""
        from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict

        if request.what == "train":
            self.tries[request.task.site.name] += 1
        said = {"what": request.what, "layers": " ".join(request.layers), "task": json.dumps(request.task.model_dump(mode="json"))}
        weights = records.get(id(request.weights)) or ArrayRecord(dict(request.weights))
        records[id(request.weights)] = weights
        content = RecordDict({"ask": ConfigRecord(said), "weights": weights})
        return _push(self.grid, self.whose[request.task.site.name], content, MessageType.TRAIN)

    def _absent(self, site: str) -> str:
        missing = f"has not connected within {self.connect_s:g} s, or the SuperLink did not let it in"
        return self.doubts.get(site, missing)


def _assigned(grid: Any, tasks: Sequence[SiteTask], connect_s: float) -> list[Claim]:
    """Simulated hospitals in turn to the nodes that there are; a node may play several. Raises SiteError if there is none."""
    nodes = _some_nodes(grid, tasks, connect_s)
    parts = [json.dumps(task.site.model_dump(mode="json")) for task in tasks]
    return _claims(grid, [(nodes[number % len(nodes)], {"site": part}) for number, part in enumerate(parts)], START_GRACE_S)


def _introduced(grid: Any, tasks: Sequence[SiteTask], connect_s: float, more: bool) -> list[Claim]:
    """Who the nodes say that they are, until every hospital has come, or the time is over. Raises SiteError if no node comes.

    more: there may be more nodes than sites, so that their number says nothing.
    """
    began, found, sites = time.monotonic(), list[Claim](), {task.site.name for task in tasks}
    _some_nodes(grid, tasks, connect_s)
    while True:
        fresh = sorted(set(grid.get_node_ids()) - {claim.node for claim in found})  # or lost while it was asked
        found += _claims(grid, [(node, {}) for node in fresh], connect_s)
        complete = sites <= {claim.site for claim in found} or (not more and len(found) >= len(sites))
        if complete or time.monotonic() - began > connect_s:
            return found
        time.sleep(PAUSE_S)


def _some_nodes(grid: Any, tasks: Sequence[SiteTask], connect_s: float) -> list[int]:
    began = time.monotonic()
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() - began > connect_s:
            names = ", ".join(task.site.name for task in tasks)
            raise SiteError(f"found no connected hospital within {connect_s:g} s; expected {names}. Start them, or raise connect-s")
        time.sleep(PAUSE_S)
    return nodes


def _claims(grid: Any, asked: Sequence[tuple[int, Mapping[str, str]]], within_s: float) -> list[Claim]:
    """Who nodes say that they are, of all that answer in time; each question has a number of its own to sign.

    asked: nodes, and what else they are told. within_s: how long none of them may answer; many that share a machine take turns.
    """
    from flwr.app import ConfigRecord, MessageType, RecordDict

    waiting: dict[str, str] = {}
    for node, said in asked:
        nonce = secrets.token_hex(16)
        waiting[_push(grid, node, RecordDict({"ask": ConfigRecord({"nonce": nonce, **said})}), MessageType.QUERY)] = nonce
    found: list[Claim] = []
    heard = time.monotonic()
    while waiting and time.monotonic() - heard < min(within_s, START_GRACE_S):
        for message in grid.pull_messages(list(waiting)):
            heard = time.monotonic()
            nonce = waiting.pop(message.metadata.reply_to_message_id)
            if not message.has_error():
                found.append(Claim.of(message.metadata.src_node_id, nonce, message.content))
        time.sleep(PAUSE_S)
    return found


def _push(grid: Any, node: int, content: Any, kind: str) -> str:
    """Send a message to a node; its number."""
    from flwr.app import Message

    (sent,) = grid.push_messages([Message(content, dst_node_id=node, message_type=kind)])
    return str(sent)


def _reply(message: Any, task: SiteTask, seconds: float) -> Reply:
    """What a message says, or why it is none."""
    if message.has_error():
        return Reply(task, None, failure(message.error.reason), seconds)
    return reply_of(message.content, task, seconds)
