"""What leaves a hospital, looked for rather than promised: one real run, watched in all its processes."""

from __future__ import annotations

import ast
import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from fedmerge.data.datasets._base import Geometry
from fedmerge.federated.site import Site
from tests.canary import Canary
from tests.conftest import TINY

HERE = Path(__file__).resolve().parents[1]
HOSPITALS = {"sealed": 0, "open": 1, "mercy": 0}
SCENARIO = {
    "name": "canary",
    "model": TINY,
    "initialization": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": ["sealed", "open"],
    "training": {"runs": 1, "epochs": 1, "augment": "none"},
    "target": "mercy",
    "stream": {"kind": "iid", "batch_size": 4},
    "methods": ["mean", "eam"],
    "uploads": [{"gram": {"samples": 4}}],
}


@dataclass
class Watched:
    """A finished run: the canaries by hospital, all that left a hospital as one folder, and peers of its sockets."""

    canaries: dict[str, Canary]
    left: Path
    cache: Path
    peers: set[str] = field(default_factory=set)

    def found(self, hospital: str) -> dict[str, set[str]]:
        return self.canaries[hospital].in_folder(self.left)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """One run by the front door; the folder's name is short, for Ray's sockets have to fit into it."""
    with tempfile.TemporaryDirectory(prefix="fm-") as name:
        here = Path(name)
        canaries = {hospital: Canary(seed) for seed, hospital in enumerate(HOSPITALS)}
        scenario = hospitals(here, canaries)
        run = Watched(canaries, here / "left", here / "cache")
        (run.left / "ray").mkdir(parents=True)
        (run.left / "seen").mkdir()
        environment = watching(run.left / "seen") | {"FEDMERGE_CACHE": str(run.cache), "RAY_TMPDIR": str(run.left / "ray")}
        command = [sys.executable, "-m", "fedmerge.simulate", str(scenario), "--out", "run", "--pool", "pool"]
        over = threading.Event()
        watcher = threading.Thread(target=collect_peers, args=(str(run.left / "seen"), run.peers, over))
        watcher.start()
        try:
            ended = subprocess.run(command, cwd=run.left, env=environment, capture_output=True, timeout=280)
        finally:
            over.set()
            watcher.join()
        (run.left / "terminal").write_bytes(ended.stdout + ended.stderr)
        assert ended.returncode == 0, ended.stderr.decode()
        yield run


def watching(folder: Path) -> dict[str, str]:
    """An environment without any switch of telemetry, in which every Python process leaves in `folder` what it does."""
    switches = ("RAY_USAGE", "FLWR_", "HF_", "RAY_ADDRESS", "RAY_ENABLE")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(switches) and "proxy" not in name.lower()}
    path = os.pathsep.join([str(HERE / "watch"), str(HERE.parent)])
    return plain | {"PYTHONPATH": path, "FEDMERGE_WATCH": str(folder), "OMP_NUM_THREADS": "1"}


def hospitals(here: Path, canaries: dict[str, Canary]) -> Path:
    """Three image folders of two classes with a canary each, and in one a torn file; returns the scenario's file."""
    (here / "sites").mkdir()
    for number, (name, samples) in enumerate(HOSPITALS.items()):
        for label in ("a", "b"):
            canaries[name].save(here / "album" / name / "a")
            (here / "album" / name / label).mkdir(exist_ok=True)
            for image in range(8):
                pixels = np.random.default_rng([number, image, label == "a"]).integers(0, 256, (16, 16), np.uint8)
                Image.fromarray(pixels).save(here / "album" / name / label / f"z{image}.png")
        site = {"name": name, "source": source(here, name), "samples": samples}
        (here / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(site))
    (here / "album" / "sealed" / "a" / f"{canaries['sealed'].name}-torn.png").write_text("no image")
    (here / "scenarios").mkdir()
    (here / "scenarios" / "canary.yaml").write_text(yaml.safe_dump(SCENARIO))
    return here / "scenarios" / "canary.yaml"


def source(here: Path, name: str) -> dict[str, Any]:
    return {"kind": "image_folder", "root": str(here / "album"), "folders": [name]}


def collect_peers(marker: str, peers: set[str], over: threading.Event) -> None:
    """Addresses at both ends of every TCP and UDP socket of the processes that carry the marker, Ray's own binaries among them."""
    while not over.wait(0.3):
        inodes: set[str] = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker.encode() in (process / "environ").read_bytes():
                    inodes |= {str(item.readlink()).removeprefix("socket:[").rstrip("]") for item in (process / "fd").iterdir()}
            except OSError:
                continue
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                parts = line.split()
                if parts[9] in inodes:
                    peers |= {address(end.partition(":")[0]) for end in parts[1:3]}


def address(words: str) -> str:
    """The kernel's hexadecimal address, four bytes at a time in the machine's order."""
    whole = b"".join(bytes.fromhex(words[at : at + 8])[:: -1 if sys.byteorder == "little" else 1] for at in range(0, len(words), 8))
    return str(ip_address(whole))


def is_local(host: str) -> bool:
    """Loopback, however it is spelled, or the far end of a listening socket, which is no address."""
    if host in ("localhost", "None", ""):
        return True
    try:
        known = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(known, "ipv4_mapped", None)
    return (mapped or known).is_loopback


def asked_for(folder: Path) -> set[tuple[str, str]]:
    """(call, host) of all that Python's sockets were asked for."""
    told = [json.loads(line) for file in folder.glob("sockets-*") for line in file.read_text().splitlines()]
    hosts = set()
    for call, wanted, _ in told:
        value = ast.literal_eval(wanted)
        host = value[0] if isinstance(value, tuple) else value
        hosts.add((call, host.decode() if isinstance(host, bytes) else str(host)))
    return hosts


@pytest.mark.slow
def test_nothing_of_a_hospitals_images_leaves_it(watched: Watched) -> None:
    assert watched.found("sealed") == {}
    assert watched.found("mercy") == {}


@pytest.mark.slow
def test_the_search_finds_the_image_that_a_hospital_shows(watched: Watched) -> None:
    """The control: one image of the other hospital leaves it, as its site file grants, by the very ways that were searched."""
    where = watched.found("open")
    assert "a picture of it" in where["run/report.html"]
    assert any(path.startswith("pool/") and path.endswith("samples.safetensors") for path in where)
    assert any(path.startswith("seen/sent-") for path in where), "the message from the hospital was not seen"
    assert "its file's name" not in set.union(*where.values())


@pytest.mark.slow
def test_the_hospital_itself_knows_its_image_and_what_is_wrong_with_the_others(watched: Watched) -> None:
    """Otherwise the search would look for something that was never there."""
    name = watched.canaries["sealed"].name
    here = watched.cache.parent
    site = Site.model_validate({"name": "sealed", "source": source(here, "sealed")})
    os.environ["FEDMERGE_CACHE"], before = str(watched.cache), os.environ["FEDMERGE_CACHE"]
    try:
        pixels = site.images(Geometry(16, 1), 0).pixels[..., 0]
    finally:
        os.environ["FEDMERGE_CACHE"] = before
    assert any(np.array_equal(image, watched.canaries["sealed"].pixels) for image in pixels)
    assert "3 as uint8" in set.union(*watched.canaries["sealed"].in_folder(watched.cache).values())
    assert f"{name}-torn.png (no image)" in (watched.cache / "sealed" / "site.log").read_text()


@pytest.mark.slow
def test_no_process_looks_for_anything_beyond_this_machine(watched: Watched) -> None:
    asked = asked_for(watched.left / "seen")
    assert asked, "no process was watched"
    assert {(call, host) for call, host in asked if not is_local(host)} == set()
    assert {peer for peer in watched.peers if not is_local(peer) and not ip_address(peer).is_unspecified} == set()
    assert any(is_local(peer) for peer in watched.peers), "no socket was watched"


@pytest.mark.slow
def test_ray_is_reached_from_nowhere_else(watched: Watched) -> None:
    """No socket of the run is bound to all addresses of the machine: an unspecified end is the far end of a listener."""
    listening = {host for call, host in asked_for(watched.left / "seen") if call == "bind"}
    assert listening <= {"127.0.0.1", "::1", ""}


def test_the_hook_sees_a_look_up(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.getaddrinfo('telemetry.invalid', 443)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", code], env=watching(tmp_path), check=True, timeout=60)
    assert asked_for(tmp_path) == {("getaddrinfo", "telemetry.invalid")}
    assert not is_local("telemetry.invalid")
    assert not is_local("169.254.169.254")
    assert is_local("::ffff:127.0.0.1")
    assert address("0100007F") == "127.0.0.1"


def png(pixels: np.ndarray, side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x", data)
    return file.getvalue()


def npz(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=pixels)
    return file.getvalue()


HIDDEN: dict[str, Callable[[Canary], bytes]] = {
    "raw pixels": lambda canary: canary.pixels.tobytes(),
    "mirrored": lambda canary: canary.pixels[:, ::-1].tobytes(),
    "its file": lambda canary: canary.file,
    "an enlarged picture": lambda canary: png(canary.pixels, 96),
    "normalized": lambda canary: save({"x": (torch.from_numpy(canary.pixels).float() / 255 - 0.5) / 0.5}),
    "half precision": lambda canary: (canary.pixels.astype(np.float32) / np.float32(255)).astype(np.float16).tobytes(),
    "JSON": lambda canary: json.dumps({"x": canary.pixels.tolist()}, indent=1).encode(),
    "hexadecimal": lambda canary: canary.pixels.tobytes().hex().encode(),
    "zlib": lambda canary: zlib.compress(canary.pixels.tobytes()),
    "gzip": lambda canary: gzip.compress(canary.file),
    "zip": lambda canary: zipped(canary.pixels.tobytes()),
    "npz": lambda canary: npz(canary.pixels),
    "a page": lambda canary: b'<img src="data:image/png;base64,' + base64.b64encode(png(canary.pixels, 96)) + b'">',
    "base64 of gzip": lambda canary: base64.urlsafe_b64encode(gzip.compress(canary.pixels.tobytes())),
    "its name": lambda canary: f"cannot read '/data/{canary.name}.png'".encode(),
}


@pytest.mark.parametrize("how", HIDDEN)
def test_the_search_finds_it_in_every_form(how: str, tmp_path: Path) -> None:
    canary, other = Canary(1), Canary(2)
    canary.save(tmp_path)
    other.save(tmp_path)
    around = np.random.default_rng(0).bytes(1000)
    data = around + HIDDEN[how](canary) + around
    assert canary.in_bytes(data)
    assert not other.in_bytes(data)


def test_the_search_looks_at_names_and_below(tmp_path: Path) -> None:
    canary = Canary(1)
    canary.save(tmp_path / "deep" / "down")
    shutil.copy(tmp_path / "deep" / "down" / f"{canary.name}.png", tmp_path / "other.bin")
    found = canary.in_folder(tmp_path)
    assert "its file's name" in found[f"deep/down/{canary.name}.png"]
    assert found["other.bin"] >= {"its file", "a picture of it"}
