"""PACS, VLCS, Office-Home and TerraIncognita in DomainBed's folders: <root>/<data set>/<domain>/<class>/<image>."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedmerge.data.datasets._public import Public, Published, Row

WHERE = "github.com/facebookresearch/DomainBed, python -m domainbed.scripts.download"

OFFICE = (
    "Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator", "Calendar", "Candles", "Chair",
    "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp", "Drill", "Eraser", "Exit_Sign", "Fan", "File_Cabinet", "Flipflops",
    "Flowers", "Folder", "Fork", "Glasses", "Hammer", "Helmet", "Kettle", "Keyboard", "Knives", "Lamp_Shade", "Laptop", "Marker",
    "Monitor", "Mop", "Mouse", "Mug", "Notebook", "Oven", "Pan", "Paper_Clip", "Pen", "Pencil", "Postit_Notes", "Printer",
    "Push_Pin", "Radio", "Refrigerator", "Ruler", "Scissors", "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda", "Speaker",
    "Spoon", "TV", "Table", "Telephone", "ToothBrush", "Toys", "Trash_Can", "Webcam",
)  # fmt: skip


class Domainbed(Public):
    """Every image is a group of its own. Folders of the root that are no domain are left alone."""

    published: ClassVar = {
        "pacs": Published(
            title="PACS",
            classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
            images={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
            layout="PACS/<art_painting, cartoon, photo, sketch>/<class>/",
            license="not stated; for research",
            citation="Li et al., Deeper, broader and artier domain generalization, ICCV 2017",
            where=WHERE,
            inside=("PACS", "kfold"),
        ),
        "vlcs": Published(
            title="VLCS",
            classes=("bird", "car", "chair", "dog", "person"),
            images={"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
            layout="VLCS/<Caltech101, LabelMe, SUN09, VOC2007>/<class>/",
            license="not stated; for research",
            citation="Fang et al., Unbiased metric learning, ICCV 2013",
            where=WHERE,
            inside=("VLCS",),
        ),
        "office_home": Published(
            title="Office-Home",
            classes=OFFICE,
            images={"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
            layout="office_home/<Art, Clipart, Product, Real World>/<class>/",
            license="non-commercial research and education",
            citation="Venkateswara et al., Deep hashing network for unsupervised domain adaptation, CVPR 2017",
            where=WHERE,
            inside=("office_home", "OfficeHomeDataset_10072016"),
        ),
        "terra_incognita": Published(
            title="TerraIncognita",
            classes=("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
            images={"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883},
            layout="terra_incognita/<location_100, location_38, location_43, location_46>/<class>/",
            license="Community Data License Agreement, permissive",
            citation="Beery, Van Horn & Perona, Recognition in terra incognita, ECCV 2018",
            where=WHERE,
            inside=("terra_incognita",),
            unverified="24,330 images in later papers, 24,788 in DomainBed's own: annotations have changed",
        ),
    }

    dataset: Literal["pacs", "vlcs", "office_home", "terra_incognita"] = Field(description="name of the data set")

    def _rows(self, root: Path) -> list[Row]:
        return list(self._in_folders(root))
