"""What lies in a folder or table of images, as far as names tell: hospitals, parts, classes and patients.

Nothing here is sure: what is assumed is said in words, for somebody who knows the images.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedmerge.data.datasets._image_files import ENDS, PARTS, passed_over, writable
from fedmerge.data.datasets.table import MOST_CLASSES
from fedmerge.data.spreadsheet import Spreadsheet, read_spreadsheet
from fedmerge.errors import DataError, SourceError, first_of, folded, quoted

KNOWN = (
    "ROOT/<hospital>/<class>/*, with folders of patients below or not",
    "ROOT/<class>/*, of one hospital",
    "ROOT/<hospital>/<train or test>/<class>/*, with the parts at any level",
    "a table, CSV or Parquet, with columns such as path, label, patient, site, split",
)
"""Layouts that are found, in words."""

TABLES = (".csv", ".tsv", ".parquet")
TEXTS = (*TABLES, ".txt", ".json", ".xml", ".md", ".pdf", ".yaml", ".yml", ".html", ".log", ".ini", ".xls", ".xlsx", ".py", ".zip")
"""Ends of files that are no images, and are not opened to see."""

PATIENT_WORDS = frozenset("p pat patient sub subj subject case mrn id pid study exam lesion".split())  # noqa: SIM905
SITE_WORDS = frozenset("hospital site center centre clinic lab laboratory scanner institution domain client node".split())  # noqa: SIM905
PATIENT_IN_FILE = r"(?i)/((?:patient|pat|subject|subj|sub|case|p)[-_]?\d+)(?!\d)[^/]*$"
"""How patients stand in names of files, below the root."""

COLUMNS = {
    "path": "path file filename filepath image imagepath imagefile imagefilename imgpath img imgfile imagename dicom imageid",
    "label": "label class dx diagnosis target category finding labels classname disease y",
    "patient": "patient patientid mrn subject subjectid pid patientnumber case caseid lesionid lesion",
    "domain": "site hospital center centre domain institution clinic ward scanner lab laboratory dataset source",
    "split": "split part partition subset set fold phase",
}
"""What columns are called, in small letters and without signs; the first that is there is taken."""

LOOSE = 0.05
"""Share of images that may lie higher up than the others, and are left out."""


class ListedImage(NamedTuple):
    """One image. path: relative to the root, with forward slashes; what is not known is empty."""

    path: str
    label: str
    site: str = ""
    split: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Survey:
    """Images, and how a source of sites reads them. listed: a table of `rows` has to be written for it.

    root: of the rows' paths. source: keys that all hospitals have in common. said: what was assumed, a sentence each.
    """

    root: Path
    rows: tuple[ListedImage, ...]
    source: dict[str, Any]
    listed: bool = False
    said: list[str] = field(default_factory=list)

    def by_site(self) -> dict[str, list[ListedImage]]:
        """Rows of every hospital, sorted by its name; one without a name if hospitals are not known."""
        found: dict[str, list[ListedImage]] = defaultdict(list)
        for row in self.rows:
            found[row.site].append(row)
        return {name: found[name] for name in sorted(found)}


def survey(images: Path) -> Survey:
    """What a folder or a table of images holds. Raises DataError with the layouts that are known."""
    try:
        if images.is_dir():
            return _survey_folder(images.resolve())
        if images.exists():
            return survey_table(images.resolve())
    except OSError as error:
        raise DataError(
            f"--images: found '{error.filename or images}', which cannot be read ({error.strerror}); expected {_known()}"
        ) from None
    raise DataError(f"--images: found nothing at {quoted(images)}, looked for in {quoted(Path.cwd())}; expected {_known()}")


def _known() -> str:
    return "one of: " + "; ".join(KNOWN)


def _unknown(root: Path, found: str) -> DataError:
    return DataError(f"--images: {quoted(root)}: found {found}; expected {_known()}")


class Level(NamedTuple):
    """Which level of folders below the root is what, from 0; None for what no level is."""

    label: int
    site: int | None = None
    split: int | None = None
    patient: int | None = None

    def row(self, parts: Sequence[str]) -> ListedImage:
        """The row of an image by its path's parts."""
        site, split, patient = ("" if at is None or at >= len(parts) - 1 else parts[at] for at in self[1:])
        return ListedImage("/".join(parts), parts[self.label], site, split, patient)


def _survey_folder(root: Path) -> Survey:
    images, others = _files(root)
    tables = [path for path in others if "/" not in path and path.casefold().endswith(TABLES)]
    if not images:
        if len(tables) == 1:
            return survey_table(root / tables[0])
        raise _unknown(root, f"no image, and {len(others)} other files")
    try:
        return _by_folders(root, images, others)
    except DataError as error:
        if len(tables) != 1:
            raise
        try:
            return survey_table(root / tables[0])
        except DataError as of_table:
            raise DataError(f"{error}. The table in it is none of these, either: {of_table}") from None


def _files(root: Path) -> tuple[list[str], list[str]]:
    """Paths below the root of images, by their names or by what DICOM files begin with; and of other files. Raises OSError."""
    images, others, seen = list[str](), list[str](), set[str]()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_raise):
        here = os.path.realpath(folder)
        below[:] = [] if here in seen else sorted(name for name in below if not passed_over(name))
        if here in seen:
            continue
        seen.add(here)
        for name in sorted(names):
            path = Path(folder, name)
            if not passed_over(name) and path.is_file() and name != "DICOMDIR":
                (images if _is_image(path) else others).append(path.relative_to(root).as_posix())
    return images, others


def _raise(error: OSError) -> None:
    raise error


def _is_image(path: Path) -> bool:
    name = path.name.casefold()
    if name.endswith(ENDS) or name.endswith(TEXTS):
        return name.endswith(ENDS)
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _by_folders(root: Path, images: list[str], others: list[str]) -> Survey:
    paths = [tuple(path.split("/")) for path in images]
    depths = Counter(len(parts) - 1 for parts in paths)
    depth = next(d for d in sorted(depths) if sum(n for e, n in depths.items() if e <= d) > LOOSE * len(paths))
    kept = [parts for parts in paths if len(parts) > depth]
    if not depth:
        raise _unknown(root, f"images in no folder ({depths[0]}), so that their classes are not known")
    level = _levels(root, [parts[:depth] for parts in kept])
    rows = tuple(level.row(parts) for parts in kept)
    said = [_folders_in_words(level, rows)]
    if left := len(paths) - len(kept):
        said.append(f"images left out, for they lie higher up than the others: {left}")
    if others:
        said.append(f"files left out, for they are no images: {len(others)}")
    patient: int | str | None = 1 if level.patient is not None else None
    if level.patient is None and (named := _patients_in_names(rows)):
        rows, patient = named, PATIENT_IN_FILE
    said.append(_patients_in_words(rows, "folders below" if patient == 1 else "names of files"))
    top = {item.name for item in root.iterdir() if item.is_dir() and not passed_over(item.name)}
    plain = level.site == 0 and level.label == 1 and level.split is None and level.patient in (None, 2)
    if plain and not left and not others and top == {row.site for row in rows}:
        known = {"patient": patient} if patient else {}
        return Survey(root, rows, {"kind": "image_folder", "root": str(root), **known}, said=said)
    named = tuple(row for row in rows if "\\" not in row.path and row.path == row.path.strip() and writable("".join(row)))
    if len(named) < len(rows):
        said.append(f"images left out, for their names cannot stand in a table: {len(rows) - len(named)}")
        rows = named
    columns = {"path": "path", "label": "label"} | {
        key: name
        for key, name in (("patient", "patient"), ("domain", "site"), ("split", "split"))
        if any(getattr(row, name) for row in rows)
    }
    source = {"kind": "table", "root": str(root), "columns": columns, **_named_labels([row.label for row in rows], said)}
    return Survey(root, rows, source, True, said)


def _levels(root: Path, folders: list[tuple[str, ...]]) -> Level:
    """What the levels of folders (all of one depth) are. Raises DataError."""
    depth = len(folders[0])
    names = [{folder[at] for folder in folders} for at in range(depth)]
    split = next((at for at in range(depth) if all(folded(name) in PARTS for name in names[at])), None)
    rest = [at for at in range(depth) if at != split]
    while len(rest) > 1 and len(names[rest[0]]) == 1:  # a folder around everything
        rest = rest[1:]
    if not rest or max(len(names[at]) for at in rest) < 2:
        raise _unknown(root, "images of one folder only, which is no class beside others")
    again = [at for place, at in enumerate(rest) if place and _recurs(folders, rest[:place], at) and not _numbered(names[at])]
    if not again:
        if len(rest) > 1 and not _numbered(names[rest[1]]):
            first, second = (_listed(names[at]) for at in rest[:2])
            raise _unknown(root, f"folders {first}, and in them {second}, of which none recur as classes do")
        return Level(rest[0], None, split, rest[1] if len(rest) > 1 else None)
    label = next((at for at in again if not all(name.isdigit() for name in names[at])), again[0])
    above, below = rest[: rest.index(label)], rest[rest.index(label) + 1 :]
    if len(above) == 1 and _numbered(names[above[0]]):
        return Level(label, None, split, above[0])
    if len(above) == 1:
        site = above[0]
        if _stems(names[label]) <= SITE_WORDS and not _stems(names[site]) & SITE_WORDS:
            site, label = label, site
        return Level(label, site, split, below[0] if below and _numbered(names[below[0]]) else None)
    if len(above) == 2 and _numbered(names[above[1]]):
        return Level(label, above[0], split, above[1])
    raise _unknown(root, f"{len(above)} levels of folders above those that recur as classes do ({_listed(names[label])})")


def _recurs(folders: Sequence[tuple[str, ...]], above: Sequence[int], at: int) -> bool:
    """Whether half of the names of a level, or more, are in two or more of the folders above."""
    parents: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for folder in folders:
        parents[folded(folder[at])].add(tuple(folder[number] for number in above))
    return len(parents) > 1 and 2 * sum(len(those) > 1 for those in parents.values()) >= len(parents)


def _stems(names: set[str]) -> set[str]:
    """The letters that names begin with: of `Patient_012` they are `patient`."""
    return {re.split(r"[\W\d_]", name.casefold(), maxsplit=1)[0] for name in names}


def _numbered(names: set[str]) -> bool:
    """Whether names are those of patients: a word for them with numbers, or more numbers than there are classes."""
    digits = sum(any(letter.isdigit() for letter in name) for name in names)
    if digits == len(names) and _stems(names) <= PATIENT_WORDS:
        return True
    return len(names) > 20 and digits >= 0.8 * len(names)


def _listed(names: set[str]) -> str:
    return first_of([*map(quoted, sorted(names))], 4)


def _folders_in_words(level: Level, rows: Sequence[ListedImage]) -> str:
    kinds = {level.site: "hospital", level.split: "part", level.label: "class", level.patient: "patient"}
    last = max(at for at in kinds if at is not None)
    levels = "/".join(f"<{kinds[at]}>" if at in kinds else "<folder>" for at in range(last + 1))
    values = {
        what: _listed({getattr(row, name) for row in rows} - {""}) for what, name in (("classes", "label"), ("parts", "split"))
    }
    return f"the folders are {levels}; " + "; ".join(f"{what} {text}" for what, text in values.items() if text)


def _patients_in_names(rows: Sequence[ListedImage]) -> tuple[ListedImage, ...] | None:
    """The rows with patients as file names have them, if all have one, and some have the same."""
    found = [re.search(PATIENT_IN_FILE, f"/{row.path}") for row in rows]
    names = [match[1] for match in found if match]
    if len(names) < len(rows) or len(set(names)) == len(names) or len(set(names)) < 2:
        return None
    return tuple(row._replace(patient=name) for row, name in zip(rows, names, strict=True))


def _patients_in_words(rows: Sequence[ListedImage], where: str) -> str:
    known = {(row.site, row.patient) for row in rows if row.patient}
    if known:
        return f"patients are taken from {where}: {len(known)} of them, whose images stay together"
    return (
        "patients are not known, so every image counts as a patient of its own; the key patient of a source says how to find them"
    )


def _named_labels(labels: Sequence[str], said: list[str]) -> dict[str, Any]:
    """The key `labels` of a table, where labels are numbers or empty; what it assumes goes into `said`."""
    values = sorted(set(labels))
    full = [value for value in values if value]
    numbers = bool(full) and all(re.fullmatch(r"[-+]?\d+(\.\d+)?", value) for value in full)
    if not numbers and len(full) == len(values):
        return {}
    if numbers:
        said.append("classes are numbers, and are called class_0 and so on: key labels of the source gives them names")
    named = {value: f"class_{value}" if numbers else value for value in sorted(full, key=float if numbers else None)}
    if "" in values:
        said.append(f"rows left out, for they have no label: {sum(not label for label in labels)}")
    return {"labels": {**named, **({"": None} if "" in values else {})}}


def survey_table(file: Path) -> Survey:
    """What a table of images holds. Raises DataError."""
    cells, encoding = _spreadsheet(file)
    columns, said = _columns(file, cells), list[str]()
    paths = [path.replace("\\", "/") for path in cells.column(columns["path"])]
    root, suffix, there = _place(file, paths)
    missing = len(paths) - sum(there)
    labels, empty = cells.column(columns["label"]), ("",) * len(cells)
    site, split, patient = (cells.column(columns[key]) if key in columns else empty for key in ("domain", "split", "patient"))
    rows = tuple(
        ListedImage(path + suffix, *rest)
        for path, is_there, *rest in zip(paths, there, labels, site, split, patient, strict=True)
        if is_there and rest[0]
    )
    named = ", ".join(f"{key if key != 'domain' else 'hospital'} is column {quoted(name)}" for key, name in columns.items())
    said.append(f"the table {quoted(file.name)} has {len(cells)} rows: {named}")
    keys = _named_labels(labels, said)
    names = keys.get("labels", {})
    rows = tuple(row._replace(label=names.get(row.label, row.label)) for row in rows)
    if "split" in columns and not {folded(row.split) for row in rows} <= PARTS:
        said.append(
            f"column {quoted(columns.pop('split'))} is left alone: its values are no names of parts, such as train and test"
        )
        rows = tuple(row._replace(split="") for row in rows)
    if missing:
        said.append(f"rows left out, for their file is missing: {missing}")
        keys["max_broken"] = missing + 3
    keys |= {"suffix": suffix} if suffix else {}
    keys |= {"encoding": encoding} if encoding != "utf-8" else {}
    said.append(_patients_in_words(rows, "the table"))
    source = {"kind": "table", "file": str(file), "root": str(root), "columns": columns, **keys}
    return Survey(root, rows, source, said=said)


def _spreadsheet(file: Path) -> tuple[Spreadsheet, str]:
    """The table, in UTF-8 or UTF-16 or as Excel writes it in Western Europe. Raises DataError."""
    encoding = "utf-8"
    while True:
        try:
            return read_spreadsheet(file, encoding), encoding
        except SourceError as error:
            problem, before = error.problem, encoding
            encoding = "utf-16" if "in UTF-16" in problem.found else "cp1252" if problem.key == "encoding" else before
            if encoding == before or before != "utf-8":
                raise DataError(
                    f"--images: found {problem.found}; expected {problem.expected}. {problem.mend}".strip(". ")
                ) from None


def _columns(file: Path, cells: Spreadsheet) -> dict[str, str]:
    """Columns by what they are. Raises DataError where paths or labels are in none."""
    plain = {re.sub(r"[\W_]+", "", name.casefold()): name for name in reversed(cells.names)}
    found = {key: plain[word] for key, words in COLUMNS.items() for word in reversed(words.split()) if word in plain}
    if "path" not in found:  # by what stands in them
        ends = {name: sum(cell.casefold().endswith(ENDS) for cell in cells.column(name)) for name in cells.names}
        best = max(ends, key=lambda name: ends[name])
        found |= {"path": best} if 2 * ends[best] > len(cells) else {}
    if lacking := [key for key in ("path", "label") if key not in found]:
        each = ", ".join(f"{quoted(name)} ({len(set(cells.column(name)))} values)" for name in cells.names[:20])
        want = " and ".join(f"{key} (called {', '.join(COLUMNS[key].split()[:6])} or the like)" for key in lacking)
        raise DataError(f"--images: {quoted(file)}: found the columns {each}; expected one with the {want}. Rename it in the table")
    values = set(cells.column(found["label"])) - {""}
    if not 2 <= len(values) <= MOST_CLASSES:
        what = f"{len(values)} different values in column {quoted(found['label'])}, taken for the label"
        raise DataError(f"--images: {quoted(file)}: found {what}; expected 2 to {MOST_CLASSES} classes")
    return {key: found[key] for key in COLUMNS if key in found}


def _place(file: Path, paths: Sequence[str]) -> tuple[Path, str, list[bool]]:
    """The folder that paths are relative to, what they lack at their ends, and which of them are there. Raises DataError."""
    folders = [file.parent, *sorted(item for item in file.parent.iterdir() if item.is_dir() and not passed_over(item.name))]
    some = paths[:: max(1, len(paths) // 20)]
    known = any(path.casefold().endswith(ENDS) for path in some)
    best = max(
        ((root, suffix) for root in folders for suffix in ("", *(() if known else ENDS))),
        key=lambda place: sum(_is_file(place[0], path + place[1]) for path in some),
    )
    there = [_is_file(best[0], path + best[1]) for path in paths]
    if not any(there):
        raise DataError(
            f"--images: {quoted(file)}: found no file of its {len(paths)} rows in {quoted(file.parent)} or a folder in it; "
            "expected paths that are relative to one of these"
        )
    return *best, there


def _is_file(root: Path, path: str) -> bool:
    return os.path.isfile(os.path.join(root, path))  # noqa: PTH113, PTH118 - half the time of a Path, for 100,000 rows
