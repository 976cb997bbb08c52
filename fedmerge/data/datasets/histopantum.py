"""HISTOPANTUM: patches of four cancers, with tumor or without, in HistoDomainBed's folders."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fedmerge.data.datasets._public import Public, Published, Row


class Histopantum(Public):
    """Every patch is a group of its own: the folders say nothing about slides and patients."""

    published: ClassVar = {
        "histopantum": Published(
            title="HISTOPANTUM",
            classes=("non_tumor", "tumor"),
            images=dict.fromkeys(("colon", "ovarian", "stomach", "uterus"), 0),
            layout="HistoPANTUM/<colon, ovarian, stomach, uterus>/<non_tumor, tumor>/",
            license="not verified; see the record at Zenodo",
            citation="Zamanitajeddin et al., Benchmarking domain generalization algorithms in computational pathology, 2024",
            where="zenodo.org/records/14555794",
            inside=("HistoPANTUM", "HISTOPANTUM", "histopantum", "histopantume"),
            total=281_142,
            unverified="281,142 patches by the paper, 140,569 by the authors' repository; no numbers for each domain",
        )
    }

    def _rows(self, root: Path) -> list[Row]:
        return list(self._in_folders(root))
