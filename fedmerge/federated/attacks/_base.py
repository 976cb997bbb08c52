"""What a careless or malicious hospital may do, to be simulated on purpose: a kind is one file in `attacks/`, named in a site file.

It happens in the site's own process, so that server and target see what they would see: an upload like any other.
"""

from __future__ import annotations

from fedmerge.data.images import Images
from fedmerge.federated.statistics._base import State
from fedmerge.registry import Folder, Plugin


class Attack(Plugin):
    """Base of every kind. It changes the images before the site trains, or the weights before it uploads; by default neither."""

    def poison(self, images: Images, owner: str, seed: int) -> Images:
        """The images that the site trains and validates on."""
        return images

    def tamper(self, state: State, heads: tuple[str, ...]) -> State:
        """The weights that the site uploads. heads: names of the head's parameters."""
        return state

    @property
    def words(self) -> str:
        """The kind and its fields, for reports."""
        fields = ", ".join(f"{name} {getattr(self, name)}" for name in type(self).model_fields)
        return f"{self.kind()} ({fields})" if fields else self.kind()


ATTACKS: Folder[Attack] = Folder("fedmerge.federated.attacks", Attack, "attack")
