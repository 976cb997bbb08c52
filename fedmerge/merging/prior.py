"""How common labels were where an expert was trained, taken out of its head; and how common they are at the target, put in.

A model that is trained by cross entropy on shares P(y) has log P(y) in its logits. Less that, its predictions are relative to even
shares (Menon et al., Long-tail learning via logit adjustment, ICLR 2021, section 4.1; Saerens et al., 2002, eq. 4). The correction
is a change of the head's bias, so that every linear merge of corrected experts is corrected, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmerge.errors import CheckpointError
from fedmerge.merging.bank.layout import head_names


def head_bias(model: nn.Module) -> str:
    """Name of the bias of a model's classifier.

    Parameters
    ----------
    model : nn.Module
        The architecture.

    Returns
    -------
    str
        Name of a parameter (C,).

    Raises
    ------
    CheckpointError
        If the classifier has no bias, or several.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.prior import head_bias
    >>> head_bias(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    '1.bias'
    """
    names = [name for name in head_names(model) if model.get_parameter(name).ndim == 1]
    if len(names) != 1:
        raise CheckpointError(f"classifier: found {len(names)} biases; expected one, which holds the label prior")
    return names[0]


def log_shares(counts: Tensor) -> Tensor:
    """Logarithms of the classes' shares, relative to even ones: log(C (n_c + 1) / (n + C)).

    One image is added to each class, so that no share is 0.

    Parameters
    ----------
    counts : Tensor
        Images of each class (C,).

    Returns
    -------
    Tensor
        (C,), nats; 0 for even shares.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.prior import log_shares
    >>> log_shares(torch.tensor([8.0, 2.0])).exp()  # (9, 3) of 12, times 2
    tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    n = counts.double()
    return (len(n) * (n + 1) / (n.sum() + len(n))).log()


def under_prior(state: Mapping[str, Tensor], bias: str, trained: Tensor | None, target: Tensor | None) -> dict[str, Tensor]:
    """A state whose predictions are under the target's shares of labels instead of those that it was trained on.

    Parameters
    ----------
    state : mapping of str to Tensor
        The expert. It is not changed.
    bias : str
        Name of the classifier's bias (C,).
    trained, target : Tensor, optional
        `log_shares` (C,) of the labels in training and at the target; None for even ones, and for those that nobody knows.

    Returns
    -------
    dict of str to Tensor
        The state with another bias.

    Examples
    --------
    >>> import torch
    >>> from fedmerge.merging.prior import log_shares, under_prior
    >>> state = {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}
    >>> trained = log_shares(torch.tensor([8.0, 2.0]))
    >>> moved = under_prior(state, "bias", trained=trained, target=None)
    >>> torch.softmax(moved["bias"], 0)  # the class that was rare in training is likelier now
    tensor([0.2500, 0.7500])
    """
    shift = torch.zeros(len(state[bias]), dtype=torch.float64)
    if target is not None:
        shift = shift + target
    if trained is not None:
        shift = shift - trained
    return {**state, bias: state[bias] + shift.to(state[bias])}
