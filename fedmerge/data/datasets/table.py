"""Images that a table lists: CSV or Parquet with a row for each image, and any layout of folders behind it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from fedmerge.data.datasets import _image_files
from fedmerge.data.datasets._base import Pseudonyms, same_names
from fedmerge.data.datasets._file_source import FileSource, numbers_of
from fedmerge.data.spreadsheet import Spreadsheet, known_encoding, plain, read_spreadsheet
from fedmerge.errors import Problem, SourceError, first_of, nearest, quoted
from fedmerge.registry import Spec
from fedmerge.system.files import at_home

HERE = "May begin with ~ and name environment variables as ${NAME}"
TRUTH = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}

ROUNDED = re.compile(r"-?\d+([.,]\d+)?e\+\d+", re.IGNORECASE)
"""What Excel makes of a long number, and pandas of one beside empty cells: 1.23E+11."""

MOST_CLASSES = 1000
"""Labels beyond this number are measurements or names, and no classes."""


class Columns(Spec):
    """Names of the table's columns, as its first row has them."""

    path: str = Field(min_length=1, description="column of the image's file: relative to the root, or a full path")
    label: str = Field(min_length=1, description="column of the label")
    patient: str | None = Field(
        None, description="column of the patient, whose images stay together; default: patients are unknown"
    )
    domain: str | None = Field(
        None, description="column of the domain (hospital, scanner, ...); default: one domain with the name of the table"
    )
    split: str | None = Field(None, description="column of the part, e.g. train or test; see `take`")


def _texts(value: Any) -> Any:
    """Keys of YAML that look like numbers or truth values, as a table has them, and classes that look like numbers.

    A class that is a truth value stays one, and is told: nobody means the class `false` by `no`.
    """
    if not isinstance(value, dict):
        return value
    return {_cell(key): name if name is None or isinstance(name, bool) else _text(name) for key, name in value.items()}


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | date) else value


def _cell(value: Any) -> Any:
    """As the table's cells are read: 1.0 is 1 there."""
    text = _text(value)
    return plain(text) if isinstance(text, str) else text


def _list_of_texts(value: Any) -> Any:
    return [_cell(item) for item in value] if isinstance(value, list | tuple) else value


Labels = Annotated[dict[str, str | None], BeforeValidator(_texts)]
Values = Annotated[tuple[str, ...], BeforeValidator(_list_of_texts)]


class Table(FileSource):
    """One row for each image. Cells are text without blanks at their ends; 3.0 is the same as 3.

    Rows whose file is not there are left out up to `max_broken`, counted for everybody and named in the site's own log.
    """

    left_out: ClassVar[str] = "files that are missing or no image"

    file: str = Field(
        min_length=1,
        description="the table: CSV (comma, semicolon or tab; UTF-8) or Parquet, recognized by its content, not by its name. "
        f"{HERE}. A relative one is looked for in the folder where the command is given",
    )
    columns: Columns = Field(description="names of the columns")
    root: str = Field("", description=f"the folder that paths are relative to. {HERE}; default: that of the table")
    suffix: str = Field("", description="text added to every path, e.g. '.jpg' if the table has names without endings")
    labels: Labels = Field(
        default_factory=dict,
        description="class of each label as it stands in the table, e.g. {0: benign, 1: malignant}, and null for rows to leave "
        "out; default: labels are the names of the classes. A class that no row has may be named, too",
    )
    folders: Values = Field((), description="domains that this hospital holds: values of the column `domain`; default: all")
    take: Values = Field((), description="parts that this hospital holds: values of the column `split`; default: all")
    encoding: Annotated[str, BeforeValidator(known_encoding)] = Field(
        "utf-8", description="text encoding of a CSV file, e.g. latin-1 or cp1252 for Excel's older exports"
    )

    def check(self) -> list[Problem]:
        """A table or root that is not there, missing columns, rows that contradict each other, a part without two classes."""
        try:
            cells = self._sheet()
            root = self._located()
            return [root] if isinstance(root, Problem) else self._faults(cells) or self._few(cells, root) or self.unkeyed()
        except SourceError as error:
            return [error.problem]
        except OSError as error:
            return [_image_files.unreadable(error, Path(error.filename or self.file))]

    def remarks(self) -> list[str]:
        """What is left out or said twice, in counts."""
        cells, rows = self._sheet(), self._rows()
        with self._opened() as root:
            missing = len(self._listed(root)[1])
        unread = sum(self._class(label) is None for label in cells.column(self.columns.label))
        said = [f"rows left out, for their file is missing: {missing}"] if missing else []
        said += [f"rows left out, for labels gives their label no class: {unread}"] if unread else []
        return said + ([f"rows that repeat another, and count once: {again}"] if (again := _repeated(rows)) else [])

    def classes(self) -> tuple[str, ...]:
        """Classes of all rows, whatever their domain and part, and those that `labels` names; sorted."""
        found = {self._class(label) for label in self._sheet().column(self.columns.label)} | set(self.labels.values())
        return tuple(sorted(name for name in found if name is not None))

    def how_to_add(self, classes: Sequence[str]) -> str:
        """In the key `labels`."""
        more = ", ".join(f"{quoted(name)}: {quoted(name)}" for name in classes)
        return f"Add {more} to source.labels, which may name classes that no row has"

    def domains(self) -> tuple[str, ...]:
        """The chosen domains, in the order given; otherwise all, sorted."""
        if self.columns.domain is None:
            return (Path(self.file).stem,)
        return self.folders or tuple(sorted(set(self._sheet().column(self.columns.domain))))

    @property
    def knows_patients(self) -> bool:
        """Where a column has them."""
        return self.columns.patient is not None

    def _determined(self) -> list[Any]:
        """Labels and patients are no part of files: patients as numbers, for their names may not be guessed from a digest."""
        rows = self._rows()
        patients = numbers_of([row.patient for row in rows]).tolist() if self.knows_patients else []
        return ["table", [(row.path, row.label, row.domain) for row in rows], patients]

    def _located(self) -> Path | Problem:
        if self.root:
            root = _image_files.locate(self.root, self.hint)
            wanted = "the folder that the table's paths are relative to"
            return replace(root, expected=wanted) if isinstance(root, Problem) else root
        return at_home(self.file).parent

    def _sheet(self) -> Spreadsheet:
        """Raises SourceError."""
        return read_spreadsheet(at_home(self.file), self.encoding, self.hint)

    def pseudonyms(self) -> Pseudonyms | None:
        """By `patient_key`; without one, for sites of one and the same table in this process alone."""
        if self.patient_key or not self.knows_patients:
            return super().pseudonyms()
        place = str(at_home(self.file).resolve())
        return Pseudonyms(place, frozenset(row.patient for row in self._rows()))

    def _class(self, label: str) -> str | None:
        return self.labels.get(self._key(label)) if self.labels else label

    def _key(self, label: str) -> str:
        """How `labels` has a cell: YAML takes `yes` and `True` for truth values, and so do tables."""
        plain = TRUTH.get(label.casefold(), label)
        return plain if label not in self.labels and plain in self.labels else label

    def _rows(self) -> list[_image_files.ImageFile]:
        """The rows of this hospital that have a class, by domain and path, and where they repeat one another all of them."""
        cells, of, found = self._sheet(), self.columns, []
        domain = cells.column(of.domain) if of.domain else self.domains() * len(cells)
        part = cells.column(of.split) if of.split else [""] * len(cells)
        patient = cells.column(of.patient) if of.patient else [""] * len(cells)
        own, take, top = self.domains(), frozenset(self.take), self._top()
        places = {name: number for number, name in enumerate(own)}
        for path, label, where, piece, who in zip(
            cells.column(of.path), cells.column(of.label), domain, part, patient, strict=True
        ):
            name = self._class(label)
            if name is not None and where in places and (not take or piece in take):
                found.append(_image_files.ImageFile(where, name, _normal(path, top) + self.suffix, patient=who))
        return sorted(found, key=lambda row: (places[row.domain], row.path))

    def _top(self) -> str:
        """How full paths of files below the root begin."""
        return f"{self._root().absolute().as_posix()}/"

    def _found(self, root: Path) -> tuple[list[_image_files.ImageFile], list[str]]:
        """One item for each file: rows that repeat another count once."""
        held, odd = list[_image_files.ImageFile](), list[str]()
        for row in dict.fromkeys(self._rows()):
            item = _image_files.looked_at(root, row)
            if item.regular:
                held.append(item)
            else:
                odd.append(f"{row.path} ({'missing' if item is row else 'no regular file'})")
        return held, odd

    def _faults(self, cells: Spreadsheet) -> list[Problem]:
        """What no row may say, the first kind of it."""
        of = self.columns
        named = {f"columns.{key}": name for key, name in of.model_dump().items() if name}
        if wrong := [
            Problem("", key, f"{quoted(name)}, which the table has not", "the name of a column", nearest(name, cells.names))
            for key, name in named.items()
            if name not in cells.names
        ]:
            return wrong
        return (
            self._choices(cells)
            or self._empty(cells)
            or self._rounded(cells)
            or self._unknown_labels(cells)
            or self._unwritable()
            or same_names("labels", "class", {name: name for name in self.classes()}, "Make them one with `labels`")
            or same_names("columns.domain", "domain", {name: name for name in self.domains()}, "Write it in one way in all rows")
            or self._contradictions(cells)
        )

    def _choices(self, cells: Spreadsheet) -> list[Problem]:
        """Domains and parts that no row has, or for which no column is named."""
        problems = []
        for key, given, name, column in (
            ("folders", self.folders, "domain", self.columns.domain),
            ("take", self.take, "split", self.columns.split),
        ):
            if given and column is None:
                problems.append(Problem("", key, ", ".join(given), f"columns.{name}, the column whose values these are"))
                continue
            counts = Counter(cells.column(column)) if column else {}
            for value in given:
                if value not in counts:
                    listed = ", ".join(f"{quoted(one)} ({n})" for one, n in list(counts.items())[:10])
                    found = f"{quoted(value)}, which no row has in column {quoted(column)}"
                    problems.append(Problem("", key, found, f"values of that column (rows): {listed}"))
            if len(set(given)) < len(given):
                problems.append(Problem("", key, ", ".join(given), "every value once"))
        return problems

    def _empty(self, cells: Spreadsheet) -> list[Problem]:
        """Spreadsheet that must not be empty. The label's may be, where `labels` says what that means."""
        of, problems = self.columns, []
        for key, column in (("path", of.path), ("label", of.label), ("patient", of.patient), ("domain", of.domain)):
            lines = [cells.lines[at] for at, cell in enumerate(cells.column(column)) if not cell] if column else []
            if lines and not (key == "label" and "" in self.labels):
                mend = "Fill them in, or remove the rows" + (", or leave them out with labels: {'': null, ...}" * (key == "label"))
                found = f"column {quoted(column)} empty in {_in_lines(lines, cells)}"
                problems.append(Problem("", f"columns.{key}", found, "a value in every row", mend))
        return problems

    def _rounded(self, cells: Spreadsheet) -> list[Problem]:
        """Patients by numbers that a spreadsheet has cut off: several of them would be one."""
        column = self.columns.patient
        at = [number for number, cell in enumerate(cells.column(column)) if ROUNDED.fullmatch(cell)] if column else []
        if not at:
            return []
        lines = _in_lines([cells.lines[number] for number in at], cells)
        found = f"numbers of rounded digits in column {quoted(str(column))}, such as {cells.column(str(column))[at[0]]}: {lines}"
        mend = "Different patients may have become one. Export the table again with this column as text"
        return [Problem("", "columns.patient", found, "every patient's whole number or name", mend)]

    def _unknown_labels(self, cells: Spreadsheet) -> list[Problem]:
        """Labels that `labels` does not name; numbers that nobody has given a name; and what is no label at all."""
        counts = Counter(cells.column(self.columns.label))
        if self.labels:
            left = {label: number for label, number in counts.items() if self._key(label) not in self.labels}
            found = f"nothing for {_counted(left)} of column {quoted(self.columns.label)}"
            expected = "a class for every label of the table, or null for rows to leave out"
            return [Problem("", "labels", found, expected)] if left else []
        of_labels = f"in column {quoted(self.columns.label)}"
        if len(counts) > MOST_CLASSES or (len(counts) > 20 and len(counts) * 2 > len(cells)):
            found = f"{len(counts)} different labels in {len(cells)} rows {of_labels}"
            return [
                Problem("", "columns.label", found, "a column of classes", "Name another column, or map its values with `labels`")
            ]
        if all(_is_number(label) for label in counts):
            first = ", ".join(f"{label}: NAME" for label in sorted(counts, key=float)[:3])
            found = f"numbers {of_labels} ({_counted(counts)}) and no names for them"
            return [Problem("", "labels", found, "the class that each number stands for", f"Add labels: {{{first}, ...}}")]
        return []

    def _unwritable(self) -> list[Problem]:
        """Names of classes and domains that cannot be shown."""
        for key, kind, names in (("labels", "class", self.classes()), ("columns.domain", "domain", self.domains())):
            if wrong := [name for name in names if not _image_files.writable(name)]:
                expected = "names with letters, in UTF-8, and without control characters such as line ends"
                return [Problem("", key, f"{quoted(wrong[0])} as the name of a {kind}", expected)]
        return []

    def _contradictions(self, cells: Spreadsheet) -> list[Problem]:
        """Rows of one file that say different things of it."""
        of, top = self.columns, self._top()
        for key, column in (("label", of.label), ("patient", of.patient), ("domain", of.domain), ("split", of.split)):
            said: dict[str, tuple[str | None, int]] = {}
            lines: list[int] = []
            for at, (path, value) in enumerate(zip(cells.column(of.path), cells.column(column), strict=True) if column else ()):
                value_or_class = self._class(value) if key == "label" else value
                first, line = said.setdefault(_normal(path, top), (value_or_class, cells.lines[at]))
                if first != value_or_class:
                    lines += [line, cells.lines[at]]
            if lines:
                found = f"rows of the same file with different values in column {quoted(column)}: {_in_lines(lines, cells)}"
                return [Problem("", f"columns.{key}", found, f"one {key} for each file", "Remove the wrong rows")]
        return []

    def _few(self, cells: Spreadsheet, root: Path) -> list[Problem]:
        """A part without two classes, and why."""
        held, odd = self._listed(root)
        there = sorted({item.label for item in held})
        if len(there) > 1:
            return []
        key = "split" if self.split else "take" if self.take else "folders" if self.folders else "root" if odd else "file"
        if not held and odd:
            found = f"no file of {len(odd)} rows in {quoted(root)}"
            mend = "Paths are relative to root; `suffix` adds what the table leaves out, such as '.jpg'"
            return [
                Problem("", "root", found, "the folder that the table's paths are relative to", f"{mend}. {self.hint}".strip(". "))
            ]
        found = f"images of one class only ({there[0]})" if there else "no image"
        found += f" in {len(held)} of {len(cells)} rows" + (f", and {len(odd)} rows whose file is missing" if odd else "")
        mend = "Take another part or seed, or a larger alpha" if self.split else self.hint
        return [Problem("", key, found, "images of two classes or more", mend)]


def _normal(path: str, top: str) -> str:
    """A path from the root on, without ./ and //, and with slashes; one that does not begin with `top` stays as full as it is."""
    path = path.replace("\\", "/")
    path = os.path.normpath(path) if "//" in path or "./" in path or path.endswith("/") else path
    return path.removeprefix(top)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _repeated(rows: Sequence[_image_files.ImageFile]) -> int:
    return len(rows) - len(set(rows))


def _in_lines(lines: Sequence[int], cells: Spreadsheet) -> str:
    """Where rows stand, for who looks at the table."""
    each = sorted(set(lines))
    return f"{len(each)} rows ({cells.counted} {first_of([*map(str, each)], 5)})"


def _counted(counts: Mapping[str, int]) -> str:
    """Values, and how many rows have each."""
    return first_of([f"{quoted(value)} ({number} rows)" for value, number in counts.items()], 8)
