"""Small files by which hospitals in other processes tell the server how far they are; on another machine there is no such
folder, and nothing is told."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from fedmerge.federated.messages import Tick
from fedmerge.system.files import atomic_write


def leave_progress(folder: Path, tick: Tick) -> None:
    """Leave this site's progress where the server looks."""
    with suppress(OSError):
        atomic_write(folder / f"{tick.site}.json", json.dumps(asdict(tick)))


def begin(folder: Path, site: str) -> None:
    """Leave a mark that this site begins to train."""
    with suppress(OSError), (folder / f"{site}.begun").open("a", encoding="utf-8") as marks:
        marks.write(f"{time.time():.3f}\n")


def begun(folder: Path, site: str) -> int:
    """How often a site has begun to train: more than once if its client has died."""
    with suppress(OSError):
        return len((folder / f"{site}.begun").read_text(encoding="utf-8").splitlines())
    return 0
