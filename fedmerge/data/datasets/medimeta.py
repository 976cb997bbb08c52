"""MedIMeta: nineteen data sets prepared in one way, each with its own info.yaml; any of them, with any of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fedmerge.data.datasets._image_files import ImageFile
from fedmerge.data.datasets._public import Public, Published, Row, listed
from fedmerge.errors import nearest
from fedmerge.system.yaml_loader import read_yaml

ONE_OF_MANY = ("BINARY_CLASSIFICATION", "MULTICLASS_CLASSIFICATION", "ORDINAL_REGRESSION")
PARTS = ("train", "val", "test")


class Medimeta(Public):
    """The domain is the data set. Images are read from images/*.tiff; the copy of them in images.hdf5 is not needed."""

    published: ClassVar = {
        "medimeta": Published(
            title="MedIMeta",
            classes=(),
            images={},
            layout="<data set>/ with info.yaml, images/*.tiff, task_labels/<task>.npy and splits/<train, val, test>.txt",
            license="of each data set by itself: info.yaml names it",
            citation="Woerner, Jaques & Baumgartner, A comprehensive and easy-to-use multi-domain multi-task medical imaging "
            "meta-dataset, Scientific Data 12, 2025",
            where="zenodo.org/records/7884735",
            parts=PARTS,
        )
    }

    dataset: str = Field(
        min_length=1,
        pattern=r"^[\w-]+$",
        description="folder of the data set, e.g. organs_axial, organs_coronal or organs_sagittal",
    )
    task: str = Field(min_length=1, description="task of the data set, as info.yaml names it, e.g. 'organ label'")
    flips: bool = Field(False, description="whether a horizontal flip preserves the label; for organs it does not")

    @property
    def facts(self) -> Published:
        """The record of MedIMeta; what info.yaml adds is read where it is needed."""
        return self.published["medimeta"]

    def _known(self) -> tuple[str, ...]:
        return (self.dataset,)

    def classes(self) -> tuple[str, ...]:
        """As info.yaml has them, by their numbers."""
        task = self._task(self._info(self._root()))
        labels = task.get("labels")
        if not isinstance(labels, dict) or sorted(labels) != list(range(len(labels))) or len(labels) < 2:
            raise self._wrong(f"labels of '{self.task}' that do not count from 0 in info.yaml")
        return tuple(str(labels[number]) for number in sorted(labels))

    def _info(self, root: Path) -> Mapping[str, Any]:
        file = root / self.dataset / "info.yaml"
        if not file.is_file():
            there = sorted(found.parent.name for found in root.glob("*/info.yaml"))
            raise self._wrong(f"no '{self.dataset}/info.yaml' in '{root}'; {nearest(self.dataset, there)}")
        return read_yaml(file)

    def _task(self, info: Mapping[str, Any]) -> Mapping[str, Any]:
        tasks = {str(task.get("task_name")): task for task in info.get("tasks") or ()}
        if self.task not in tasks:
            raise self._wrong(f"no task '{self.task}' in {self.dataset}; {nearest(self.task, tasks)}", "a task of the data set")
        if tasks[self.task].get("task_target") not in ONE_OF_MANY:
            found = f"the task '{self.task}', which is {tasks[self.task].get('task_target')}"
            raise self._wrong(found, "a task whose images have one label each")
        return dict(tasks[self.task])

    def _rows(self, root: Path) -> list[Row]:
        classes, folder = self.classes(), root / self.dataset
        try:
            labels = np.load(folder / "task_labels" / f"{self.task}.npy", allow_pickle=False)
            parts = {part: (folder / "splits" / f"{part}.txt").read_text(encoding="utf-8").split() for part in PARTS}
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise self._wrong(f"'{folder}', in which something is missing or cannot be read ({error})") from None
        if labels.ndim != 1 or not np.isin(labels, np.arange(len(classes))).all():
            raise self._wrong(f"labels of shape {labels.shape} for '{self.task}'", f"one of 0 to {len(classes) - 1} for each image")
        rows = []
        for part, names in parts.items():
            for number in (self._at(name, len(labels)) for name in names):
                path = f"{self.dataset}/images/{number:06d}.tiff"
                rows.append(listed(path, classes[int(labels[number])], self.dataset, part=part))
        return rows

    def _at(self, name: str, count: int) -> int:
        """The number of the image that a line of a split names."""
        stem = Path(name).stem
        if not stem.isdigit() or int(stem) >= count:
            raise self._wrong(f"'{name}' in the splits of {self.dataset}", f"images 0 to {count - 1}")
        return int(stem)

    def _off(self, root: Path, held: Sequence[ImageFile]) -> list[str]:
        """Parts of another size than info.yaml says."""
        said = self._info(root).get("splits_num_samples")
        said = said if isinstance(said, dict) else {}
        rows, there = self._rows(root), {item.path for item in held}
        counts = {part: sum(of == part and item.path in there for item, of in rows) for part in PARTS}
        wrong = [part for part in PARTS if said.get(part, counts[part]) != counts[part]]
        return [f"{counts[part]} images of '{part}', not {said[part]}" for part in wrong]
