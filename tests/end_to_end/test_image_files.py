"""Image files of hospitals through the front door: what is done to their values is said once, and where they can read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedmerge.federated.client.site_log import own_log
from tests.front_door import SCENARIO, done, read


def test_how_values_of_12_bits_are_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sites").mkdir()
    (tmp_path / "scenarios").mkdir()
    rng = np.random.default_rng(0)
    for name, top in {"north": 4095, "south": 255, "mercy": 4095}.items():
        for label in ("dark", "light"):
            (tmp_path / "album" / name / label).mkdir(parents=True)
            for number in range(12):
                picture = rng.integers(0, top, (16, 16)).astype(np.uint8 if top == 255 else np.uint16)
                Image.fromarray(picture).save(tmp_path / "album" / name / label / f"{number}.png")
        source = {"kind": "image_folder", "root": "album", "folders": [name]}
        site = {"name": name, "source": source | ({"gray_range": [0, 4095]} if name == "north" else {})}
        (tmp_path / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site))
    changes = {"stream": {"kind": "iid", "batch_size": 8}, "methods": ["mean"], "training": {"runs": 1, "epochs": 1}}
    (tmp_path / "scenarios" / "tiny.yaml").write_text(yaml.safe_dump(SCENARIO | changes))
    told = done(tmp_path, "--out", "run", "--pool", "pool")
    assert told.count("has a remark in its own log") == 2
    remarks = read(tmp_path / "run" / "manifest.json")["remarks"]
    assert remarks[0] == "source.gray_range differs: [0, 4095] at north; not given at south, mercy"
    assert remarks[1:] == [f"site '{name}' has a remark in its own log" for name in ("north", "mercy")]
    shown = read(tmp_path / "run" / "manifest.json")["images"]
    given, found = ({"gray_range": {"range": [0, 4095], "images": 24, "rule": rule}} for rule in ("gray_range", "auto"))
    assert shown == {"north": given, "mercy": found}
    for name in ("north", "mercy"):
        assert f"site '{name}' has a remark in its own log" in told
        said = own_log(name).read_text()
        assert "24 images of more than 8 bits are shown by the range 0 (black) to 4095 (white)" in said
    assert not own_log("south").exists()
