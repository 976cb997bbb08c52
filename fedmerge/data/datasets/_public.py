"""What public data sets have in common: a record of what was published, and a layout that says what each file is."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._base import Source
from fedmerge.data.datasets._file_source import FileSource
from fedmerge.data.datasets._image_files import ImageFile
from fedmerge.data.spreadsheet import read_spreadsheet
from fedmerge.errors import Problem, SourceError, nearest, quoted

ROOT = (
    "the folder that holds the data set as it was published; may begin with ~ and name environment variables as ${NAME}. "
    "A relative one is looked for in the folder where the command is given"
)
COUNTS = "whether the number of images must be the published one; false for a part of the data set that you have chosen yourself"
PARTS = "official parts that this hospital holds, e.g. [train, val]; default all"

Row = tuple[ImageFile, str]
"""An image as the layout has it, its file not looked at yet, and the official part that it belongs to."""


@dataclass(frozen=True)
class Published:
    """What is known of a data set without its files.

    classes: in label order. images: how many there are of each domain, in domain order; 0 where nobody says. total: of all domains
    together where that alone is known. inside: folders of the root in which the files may lie, by the names that archives give
    them. parts: names of the official parts. patients: what keeps images together. unverified: what could not be compared with the
    source; then another number of images is told, and not refused.
    """

    title: str
    classes: tuple[str, ...]
    images: Mapping[str, int]
    layout: str
    license: str
    citation: str
    where: str
    inside: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    patients: str = ""
    total: int = 0
    unverified: str = field(default="", kw_only=True)


class Public(FileSource):
    """A data set of single files, in the layout in which it was published."""

    published: ClassVar[Mapping[str, Published]]
    left_out: ClassVar[str] = "files that are missing or no image"

    root: str = Field(min_length=1, description=ROOT)
    folders: tuple[str, ...] = Field((), description="domains that this hospital holds; default: all")
    take: tuple[str, ...] = Field((), description=PARTS)
    flips: bool = Field(True, description="whether a horizontal flip preserves the label")
    check_counts: bool = Field(True, description=COUNTS)

    @property
    def facts(self) -> Published:
        """What was published of the chosen data set."""
        return self.published[getattr(self, "dataset", self.kind())]

    @abstractmethod
    def _rows(self, root: Path) -> list[Row]:
        """All images of the chosen domains, whatever their part. Raises SourceError, and OSError."""

    def check(self) -> list[Problem]:
        """A root that is not there, files that are not as published, domains and parts that it has not, too few classes."""
        try:
            root = self._root()
            if wrong := chosen("folders", self.folders, self._known()) + chosen("take", self.take, self.facts.parts):
                return wrong
            whole, odd = self._whole(root)
            if off := [] if self.facts.unverified or not self.check_counts else self._off(root, whole):
                mend = f"Get it again ({self.facts.where}), or say check_counts: false if some are left out on purpose"
                return [Problem("", "root", f"{'; '.join(off)} in {quoted(root)}", "the published number", mend)]
            if self.take:
                whole, odd = self._found(root)
            held = self._part(whole)
        except SourceError as error:
            return [error.problem]
        except OSError as error:
            return [_image_files.unreadable(error, Path(error.filename or self.root))]
        if len(odd) > self.max_broken:
            found = f"{len(odd)} of {len(held) + len(odd)} images whose file is missing in {quoted(root)}"
            return [Problem("", "root", found, f"at most {self.max_broken} (max_broken)", f"The data: {self.facts.where}")]
        there = sorted({item.label for item in held})
        found = f"images of one class only ({there[0]})" if there else f"no image in {quoted(root)}"
        key = "split" if self.split else "take" if self.take else "folders" if self.folders else "root"
        few = [Problem("", key, found, f"two classes or more of {', '.join(self.classes())}")]
        return self.unkeyed() if len(there) > 1 else few

    def remarks(self) -> list[str]:
        """What is missing, and numbers that differ from published ones."""
        with self._opened() as root:
            whole, odd = self._whole(root)
            off = self._off(root, whole)
            missing = len(self._found(root)[1] if self.take else odd)
        said = [f"images left out, for their file is missing: {missing}"] if missing else []
        return said + [f"{line} (published; {self.facts.unverified or 'not asked for'})" for line in off]

    def _whole(self, root: Path) -> tuple[list[ImageFile], list[str]]:
        """All files of the chosen domains, of whatever part; and those that are missing."""
        return self.model_copy(update={"take": ()})._found(root)

    def classes(self) -> tuple[str, ...]:
        """As published."""
        return self.facts.classes

    def domains(self) -> tuple[str, ...]:
        """The chosen domains, in the order given; otherwise all, as published."""
        return self.folders or self._known()

    @property
    def knows_patients(self) -> bool:
        """Whether the data set says which images belong together."""
        return bool(self.facts.patients)

    def _known(self) -> tuple[str, ...]:
        return tuple(self.facts.images)

    def _off(self, root: Path, held: Sequence[ImageFile]) -> list[str]:
        """Domains with another number of images than was published. held: all parts of them."""
        facts, counts = self.facts, Counter(item.domain for item in held)
        off = [
            f"{counts[name]} images of '{name}', not {facts.images[name]}"
            for name in self.domains()
            if facts.images.get(name) and counts[name] != facts.images[name]
        ]
        all_there = set(self.domains()) == set(self._known())
        return [*off, f"{len(held)} images, not {facts.total}"] if all_there and facts.total not in (0, len(held)) else off

    def _located(self) -> Path | Problem:
        facts = self.facts
        root = _image_files.locate(self.root, self.hint or facts.where)
        if isinstance(root, Problem):
            return replace(root, expected=f"the folder of {facts.title}: {facts.layout}")
        return next((root / name for name in facts.inside if (root / name).is_dir()), root)

    def _found(self, root: Path) -> tuple[list[ImageFile], list[str]]:
        held: list[ImageFile] = []
        odd: list[str] = []
        places = {name: number for number, name in enumerate(self.domains())}
        for row, part in self._rows(root):
            if row.domain not in places or (self.take and part not in self.take):
                continue
            item = row if row.regular else _image_files.looked_at(root, row)
            if item.regular:
                held.append(item)
            else:
                odd.append(f"{item.path} (missing)")
        return sorted(held, key=lambda item: (places[item.domain], item.path)), odd

    def _determined(self) -> list[Any]:
        """Labels and patients, which files do not say; patients as numbers."""
        items = self._listed(self._root())[0]
        patients = np.unique([item.patient for item in items], return_inverse=True)[1].tolist() if self.knows_patients else []
        return [self.kind(), [(item.path, item.label, item.domain) for item in items], patients]

    def _wrong(self, found: str, expected: str = "") -> SourceError:
        """What to raise for files that are not as published."""
        facts = self.facts
        wanted, mend = expected or f"{facts.title}: {facts.layout}", f"The data: {facts.where}"
        return SourceError(Problem(self.kind(), "root", found, wanted, mend))

    def _in_folders(self, root: Path) -> Iterator[Row]:
        """Files in <root>/<domain>/<class>/, as DomainBed has them."""
        for domain in self.domains():
            if not (root / domain).is_dir():
                raise self._wrong(f"no folder {quoted(domain)} in {quoted(root)}")
            for item in _image_files.items_of(root, domain):
                if item.label not in self.classes():
                    place = quoted(root / domain / item.label)
                    raise self._wrong(f"{place}, which is no class of {self.facts.title}", ", ".join(self.classes()))
                yield item, ""

    def _table(self, file: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
        """These columns of a CSV, row by row."""
        try:
            cells = read_spreadsheet(file, "utf-8", self.hint or self.facts.where)
        except SourceError as error:
            raise SourceError(replace(error.problem, where=self.kind(), key="root")) from None
        if missing := [name for name in names if name not in cells.names]:
            found = f"no column {', '.join(missing)} in {quoted(file)}, which has {', '.join(cells.names[:12])}"
            raise self._wrong(found, f"the columns {', '.join(names)}")
        return list(zip(*(cells.column(name) for name in names), strict=True))


def published_by(source: type[Source]) -> Mapping[str, Published]:
    """The records of a source that is a public data set, or several; none of another."""
    found: Mapping[str, Published] = getattr(source, "published", {})
    return found


def chosen(key: str, given: Sequence[str], known: Sequence[str]) -> list[Problem]:
    """Values that there are not, or that are given twice."""
    problems = [
        Problem("", key, quoted(name), "one that is published", nearest(name, known)) for name in given if name not in known
    ]
    twice = sorted({name for name in given if given.count(name) > 1})
    return problems + [Problem("", key, f"{quoted(name)} twice", "every one once") for name in twice]


def files_below(root: Path, folders: Sequence[str] = ("",)) -> dict[str, str]:
    """Files in these folders and below, by their names in small letters without ends: paths relative to the root."""
    found: dict[str, str] = {}
    for folder in folders:
        for place, inside, names in os.walk(root / folder):
            inside[:] = sorted(name for name in inside if not _image_files.passed_over(name))
            for name in sorted(names):
                if not _image_files.passed_over(name):
                    found.setdefault(Path(name).stem.casefold(), Path(place, name).relative_to(root).as_posix())
    return found


def listed(path: str, label: str, domain: str, patient: str = "", part: str = "") -> Row:
    """An image that a table lists."""
    return ImageFile(domain, label, path, patient=patient), part
