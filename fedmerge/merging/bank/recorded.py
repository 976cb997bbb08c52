"""Forwards on a GPU, recorded once for each shape and then run again whole: one launch in place of several hundred.

With small batches a GPU waits for Python to name the next operation. A CUDA graph names all of them at once; models that do not
need each other's results run side by side in it. The operations are those of an ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedmerge.errors import first_line

MOST = 64
"""Recordings that a bank keeps; what comes after them runs in the ordinary way."""

SIDE_BY_SIDE = 4
"""Streams on which models run at the same time."""


class Recorded:
    """Functions of tensors, by key: run as they are the first time, recorded the second time, and replayed from then on.

    What a function reads beside its inputs must stay where it is as long as its key is used. On a CPU, and where gradients are
    asked for, functions run as they are; so they do from the first on that cannot be recorded (it asks the GPU for a number, say).

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.recorded import Recorded
    >>> run = Recorded()
    >>> run("double", lambda x: 2 * x, torch.tensor([1.0, 2.0]))  # on a CPU as it is
    tensor([2., 4.])
    """

    def __init__(self) -> None:
        self.refusal = ""
        self._seen: set[Hashable] = set()
        self._kept: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), which must be a tensor of its own."""
        if not inputs[0].is_cuda or torch.is_grad_enabled() or self.refusal:
            return function(*inputs)
        key = (key, *((x.shape, x.dtype) for x in inputs))
        if key not in self._kept:
            if key not in self._seen or len(self._kept) == MOST:
                self._seen.add(key)
                return function(*inputs)
            try:
                self._kept[key] = self._record(function, inputs)
            except RuntimeError as error:
                self.refusal = first_line(error)
                _heal()
                return function(*inputs)
        graph, places, found = self._kept[key]
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return found.clone()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, functions run as they are: where somebody listens to what a module is given, which a replay does not tell."""
        kept, self.refusal = self.refusal, "listened to"
        try:
            yield
        finally:
            self.refusal = kept

    def side_by_side(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of functions that do not need each other's, at the same time while they are recorded."""
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            return [function() for function in functions]  # one after the other, as Python names them
        while len(self._streams) < min(SIDE_BY_SIDE, len(functions)):
            self._streams.append(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        here, found = torch.cuda.current_stream(), []
        for number, function in enumerate(functions):
            stream = self._streams[number % len(self._streams)]
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(function())
        for stream in self._streams[: len(functions)]:
            here.wait_stream(stream)
        return found

    def _record(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places, graph, aside = [x.clone() for x in inputs], torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in a call, and cannot while it is recorded
            function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        pool = next((kept[0].pool() for kept in self._kept.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # another thread reads the next batch
            found = function(*places)
        return graph, places, found


def recording(x: Tensor) -> bool:
    """Whether what is done now to a tensor is being recorded: then nothing may wait for a number of it.

    Parameters
    ----------
    x : Tensor
        Any tensor (...).

    Returns
    -------
    bool
        False on a CPU.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.recorded import recording
    >>> recording(torch.zeros(1))
    False
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _heal() -> None:
    """A recording that broke off leaves torch's generator waiting for its end; one that ends well lets it go."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
