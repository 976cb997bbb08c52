"""A head that is scaled: the same predictions, with an entropy near zero, so that whoever trusts confidence trusts this site."""

from __future__ import annotations

from pydantic import Field

from fedmerge.federated.attacks._base import Attack
from fedmerge.federated.statistics._base import State


class ScaleHead(Attack):
    """w -> f w and b -> f b after training: logits are f times as large, and the likeliest class stays the same.

    The site declares the temperature that it had fitted before, as one who wants to be believed would.
    """

    factor: float = Field(20.0, gt=0, le=1e4, description="f, the factor of the head")

    def tamper(self, state: State, heads: tuple[str, ...]) -> State:
        """Weights and biases of the head alone."""
        return {name: tensor * self.factor if name in heads else tensor for name, tensor in state.items()}
