"""Public data sets, each from small files in its own format: classes, domains, parts, patients, counts, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xlwt
import yaml
from PIL import Image

from fedmerge.data.datasets import _public
from fedmerge.data.datasets._base import SOURCES, Geometry, Source
from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.experiment.validation.sites import copied
from fedmerge.federated.site import Site

GEOMETRY = Geometry(8, 3)


def image(file: Path, value: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value % 256, np.uint8)).save(file)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def domainbed(root: Path, dataset: str = "pacs", folder: str = "PACS") -> None:
    facts = SOURCES.load("domainbed").published[dataset]
    for d, domain in enumerate(facts.images):
        for c, label in enumerate(facts.classes):
            image(root / folder / domain / label / "pic_1.png", 20 * d + c)


def histopantum(root: Path) -> None:
    for d, domain in enumerate(("colon", "ovarian", "stomach", "uterus")):
        for c, label in enumerate(("non_tumor", "tumor")):
            image(root / "HistoPANTUM" / domain / label / "a.png", 40 * d + c)


def camelyon17(root: Path) -> None:
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for number in range(20):
        patient, center, tumor = f"{number // 2:03d}", number // 4, number % 2
        lines.append(f"{number},{patient},1,{number},7,{tumor},{number // 2},{center},{int(number % 4 == 3)}")
        folder = f"patient_{patient}_node_1"
        image(root / f"camelyon17_v1.0/patches/{folder}/patch_{folder}_x_{number}_y_7.png", number)
    write(root / "camelyon17_v1.0/metadata.csv", "\n".join(lines))


def midog_atypical(root: Path) -> None:
    lines = ["image_id,filename,coordinateX,coordinateY,Tumor,Scanner,Origin,Species,expert1,expert2,expert3,majority"]
    tumors = list(SOURCES.load("midog_atypical").published["midog_atypical"].images)
    for number in range(14):
        label = "AMF" if number % 2 else "NMF"
        lines.append(f"{number}.png,{number // 2}.tiff,1,2,{tumors[number // 2]},X,Y,Z,{label},{label},,{label}")
        image(root / f"MIDOG25_Binary_Classification_Train_Set/{number}.png", number)
    write(root / "MIDOG25_Atypical_Classification_Train_Set.csv", "\n".join(lines))


def isic2019(root: Path) -> None:
    names = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    truth, meta = ["image," + ",".join(names)], ["image,age_approx,anatom_site_general,lesion_id,sex"]
    artifacts = [",image,dark_corner,hair,gel_border,gel_bubble,ruler,ink,patches,label,label_string,vasc"]
    kinds = ["0.9,0.1,0.9,0.2,0.3", "0.1,0.8,0.9,0.2,0.3", "0.1,0.2,0.9,0.7,0.3", "0.1,0.2,0.1,0.2,0.95", "0.5,0.6,0.99,0.2,0.3"]
    for number in range(20):
        name, label = f"ISIC_{number:07d}", names[number % 8]
        truth.append(f"{name}," + ",".join("1.0" if one == label else "0.0" for one in names))
        meta.append(f"{name},55.0,torso,{f'HAM_{number // 8}' if number % 8 else ''},male")
        if label in ("MEL", "NV", "BKL", "DF", "VASC"):
            artifacts.append(f"{number},{name},{kinds[number % 5]},0.9,0.99,{int(label == 'MEL')},x,0")
        image(root / f"ISIC_2019_Training_Input/{name}.jpg", number)
    write(root / "ISIC_2019_Training_GroundTruth.csv", "\n".join(truth))
    write(root / "ISIC_2019_Training_Metadata.csv", "\n".join(meta))
    write(root / "isic_inferred_wocarcinoma.csv", "\n".join(artifacts))


def ph2(root: Path) -> None:
    lines = ["||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry || Colors ||"]
    for number, diagnosis in enumerate((0, 1, 2)):
        lines.append(f"|| IMD00{number} ||            ||         {diagnosis} ||    0 |   T |   A || 4 ||")
        folder = root / "PH2Dataset/PH2 Dataset images" / f"IMD00{number}"
        image(folder / f"IMD00{number}_Dermoscopic_Image/IMD00{number}.bmp", number)
        image(folder / f"IMD00{number}_lesion/IMD00{number}_lesion.bmp", number)
    write(
        root / "PH2Dataset/PH2_dataset.txt", "\n".join([*lines, "Legends:", "0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma."])
    )


def pad_ufes_20(root: Path) -> None:
    lines = ["patient_id,lesion_id,smoke,diagnostic,img_id"]
    for number, diagnosis in enumerate(("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")):
        lines.append(f"PAT_{number // 3},{number},,{diagnosis},PAT_{number}.png")
        image(root / f"images/imgs_part_{1 + number % 3}/imgs_part_{1 + number % 3}/PAT_{number}.png", number)
    write(root / "metadata.csv", "\n".join(lines))


def derm7pt(root: Path) -> None:
    diagnoses = (
        "basal cell carcinoma",
        "blue nevus",
        "melanoma (in situ)",
        "melanoma metastasis",
        "seborrheic keratosis",
        "lentigo",
    )
    lines = ["case_num,diagnosis,seven_point_score,clinic,derm"]
    for number, diagnosis in enumerate(diagnoses):
        lines.append(f"{number + 1},{diagnosis},1,NEL/Nel{number}.jpg,NEL/Ndl{number}.jpg")
        image(root / f"release_v0/images/NEL/Nel{number}.jpg", number)
        image(root / f"release_v0/images/NEL/Ndl{number}.jpg", 50 + number)
    write(root / "release_v0/meta/meta.csv", "\n".join(lines))
    for part, places in (("train", (0, 1, 2)), ("valid", (3,)), ("test", (4, 5))):
        write(root / f"release_v0/meta/{part}_indexes.csv", "\n".join(["indexes", *map(str, places)]))


def messidor(root: Path, csv: bool = False) -> None:
    for hospital in "123":
        for archive in "1234":
            base, rows = f"Base{hospital}{archive}", []
            for grade in range(4):
                name = f"2005_{base}_{grade}.tif"
                image(root / base / name, int(hospital + archive) + 50 * grade)
                rows.append((name, "dept", grade, 0))
            heads = ("Image name", "Ophthalmologic department", "Retinopathy grade", "Risk of macular edema ")
            if csv:
                write(root / f"Annotation_{base}.csv", "\n".join(",".join(map(str, row)) for row in (heads, *rows)))
                continue
            book = xlwt.Workbook()
            sheet = book.add_sheet("1")
            for r, cells in enumerate((heads, *rows)):
                for c, cell in enumerate(cells):
                    sheet.write(r, c, cell)
            book.save(str(root / f"Annotation_{base}.xls"))


def messidor2(root: Path) -> None:
    lines = ["image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"]
    for number in range(6):
        lines.append(f"im_{number}.png,{number if number < 5 else ''},0,{int(number < 5)}")
        image(root / f"IMAGES/im_{number}.{'JPG' if number % 2 else 'png'}", 30 * number)
    write(root / "messidor_data.csv", "\n".join(lines))
    write(root / "messidor-2.csv", "left;right\nim_0.png;im_1.png\nim_2.png;im_3.png\n")


def medimeta(root: Path) -> None:
    for dataset in ("organs_axial", "organs_coronal"):
        folder, labels = root / dataset, np.arange(9) % 3
        tasks = [
            {
                "task_name": "organ label",
                "task_target": "MULTICLASS_CLASSIFICATION",
                "labels": {0: "bladder", 1: "heart", 2: "liver"},
            },
            {"task_name": "many", "task_target": "MULTILABEL_CLASSIFICATION", "labels": {0: "a", 1: "b"}},
        ]
        info = {"id": dataset, "name": dataset, "tasks": tasks, "splits_num_samples": {"train": 5, "val": 2, "test": 2}}
        write(folder / "info.yaml", yaml.safe_dump(info))
        (folder / "task_labels").mkdir()
        np.save(folder / "task_labels/organ label.npy", labels)
        for part, places in (("train", range(5)), ("val", (5, 6)), ("test", (7, 8))):
            write(folder / f"splits/{part}.txt", "\n".join(f"images/{place:06d}.tiff" for place in places))
        for number in range(9):
            image(folder / f"images/{number:06d}.tiff", 20 * number)


def medmnist(root: Path, dataset: str = "organamnist", size: int = 28, **other: Any) -> None:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 22), ("val", 11), ("test", 12)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 11)[:, None].astype(np.uint8)
    end = "" if size == 28 else f"_{size}"
    np.savez_compressed(root / f"{dataset}{end}.npz", **(other or arrays))


def source(kind: str, root: Path, **fields: Any) -> Source:
    fields = {"kind": kind, "root": str(root), "check_counts": False, **fields}
    return Site.model_validate({"name": "here", "source": fields}).source


def loaded(kind: str, root: Path, **fields: Any) -> Images:
    found = source(kind, root, **fields)
    assert found.check() == []
    return found.load(GEOMETRY, "here", 0)


def said(kind: str, root: Path, **fields: Any) -> str:
    problems = source(kind, root, **fields).check()
    assert len(problems) == 1
    return str(problems[0])


def by_domain(images: Images) -> dict[str, int]:
    return dict(Counter(images.domain_names[at] for at in images.domains.tolist()))


CASES: list[tuple[Callable[[Path], None], str, dict[str, Any], dict[str, int]]] = [
    (domainbed, "domainbed", {"dataset": "pacs"}, {"art_painting": 7, "cartoon": 7, "photo": 7, "sketch": 7}),
    (histopantum, "histopantum", {}, {"colon": 2, "ovarian": 2, "stomach": 2, "uterus": 2}),
    (camelyon17, "camelyon17", {}, {f"hospital_{number}": 4 for number in range(5)}),
    (midog_atypical, "midog_atypical", {"folders": ["human melanoma"]}, {"human melanoma": 2}),
    (isic2019, "isic", {"dataset": "isic2019"}, {"isic2019": 12}),
    (isic2019, "isic", {"dataset": "isic2019_artifacts"}, {"clean": 3, "dark_corner": 2, "gel_bubble": 2, "hair": 3, "ruler": 2}),
    (ph2, "isic", {"dataset": "ph2"}, {"ph2": 3}),
    (pad_ufes_20, "isic", {"dataset": "pad_ufes_20"}, {"pad_ufes_20": 3}),
    (derm7pt, "isic", {"dataset": "derm7pt"}, {"derm": 5, "clinic": 5}),
    (isic2019, "isic", {"dataset": "isic2019", "task": "diagnosis"}, {"isic2019": 20}),
    (messidor, "messidor", {"dataset": "messidor"}, {"lariboisiere": 16, "saint_etienne": 16, "brest": 16}),
    (messidor2, "messidor", {"dataset": "messidor2"}, {"messidor2": 5}),
    (medimeta, "medimeta", {"dataset": "organs_axial", "task": "organ label"}, {"organs_axial": 9}),
    (medmnist, "medmnist", {"datasets": ["organamnist"]}, {"organamnist": 45}),
]  # fmt: skip
WAYS = pytest.mark.parametrize(
    ("make", "kind", "fields", "images"), CASES, ids=[f"{c[1]}-{c[2].get('dataset', '')}" for c in CASES]
)


@WAYS
def test_the_official_layout_is_read(
    make: Callable[[Path], None], kind: str, fields: dict[str, Any], images: dict[str, int], tmp_path: Path
) -> None:
    make(tmp_path)
    found = loaded(kind, tmp_path, **fields)
    assert by_domain(found) == images
    assert found.pixels.shape == (sum(images.values()), 8, 8, 3)
    assert set(found.labels.tolist()) <= set(range(len(found.classes)))
    first = source(kind, tmp_path, **fields)
    assert first.identity("here", 0) == source(kind, tmp_path, **fields).identity("here", 0)
    assert len(first.holdings("here") or {}) == len(found)
    assert first.knows_patients or len(set(found.groups.tolist())) == len(found)


@WAYS
def test_a_root_that_is_not_there_says_where_to_get_it(
    make: Callable[[Path], None], kind: str, fields: dict[str, Any], images: dict[str, int], tmp_path: Path
) -> None:
    text = said(kind, tmp_path / "nowhere", **fields)
    assert "nowhere', which does not exist; expected the folder of" in text
    assert "The data: " in text
    with pytest.raises(DataError, match="nowhere"):
        source(kind, tmp_path / "nowhere", **fields).load(GEOMETRY, "here", 0)
    (tmp_path / "empty").mkdir()
    assert "The data: " in said(kind, tmp_path / "empty", **fields)


def test_every_record_is_complete() -> None:
    described = [SOURCES.load(name) for name in SOURCES.names if _public.published_by(SOURCES.load(name))]
    assert {kind.kind() for kind in described} == {case[1] for case in CASES}
    for kind in described:
        for facts in kind.published.values():  # type: ignore[attr-defined]
            assert all((facts.title, facts.layout, facts.license, facts.citation, facts.where))
            assert len(set(facts.classes)) == len(facts.classes)
            assert all(facts.images.values()) or facts.unverified or facts.total or not facts.images
    sums = {name: sum(facts.images.values()) for name, facts in SOURCES.load("domainbed").published.items()}  # type: ignore[attr-defined]
    assert sums == {"pacs": 9991, "vlcs": 10_729, "office_home": 15_588, "terra_incognita": 24_330}
    assert sum(SOURCES.load("camelyon17").published["camelyon17"].images.values()) == 455_954  # type: ignore[attr-defined]
    assert len(SOURCES.load("domainbed").published["office_home"].classes) == 65  # type: ignore[attr-defined]


@pytest.mark.parametrize(("make", "kind", "fields", "text"), [
    (domainbed, "domainbed", {"dataset": "pacs"}, "7 images of 'art_painting', not 2048; 7 images of 'cartoon', not 2344"),
    (camelyon17, "camelyon17", {"take": ["train"]}, "4 images of 'hospital_0', not 59436"),
    (ph2, "isic", {"dataset": "ph2"}, "3 images of 'ph2', not 200"),
    (messidor, "messidor", {"dataset": "messidor", "folders": ["brest"]}, "16 images of 'brest', not 400"),
    (medmnist, "medmnist", {"datasets": ["organamnist"]}, "22 images of 'train', not 34561"),
])  # fmt: skip
def test_another_number_of_images_is_refused(
    make: Callable[[Path], None], kind: str, fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    make(tmp_path)
    message = said(kind, tmp_path, check_counts=True, **fields)
    assert text in message
    assert "expected the published number. Get it again (" in message
    assert "check_counts: false" in message


def test_a_number_that_nobody_could_verify_is_told_and_not_refused(tmp_path: Path) -> None:
    domainbed(tmp_path, "terra_incognita", "terra_incognita")
    found = source("domainbed", tmp_path, dataset="terra_incognita", check_counts=True)
    assert found.check() == []
    assert any("10 images of 'location_38', not 9736 (published; 24,330 images in later papers" in line for line in found.remarks())


def test_one_image_that_is_missing(tmp_path: Path) -> None:
    camelyon17(tmp_path)
    next(tmp_path.rglob("patient_004*/*.png")).unlink()
    found = source("camelyon17", tmp_path)
    assert found.check() == []
    assert "images left out, for their file is missing: 1" in found.remarks()
    assert len(found.load(GEOMETRY, "here", 0)) == 19
    assert "1 of 20 images whose file is missing" in said("camelyon17", tmp_path, max_broken=0)


def test_parts_and_patients_of_camelyon17(tmp_path: Path) -> None:
    camelyon17(tmp_path)
    parts = {part: by_domain(loaded("camelyon17", tmp_path, take=[part])) for part in ("train", "val", "test")}
    assert parts == {
        "train": {"hospital_0": 3, "hospital_3": 3, "hospital_4": 3},
        "val": {"hospital_1": 4},
        "test": {"hospital_2": 4},
    }
    found = loaded("camelyon17", tmp_path)
    assert found.classes == ("normal", "tumor")
    assert found.labels.tolist() == [0, 1] * 10
    assert found.groups.tolist() == [number // 2 for number in range(20)]


def test_melanoma_is_the_same_question_everywhere(tmp_path: Path) -> None:
    for make in (isic2019, ph2, pad_ufes_20, derm7pt):
        make(tmp_path / make.__name__)
    melanomas = {
        dataset: int(loaded("isic", tmp_path / folder, dataset=dataset).labels.sum())
        for dataset, folder in (("isic2019", "isic2019"), ("ph2", "ph2"), ("pad_ufes_20", "pad_ufes_20"), ("derm7pt", "derm7pt"))
    }
    assert melanomas == {"isic2019": 3, "ph2": 1, "pad_ufes_20": 1, "derm7pt": 4}
    assert by_domain(loaded("isic", tmp_path / "derm7pt", dataset="derm7pt", take=["train", "valid"], folders=["derm"])) == {
        "derm": 3
    }


def test_eight_diagnoses_of_isic_have_one_name_everywhere(tmp_path: Path) -> None:
    """With the images that official files name: the row of each is 0.0 but for one 1.0."""
    diagnoses = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
    expected = {
        isic2019: {"MEL": 3, "NV": 3, "BCC": 3, "AK": 3, "BKL": 2, "DF": 2, "VASC": 2, "SCC": 2},
        ph2: {"NV": 2, "MEL": 1},
        pad_ufes_20: {"AK": 1, "BCC": 1, "MEL": 1, "NV": 1, "SCC": 1, "BKL": 1},
        derm7pt: {"BCC": 2, "NV": 2, "MEL": 4, "BKL": 4},
    }
    for make, counts in expected.items():
        make(tmp_path / make.__name__)
        found = loaded("isic", tmp_path / make.__name__, dataset=make.__name__, task="diagnosis")
        assert found.classes == diagnoses
        assert Counter(diagnoses[label] for label in found.labels.tolist()) == counts
    fields = {"dataset": "isic2019_artifacts", "task": "diagnosis"}
    found = loaded("isic", tmp_path / "isic2019", **fields)
    assert by_domain(found) == {"clean": 3, "dark_corner": 2, "gel_bubble": 2, "hair": 3, "ruler": 2}
    assert {diagnoses[label] for label in found.labels.tolist()} == {"MEL", "NV", "BKL", "DF", "VASC"}
    assert "20 images of 'isic2019', not 25331" in said(
        "isic", tmp_path / "isic2019", dataset="isic2019", task="diagnosis", check_counts=True
    )


def test_diagnoses_that_no_official_file_has(tmp_path: Path) -> None:
    for make in (isic2019, pad_ufes_20, derm7pt):
        make(tmp_path / make.__name__)
    meta = tmp_path / "derm7pt/release_v0/meta/meta.csv"
    meta.write_text(meta.read_text().replace("lentigo", "melanosis").replace("blue nevus", "wart"))
    fields = {"dataset": "derm7pt", "task": "diagnosis"}
    assert "the diagnosis 'wart' in meta.csv; expected a melanoma, a nevus, or one of" in said(
        "isic", tmp_path / "derm7pt", **fields
    )
    meta.write_text(meta.read_text().replace("wart", "reed or spitz nevus"))
    assert by_domain(loaded("isic", tmp_path / "derm7pt", **fields)) == {"derm": 5, "clinic": 5}  # melanosis is none of ISIC's
    meta = tmp_path / "pad_ufes_20/metadata.csv"
    meta.write_text(meta.read_text().replace("SEK", "seb"))
    assert "the diagnosis 'seb' in metadata.csv; expected one of MEL, NEV" in said(
        "isic", tmp_path / "pad_ufes_20", dataset="pad_ufes_20"
    )
    truth = tmp_path / "isic2019/ISIC_2019_Training_GroundTruth.csv"
    whole = truth.read_text()
    for old, new, text in (
        (
            "ISIC_0000000,1.0,0.0",
            "ISIC_0000000,1.0,1.0",
            "2 diagnoses of 'ISIC_0000000' in ISIC_2019_Training_GroundTruth.csv (MEL, NV)",
        ),
        ("ISIC_0000000,1.0", "ISIC_0000000,0.0", "0 diagnoses of 'ISIC_0000000'"),
        ("ISIC_0000000,1.0", "ISIC_0000000,yes", "'yes' where a number is due in ISIC_2019_Training_GroundTruth.csv"),
        ("BCC", "bcc", "no column BCC in"),
    ):
        truth.write_text(whole.replace(old, new))
        assert text in said("isic", tmp_path / "isic2019", dataset="isic2019")
    truth.write_text("\n".join(line for line in whole.splitlines() if "0000001" not in line))
    text = said("isic", tmp_path / "isic2019", dataset="isic2019_artifacts", task="diagnosis")
    assert "'ISIC_0000001' in isic_inferred_wocarcinoma.csv and not in ISIC_2019_Training_GroundTruth.csv" in text


def test_referable_retinopathy_is_the_same_question_for_both(tmp_path: Path) -> None:
    messidor(tmp_path / "csv", csv=True)
    messidor(tmp_path / "xls") if (tmp_path / "xls").mkdir() is None else None
    grades = loaded("messidor", tmp_path / "xls", dataset="messidor")
    assert np.array_equal(grades.labels, loaded("messidor", tmp_path / "csv", dataset="messidor").labels)
    assert np.bincount(grades.labels).tolist() == [12, 12, 12, 12]
    messidor2(tmp_path / "two")
    for dataset, folder, refer in (("messidor", "xls", 24), ("messidor2", "two", 3)):
        found = loaded("messidor", tmp_path / folder, dataset=dataset, task="referable")
        assert found.classes == ("not referable", "referable")
        assert int(found.labels.sum()) == refer


def test_medimeta_takes_names_and_parts_from_its_info(tmp_path: Path) -> None:
    medimeta(tmp_path)
    fields = {"dataset": "organs_axial", "task": "organ label"}
    found = loaded("medimeta", tmp_path, take=["train"], check_counts=True, **fields)
    assert found.classes == ("bladder", "heart", "liver")
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    (tmp_path / "organs_axial/images/000008.tiff").unlink()
    assert "1 images of 'test', not 2" in said("medimeta", tmp_path, check_counts=True, **fields)
    assert "no task 'organ'" in said("medimeta", tmp_path, dataset="organs_axial", task="organ")
    assert "did you mean 'organs_axial'?" in said("medimeta", tmp_path, dataset="organ_axial", task="organ label")
    assert "the task 'many', which is MULTILABEL" in said("medimeta", tmp_path, dataset="organs_axial", task="many")


def test_medmnist_of_any_size(tmp_path: Path) -> None:
    for dataset in ("organamnist", "organcmnist"):
        medmnist(tmp_path, dataset, 64)
    fields: dict[str, Any] = {"datasets": ["organcmnist", "organamnist"], "size": 64}
    found = loaded("medmnist", tmp_path, take=["test"], **fields)
    assert by_domain(found) == {"organcmnist": 12, "organamnist": 12}
    assert found.classes[:2] == ("bladder", "femur-left")
    with np.load(tmp_path / "organamnist_64.npz") as stored:
        whole = source("medmnist", tmp_path, **fields).load(Geometry(64, 1), "here", 0)
        assert np.array_equal(whole.pixels[45:67, ..., 0], stored["train_images"])
    halves = [loaded("medmnist", tmp_path, split={"by": "quantity", "part": part, "shares": [1, 1]}, **fields) for part in (0, 1)]
    assert sum(map(len, halves)) == len(whole)
    assert "no organamnist.npz, organcmnist.npz in" in said("medmnist", tmp_path, datasets=["organamnist", "organcmnist"])
    assert "expected data sets with the same classes" in said("medmnist", tmp_path, datasets=["organamnist", "bloodmnist"])


def test_copies_in_medmnist_are_counted_as_in_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    medmnist(tmp_path)
    with np.load(tmp_path / "organamnist.npz") as stored:
        arrays = dict(stored)
    images = arrays["train_images"]
    images[11], images[1], arrays["test_images"][3] = images[0], images[2], images[7]
    medmnist(tmp_path, **arrays)
    parts = {
        name: Site(name=name, source=source("medmnist", tmp_path, datasets=["organamnist"], take=list(take)))
        for name, take in (("north", ("train", "val")), ("south", ("test",)))
    }
    assert copied(list(parts.values()), ()) == [
        "site 'north': images with the same content as another, which validation may hold: 4; 2 of them are in different classes, "
        "as their own log says",
        "sites 'north' and 'south' have 1 images with the same content",
    ]
    parts["north"].source.load(Geometry(28, 1), "north", 0)
    assert (
        "images of different classes with the same content: organamnist, train, image 1 = organamnist, train, image 2"
        in caplog.text
    )


def test_files_that_are_no_medmnist(tmp_path: Path) -> None:
    medmnist(tmp_path, images=np.zeros(3), labels=np.zeros(3))
    text = said("medmnist", tmp_path, datasets=["organamnist"])
    assert "no array train_labels in" in text
    assert "which has images, labels; expected the arrays train_images" in text
    (tmp_path / "organamnist.npz").write_bytes(b"PK\x03\x04 torn")
    assert "which cannot be read" in said("medmnist", tmp_path, datasets=["organamnist"])
    np.savez(tmp_path / "organamnist.npz", train_labels=np.array([object()]))
    assert "which cannot be read" in said("medmnist", tmp_path, datasets=["organamnist"])


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (np.ones((4, 28, 28)), [0, 1, 2, 3], "train_images of type float64 and shape (4, 28, 28)"),
        (np.ones((4, 28, 28), np.uint16), [0, 1, 2, 3], "train_images of type uint16"),
        (np.ones((4, 28, 28, 4), np.uint8), [0, 1, 2, 3], "train_images of type uint8 and shape (4, 28, 28, 4)"),
        (np.ones((4, 0, 28), np.uint8), [0, 1, 2, 3], "shape (4, 0, 28)"),
        (np.ones((4, 28, 28), np.uint8), [[0, 1], [1, 0], [0, 1], [0, 1]], "train_labels of type int64 and shape (4, 2)"),
        (np.ones((4, 28, 28), np.uint8), [0.5, 1, 2, 3], "train_labels of type float64"),
        (np.ones((4, 28, 28), np.uint8), ["a", "b", "a", "b"], "train_labels of type <U1"),
        (np.ones((4, 28, 28), np.uint8), [3, 3, 3, 3], "12 images, of 1 class;"),
    ],
)
def test_arrays_that_are_not_as_published_are_refused(tmp_path: Path, images: Any, labels: Any, found: str) -> None:
    arrays = {f"{part}_{what}": of for part in ("train", "val", "test") for what, of in (("images", images), ("labels", labels))}
    medmnist(tmp_path, **arrays)
    assert found in said("medmnist", tmp_path, datasets=["organamnist"])


def test_what_is_no_part_domain_or_class(tmp_path: Path) -> None:
    domainbed(tmp_path)
    assert "did you mean 'sketch'?" in said("domainbed", tmp_path, dataset="pacs", folders=["sketches"])
    assert "take: found 'train'" in said("domainbed", tmp_path, dataset="pacs", take=["train"])
    image(tmp_path / "PACS/photo/cat/1.png")
    assert "photo/cat', which is no class of PACS; expected dog, elephant" in said("domainbed", tmp_path, dataset="pacs")
    assert "no folder 'Caltech101'" in said("domainbed", tmp_path, dataset="vlcs")
    isic2019(tmp_path / "isic")
    write(tmp_path / "isic/isic_inferred_wocarcinoma.csv", "image,label,hair\nISIC_1,0,0.1\n")
    assert "no column dark_corner, gel_bubble, ruler in" in said("isic", tmp_path / "isic", dataset="isic2019_artifacts")
    camelyon17(tmp_path)
    file = tmp_path / "camelyon17_v1.0/metadata.csv"
    file.write_text(file.read_text().replace(",1,0,7,0,", ",1,0,7,2,"))
    assert "tumor '2' and split '0' in a row of metadata.csv; expected 0 or 1 in both" in said("camelyon17", tmp_path)
