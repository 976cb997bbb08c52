"""MIDOG 2025, track 2: normal and atypical mitotic figures from seven kinds of tumors."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fedmerge.data.datasets._public import Public, Published, Row, listed

TABLE = "MIDOG25_Atypical_Classification_Train_Set.csv"
CROPS = "MIDOG25_Binary_Classification_Train_Set"
LABELS = {"NMF": "normal", "AMF": "atypical"}


class MidogAtypical(Public):
    """The label is what most pathologists said. Figures of one slide stay together."""

    published: ClassVar = {
        "midog_atypical": Published(
            title="MIDOG 2025, atypical mitotic figures",
            classes=("normal", "atypical"),
            images=dict.fromkeys(
                (
                    "canine cutaneous mast cell tumor",
                    "canine lung cancer",
                    "canine lymphoma",
                    "canine soft tissue sarcoma",
                    "human breast cancer",
                    "human melanoma",
                    "human neuroendocrine tumor",
                ),
                0,
            ),
            layout=f"{TABLE} and {CROPS}/*.png",
            license="CC BY 4.0 by the record at Zenodo; not verified",
            citation="Weiss et al., A dataset of atypical vs normal mitoses classification for MIDOG 2025, Zenodo 2025",
            where="doi.org/10.5281/zenodo.15188326",
            inside=("MIDOG2025-Binary-Classification",),
            patients="slides",
            total=11_939,
            unverified="11,939 figures by a later record, 11,937 in the first table; no numbers for each tumor",
        )
    }

    def _rows(self, root: Path) -> list[Row]:
        rows = []
        for image, slide, tumor, majority in self._table(root / TABLE, ("image_id", "filename", "Tumor", "majority")):
            if majority not in LABELS or tumor not in self._known():
                expected = f"a majority of {' or '.join(LABELS)}, and a tumor of {', '.join(self._known())}"
                raise self._wrong(f"majority '{majority}' and tumor '{tumor}' in a row of {TABLE}", expected)
            rows.append(listed(f"{CROPS}/{image}", LABELS[majority], tumor, slide))
        return rows
