"""A batch in which every sample has a merged model of its own, in one pass and without building any of them whole.

The unmodified model runs with `Mixed` parameters. Only rows of the bank that have a coefficient take part, and those whose
coefficient is the same for all samples are merged once and take part as one. Every parameter and BatchNorm statistic must have
been read by the end of the pass: one that was not is an error, because a part of the model would have been left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fedmerge.merging.per_sample.mixed_operations  # noqa: F401 - fills the table of operations
from fedmerge.errors import PerSampleRefused, first_line
from fedmerge.merging.bank.bank import Bank
from fedmerge.merging.bank.row_storage import Add, weighted_sum
from fedmerge.merging.per_sample.mixed_tensor import Mixed

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference from an explicit merge that `verify` accepts; 0.1 for half precision."""


def alike(encoder: Tensor, head: Tensor) -> Tensor:
    """Rows of the bank whose coefficients are the same in all samples, and not 0.

    Parameters
    ----------
    encoder, head : Tensor
        Coefficients (N, K), or (N, K + A) with the bank's anchors.

    Returns
    -------
    Tensor
        (K,), or (K + A,), bool.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.per_sample.mixture import alike
    >>> alpha = torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25]])  # of two images
    >>> alike(alpha, alpha)
    tensor([False, False,  True,  True])
    """
    return (encoder == encoder[0]).all(0) & (head == head[0]).all(0) & ((encoder[0] != 0) | (head[0] != 0))


def merged_once(bank: Bank, encoder: Tensor, head: Tensor, add: Add = weighted_sum) -> tuple[Tensor, Tensor | None]:
    """The part of all samples' models that is the same.

    Parameters
    ----------
    bank : Bank
        The experts.
    encoder, head : Tensor
        Coefficients (N, K), or (N, K + A) with the bank's anchors.
    add : Add, optional
        As in `Bank.mix`.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        For each row of the bank, whether it is left to every sample (K,), or (K + A,); and of the other rows the merge (P,), or
        None where fewer than two have the same coefficients in all samples, and nothing would be saved.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.per_sample.mixture import merged_once
    >>> experts = {name: {"weight": torch.full((1, 1), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0))}
    >>> bank = Bank.of(torch.nn.Linear(1, 1, bias=False), experts)
    >>> alpha = torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25]])  # of two images
    >>> left, once = merged_once(bank, alpha, alpha)
    >>> left, once
    (tensor([ True,  True, False, False]), tensor([3.]))
    """
    same = alike(encoder, head)
    if int(same.sum()) < 2:
        return torch.ones_like(same), None
    return ~same, bank.mix(encoder[0] * same, head[0] * same, out=torch.empty_like(bank.blank()), add=add)


class Mixture:
    """The bank's model with one row of coefficients for every sample.

    Parameters
    ----------
    bank : Bank
        The experts.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.bank.bank import Bank
    >>> from fedmerge.merging.per_sample.mixture import Mixture
    >>> a, b = ({"weight": torch.tensor([row]).T} for row in ([2.0, -2.0], [0.0, 4.0]))
    >>> bank = Bank.of(torch.nn.Linear(1, 2, bias=False), {"axial": a, "coronal": b})
    >>> alpha = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # of two images
    >>> Mixture(bank).forward(torch.ones(2, 1), alpha, alpha)
    tensor([[ 2., -2.],
            [ 1.,  1.]])
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @torch.no_grad()
    def forward(self, batch: Tensor, encoder: Tensor, head: Tensor, add: Add = weighted_sum) -> Tensor:
        """Logits (N, C) of sample i under (sum_k encoder_ik phi_k, sum_k head_ik w_k).

        batch: (N, channels, H, W). encoder, head: (N, K), or (N, K + A) with the bank's anchors. add: as in `Bank.mix`.
        Raises PerSampleRefused, naming operation and parameter, if the model does something that has no exact form.
        """
        bank, used = self.bank, set[str]()
        if bank.shards:
            raise PerSampleRefused("per-sample merging: the experts are spread over shards, and a mixture needs them in one place")
        left, once = merged_once(bank, encoder, head, add)
        parts = tuple(zip((bank.parts.encoder, bank.parts.head), (encoder * left, head * left), strict=True))
        rows = tuple(tuple(torch.nonzero(coefficients.any(0)).flatten().tolist()) for _, coefficients in parts)
        chosen = [coefficients[:, list(at)] for (_, coefficients), at in zip(parts, rows, strict=True)]
        if once is not None:
            chosen = [torch.cat([shares, shares.new_ones(len(shares), 1)], 1) for shares in chosen]
        weights = [shares.to(bank.like.device, bank.wide) for shares in chosen]
        statistics = bank.buffers.statistics(encoder.to(bank.theta))

        def run(batch: Tensor, *given: Tensor) -> Tensor:
            state: dict[str, Tensor] = {}
            for (names, _), at, shares in zip(parts, rows, given, strict=False):
                for name in names:
                    whole = [bank.rows[row] for row in at] + [*given[len(parts) + len(statistics) :]]
                    pieces = [theta[bank.slices[name]].view(bank.shapes[name]) for theta in whole]
                    state[name] = Mixed.linear(pieces, shares, (name,), used)
            mixed = zip(statistics, given[len(parts) :], strict=False)
            state |= {name: Mixed.computed(values, (name,), used) for name, values in mixed}
            logits = bank.call({**state, **bank.buffers.fixed}, batch)
            if missing := sorted(set(state) - used):
                raise PerSampleRefused(
                    f"per-sample merging: {missing[0]} took no part in the forward pass ({len(missing)} of {len(state)} tensors "
                    "did not); use one merge per distinct row instead (per_sample: rows)"
                )
            return logits  # type: ignore[no-any-return]

        try:
            shared = () if once is None else (once,)
            logits = bank.recorded(("mixture", rows), run, batch.to(bank.like.dtype), *weights, *statistics.values(), *shared)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # of the model: what is tried here, it was not written for
            raise PerSampleRefused(
                f"per-sample merging: the model does something that has no exact form ({first_line(error)}); use one merge per "
                "distinct row instead (per_sample: rows)"
            ) from error
        bank.read(len(rows[0]) * bank.P * bank.like.element_size())
        return logits

    def verify(self, batch: Tensor, encoder: Tensor, head: Tensor) -> None:
        """Compare the first and the last sample with their explicit merges. Raises PerSampleRefused if they differ."""
        found = self.forward(batch, encoder, head)
        for i in {0, len(batch) - 1}:
            wanted = self.bank.forward(self.bank.mix(encoder[i], head[i]), batch[i : i + 1], encoder[i])[0]
            error = float((found[i] - wanted).norm() / wanted.norm().clamp(min=1e-12))
            if not error <= TOLERANCE.get(self.bank.like.dtype, 0.1):
                raise PerSampleRefused(
                    f"per-sample merging: sample {i} differs from its explicit merge by {error:.1e} of its length; "
                    "use one merge per distinct row instead (per_sample: rows)"
                )
