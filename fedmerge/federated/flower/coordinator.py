"""The coordinator's desk: who has connected, who is asked again because its process was lost, and who never came."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedmerge.errors import SiteError
from fedmerge.federated.flower.grid import claims, push, reply
from fedmerge.federated.messages import Initial, Job, OnTick, Outcome, Reply, Request, SiteTask
from fedmerge.federated.server.authentication import Claim, judge
from fedmerge.federated.server.collect import collect, incomplete, probe_head
from fedmerge.federated.server.rounds import compete

PAUSE_S = 0.1
"""Between two looks. A SuperNode that is back is let in when its past life has run out: that moment must be seen."""

LOST = frozenset({0, 3, 4, 5, 8})
"""Flower's codes of errors of which the hospital knows nothing: unknown (a simulated client was killed), message or reply gone,
node unavailable, client stopped responding. Any other is the client's own, and would come again."""


@dataclass(frozen=True)
class DeploymentBackend:
    """Hospitals at the nodes of a grid. simulated: nodes play whom they are told to. connect_s: how long to wait for nodes."""

    grid: Any
    simulated: bool
    connect_s: float

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Experts and statistics into the pool; how asking each site ended."""
        desk = self._desk(job, incomplete(job))
        return {name: replace(one, tries=max(1, desk.tries[name])) for name, one in collect(job, desk.ask).items()}

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing. Raises SiteError."""
        return probe_head(job, self._desk(job, job.tasks).ask)

    def compete(self, job: Job, on_tick: OnTick) -> dict[str, str]:
        """Global models of federated strategies into the pool; why there is none, by the strategy's key."""
        return compete(job, self._desk(job, job.tasks).ask)

    def _desk(self, job: Job, tasks: Sequence[SiteTask]) -> Desk:
        return Desk(self.grid, job, tasks, self.simulated, self.connect_s)


@dataclass
class Desk:
    """Asks for one job. tries: how often each hospital was asked to train. simulated: nodes play whom they are told to."""

    grid: Any
    job: Job
    tasks: Sequence[SiteTask]
    simulated: bool
    connect_s: float
    whose: dict[str, int] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)

    def ask(self, requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        """One message to the node of each site; again, as often as `training.retries`, to a node that was lost and is back."""
        if not self.whose:
            self._meet()
        began = time.monotonic()
        waiting: dict[str, Request] = {}
        again: list[tuple[Request, int]] = []
        left = {request.task.site.name: request.task.training.retries for request in requests}
        for request in requests:
            name = request.task.site.name
            if name in self.whose:
                waiting[self._send(request)] = request
            else:
                missing = f"has not connected within {self.connect_s:g} s, or the SuperLink did not let it in"
                yield Reply(request.task, None, self.doubts.get(name, missing), 0.0)
        while (waiting or again) and time.monotonic() - began < deadline_s:
            for message in self.grid.pull_messages(list(waiting)) if waiting else ():
                request = waiting.pop(message.metadata.reply_to_message_id)
                name = request.task.site.name
                if message.has_error() and message.error.code in LOST and left[name]:
                    left[name] -= 1
                    again.append((request, self.whose[name]))
                else:
                    yield reply(message, request.task, time.monotonic() - began)
            online = set(self.grid.get_node_ids()) if again else set()
            for entry in [entry for entry in again if entry[1] in online]:
                again.remove(entry)
                waiting[self._send(entry[0])] = entry[0]
            time.sleep(PAUSE_S)
        for request, _ in again:
            yield Reply(request.task, None, f"its client was lost, and was not back within {deadline_s:g} s", deadline_s)

    def _send(self, request: Request) -> str:
        if request.what == "train":
            self.tries[request.task.site.name] += 1
        said = {"task": json.dumps(request.task.model_dump(mode="json"))}
        return push(self.grid, self.whose[request.task.site.name], request, said)

    def _meet(self) -> None:
        """Find the node of every site that comes in time. Raises SiteError if none does."""
        found = self._assigned() if self.simulated else self._introduced()
        known, self.doubts = judge(found, self.job.tasks, self.job)
        self.whose.update(known)

    def _assigned(self) -> list[Claim]:
        """Simulated hospitals in turn to the nodes that there are; a node may play several."""
        nodes = self._wait()
        parts = [json.dumps(task.site.model_dump(mode="json")) for task in self.tasks]
        asked = [(nodes[number % len(nodes)], {"site": part}) for number, part in enumerate(parts)]
        return claims(self.grid, asked, self.job.deadline_s)

    def _introduced(self) -> list[Claim]:
        """Who the nodes say that they are, until every hospital has come, or the time is over."""
        began, found = time.monotonic(), list[Claim]()
        self._wait()
        while True:
            fresh = sorted(set(self.grid.get_node_ids()) - {claim.node for claim in found})  # or lost while it was asked
            found += claims(self.grid, [(node, {}) for node in fresh], self.connect_s)
            if {task.site.name for task in self.tasks} <= {claim.site for claim in found}:
                return found
            if time.monotonic() - began > self.connect_s:
                return found
            time.sleep(1)

    def _wait(self) -> list[int]:
        began = time.monotonic()
        while not (nodes := sorted(self.grid.get_node_ids())):
            if time.monotonic() - began > self.connect_s:
                names = ", ".join(task.site.name for task in self.tasks)
                raise SiteError(f"no hospital has connected within {self.connect_s:g} s; expected {names}")
            time.sleep(PAUSE_S)
        return nodes
