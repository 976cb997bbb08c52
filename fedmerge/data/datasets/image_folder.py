"""Images on disk: `<root>/<domain>/<class>/*`, the layout of DomainBed (Gulrajani & Lopez-Paz, ICLR 2021)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._file_source import FileSource
from fedmerge.errors import Problem, quoted

ROOT = (
    "the folder; may begin with ~ and name environment variables as ${NAME}. "
    "A relative one is looked for in the folder where the command is given"
)

NO_FILES = "no files but links to nowhere or in a circle, pipes or the like"


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"{groups} groups in it; expected one, the patient, e.g. '/(P\\d+)_'; others can be written (?:...)")
    return pattern


Level = Annotated[int, Field(strict=True, ge=1)]


class ImageFolder(FileSource):
    """Every image is a group of its own: files say nothing about patients.

    Folders below a class, such as one for each patient, are read, too. Hidden files, and what operating systems leave in folders
    (`__MACOSX`, `@eaDir`, `Thumbs.db`, ...), are left alone.
    """

    root: str = Field(min_length=1, description=ROOT)
    folders: tuple[str, ...] = Field((), description="domains that this hospital holds: subfolders of the root; default: all")
    patient: Level | Annotated[str, AfterValidator(_one_group)] | None = Field(
        None,
        description="how the patient of a file is found. A number: the folder that many levels below the class, e.g."
        " 1 for ward/nevus/P12/3.png. Or a regular expression with one group for the path below the "
        "root, e.g. '/(P\\d+)_' for ward/nevus/P12_3.png. A patient's images stay together in splits and "
        "validation; default: every image counts as a patient",
    )

    def check(self) -> list[Problem]:
        """A folder that is not there or may not be read, unknown domains, names that cannot be, and a part without two classes."""
        root = self._located()
        if isinstance(root, Problem):
            return [root]
        try:
            known = _image_files.domains_of(root, self.folders)
            if wrong := _image_files.unknown(root, self.folders, known) or _image_files.unfit_names(root, self.folders):
                return wrong
            every, odd = self._found(root)
            if without := sum(self._patient_of(item) is None for item in every) if self.patient else 0:
                found = f"'{self.patient}', which finds no patient in {without} of {len(every)} paths below the root"
                expected = "an expression that finds one in every path <domain>/<class>/<file>, as its one group"
                if isinstance(self.patient, int):
                    expected = f"{self.patient} folders or more below the class around every image"
                return [Problem("", "patient", found, expected)]
            if len(odd) > self.max_broken:
                found, mend = f"{len(odd)} entries that are {NO_FILES}", "Remove them, or raise max_broken to leave them out"
                return [Problem("", "max_broken", found, f"at most {self.max_broken}", mend)]
            held = sorted({item.label for item in self._part(every)})
            if len(held) > 1:
                return self.unkeyed()
            left = _image_files.loose(root, self.domains())
        except OSError as error:
            return [_image_files.unreadable(error, root)]
        found = f"images of one class only ({held[0]})" if held else f"no image in '{root}'"
        found += f", and {left} that lie in no class folder" if left else ""
        mend = "Take another part or seed, or a larger alpha" if self.split else self.hint
        return [Problem("", "split" if self.split else "root", found, f"two classes or more in {_image_files.LAYOUT}", mend)]

    def remarks(self) -> list[str]:
        """What is left out, in counts, and what else may not be as its owner thinks."""
        with self._opened() as root:
            left, (items, odd) = _image_files.loose(root, self.domains()), self._listed(root)
        said = [f"images left out, for they lie in no class folder: {left}"] if left else []
        said += [f"entries left out, for they are {NO_FILES}: {len(odd)}"] if odd else []
        below = {item.label: set[str]() for item in items}
        for item in items:
            below[item.label].add(item.path.split("/", 3)[2] if item.path.count("/") > 2 else "")
        first = next(iter(below.values()), {""})
        if self.patient != 1 and len(below) > 1 and "" not in first and all(those == first for those in below.values()):
            said.append(
                f"images of all classes ({', '.join(below)}) lie in the same folders below: is the root one folder too high?"
            )
        return said

    def classes(self) -> tuple[str, ...]:
        """Class folders of all domains in the root that can be read, sorted."""
        with self._opened() as root:
            return tuple(_image_files.classes_of(root, self.folders))

    def how_to_add(self, classes: Sequence[str]) -> str:
        """Empty folders."""
        each = " and ".join(quoted(name) for name in classes)
        what = f"an empty folder {each}" if len(classes) == 1 else f"empty folders {each}"
        return f"Make {what} in {quoted(self._root() / self.domains()[0])} for what it has no image of"

    def domains(self) -> tuple[str, ...]:
        """The chosen domains, in the order given; otherwise all, sorted."""
        with self._opened() as root:
            return self.folders or _image_files.domains_of(root)

    @property
    def knows_patients(self) -> bool:
        """Where their names can be found."""
        return self.patient is not None

    def _located(self) -> Path | Problem:
        return _image_files.locate(self.root, self.hint)

    def _found(self, root: Path) -> tuple[list[_image_files.ImageFile], list[str]]:
        found = [item for domain in self.folders or _image_files.domains_of(root) for item in _image_files.items_of(root, domain)]
        return [item for item in found if item.regular], [f"{item.path} (no regular file)" for item in found if not item.regular]

    def _determined(self) -> list[Any]:
        return [self.patient]

    def _patient_of(self, item: _image_files.ImageFile) -> str | None:
        if isinstance(self.patient, int):
            folders = item.path.split("/")[2:-1]
            return folders[self.patient - 1] if len(folders) >= self.patient else None
        found = re.search(self.patient or "", item.path)
        return (found[1] or None) if found else None
