"""PyTorch's global settings while fedmerge works: a notebook may have changed them for its own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_settings(gradients: bool) -> Iterator[None]:
    """PyTorch as it is when it begins, with gradients or without; afterwards what the caller has set.

    No inference mode, whose tensors cannot be changed outside; new tensors are float32 and on the CPU where the code says nothing.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if torch.get_default_device().type != "cpu":  # a device that is set costs time at every call, also where it is this one
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)
