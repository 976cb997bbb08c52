"""Real Flower processes, by `flwr run` in Flower's simulation and as a deployment, give the bits of the plain loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fedmerge.data.datasets.organ_phantom import ORGANS
from fedmerge.experiment.experiment import RunOptions, load_experiment
from fedmerge.experiment.run import prepare
from fedmerge.federated.server.in_process import LocalBackend
from tests.front_door import world

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples" / "deployment"))
from loopback import Loopback  # noqa: E402 - an example is no package

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    """Three hospitals; one of them has a folder of images, whose path and file names nobody else may see."""
    file = world(tmp_path / "world")
    for number, organ in enumerate(ORGANS):
        place = tmp_path / "disk-of-south" / "ward" / organ
        place.mkdir(parents=True)
        for patient in range(5):
            Image.new("L", (16, 16), 20 * number + 3 * patient).save(place / f"patient-{patient}.png")
    site = file.parent.parent / "sites" / "south.yaml"
    source = {"kind": "image_folder", "root": str(tmp_path / "disk-of-south"), "folders": ["ward"]}
    site.write_text(yaml.safe_dump({"name": "south", "source": source}))
    content = yaml.safe_load(file.read_text()) | {"sites": ["north", "south", "east"], "methods": ["mean"]}
    content["training"] |= {"runs": 1, "epochs": 1}
    file.write_text(yaml.safe_dump(content))
    return file


def plain(scenario: Path, out: Path) -> dict[str, bytes]:
    """Experts of the same hospitals by a loop in this process."""
    prepare(
        load_experiment(scenario),
        RunOptions(out=out, pool=out.parent / "plain-pool", quiet=True),
        LocalBackend(),
    )
    return experts(out.parent / "plain-pool")


def experts(pool: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in pool.glob("experts/*/expert.safetensors")}


def test_hospitals_in_processes_of_their_own_train_the_same_experts(scenario: Path, tmp_path: Path) -> None:
    with Loopback(tmp_path / "here", scenario) as here:
        sites = here.prepare()
        here.start_link()
        for site in sites:
            here.register(site)
            here.start_node(site)
        ended = here.run()
        assert ended.status == "finished:completed", ended.said
    assert all(process.poll() is not None for process in here.started.values())
    assert len(sites) == 3
    assert experts(here.pool) == plain(scenario, tmp_path / "plain")
    audit = (here.out / "audit.jsonl").read_text()
    assert audit.count('"signed"') == 3
    assert '"refused"' not in audit
    manifests = "".join(file.read_text() for file in here.pool.glob("experts/*/manifest.json"))
    known = "".join(file.read_text() for file in here.coordinator.glob("*/*.yaml"))
    for text in (audit, manifests, known, ended.said):
        assert "disk-of-south" not in text
        assert "patient-" not in text
    merging = [sys.executable, "-m", "fedmerge.simulate", f"scenarios/{scenario.name}", "--pool", str(here.pool), "--experts-only"]
    merged = subprocess.run(merging, cwd=here.target, capture_output=True, text=True, timeout=120)
    assert "every expert is in the pool; nobody trains" in merged.stdout, merged.stderr


def test_flwr_run_fills_the_pool_and_a_run_that_fails_is_seen(scenario: Path, tmp_path: Path) -> None:
    """Two simulated nodes play three hospitals."""
    here = Loopback(tmp_path / "here", scenario)
    (here.coordinator / "flwr").mkdir(parents=True)
    connection = f'address = "127.0.0.1:{here.port}"\ninsecure = true\n'
    (here.coordinator / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n{connection}'
    )
    with here:
        options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(here.port)]
        here.start("superlink", ["flower-superlink", *options], here.coordinator)
        here.wait_for_link(secure=False)
        failed = here.run(scenario="nowhere.yaml")
        assert failed.status == "finished:failed"
        assert "nowhere.yaml: found No such file or directory" in failed.details
        ended = here.run(root=str(scenario.parent.parent))
        assert ended.status == "finished:completed", ended.said
    assert experts(here.pool) == plain(scenario, tmp_path / "plain")
    assert json.loads((here.out / "manifest.json").read_text())["status"] == "done"
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if _ours(pid, here.coordinator)]


def _ours(process: Path, folder: Path) -> bool:
    try:
        return f"FLWR_HOME={folder}".encode() in (process / "environ").read_bytes() and process.name != str(os.getpid())
    except OSError:
        return False
