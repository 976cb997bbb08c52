"""Hospitals in this process, or in worker processes of it: the backend `local`, without Flower and Ray."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as ended
from typing import Any

import torch

from fedmerge.federated.client.diwa import Run
from fedmerge.federated.client.worker import answer, one_run
from fedmerge.federated.messages import Initial, Job, OnTick, Outcome, Reply, Request, Tick
from fedmerge.federated.server.collect import collect, probe_head
from fedmerge.federated.server.rounds import compete
from fedmerge.system.process import owners, process_context

GLANCE_S = 0.2
"""Between two looks at the progress of worker processes, seconds."""

GONE = "its process is gone, as when it is killed, or memory has run out"


@dataclass(frozen=True)
class LocalBackend:
    """The plain loop. jobs: worker processes; 1 is this process, where a debugger can step through a hospital's training.

    With several, the runs of all hospitals are spread over the workers as these become free. The bits are the same.
    """

    jobs: int = 1

    def gather(self, job: Job, on_tick: OnTick) -> dict[str, Outcome]:
        """Experts and statistics into the pool; how asking each site ended."""
        with self._workers(on_tick) as ask:
            return collect(job, ask)

    def probe(self, job: Job, on_tick: OnTick) -> Initial:
        """theta_0 with a head from federated linear probing. Raises SiteError."""
        with self._workers(on_tick) as ask:
            return probe_head(job, ask)

    def compete(self, job: Job, on_tick: OnTick) -> dict[str, str]:
        """Global models of federated strategies into the pool; why there is none, by the strategy's key."""
        with self._workers(on_tick) as ask:
            return compete(job, ask)

    def import_ahead(self) -> None:
        """Before theta_0 is trained, which needs one core: what workers import, meanwhile on another."""
        if self.jobs > 1:
            process_context()

    @contextmanager
    def _workers(self, on_tick: OnTick) -> Iterator[Any]:
        """A way to ask hospitals. One sets its own number of threads; afterwards this process gets its own back."""
        threads, workers = torch.get_num_threads(), _Workers(self.jobs, on_tick)
        try:
            alone = self.jobs == 1
            yield (lambda requests, deadline_s: (answer(one, on_tick) for one in requests)) if alone else workers.ask
        finally:
            workers.end()
            torch.set_num_threads(threads)


class _Workers:
    """Processes that train for hospitals; they are started when something is asked."""

    def __init__(self, jobs: int, on_tick: OnTick) -> None:
        self.jobs, self.on_tick = jobs, on_tick
        self.ticks: Any = None
        self.executor: ProcessPoolExecutor | None = None

    def ask(self, requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        """Replies as they arrive; a site's runs go to whichever worker is free, in the order of the sites."""
        began = time.monotonic()
        executor = self._started()
        waiting: dict[Future[Any], tuple[Request, int | None]] = {}
        for request in requests:
            several = request.task.runs if request.what == "train" else 0
            for number in range(several) if several > 1 else (None,):
                call: Callable[..., Any] = _answered if number is None else _run
                given = (request,) if number is None else (request, number)
                waiting[executor.submit(call, *given)] = (request, number)
        runs: dict[str, dict[int, Run]] = defaultdict(dict)
        failed: set[str] = set()
        done: dict[str, dict[int, int]] = defaultdict(dict)
        while waiting and time.monotonic() - began < deadline_s:
            ready, _ = wait(waiting, GLANCE_S, FIRST_COMPLETED)
            self._miss_the_dead()
            self._tell(done, {request.task.site.name: request for request, _ in waiting.values()})
            for future in ready:
                request, number = waiting.pop(future)
                name, seconds = request.task.site.name, time.monotonic() - began
                try:
                    found = future.result()
                except BrokenProcessPool:
                    self.end()  # the others, too: their runs have failed with it
                    found = GONE
                if isinstance(found, Run) and self.executor is None:
                    found = GONE
                if name in failed:
                    continue
                if isinstance(found, Reply):
                    yield Reply(found.task, found.upload, found.reason, seconds)
                elif isinstance(found, str):
                    failed.add(name)
                    yield Reply(request.task, None, found, seconds)
                else:
                    assert number is not None
                    runs[name][number] = found
                    if len(runs[name]) == request.task.training.runs:
                        trained = [run for _, run in sorted(runs.pop(name).items())]
                        waiting[executor.submit(_answered, request, trained)] = (request, None)
        if waiting:
            self.end()

    def _miss_the_dead(self) -> None:
        """The executor notices the end of workers that were there when it was last called, and the youngest was not."""
        there = list((self.executor._processes or {}).values()) if self.executor else []
        if ended([process.sentinel for process in there], timeout=0):
            with suppress(BrokenProcessPool):
                self._started().submit(abs, 0)

    def end(self) -> None:
        """No worker outlives this call."""
        executor, self.executor = self.executor, None
        if executor is not None:
            for process in list((executor._processes or {}).values()):
                process.kill()
            executor.shutdown(cancel_futures=True)  # waits for its own thread, which alone may wait for its processes

    def _started(self) -> ProcessPoolExecutor:
        if self.executor is None:
            self.ticks = process_context().SimpleQueue()
            self.executor = owners(self.jobs, _begin, (self.ticks,))
        return self.executor

    def _tell(self, done: dict[str, dict[int, int]], requests: dict[str, Request]) -> None:
        """Progress of every site: the mean of its runs, each of which tells its own."""
        while not self.ticks.empty():
            number, tick = self.ticks.get()
            if tick.site in requests:
                done[tick.site][number] = tick.done
                several = requests[tick.site].task.training.runs if number >= 0 else 1
                self.on_tick(Tick(tick.site, sum(done[tick.site].values()) // several, 100, tick.text))


_ticks: Any = None
"""In a worker: the way back for its progress."""


def _begin(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process


def _answered(request: Request, runs: Sequence[Run] | None = None) -> Reply:
    return answer(request, (lambda tick: None) if runs else (lambda tick: _ticks.put((-1, tick))), runs)


def _run(request: Request, number: int) -> Run | str:
    return one_run(request, number, lambda tick: _ticks.put((number, tick)))
