"""Skin lesions: ISIC 2019, whole or divided by artifacts, and for tests of its experts PH2, PAD-UFES-20 and Derm7pt.

`task: melanoma` has the classes melanoma and benign. Carcinomas (BCC, SCC) and actinic keratoses are then left out of all data
sets, because the annotation of artifacts leaves them out of ISIC 2019. `task: diagnosis` has the eight diagnoses of ISIC 2019:
MEL, NV, BCC, AK, BKL, DF, VASC, SCC (25,331 images). The other data sets get the same names for the diagnoses that they have:
PH2 (200 images); PAD-UFES-20 (2,298; its SCC includes Bowen's disease); Derm7pt (987 of each domain; its lentigines are BKL, as
in ISIC; melanosis and `miscellaneous` have no name in ISIC and are left out). ISIC 2019 by artifacts has only five diagnoses:
no image of BCC, AK or SCC is annotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedmerge.data.datasets._public import Public, Published, Row, files_below, listed

CLASSES = ("benign", "melanoma")
MELANOMA = {"MEL": "melanoma", **dict.fromkeys(("NV", "BKL", "DF", "VASC"), "benign")}
"""Of the diagnoses, those that are asked for where the question is melanoma or benign."""
DIAGNOSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
UNKNOWN = "UNK"
"""The last column of the official answers: none of the eight."""
PAD = {"MEL": "MEL", "NEV": "NV", "BCC": "BCC", "ACK": "AK", "SEK": "BKL", "SCC": "SCC"}
PH2 = {"0": "NV", "1": "NV", "2": "MEL"}
DERM7PT = {
    "basal cell carcinoma": "BCC",
    "seborrheic keratosis": "BKL",
    "lentigo": "BKL",
    "dermatofibroma": "DF",
    "vascular lesion": "VASC",
    **dict.fromkeys(("melanosis", "miscellaneous"), UNKNOWN),
}
"""What is neither a nevus nor a melanoma by its first or last word."""
OF_DIAGNOSES = {"isic2019": 25_331, "ph2": 200, "pad_ufes_20": 2_298, "derm": 987, "clinic": 987}
"""Images of each domain with one of the eight diagnoses."""
ARTIFACTS = ("dark_corner", "gel_bubble", "hair", "ruler")
CLEAR = 0.65
"""Probability of an artifact up to which an image counts as clean, as in EPVT (Yan et al., MICCAI 2023, data_proc/grouping.py)."""

ISIC_WHERE = "challenge.isic-archive.com/data/#2019"
ISIC_LAYOUT = "ISIC_2019_Training_Input/*.jpg, ISIC_2019_Training_GroundTruth.csv and ISIC_2019_Training_Metadata.csv"
ISIC_PAPERS = "Tschandl et al. 2018; Codella et al. 2018; Combalia et al. 2019 (BCN_20000)"


class Isic(Public):
    """All have the same classes, so that a scenario may mix them."""

    published: ClassVar = {
        "isic2019": Published(
            title="ISIC 2019",
            classes=CLASSES,
            images={"isic2019": 20_513},
            layout=ISIC_LAYOUT,
            license="CC BY-NC 4.0",
            citation=ISIC_PAPERS,
            where=ISIC_WHERE,
            patients="lesions",
        ),
        "isic2019_artifacts": Published(
            title="ISIC 2019 by artifacts",
            classes=CLASSES,
            images=dict.fromkeys(("clean", *ARTIFACTS), 0),
            layout=f"{ISIC_LAYOUT}, and isic_inferred_wocarcinoma.csv",
            license="CC BY-NC 4.0",
            citation=f"{ISIC_PAPERS}; Bissoto et al., Artifact-based domain generalization, ECCV workshops 2022",
            where=f"{ISIC_WHERE}, and github.com/alceubissoto/artifact-generalization-skin for the CSV",
            patients="lesions",
            unverified="how many images each group has: nobody publishes it",
        ),
        "ph2": Published(
            title="PH2",
            classes=CLASSES,
            images={"ph2": 200},
            layout="PH2_dataset.txt and 'PH2 Dataset images'/<IMD>/<IMD>_Dermoscopic_Image/<IMD>.bmp",
            license="research and education; copies may not be passed on",
            citation="Mendonca et al., PH2: a dermoscopic image database, EMBC 2013",
            where="fc.up.pt/addi/ph2%20database.html",
            inside=("PH2Dataset",),
        ),
        "pad_ufes_20": Published(
            title="PAD-UFES-20",
            classes=CLASSES,
            images={"pad_ufes_20": 531},
            layout="metadata.csv and images/imgs_part_<1, 2, 3>/*.png",
            license="CC BY 4.0",
            citation="Pacheco et al., PAD-UFES-20, Data in Brief 32, 2020",
            where="data.mendeley.com/datasets/zr7vgbcyr2",
            patients="patients",
        ),
        "derm7pt": Published(
            title="Derm7pt",
            classes=CLASSES,
            images={"derm": 969, "clinic": 969},
            layout="release_v0/ with meta/meta.csv, meta/<train, valid, test>_indexes.csv and images/",
            license="research, on request",
            citation="Kawahara et al., Seven-point checklist and skin lesion classification, IEEE JBHI 23, 2019",
            where="derm.cs.sfu.ca",
            inside=("release_v0",),
            parts=("train", "valid", "test"),
            patients="cases",
        ),
    }

    dataset: Literal["isic2019", "isic2019_artifacts", "ph2", "pad_ufes_20", "derm7pt"] = Field(description="name of the data set")
    task: Literal["melanoma", "diagnosis"] = Field(
        "melanoma", description="classes: melanoma and benign, or the eight diagnoses of ISIC 2019"
    )

    @property
    def facts(self) -> Published:
        """What was published of the chosen data set, with the images and classes of the task."""
        facts = super().facts
        if self.task == "melanoma":
            return facts
        images: Mapping[str, int] = {name: OF_DIAGNOSES.get(name, count) for name, count in facts.images.items()}
        return replace(facts, classes=DIAGNOSES, images=images)

    def _label(self, diagnosis: str) -> str | None:
        """The class of a diagnosis; None if its images are left out."""
        return MELANOMA.get(diagnosis) if self.task == "melanoma" else diagnosis if diagnosis in DIAGNOSES else None

    def _rows(self, root: Path) -> list[Row]:
        return {
            "isic2019": self._isic2019,
            "isic2019_artifacts": self._artifacts,
            "ph2": self._ph2,
            "pad_ufes_20": self._pad_ufes_20,
            "derm7pt": self._derm7pt,
        }[self.dataset](root)

    def _isic2019(self, root: Path) -> list[Row]:
        lesions, rows = self._lesions(root), []
        for image, diagnosis in self._diagnoses(root).items():
            if label := self._label(diagnosis):
                rows.append(listed(_jpg(image), label, "isic2019", lesions.get(image) or image))
        return rows

    def _diagnoses(self, root: Path) -> dict[str, str]:
        """The official answers have a column for each diagnosis, with 1 in one of them and 0 in the others."""
        file, found = root / "ISIC_2019_Training_GroundTruth.csv", {}
        for image, *marks in self._table(file, ("image", *DIAGNOSES, UNKNOWN)):
            given = [name for name, mark in zip((*DIAGNOSES, UNKNOWN), marks, strict=True) if self._number(mark, file) == 1]
            if len(given) != 1:
                said = f"{len(given)} diagnoses of '{image}' in {file.name} ({', '.join(given) or 'no column holds 1'})"
                raise self._wrong(said, "one for every image: 1 in its column and 0 in the others")
            found[image] = given[0]
        return found

    def _artifacts(self, root: Path) -> list[Row]:
        """Every image belongs to its most probable artifact, or to none where that is not probable enough."""
        file, lesions, rows = root / "isic_inferred_wocarcinoma.csv", self._lesions(root), []
        diagnoses = self._diagnoses(root) if self.task == "diagnosis" else {}
        for image, label, *marks in self._table(file, ("image", "label", *ARTIFACTS)):
            most, artifact = max(zip((self._number(mark, file) for mark in marks), ARTIFACTS, strict=True))
            if label not in ("0", "1"):
                raise self._wrong(f"the label '{label}' in a row of {file.name}", "0, benign, or 1, melanoma")
            if diagnoses and image not in diagnoses:
                raise self._wrong(f"'{image}' in {file.name} and not in ISIC_2019_Training_GroundTruth.csv", "its diagnosis there")
            kind = self._label(diagnoses[image]) if diagnoses else CLASSES[int(label)]
            if kind:
                domain = artifact if most > CLEAR else "clean"
                rows.append(listed(_jpg(image), kind, domain, lesions.get(image) or image))
        return rows

    def _lesions(self, root: Path) -> dict[str, str]:
        """The lesion of each image, of some nothing."""
        return dict(self._table(root / "ISIC_2019_Training_Metadata.csv", ("image", "lesion_id")))  # type: ignore[arg-type]

    def _number(self, text: str, file: Path) -> float:
        try:
            return float(text)
        except ValueError:
            raise self._wrong(f"'{text}' where a number is due in {file.name}", "numbers from 0 to 1") from None

    def _ph2(self, root: Path) -> list[Row]:
        """A text with || between cells: name, histological and clinical diagnosis (0 and 1: nevi, 2: melanoma), and more."""
        rows = []
        try:
            text = (root / "PH2_dataset.txt").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise self._wrong(f"no PH2_dataset.txt in '{root}'") from None
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.split("||")]
            if len(cells) > 3 and cells[1].startswith("IMD") and (label := self._label(PH2.get(cells[3], UNKNOWN))):
                name = cells[1]
                rows.append(listed(f"PH2 Dataset images/{name}/{name}_Dermoscopic_Image/{name}.bmp", label, "ph2"))
        return rows

    def _pad_ufes_20(self, root: Path) -> list[Row]:
        files = files_below(root, ("images", "imgs_part_1", "imgs_part_2", "imgs_part_3"))
        rows = []
        for image, diagnosis, patient in self._table(root / "metadata.csv", ("img_id", "diagnostic", "patient_id")):
            if diagnosis not in PAD:
                raise self._wrong(f"the diagnosis '{diagnosis}' in metadata.csv", f"one of {', '.join(PAD)}")
            if label := self._label(PAD[diagnosis]):
                path = files.get(Path(image).stem.casefold(), f"images/{image}")
                rows.append(listed(path, label, "pad_ufes_20", patient))
        return rows

    def _derm7pt(self, root: Path) -> list[Row]:
        """Two images of each case: through a dermatoscope, and of the skin as it looks."""
        parts = {place: part for part in self.facts.parts for place in self._indexes(root / f"meta/{part}_indexes.csv")}
        cases = self._table(root / "meta/meta.csv", ("case_num", "diagnosis", "derm", "clinic"))
        rows = []
        for number, (case, diagnosis, derm, clinic) in enumerate(cases):
            if label := self._derm7pt_label(diagnosis):
                for domain, path in (("derm", derm), ("clinic", clinic)):
                    rows.append(listed(f"images/{path}", label, domain, case, parts.get(number, "")))
        return rows

    def _derm7pt_label(self, diagnosis: str) -> str | None:
        """Of whatever is no melanoma and no carcinoma, benign; as a diagnosis, what ISIC calls it."""
        if diagnosis.startswith("melanoma"):
            return self._label("MEL")
        if self.task == "melanoma":
            return None if diagnosis == "basal cell carcinoma" else "benign"
        nevus = diagnosis.endswith("nevus")
        if not nevus and diagnosis not in DERM7PT:
            raise self._wrong(f"the diagnosis '{diagnosis}' in meta.csv", f"a melanoma, a nevus, or one of {', '.join(DERM7PT)}")
        return self._label("NV" if nevus else DERM7PT[diagnosis])

    def _indexes(self, file: Path) -> list[int]:
        """Places of cases in the table, from 0: a line for each below the word `indexes`."""
        try:
            return [int(line) for line in file.read_text(encoding="utf-8").split()[1:]]
        except (FileNotFoundError, ValueError) as error:
            raise self._wrong(f"'{file}', which is missing or holds no numbers ({error})") from None


def _jpg(image: str) -> str:
    return f"ISIC_2019_Training_Input/{image}.jpg"
