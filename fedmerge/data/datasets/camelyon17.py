"""Camelyon17 of WILDS: patches of lymph nodes from five hospitals, with tumor or without; metadata.csv has the labels."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fedmerge.data.datasets._public import Public, Published, Row, listed

OUT_OF_DOMAIN = {"1": "val", "2": "test"}
"""Hospitals that WILDS never trains on, and their official parts; a column has the part of images from other hospitals."""


class Camelyon17(Public):
    """Patients stay together. Hospitals are numbered from 0, as in the files; the paper numbers from 1 and swaps some."""

    published: ClassVar = {
        "camelyon17": Published(
            title="Camelyon17-WILDS",
            classes=("normal", "tumor"),
            images={
                "hospital_0": 59_436,
                "hospital_1": 34_904,
                "hospital_2": 85_054,
                "hospital_3": 129_838,
                "hospital_4": 146_722,
            },
            layout="camelyon17_v1.0/ with metadata.csv and patches/patient_<p>_node_<n>/*.png",
            license="CC0 1.0",
            citation="Koh et al., WILDS, ICML 2021; Bandi et al., IEEE Transactions on Medical Imaging 38, 2018",
            where="wilds.stanford.edu; python -c \"import wilds; wilds.get_dataset('camelyon17', download=True)\"",
            inside=("camelyon17_v1.0",),
            parts=("train", "id_val", "val", "test"),
            patients="patients",
        )
    }

    def _rows(self, root: Path) -> list[Row]:
        names = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
        rows = []
        for patient, node, x, y, tumor, center, split in self._table(root / "metadata.csv", names):
            if tumor not in ("0", "1") or split not in ("0", "1"):
                raise self._wrong(f"tumor '{tumor}' and split '{split}' in a row of metadata.csv", "0 or 1 in both")
            folder = f"patient_{patient}_node_{node}"
            path = f"patches/{folder}/patch_{folder}_x_{x}_y_{y}.png"
            part = OUT_OF_DOMAIN.get(center) or ("train", "id_val")[int(split)]
            rows.append(listed(path, self.classes()[int(tumor)], f"hospital_{center}", patient, part))
        return rows
