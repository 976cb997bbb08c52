"""A run in one process needs neither Flower nor Ray, from its import to its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import world

pytestmark = pytest.mark.slow

CODE = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(["flwr", "ray"]))
from fedmerge.simulate import command_alone
told = []
for options in json.loads(sys.argv[1]):
    sys.argv[1:] = ["scenarios/tiny.yaml", "--quiet", *options]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            command_alone()
        except SystemExit as ended:
            told.append([ended.code, said.getvalue()])
print(json.dumps(told))
"""


def test_a_local_run_needs_neither_flower_nor_ray(tmp_path: Path) -> None:
    world(tmp_path)
    alone = ["--backend", "local", "--jobs", "1"]
    rounds = [*alone, "--set", "federated=[fedavg]", "--out", "runs/rounds"]  # Flower's strategy
    asked = json.dumps([alone, rounds, ["--backend", "simulation", "--out", "runs/simulation"]])
    done = subprocess.run([sys.executable, "-c", CODE, asked], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    local, *others = json.loads(done.stdout)
    assert local == [0, ""]
    assert (tmp_path / "runs" / "tiny-3" / "report.html").exists()
    for code, said in others:
        assert code == 2
        assert said.endswith("pip install 'fedmerge[simulation]'\n")
