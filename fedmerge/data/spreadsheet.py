"""A table as text, cell by cell: which separator, letters and columns it has, and one message for what cannot be read."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from fedmerge.errors import Problem, SourceError, extras_named, first_line, quoted

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}

NOTHING = frozenset({"nan", "NaN", "NaT", "<NA>"})
"""What programs write for a cell that is empty. NA and None are left alone: they may be the name of a class."""

STARTS = {
    b"\xff\xfe\0\0": "text in UTF-32",
    b"PK\x03\x04": "an Excel workbook or another zip archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""First bytes of what people take for a CSV."""


def _wrong(key: str, found: str, expected: str, mend: str = "") -> SourceError:
    return SourceError(Problem("table", key, found, expected, mend))


@dataclass(frozen=True)
class Spreadsheet:
    """A table's rows. names: of its columns; rows: their cells as text; lines: where each row stands, counted in `counted`."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    counted: str

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _columns(self) -> dict[str, tuple[str, ...]]:
        return dict(zip(self.names, zip(*self.rows, strict=True), strict=True))

    def column(self, name: str) -> tuple[str, ...]:
        """The cells of one column. Raises SourceError if there is no such column."""
        if name not in self._columns:
            raise _wrong("columns", quoted(name), f"columns of the table: {', '.join(self.names)}")
        return self._columns[name]


def known_encoding(name: Any) -> Any:
    """The name of an encoding. Raises ValueError if Python has no such one, or it is none of text, as base64."""
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except TypeError:
        return name
    except (LookupError, ValueError):
        raise ValueError(f"no encoding '{name}'; known: utf-8, latin-1, cp1252, utf-16 and others of Python") from None


def read_spreadsheet(path: Path, encoding: str, hint: str = "") -> Spreadsheet:
    """The table in a file, read once for as long as the file stays as it is. Raises SourceError, and OSError."""
    try:
        facts = path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            where = "" if path.is_absolute() else f", looked for in {quoted(Path.cwd())}"
            unset = "; is its environment variable set?" if "$" in str(path) else ""
            mend = f"The data: {hint}" if hint else ""
            raise _wrong("file", f"{quoted(path)}, which does not exist{where}{unset}", "a CSV or Parquet file", mend) from None
        raise
    if path.is_dir():
        raise _wrong("file", f"{quoted(path)}, which is a folder", "a CSV or Parquet file")
    return _read(path.absolute(), encoding, (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino))


@lru_cache(maxsize=8)
def _read(path: Path, encoding: str, facts: tuple[int, ...]) -> Spreadsheet:
    with path.open("rb") as file:
        start = file.read(4)
    cells = _parquet(path) if start == b"PAR1" else _csv(path, encoding)
    if twice := [name for name, times in Counter(cells.names).items() if times > 1]:
        raise _wrong("file", f"{len(twice)} names of columns twice, e.g. {quoted(twice[0])}", "every name once")
    if not cells.rows:
        raise _wrong("file", f"no row below the names of the columns in {quoted(path)}", "a row for each image")
    return cells


def _csv(path: Path, encoding: str) -> Spreadsheet:
    text, first = _text(path, encoding), 1
    if not text.strip():
        raise _wrong("file", f"{quoted(path)}, which is empty", "a CSV or Parquet file with a row for each image")
    if text.startswith("sep="):  # Excel's own way to tell
        declared, _, text = text.partition("\n")
        first, separator = 2, declared.strip("\r")[4:5] or ","
    else:
        separator = _separator(text, path)
    rows, lines = [], []
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True)
    begins = first
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(tuple(plain(cell) for cell in row))
                lines.append(begins)
            begins = reader.line_num + first
    except csv.Error as error:
        found = f"a line that is no CSV in {quoted(path)}, line {begins} ({error})"
        raise _wrong("file", found, "cells in quotes that end, and no NUL bytes") from None
    _without_nul(rows, lines, "lines", path)
    _same_width(rows, lines, separator, path)
    return Spreadsheet(rows[0], tuple(rows[1:]), tuple(lines[1:]), "lines")


def _text(path: Path, encoding: str) -> str:
    """The whole file as text, without a byte order mark."""
    data = path.read_bytes()
    kind = next((what for start, what in STARTS.items() if data.startswith(start)), None)
    told = kind and kind.startswith("text in") and kind[8:].lower()
    if kind and not (told and encoding.startswith(told)):
        mend = f"Set encoding: {told} in the source" if told else "Save it as 'CSV UTF-8', or unpack it"
        raise _wrong("file", f"{quoted(path)}, which is {kind}", "a CSV or Parquet file", mend)
    try:
        marked = data.startswith(codecs.BOM_UTF8)  # then it is UTF-8, whatever the source says
        return codecs.decode(data, "utf-8-sig" if marked else encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        start = getattr(error, "start", 0)  # some codecs do not say where
        line = data[:start].count(b"\n") + 1
        found = f"{quoted(path)}, which is not {encoding.upper()} (byte 0x{data[start]:02x} in line {line})"
        mend = "Save it as 'CSV UTF-8', or set encoding in the source: cp1252 or latin-1 for what Excel writes in Western Europe"
        raise _wrong("encoding", found, f"text in {encoding.upper()}", mend) from None


def _separator(text: str, path: Path) -> str:
    """What parts the names of the columns; the names may hold the others in quotes."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    widths = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in SEPARATORS}
    best = max(widths, key=lambda sign: widths[sign])
    mixed = [sign for sign in SEPARATORS if widths[sign] > 1]
    if len(mixed) > 1 and len({_narrowest(text, sign) for sign in mixed}) > 1:  # a comma in a name: the rows tell
        best = max(mixed, key=lambda sign: _narrowest(text, sign))
    if widths[best] < 2:
        found = f"one column only in the first line of {quoted(path)}"
        raise _wrong("file", found, f"columns parted by {', '.join(SEPARATORS.values())}")
    return best


def _narrowest(text: str, sign: str) -> int:
    """Spreadsheet of the narrowest of the first lines."""
    lines = [line for line in text.splitlines()[:50] if line.strip()]
    return min(len(next(csv.reader([line], delimiter=sign), [])) for line in lines)


def _without_nul(rows: Sequence[tuple[str, ...]], lines: Sequence[int], counted: str, path: Path) -> None:
    """Raises SourceError for cells that no file can have for a name."""
    if nul := [line for line, row in zip(lines, rows, strict=True) if "\0" in "".join(row)]:
        found = f"NUL characters in {len(nul)} {counted} of {quoted(path)}, e.g. {nul[0]}"
        raise _wrong("file", found, "text without them", "Is it UTF-16? Then set encoding: utf-16-le, or utf-16-be, in the source")


def _same_width(rows: Sequence[tuple[str, ...]], lines: Sequence[int], separator: str, path: Path) -> None:
    """Raises SourceError for rows that have not as many cells as there are names, as where separators are mixed."""
    width = len(rows[0])
    odd = [at for at, row in enumerate(rows) if len(row) != width]
    if not odd:
        return
    first = rows[odd[0]]
    others = [name for sign, name in SEPARATORS.items() if sign != separator and any(sign in cell for cell in first)]
    mixed = f"; it holds a {others[0]}, as if separators were mixed" if others and len(first) < width else ""
    found = f"{len(odd)} rows of another number of cells in {quoted(path)}, e.g. {len(first)} in line {lines[odd[0]]}{mixed}"
    expected = f"{width} in each, as in the first line, which are parted by {SEPARATORS.get(separator, repr(separator))}"
    raise _wrong("file", found, expected, "Put cells that hold the separator in quotes, or save the table again")


def _parquet(path: Path) -> Spreadsheet:
    with extras_named():
        import pandas as pd
        import pyarrow as pa
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except (pa.ArrowException, ValueError) as error:
        reason = first_line(error)[:120]
        raise _wrong("file", f"{quoted(path)}, a Parquet file that cannot be read ({reason})", "a whole one") from None
    if any(name is not None for name in frame.index.names):  # pandas keeps a named index as such
        frame = frame.reset_index(allow_duplicates=True)
    columns = [
        [plain("" if missing else _as_text(cell)) for cell, missing in zip(cells, cells.isna(), strict=True)]
        for _, cells in frame.items()
    ]
    rows = tuple(zip(*columns, strict=True))
    _without_nul(rows, lines := tuple(range(1, len(rows) + 1)), "rows", path)
    return Spreadsheet(tuple(map(str, frame)), rows, lines, "rows")


def _as_text(cell: Any) -> str:
    """As a CSV would have it."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "backslashreplace")
    return str(cell).lower() if type(cell).__name__ in ("bool", "bool_") else str(cell)


def plain(cell: str) -> str:
    """Without blanks at its ends; a whole number in one way, since tables with gaps write 3 as 3.0; NaN as the empty cell it is."""
    cell = cell.strip()
    if cell in NOTHING:
        return ""
    whole, point, rest = cell.partition(".")
    return whole if point and rest and not rest.strip("0") and whole.lstrip("-").isdigit() else cell
