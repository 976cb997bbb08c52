"""What a data source promises; the sources themselves are files in `data/datasets/`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmerge.data.images import Images
from fedmerge.errors import Problem, difference, folded, quoted
from fedmerge.registry import Folder, Plugin


class Geometry(NamedTuple):
    """The model's input: side of the square image in pixels, and number of channels (1 or 3)."""

    size: int
    channels: int


def same_names(key: str, kind: str, places: Mapping[str, object], mend: str) -> list[Problem]:
    """Names that a person would take for one, each group once. places: every name, and what to call it by in the message."""
    ways: dict[str, list[str]] = {}
    for name in sorted(places):
        ways.setdefault(folded(name), []).append(name)
    problems = []
    for first, *others in (names for names in ways.values() if len(names) > 1):
        found = " and ".join(quoted(places[name]) for name in (first, *others))
        differ = " or ".join(dict.fromkeys(difference(first, other) for other in others))
        problems.append(Problem("", key, f"{found}, which differ in {differ} only", f"one name for one {kind}", mend))
    return problems


class Pseudonyms(NamedTuple):
    """Patients as a secret makes them: who has it, too, finds the same patient, and who has not can tell nothing.

    secret: a digest of the secret, to tell that two hospitals have the same. patients: a digest of each.
    """

    secret: str
    patients: frozenset[str]


class Source(Plugin):
    """Images of one site, as its YAML describes them. Everything but `load` is cheap and decodes no pixel.

    Examples
    --------
    >>> from fedmerge.data.datasets._base import SOURCES, Geometry
    >>> source = SOURCES.load("organ_phantom")(images=8, patients=4, planes=("axial",))
    >>> source.domains(), source.check()
    (('axial',), [])
    >>> source.load(Geometry(size=16, channels=1), owner="axial", seed=0).pixels.shape
    (8, 16, 16, 1)
    """

    if TYPE_CHECKING:  # every source has it: as a class variable if it is a fact, as a field if the user must say it

        @property
        def flips(self) -> bool:
            """Whether a horizontal flip preserves the label of this source's images."""

    @abstractmethod
    def check(self) -> list[Problem]:
        """What is wrong before anything is loaded (missing folder, too few classes); the caller fills in `where`."""

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""

    def how_to_add(self, classes: Sequence[str]) -> str:
        """How its owner makes it know classes that it has no image of."""
        return ""

    @abstractmethod
    def domains(self) -> tuple[str, ...]:
        """Domain names in domain order."""

    def remarks(self) -> list[str]:
        """What readers of a run should know of these images, such as how many are left out. No name of a file: it is shown."""
        return []

    def shown(self) -> frozenset[str] | None:
        """Classes of which there is an image, or None if that cannot be told without loading them."""
        return None

    @abstractmethod
    def identity(self, owner: str, seed: int) -> str:
        """A sha256 of all that determines the images: fields, names and contents of files, owner, seed, version."""

    @abstractmethod
    def holdings(self, owner: str) -> Mapping[str, str] | None:
        """Names of the items held, by what they are, to tell that two sites share some; None if they cannot."""

    def contents(self, owner: str) -> Mapping[str, tuple[str, ...]]:
        """Classes of the files of each content, by its digest, to tell copies; none where that cannot be told."""
        return {}

    @property
    def knows_patients(self) -> bool:
        """Whether images of one patient are known as such."""
        return True

    def pseudonyms(self) -> Pseudonyms | None:
        """Patients under the secret that hospitals agree on; None where there is none, or patients are not known."""
        return None

    def decided(self, owner: str) -> dict[str, Any]:
        """What `load` has decided by all images of the owner together, where that was on this machine: for the manifest."""
        return {}

    @abstractmethod
    def load(self, geometry: Geometry, owner: str, seed: int) -> Images:
        """The images, before the scanner. Raises DataError."""


SOURCES: Folder[Source] = Folder("fedmerge.data.datasets", Source, "data source")  # type: ignore[type-abstract]
