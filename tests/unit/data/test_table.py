"""Tables of images: whatever a hospital's export looks like, what a row says is used, or named in one message."""

from __future__ import annotations

import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from fedmerge.data.datasets._base import Geometry
from fedmerge.data.datasets.table import Table
from fedmerge.data.partition import own_split
from fedmerge.data.survey import survey
from fedmerge.errors import DataError, MissingExtra

GEOMETRY = Geometry(8, 1)
COLUMNS = {"path": "file", "label": "dx", "patient": "mrn", "domain": "site", "split": "fold"}
HEADER = "file,dx,mrn,site,fold"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """24 images in folders by year; the shade tells the class. 8 patients, two sites, two parts."""
    lines = [HEADER]
    for number in range(24):
        file = Path("images") / str(2000 + number % 3) / f"IM{number:04}.png"
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 10), 200 if number % 2 else 40).save(tmp_path / file)
        part = "test" if number % 4 == 0 else "train"
        lines.append(f"{file},{'mel' if number % 2 else 'nev'},P{number % 8},{'north' if number < 12 else 'south'},{part}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def table(archive: Path, name: str = "cohort.csv", **fields: Any) -> Table:
    return Table(file=str(archive / name), **{"columns": COLUMNS, **fields})


def written(archive: Path, text: str, name: str = "other.csv", encoding: str = "utf-8") -> str:
    (archive / name).write_bytes(text.encode(encoding))
    return name


def text_of(archive: Path) -> str:
    return (archive / "cohort.csv").read_text()


def problem(source: Table) -> str:
    (found,) = source.check()
    return str(found)


def test_a_row_is_an_image(archive: Path) -> None:
    source = table(archive, labels={"mel": "melanoma", "nev": "nevus"})
    assert source.check() == []
    images = source.load(GEOMETRY, "x", 0)
    assert (images.classes, images.domain_names) == (("melanoma", "nevus"), ("north", "south"))
    assert np.array_equal(images.pixels[:, 4, 4, 0] > 100, images.labels == 0)
    assert np.bincount(images.groups).tolist() == [3] * 8
    assert np.bincount(images.domains).tolist() == [12, 12]
    train, held = own_split(images, "x", 0.3, 0)
    assert not set(images.groups[train]) & set(images.groups[held])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_any_usual_way_to_write_it_is_the_same_table(archive: Path, separator: str, encoding: str) -> None:
    text = text_of(archive).replace(",", separator).replace("nev", "näv").replace("\n", "\r\n")
    told = {} if encoding.startswith("utf-8") else {"encoding": encoding}
    source = table(archive, written(archive, text, "cohort.csv", encoding), **told)
    assert source.check() == []
    assert source.classes() == ("mel", "näv")
    assert len(source.load(GEOMETRY, "x", 0)) == 24


def test_parquet_with_numbers_is_the_table_in_text(archive: Path) -> None:

    frame = pd.read_csv(archive / "cohort.csv")
    frame["dx"] = [0.0 if label == "nev" else 1.0 for label in frame["dx"]]
    frame.to_parquet(archive / "cohort.parquet", index=False)
    source = table(archive, "cohort.parquet", labels={0: "nevus", 1: "melanoma"})
    assert source.check() == []
    same = table(archive, labels={"mel": "melanoma", "nev": "nevus"})
    assert np.array_equal(source.load(GEOMETRY, "x", 0).labels, same.load(GEOMETRY, "x", 0).labels)
    assert source.identity("x", 0) == same.identity("x", 0)


def test_parquet_names_its_extra_and_csv_needs_none(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive / "cohort.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert table(archive).check() == []
    with pytest.raises(MissingExtra, match=r"fedmerge\[tables\]"):
        table(archive, "cohort.parquet").check()


def test_a_broken_parquet_is_one_problem(archive: Path) -> None:
    (archive / "cohort.parquet").write_bytes(b"PAR1 and nothing")
    assert "a Parquet file that cannot be read" in problem(table(archive, "cohort.parquet"))


def test_domains_and_parts_can_be_chosen(archive: Path) -> None:
    source = table(archive, folders=["south"], take=["train"])
    assert source.check() == []
    images = source.load(GEOMETRY, "x", 0)
    assert (images.domain_names, len(images)) == (("south",), 9)
    assert "'north' (12), 'south' (12)" in problem(table(archive, folders=["west"]))
    assert "values of that column (rows): 'test' (6), 'train' (18)" in problem(table(archive, take=["val"]))
    assert "images of one class only (nev) in 3 of 24 rows" in problem(table(archive, folders=["south"], take=["test"]))
    without = {key: name for key, name in COLUMNS.items() if key != "split"}
    assert "columns.split, the column whose values these are" in problem(table(archive, columns=without, take=["train"]))


def test_a_row_without_a_file_is_counted_for_all_and_named_for_its_owner(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (3, 5):
        (archive / "images" / str(2000 + number % 3) / f"IM{number:04}.png").unlink()
    source = table(archive)
    assert source.check() == []
    assert source.remarks() == ["rows left out, for their file is missing: 2"]
    assert len(source.load(GEOMETRY, "x", 0)) == 22
    assert "images/2000/IM0003.png (missing)" in caplog.text
    with pytest.raises(DataError) as error:
        table(archive, max_broken=1).load(GEOMETRY, "x", 0)
    assert "IM0003.png (missing)" in str(error.value)
    assert "IM" not in error.value.told
    assert "more than 1 files that are missing or no image" in error.value.told


def test_a_wrong_root_is_one_problem(archive: Path) -> None:
    (archive / "empty").mkdir()
    assert "no file of 24 rows in" in problem(table(archive, root=str(archive / "empty")))
    assert "does not exist" in problem(table(archive, root=str(archive / "gone")))


def test_names_without_their_ends_and_paths_of_windows(archive: Path) -> None:
    text = text_of(archive).replace(".png", "").replace("images/", "images\\")
    assert len(table(archive, written(archive, text), suffix=".png").load(GEOMETRY, "x", 0)) == 24
    assert "`suffix` adds what the table leaves out" in problem(table(archive, written(archive, text)))


def test_rows_that_repeat_count_once_and_rows_that_contradict_are_named(archive: Path) -> None:
    lines = text_of(archive).splitlines()
    twice = table(archive, written(archive, "\n".join([*lines, lines[2].replace("images/", "./images//"), lines[3]])))
    assert twice.check() == []
    assert len(twice.load(GEOMETRY, "x", 0)) == 24
    assert twice.remarks() == ["rows that repeat another, and count once: 2"]
    for wrong, key in ((",nev,", "label"), (",P9,", "patient"), (",south,", "domain"), (",test", "split")):
        right = {"label": ",mel,", "patient": ",P1,", "domain": ",north,", "split": ",train"}[key]
        said = problem(table(archive, written(archive, "\n".join([*lines, lines[2].replace(right, wrong)]), f"{key}.csv")))
        assert "2 rows (lines 3, 26)" in said, key
        assert f"one {key} for each file" in said


def test_a_full_path_below_the_root_is_the_same_file(archive: Path) -> None:
    """So one file is not counted twice, no two labels of it pass, and the expert stays the same where the folder moves."""
    lines = text_of(archive).splitlines()
    full = f"{archive}/{lines[2]}"
    twice = table(archive, written(archive, "\n".join([*lines, full])))
    assert twice.remarks() == ["rows that repeat another, and count once: 1"]
    wrong = table(archive, written(archive, "\n".join([*lines, full.replace(",mel,", ",nev,")]), "wrong.csv"))
    assert "2 rows (lines 3, 26)" in problem(wrong)
    whole = table(archive, written(archive, "\n".join([lines[0], *(f"{archive}/{line}" for line in lines[1:])]), "whole.csv"))
    assert whole.identity("x", 0) == table(archive).identity("x", 0)


def test_labels_that_are_numbers_need_names(archive: Path) -> None:
    text = text_of(archive).replace("mel", "1").replace("nev", "0.0")
    said = problem(table(archive, written(archive, text)))
    assert "numbers in column 'dx' ('0' (12 rows), '1' (12 rows)) and no names for them" in said
    assert "labels: {0: NAME, 1: NAME, ...}" in said
    source = table(archive, "other.csv", labels={0: "nevus", 1: "melanoma"})
    assert source.check() == []
    assert source.classes() == ("melanoma", "nevus")


def test_a_class_is_no_truth_value(archive: Path) -> None:
    """`{0: no, 1: yes}` were the classes `false` and `true`."""
    with pytest.raises(ValidationError, match=r"labels\.0\n.*valid string"):
        table(archive, labels={0: False, 1: True})


def test_a_column_of_measurements_is_no_label(archive: Path) -> None:
    lines = text_of(archive).splitlines()
    text = "\n".join([lines[0], *(line.replace("mel", f"{n}.5").replace("nev", f"{n}.25") for n, line in enumerate(lines[1:]))])
    assert "24 different labels in 24 rows" in problem(table(archive, written(archive, text)))


def test_labels_must_be_mapped_and_may_be_left_out(archive: Path) -> None:
    text = text_of(archive) + "images/2000/IM0000b.png,unclear,P1,north,train\nimages/2000/IM0000c.png,,P1,north,train\n"
    name = written(archive, text)
    names = {"mel": "melanoma", "nev": "nevus"}
    assert "column 'dx' empty in 1 rows (lines 27)" in problem(table(archive, name, labels=names | {"unclear": None}))
    assert "nothing for 'unclear' (1 rows)" in problem(table(archive, name, labels=names | {"": None}))
    source = table(archive, name, labels=names | {"unclear": None, "": None, "bcc": "carcinoma"})
    assert source.check() == []
    assert source.classes() == ("carcinoma", "melanoma", "nevus")
    assert source.remarks() == ["rows left out, for labels gives their label no class: 2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("mel,P1,north", "mel;P1;north", 1), "1 rows of another number of cells"),
        (lambda text: text.replace("mel,P1,north", "mel;P1;north", 1), "it holds a semicolon, as if separators were mixed"),
        (lambda text: text.replace("mel,P1", "mel,dysplastic,P1", 1), "e.g. 6 in line 3"),
        (lambda text: text.replace("file,", "mrn,", 1), "1 names of columns twice, e.g. 'mrn'"),
        (lambda text: text.replace("file,", "File,", 1), "columns.path: found 'file', which the table has not"),
        (lambda text: text.replace(",P1,", ",,", 1), "column 'mrn' empty in 1 rows (lines 3)"),
        (lambda text: text.replace(",P1,", ",1.23E+11,"), "column 'mrn', such as 1.23E+11: 3 rows (lines 3, 11, 19)"),
        (lambda text: text.replace(",P1,", ",1.2345678901234568e+16,", 1), "such as 1.2345678901234568e+16: 1 rows (lines 3)"),
        (lambda text: text.replace("images/2001/IM0001.png", "", 1), "column 'file' empty in 1 rows (lines 3)"),
        (lambda text: text.replace("mel", "Nev ", 3), "which differ in case only"),
        (lambda text: text.splitlines()[0], "no row below the names of the columns"),
        (lambda _: "", "which is empty"),
        (lambda _: "file\na.png\n", "one column only"),
        (lambda text: text.replace("images", '"images', 1), "a line that is no CSV"),
    ],
)
def test_a_table_that_cannot_be_is_one_problem(archive: Path, change: Any, said: str) -> None:
    assert said in problem(table(archive, written(archive, change(text_of(archive)))))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04rest", "an Excel workbook or another zip archive"),
        (b"\xff\xfef\0i\0", "text in UTF-16"),
        ("file,dx\na.png,näv\n".encode("latin-1"), "which is not UTF-8 (byte 0xe4 in line 2)"),
    ],
)
def test_what_is_no_table_is_told_by_its_bytes(archive: Path, data: bytes, said: str) -> None:
    (archive / "other.csv").write_bytes(data)
    assert said in problem(table(archive, "other.csv"))


def test_a_file_that_is_not_there(archive: Path) -> None:
    assert "which does not exist" in problem(table(archive, "gone.csv"))
    assert "which is a folder" in problem(table(archive, "images"))
    with pytest.raises(ValidationError, match="no encoding 'latin-99'"):
        table(archive, encoding="latin-99")


def test_excels_own_first_line_and_quoted_names(archive: Path) -> None:
    text = "sep=;\n" + text_of(archive).replace(",", ";").replace("file;", '"file; with a note";', 1)
    source = table(archive, written(archive, text), columns={**COLUMNS, "path": "file; with a note"})
    assert source.check() == []
    assert len(source.load(GEOMETRY, "x", 0)) == 24


def test_other_labels_or_patients_are_another_identity(archive: Path) -> None:
    before = table(archive).identity("x", 0)
    for right, wrong in (("mel", "bcc"), ("P1", "P2")):
        assert table(archive, written(archive, text_of(archive).replace(right, wrong))).identity("x", 0) != before
    renamed = table(archive, written(archive, text_of(archive).replace(",P", ",patient ")))
    assert renamed.identity("x", 0) == before


def test_truth_values_of_yaml_are_those_of_the_table(archive: Path) -> None:
    for sick, well in (("True", "False"), ("yes", "no"), ("TRUE", "FALSE")):
        text = text_of(archive).replace("mel", sick).replace("nev", well)
        source = table(archive, written(archive, text), labels={True: "sick", False: "well"})
        assert source.check() == []
        assert source.classes() == ("sick", "well")


def test_sites_of_one_table_know_each_others_patients_without_a_key(archive: Path) -> None:
    """In this process alone: what leaves needs a key."""
    north, south = (table(archive, folders=[name]).pseudonyms() for name in ("north", "south"))
    assert north is not None
    assert south is not None
    assert north.secret == south.secret
    assert len(north.patients & south.patients) == 8


@pytest.mark.parametrize("nothing", ["nan", "NaN", "NaT", "<NA>"])
@pytest.mark.parametrize(("key", "cell"), [("label", "mel"), ("patient", "P1")])
def test_what_programs_write_for_an_empty_cell_is_one(archive: Path, nothing: str, key: str, cell: str) -> None:
    """It is neither a class NaN, nor one patient of that name who has all these images."""
    found, empty = (
        problem(table(archive, written(archive, text_of(archive).replace(f",{cell},", f",{there},")))) for there in (nothing, "")
    )
    assert found == empty
    assert COLUMNS[key] in found


@pytest.mark.parametrize(
    ("encoding", "given"),
    [("utf-8-sig", "cp1252"), ("utf-16", "utf-16-le"), ("utf-32", "utf-32"), ("utf-16-le", "utf-16-le"), ("utf-8", "utf-8-sig")],
)
def test_a_byte_order_mark_is_no_part_of_a_name(archive: Path, encoding: str, given: str) -> None:
    name = written(archive, text_of(archive), encoding=encoding)
    assert table(archive, name, encoding=given).check() == []


@pytest.mark.parametrize("encoding", ["base64", "rot13", "undefined"])
def test_an_encoding_of_no_text_is_unknown(archive: Path, encoding: str) -> None:
    with pytest.raises(ValidationError, match=f"no encoding '{encoding}'"):
        table(archive, encoding=encoding)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("images/\0.png,mel,P1,north,train", "NUL characters in"),
        ('images/2000/IM0000.png,"a\nb",P1,north,train', "'a\\nb' as the name of a class"),
    ],
)
def test_cells_that_are_no_names_are_named(archive: Path, text: str, found: str) -> None:
    assert found in problem(table(archive, written(archive, f"{HEADER}\n{text}\n")))
    assert "Then set encoding: utf-16-le" in problem(table(archive, written(archive, text_of(archive), encoding="utf-16-le")))
    assert "'' as the name of a class" in problem(table(archive, labels={"mel": "", "nev": "nevus"}))


def test_keys_of_yaml_are_read_as_cells_are(archive: Path) -> None:
    text = text_of(archive).replace(",mel,", ",1.0,").replace(",nev,", ",2020-01-02,").replace(",north,", ",7.0,")
    source = table(archive, written(archive, text), labels={1.0: "mel", date(2020, 1, 2): "nev"}, folders=[7.0])
    assert source.check() == []
    assert source.classes() == ("mel", "nev")


def test_a_parquet_index_named_as_a_column_is_named(archive: Path) -> None:
    frame = pd.DataFrame({"file": ["a", "b"], "dx": ["x", "y"]}, index=pd.Index([0, 1], name="dx"))
    frame.to_parquet(archive / "t.parquet")
    assert "1 names of columns twice, e.g. 'dx'" in problem(table(archive, "t.parquet", columns={"path": "file", "label": "dx"}))


def test_a_patient_written_in_two_ways_is_one(archive: Path) -> None:
    lines = text_of(archive).splitlines()
    written(archive, "\n".join(line.replace(",P1,", ",p1 ,") if at % 3 else line for at, line in enumerate(lines)))
    groups = table(archive, "other.csv").load(GEOMETRY, "x", 0).groups
    assert np.array_equal(groups, table(archive).load(GEOMETRY, "x", 0).groups)


def test_init_reads_a_table_in_utf_16_and_says_what_is_wrong_with_another(archive: Path) -> None:
    found = survey(archive / written(archive, text_of(archive), encoding="utf-16"))
    assert (len(found.rows), found.source["encoding"]) == (24, "utf-16")
    with pytest.raises(DataError, match=r"found one column only in the first line of .*; expected columns parted by comma"):
        survey(archive / written(archive, text_of(archive).replace(",", "|")))


def test_init_leaves_out_files_whose_names_cannot_stand_in_a_table(tmp_path: Path) -> None:
    for number, (site, label) in enumerate([("a", "mel"), ("a", "nev"), ("b", "mel"), ("b", "nev")]):
        (tmp_path / site / label).mkdir(parents=True)
        Image.new("L", (10, 10), number).save(tmp_path / site / label / "1.png")
    (tmp_path / "a" / "readme.txt").touch()  # so that a table has to be written
    for name in (b"\xff.png", b" 2.png", b"a\\3.png"):
        Path(os.fsdecode(os.fsencode(tmp_path / "a" / "mel") + b"/" + name)).touch()
    found = survey(tmp_path)
    assert (len(found.rows), found.listed) == (5, True)
    assert "images left out, for their names cannot stand in a table: 2" in found.said
