"""Every error that fedmerge raises on purpose.

FedmergeError
├── UserError                 the user can mend it: exit code 2, one message, no traceback
│   ├── ScenarioError         a YAML says something that cannot be; carries all problems at once
│   ├── DataError             images that are missing, truncated, or of the wrong kind
│   │   └── SourceError       the same, as one problem of a source's keys
│   ├── CheckpointError       weights that do not fit the model
│   ├── MethodError           a merging method that cannot be used as asked, from the library
│   ├── FolderError           a run folder or pool that cannot be used as asked
│   ├── MissingExtra          a package of an extra is not installed; also an ImportError
│   └── SiteError             a hospital failed, stayed silent, or sent something that may not be admitted
│       └── UploadRefused     the audit said no
└── TargetError               the target's actor died or missed a deadline: exit code 1
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

EXTRAS = {
    "vlm": ["open_clip", "transformers"],
    "datasets": ["medmnist", "xlrd"],
    "report": ["jinja2", "markupsafe", "matplotlib"],
    "simulation": [
        *("PIL", "cryptography", "filelock", "flwr", "platformdirs", "ray", "rich", "ruamel", "scipy"),
        *("timm", "torchvision", "typer", "yaml"),
    ],
    "tables": ["pandas", "pyarrow"],
    "dicom": ["pydicom"],
    "nifti": ["nibabel"],
    "tensorboard": ["tensorboard"],
    "mlflow": ["mlflow"],
}
"""Packages, as they are imported, that `pip install fedmerge` does not bring, and the extra that does."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what was found, what was expected, and how to mend it."""

    where: str
    key: str
    found: str
    expected: str
    mend: str = ""

    def __str__(self) -> str:
        place = ": ".join(filter(None, (self.where, self.key)))
        if not self.expected:
            return f"{place}: found {self.found}: {self.mend}"
        joint = "; " if self.mend[:1].islower() else ". "  # "did you mean" goes on with the sentence
        return f"{place}: found {self.found}; expected {self.expected}" + (f"{joint}{self.mend}" if self.mend else "")


class FedmergeError(Exception):
    """Every error that fedmerge raises on purpose.

    Attributes
    ----------
    exit_code : int
        What the command returns: 2 for what a user can mend, else 1.
    told : str
        What a hospital may tell others of the error. Where it is empty, nothing of the text leaves the hospital.

    Examples
    --------
    >>> import fedmerge, torch
    >>> try:
    ...     fedmerge.merge(torch.nn.Linear(1, 2), [], method="mena")
    ... except fedmerge.FedmergeError as error:
    ...     print(error)
    method: found 'mena'; expected a known one: did you mean 'mean'?
    """

    exit_code = 1
    told = ""


class UserError(FedmergeError):
    """Something that the user can mend."""

    exit_code = 2

    def __init__(self, text: str, told: str = "") -> None:
        super().__init__(text)
        self.told = told or self.told


class ScenarioError(UserError):
    """All problems of a scenario and its sites, reported together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"the scenario cannot run: {count}", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[ScenarioError], tuple[Sequence[Problem]]]:
        return type(self), (self.problems,)


class DataError(UserError):
    """Images that cannot be used. text: for their owner, with names of files; told: for others, without."""

    told = "its images cannot be used"


class SourceError(DataError):
    """Images that cannot be used, as one problem of their source."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem), f"source.{problem.key}: cannot be used; expected {problem.expected}")
        self.problem = problem

    def __reduce__(self) -> tuple[type[SourceError], tuple[Problem]]:
        return type(self), (self.problem,)


class CheckpointError(UserError):
    """Weights that do not fit the model they are meant for. told: as of DataError."""


class PerSampleRefused(CheckpointError):
    """A model whose parameters cannot be merged for every sample exactly; the message names the operation and the parameter."""


class MethodError(UserError):
    """A merging method that a library user cannot use as asked: its name, hyper-parameters, or what it needs beside experts."""


class FolderError(UserError):
    """A run folder or an expert pool that cannot be used as asked."""


class MissingExtra(UserError, ImportError):
    """A package that only some uses need is not installed; the message names the command that installs it."""


@contextmanager
def extras_named() -> Iterator[None]:
    """Turn the import error of a package that is listed in EXTRAS into MissingExtra. Also usable as a decorator."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        text = f"the package '{package}' is not installed; install it with: pip install 'fedmerge[{extra}]'"
        missing = MissingExtra(text, text)
        missing.name = package
        raise missing from error


class SiteError(UserError):
    """A hospital failed, or did not answer in time. Experts of the other hospitals are kept. told: as of DataError."""


class UploadRefused(SiteError):
    """The audit found something in an upload that may not leave the site or may not be admitted."""


class TargetError(FedmergeError):
    """The target's actor died, or a wait for it reached its deadline."""


def first_line(error: Exception) -> str:
    """What an error of another package says, in one line; its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def folded(name: str) -> str:
    """A name without what people do not see, or take for the same: case, blanks, and the form in which Unicode is written.

    Examples
    --------
    >>> from fedmerge.errors import folded
    >>> folded("Mel ") == folded("mel")
    True
    """
    return _composed(_unspaced(_composed(name)).casefold())


def difference(name: str, other: str) -> str:
    """In what two names differ that are the same when folded."""
    for what, plain in (("Unicode form", _composed), ("case", str.casefold), ("blanks", _unspaced)):
        if plain(name) == plain(other):
            return what
    return "case, blanks or Unicode form"


def quoted(name: object) -> str:
    """A name or path in quotes, with escapes for bytes that are no UTF-8, and for what cannot be told from another name."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return f"'{text}'" if unicodedata.is_normalized("NFC", text) and text.isprintable() else ascii(text)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


def _unspaced(name: str) -> str:
    """Without blanks, line ends, and characters that have no width."""
    return "".join(letter for letter in name if unicodedata.category(letter) not in ("Zs", "Zl", "Zp", "Cc", "Cf"))


def first_of(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first names, and how many more there are.

    Examples
    --------
    >>> from fedmerge.errors import first_of
    >>> first_of(["axial", "coronal", "sagittal"], 2)
    'axial, coronal and 1 more'
    """
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest of `known`, or the list of what is known.

    Examples
    --------
    >>> from fedmerge.errors import nearest
    >>> nearest("ties_", ["mean", "ties"])
    "did you mean 'ties'?"
    """
    options = sorted(known)
    close = [other for other in options if folded(other) == folded(name)] or difflib.get_close_matches(name, options, n=1)
    return f"did you mean {quoted(close[0])}?" if close else f"known: {', '.join(options)}"
