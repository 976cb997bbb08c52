"""Hospitals in this process, or in worker processes of it: the backend `local`, without Flower and Ray."""

from __future__ import annotations

import signal
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
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

AHEAD = 2
"""Parts of the work that are under way or lie ready, for each worker: all of them are lost if a worker dies."""

DEATHS = 4
"""Workers that die one after the other, without an answer between them, after which no more are started: it is not one hospital."""

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


@dataclass(frozen=True)
class _Part:
    """What a worker does of a request: one of several runs, what comes after the runs that are trained, or all of it."""

    request: Request
    number: int | None = None
    trained: tuple[Run, ...] | None = None

    @classmethod
    def all_of(cls, request: Request) -> list[_Part]:
        """What can be done side by side."""
        runs = request.task.runs if request.what == "train" else 1
        return [cls(request, number) for number in range(runs)] if runs > 1 else [cls(request)]

    @property
    def site(self) -> str:
        """The hospital."""
        return self.request.task.site.name

    def given_to(self, executor: ProcessPoolExecutor) -> Future[Any]:
        """Its answer, in time."""
        if self.number is None:
            return executor.submit(_answered, self.request, self.trained)
        return executor.submit(_run, self.request, self.number)


def _broken(future: Future[Any]) -> bool:
    """Whether it will have no answer, since a worker has died."""
    return future.done() and (future.cancelled() or isinstance(future.exception(), BrokenProcessPool))


class _Workers:
    """Processes that train for hospitals; they are started when something is asked."""

    def __init__(self, jobs: int, on_tick: OnTick) -> None:
        self.jobs, self.on_tick = jobs, on_tick
        self.ticks: Any = None
        self.executor: ProcessPoolExecutor | None = None

    def ask(self, requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        """Replies as they arrive; a site's runs go to whichever worker is free, in the order of the sites.

        If a worker dies, all parts that were under way are lost. Each is done again by itself, as often as `retries` allows: a
        hospital whose worker dies each time fails alone.
        """
        began, left = time.monotonic(), {request.task.site.name: request.task.training.retries for request in requests}
        fresh = deque(part for request in requests for part in _Part.all_of(request))
        lost, waiting, deaths = deque[_Part](), dict[Future[Any], _Part](), 0
        runs: dict[str, dict[int, Run]] = defaultdict(dict)
        done: dict[str, dict[int, int]] = defaultdict(dict)
        failed: set[str] = set()
        while (fresh or lost or waiting) and time.monotonic() - began < deadline_s:
            while (lost and not waiting) or (fresh and not lost and len(waiting) < AHEAD * self.jobs):
                part = (lost or fresh).popleft()
                if part.site not in failed:
                    waiting[self._given(part)] = part
            ready, _ = wait(waiting, GLANCE_S, FIRST_COMPLETED)
            self._miss_the_dead()
            self._tell(done, {part.site: part.request for part in waiting.values()})
            if any(_broken(future) for future in ready):
                self.end()
                gone = [waiting.pop(future) for future in list(waiting) if _broken(future)]
                deaths += 1
                for name in dict.fromkeys(part.site for part in gone):
                    left[name] -= 1
                lost.extend(part for part in gone if left[part.site] >= 0 and deaths < DEATHS)
                over = [*gone, *lost, *fresh] if deaths >= DEATHS else [part for part in gone if left[part.site] < 0]
                for part in over:
                    if part.site not in failed:
                        failed.add(part.site)
                        yield Reply(part.request.task, None, GONE, time.monotonic() - began)
                continue
            for future in ready:
                part, found, seconds = waiting.pop(future), future.result(), time.monotonic() - began
                deaths = 0
                if part.site in failed:
                    continue
                if isinstance(found, Reply):
                    yield Reply(found.task, found.upload, found.reason, seconds)
                elif isinstance(found, str):
                    failed.add(part.site)
                    yield Reply(part.request.task, None, found, seconds)
                else:
                    assert part.number is not None
                    runs[part.site][part.number] = found
                    if len(runs[part.site]) == part.request.task.runs:
                        trained = tuple(run for _, run in sorted(runs.pop(part.site).items()))
                        fresh.appendleft(_Part(part.request, trained=trained))
        if waiting:
            self.end()

    def _given(self, part: _Part) -> Future[Any]:
        """A worker's answer, in time; if one has died since it last had work, by new workers."""
        try:
            return part.given_to(self._started())
        except BrokenProcessPool:
            self.end()
            return part.given_to(self._started())

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
