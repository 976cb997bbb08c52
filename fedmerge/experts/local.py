"""Hospitals as a plain loop in this process: the same result as the federation, for libraries, tests and debugging."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fedmerge.errors import UserError
from fedmerge.experts.admission import sealed
from fedmerge.experts.asking import Ask, Job, Outcome, Reply, Request, Tick
from fedmerge.experts.gather import collect, probe_head
from fedmerge.experts.initialisation import Initial
from fedmerge.experts.probe import Probe
from fedmerge.experts.signature import private_key
from fedmerge.experts.train import measure_site, train_site

OnTick = Callable[[Tick], None]


def gather(job: Job, on_tick: OnTick) -> dict[str, Outcome]:
    """Ask every site for what is not in the pool, one after the other."""
    with _threads_restored():
        return collect(job, _asking(on_tick))


def probe(job: Job, on_tick: OnTick) -> Initial:
    """theta_0 with a head from federated linear probing."""
    with _threads_restored():
        return probe_head(job, _asking(on_tick))


def _asking(on_tick: OnTick) -> Ask:
    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            yield answer(request, on_tick)

    return ask


def answer(request: Request, on_tick: OnTick) -> Reply:
    """One site's answer; what the user can mend comes back as a reason."""
    began = time.perf_counter()
    task = request.task

    def on_progress(done: int, total: int, text: str) -> None:
        on_tick(Tick(task.site.name, done, total, text))

    try:
        private_key(task.site)  # a key that is missing is told before the site trains, not after
        match request.what:
            case "probe":
                upload = Probe.at_site(task, request.weights)
            case "train":
                upload = train_site(task, request.weights, on_progress)
            case kind:
                upload = measure_site(task, kind, request.weights, request.layers, on_progress)
        upload = replace(upload, seal=sealed(request, upload))  # last: whatever is changed after this is refused
    except UserError as error:
        return Reply(task, None, str(error), time.perf_counter() - began)
    return Reply(task, upload, "", time.perf_counter() - began)


class _threads_restored:  # noqa: N801 - reads as a statement
    """A site sets its own number of threads; this process gets its own back."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
