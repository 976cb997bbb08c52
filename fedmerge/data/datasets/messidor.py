"""Diabetic retinopathy in images of the eye's fundus: Messidor, from three hospitals, and Messidor-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedmerge.data.datasets._public import Public, Published, Row, files_below, listed
from fedmerge.errors import extras_named

BASES = {"lariboisiere": "1", "saint_etienne": "2", "brest": "3"}
"""Hospitals, and the first digit of the archives that hold their images: Base11 to Base14, and so on."""

REFERABLE = 2
"""Grade from which on a patient is sent to an eye doctor, on both scales."""


class Messidor(Public):
    """Grades of the two are on different scales, 0 to 3 and the ICDR's 0 to 4; `task: referable` asks the same of both."""

    published: ClassVar = {
        "messidor": Published(
            title="Messidor",
            classes=("grade 0", "grade 1", "grade 2", "grade 3"),
            images=dict.fromkeys(BASES, 400),
            layout="Base11/ to Base34/ with *.tif, and Annotation_Base11.xls to Annotation_Base34.xls, or .csv",
            license="research and education, on request",
            citation="Decenciere et al., Feedback on a publicly distributed image database, Image Analysis & Stereology 33, 2014",
            where="adcis.net/en/third-party/messidor",
        ),
        "messidor2": Published(
            title="Messidor-2",
            classes=("no retinopathy", "mild", "moderate", "severe", "proliferative"),
            images={"messidor2": 1744},
            layout="IMAGES/ and messidor_data.csv; messidor-2.csv, if it is there, says which two eyes are one patient's",
            license="research and education, on request",
            citation="Abramoff et al., JAMA Ophthalmology 131, 2013; grades: Krause et al., Ophthalmology 125, 2018",
            where="adcis.net/en/third-party/messidor2; grades: kaggle.com/datasets/google-brain/messidor2-dr-grades",
            patients="examinations",
        ),
    }

    dataset: Literal["messidor", "messidor2"] = Field(description="name of the data set")
    task: Literal["grade", "referable"] = Field("grade", description=f"referable: grades from {REFERABLE} on against those below")

    def classes(self) -> tuple[str, ...]:
        """Grades as published, or whether to refer."""
        return self.facts.classes if self.task == "grade" else ("not referable", "referable")

    def _rows(self, root: Path) -> list[Row]:
        return self._messidor(root) if self.dataset == "messidor" else self._messidor2(root)

    def _label(self, grade: str, place: str) -> str:
        if grade not in {str(number) for number in range(len(self.facts.classes))}:
            raise self._wrong(f"the grade '{grade}' in {place}", f"0 to {len(self.facts.classes) - 1}")
        return self.classes()[int(grade) if self.task == "grade" else int(int(grade) >= REFERABLE)]

    def _messidor(self, root: Path) -> list[Row]:
        rows = []
        for hospital in self.domains():
            for number in "1234":
                base = f"Base{BASES[hospital]}{number}"
                files = files_below(root, (base,))
                for image, grade in self._annotations(root, base):
                    path = files.get(Path(image).stem.casefold(), f"{base}/{image}")
                    rows.append(listed(path, self._label(grade, f"the annotations of {base}"), hospital))
        return rows

    def _annotations(self, root: Path, base: str) -> list[tuple[str, ...]]:
        """Names and grades of one archive, from its table: a CSV before the published .xls, later corrections before the first."""
        names = sorted(
            (file for place in (root, root / base) if place.is_dir() for file in place.glob(f"Annotation_{base}*")),
            key=lambda file: (file.suffix.casefold() != ".csv", -len(file.name)),
        )
        names = [file for file in names if file.suffix.casefold() in (".csv", ".xls")]
        if not names:
            raise self._wrong(f"no Annotation_{base}.xls in '{root}'")
        if names[0].suffix.casefold() == ".csv":
            return self._table(names[0], ("Image name", "Retinopathy grade"))
        return self._sheet(names[0])

    def _sheet(self, file: Path) -> list[tuple[str, ...]]:
        """The first and third column of the first sheet."""
        with extras_named():
            import xlrd
        try:
            sheet: Any = xlrd.open_workbook(str(file)).sheet_by_index(0)
            return [(str(sheet.cell_value(at, 0)), f"{float(sheet.cell_value(at, 2)):.0f}") for at in range(1, sheet.nrows)]
        except (xlrd.XLRDError, IndexError, ValueError, AssertionError) as error:
            found = f"'{file}', which cannot be read ({error})"
            expected = "a workbook of Excel 97 with 'Image name' and 'Retinopathy grade' in its first and third column"
            raise self._wrong(found, expected) from None

    def _messidor2(self, root: Path) -> list[Row]:
        """Images without a grade could not be graded."""
        files, patients = files_below(root, ("IMAGES", "images")), self._pairs(root)
        rows = []
        for image, grade in self._table(root / "messidor_data.csv", ("image_id", "adjudicated_dr_grade")):
            if grade:
                stem = Path(image).stem.casefold()
                label = self._label(grade, "messidor_data.csv")
                rows.append(listed(files.get(stem, f"IMAGES/{image}"), label, "messidor2", patients.get(stem, stem)))
        return rows

    def _pairs(self, root: Path) -> dict[str, str]:
        """The examination of each image: two in each row. Without the file, every image is a patient."""
        if not (root / "messidor-2.csv").is_file():
            return {}
        pairs = self._table(root / "messidor-2.csv", ("left", "right"))
        return {Path(image).stem.casefold(): str(number) for number, pair in enumerate(pairs) for image in pair}
