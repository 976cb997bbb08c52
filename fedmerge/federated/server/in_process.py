"""Hospitals as a plain loop in this process: the same result as the federation, for libraries, tests and debugging."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedmerge.federated.client.linear_probe import Probe
from fedmerge.federated.client.round import train_round
from fedmerge.federated.client.site_log import kept, tell
from fedmerge.federated.client.site_training import OnProgress, measure_site, train_site
from fedmerge.federated.messages import Ask, Initial, Job, OnTick, Outcome, Reply, Request, Tick
from fedmerge.federated.security.audit import Upload
from fedmerge.federated.security.privacy import protect
from fedmerge.federated.security.signing import private_key
from fedmerge.federated.server.admission import sealed
from fedmerge.federated.server.collect import collect, probe_head
from fedmerge.federated.server.rounds import compete as all_strategies
from fedmerge.federated.server.statistics import model_of
from fedmerge.merging.bank.layout import Parts


def gather(job: Job, on_tick: OnTick) -> dict[str, Outcome]:
    """Ask every site for what is not in the pool, one after the other."""
    with _threads_restored():
        return collect(job, _asking(on_tick))


def probe(job: Job, on_tick: OnTick) -> Initial:
    """theta_0 with a head from federated linear probing."""
    with _threads_restored():
        return probe_head(job, _asking(on_tick))


def compete(job: Job, on_tick: OnTick) -> dict[str, str]:
    """The rounds of all federated strategies; why there is no model, by key."""
    with _threads_restored():
        return all_strategies(job, _asking(on_tick))


def _asking(on_tick: OnTick) -> Ask:
    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            yield answer(request, on_tick)

    return ask


def answer(request: Request, on_tick: OnTick) -> Reply:
    """All that leaves a site: an upload, or as a reason what it tells of an error; the error itself stays in the site's own log.

    Progress is told in hundredths: the number of steps would tell that of images.
    """
    began = time.perf_counter()
    site = request.task.site.name

    def on_progress(done: int, total: int, text: str) -> None:
        on_tick(Tick(site, 100 * done // total, 100, text))

    with kept(site):
        try:
            private_key(request.task.site)  # a key that is missing is told before the site trains, not after
            upload: Upload | None = _upload(request, on_progress)
            assert upload is not None
            upload, reason = replace(upload, seal=sealed(request, upload)), ""  # last: whatever is changed after this is refused
        except Exception as error:  # whatever it is, its text may hold what must not leave
            upload, reason = None, tell(site, error)
    return Reply(request.task, upload, reason, time.perf_counter() - began)


def _upload(request: Request, on_progress: OnProgress) -> Upload:
    match request.what:
        case "probe":
            return Probe.at_site(request.task, request.weights)
        case "train":
            return _protected(request, train_site(request.task, request.weights, on_progress))
        case "round":
            return train_round(request.task, request.weights, request.layers, on_progress)
        case kind:
            return measure_site(request.task, kind, request.weights, request.layers, on_progress)


def _protected(request: Request, upload: Upload) -> Upload:
    task = request.task
    if task.privacy is None:
        return upload
    return protect(upload, request.weights, Parts.of(model_of(task)), task.privacy, task.seed)


class _threads_restored:  # noqa: N801 - reads as a statement
    """A site sets its own number of threads; this process gets its own back."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
