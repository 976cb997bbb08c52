"""The tutorials run from their first cell to their last, in a kernel, and their objects show themselves."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tutorial_runs(file: Path, tmp_path: Path) -> None:
    book = nbformat.read(file, 4)
    assert not [cell for cell in book.cells if cell.get("outputs")]  # a notebook is kept without what it prints
    NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output["output_type"] == "error" or output.get("name") == "stderr"]
    tables = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert "merge_three" in file.stem or any("<table><caption>" in table for table in tables)
    if "folder" in file.stem:  # the table is a sensible one: eleven classes, and every model far above chance
        shares = [float(cell) for cell in re.findall(r"<td>(\d+\.\d)</td><td>\d+\.\d</td><td>\d+\.\d</td>", tables[0])]
        assert len(shares) >= 5 and min(shares) > 40
