"""What a deployment of real Flower processes on loopback costs with experts of a real size.

    python benchmarks/deployment.py --out runs/deployment-size

Three hospitals train vit_base_patch32_224 (350 MB an expert) for one step on a few phantom images and upload it; seconds of each
phase, and the peak memory of each process. TLS and authentication are on. Nothing leaves this machine.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from deployed import SCENARIO, Loopback, deployed, descendants, world


@dataclass
class Peaks:
    """Most resident memory of each process while a federation runs, MiB, as the kernel counts it (VmHWM)."""

    of: dict[str, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def look(self, here: Loopback) -> None:
        """Until it is told to stop."""
        while not self.stop.wait(0.2):
            for name, process in list(here.started.items()):
                for pid in descendants(process.pid):
                    with suppress(OSError, ValueError, KeyError):
                        role = f"{name}: {kind(pid)}"
                        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                        self.of[role] = max(self.of.get(role, 0.0), int(status["VmHWM"].split()[0]) / 1024)


def kind(pid: int) -> str:
    """What a process of a deployment is."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    names = [Path(word.decode(errors="replace")).name for word in words[:3]]
    return next((name for name in names if name.startswith(("flower-", "flwr-"))), "wrapper")


def main(
    out: Annotated[Path, typer.Option(help="a folder that is not there yet")] = Path("runs/deployment-size"),
    model: Annotated[str, typer.Option(help="any timm classifier")] = "vit_base_patch32_224",
    images: Annotated[int, typer.Option(help="of each hospital")] = 40,
) -> None:
    """One federation of three hospitals with a model of real size."""
    proxy = {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 40, "patients": 8}, "epochs": 1}
    training = {"runs": 1, "epochs": 1, "max_steps": 1, "evaluations": 1, "optimizer": "adamw", "deadline_s": 900}
    file = world(out / "world", {**SCENARIO, "model": {"name": model}, "initialization": proxy, "training": training}, images)
    began, peaks = time.monotonic(), Peaks()
    with deployed(out / "here", file) as here:
        started = time.monotonic() - began
        watcher = threading.Thread(target=peaks.look, args=(here,), daemon=True)
        watcher.start()
        ended = here.run()
        peaks.stop.set()
        watcher.join()
        manifest = json.loads((here.out / "manifest.json").read_text())
        entries = sorted(here.pool.glob("experts/*"))
        each = {entry.name.split("-")[0]: json.loads((entry / "manifest.json").read_text())["seconds"] for entry in entries}
        large = sum(file.stat().st_size for file in here.pool.glob("experts/*/expert.safetensors")) / max(1, len(entries)) / 1e6
    typer.echo(f"status {ended.status}; {len(entries)} experts of {large:.0f} MB; start of all processes {started:.1f} s")
    typer.echo(f"flwr run {ended.seconds:.1f} s, of which: {manifest['phases_seconds']}; upload admitted after (s): {each}")
    for role, mib in sorted(peaks.of.items()):
        typer.echo(f"| {role} | {mib:.0f} MiB |")


if __name__ == "__main__":
    typer.run(main)
