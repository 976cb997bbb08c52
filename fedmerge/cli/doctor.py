"""The verb `fedmerge doctor`: whether runs can run here, one line for each thing, and how to mend what is wrong.

Nothing heavy is imported: what is installed, its own records tell; only a GPU has to be tried.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from fedmerge.errors import EXTRAS, FedmergeError
from fedmerge.system.files import at_home
from fedmerge.system.process import cores, free_memory

PYTHONS = ((3, 11), (3, 13))
"""The oldest that works, and the newest that is tried."""

GIB = 2**30
LEAST_MEMORY, MEMORY_EACH = 1.0, 1.0
"""GiB that a run needs, and what every worker process beside it takes."""

LEAST_DISK, ENOUGH_DISK = 0.2, 5.0
"""GiB: with less no run ends, and a run of many experts may need so much."""

SHARED_MEMORY = 2.0
"""GiB of /dev/shm below which Ray keeps objects on the disk."""

FILES = 4096
"""Open files that Ray may need."""

NOT_FOR_LOCAL = frozenset({"flwr", "ray"})
"""Packages that the backend `local` does without."""

Of = Literal["ok", "warn", "fail"]


class Checked(NamedTuple):
    """One thing that was looked at. of: fail, if backend local cannot run without it. mend: what to do."""

    of: Of
    what: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.of:<5}{self.what:<14}{self.found}" + (f". {self.mend}" if self.mend else "")


def examine(pool: Path, out: Path) -> Iterator[Checked]:
    """Everything, one after the other. pool, out: folders that a run writes into."""
    yield from _machine()
    yield from _packages()
    yield from _gpu()
    yield from _folders({"runs": out, "pool": pool})
    yield from _ray()


def _machine() -> Iterator[Checked]:
    version, system = sys.version_info[:2], platform.system()
    text = f"{platform.python_version()} on {system} {platform.machine()}"
    if version < PYTHONS[0]:
        yield Checked("fail", "python", text, "Install Python 3.11 or newer")
    elif version > PYTHONS[1] or system != "Linux":
        yield Checked("warn", "python", text, "It is tried on Linux with Python 3.11 to 3.13 alone")
    else:
        yield Checked("ok", "python", text)
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        yield Checked("warn", "locale", f"names of files are read as {encoding}", "Set PYTHONUTF8=1, or a locale of UTF-8")
    count = cores()
    yield Checked("ok", "cores", f"{count}") if count > 1 else Checked("warn", "cores", "1", "Hospitals train one after the other")
    free = (free_memory() or LEAST_MEMORY * GIB) / GIB
    least, wanted = LEAST_MEMORY, LEAST_MEMORY + MEMORY_EACH * count
    text = f"{free:.1f} GiB free"
    if free < least:
        yield Checked("fail", "memory", text, f"End other programs: a run needs {least:g} GiB or more")
    elif free < wanted:
        yield Checked("warn", "memory", text, f"{count} workers may need {wanted:g} GiB: give --jobs 1, or end other programs")
    else:
        yield Checked("ok", "memory", text)


def _packages() -> Iterator[Checked]:
    """What every extra brings, and whether versions are those that are asked for."""
    yield _of_extra("fedmerge", ["torch", "numpy", "pydantic", "safetensors"], local=True)
    for extra, packages in EXTRAS.items():
        if extra != "simulation":
            yield _of_extra(f"[{extra}]", packages, local=extra == "report")
            continue
        yield _of_extra("[simulation]", [name for name in packages if name not in NOT_FOR_LOCAL], local=True)
        for name, what in (("flwr", "flower"), ("ray", "ray")):
            if find_spec(name):
                yield Checked("ok", what, _version(name))
            else:
                yield Checked("warn", what, "not installed", "Backend simulation needs it: pip install 'fedmerge[simulation]'")
    yield from (Checked("fail" if local else "warn", "versions", text, mend) for text, mend, local in _unfit())


def _of_extra(what: str, packages: list[str], local: bool) -> Checked:
    lacking = [name for name in packages if find_spec(name) is None]
    mend = f"pip install '{'fedmerge' + what if what.startswith('[') else what}'"
    if lacking:
        return Checked(
            "fail" if local else "warn",
            what,
            f"without {', '.join(lacking)}",
            f"{'Install it' if local else 'Where it is needed'}: {mend}",
        )
    return Checked("ok", what, ", ".join(f"{name} {_version(name)}".strip() for name in packages))


def _version(package: str) -> str:
    """By the package's own records; distributions may be called otherwise than what is imported."""
    names = {"PIL": "pillow", "yaml": "pyyaml", "ruamel": "ruamel.yaml", "mlflow": "mlflow-skinny"}
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(names.get(package, package))
    return ""


def _unfit() -> Iterator[tuple[str, str, bool]]:
    """Versions other than those asked for by fedmerge, and a torchvision that is not torch's pair: words, mend, is it for local."""
    from packaging.requirements import Requirement

    for owner in ("fedmerge", "torchvision"):
        try:
            asked = [Requirement(text) for text in metadata.requires(owner) or []]
        except metadata.PackageNotFoundError:
            continue
        for one in asked:
            if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS)):
                continue
            with suppress(metadata.PackageNotFoundError):
                found = metadata.version(one.name)
                if not one.specifier.contains(found, prereleases=True):
                    mend = f"pip install '{one.name}{one.specifier}'"
                    yield f"{one.name} {found}, where {owner} asks for {one.specifier}", mend, one.name not in NOT_FOR_LOCAL


def _gpu() -> Iterator[Checked]:
    """The GPU by its driver's own tool; torch is asked only where there is one."""
    try:
        tool = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        asked = subprocess.run(tool, capture_output=True, text=True, timeout=5, check=True)
        names = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError):
        names = []
    if not names:
        yield Checked("ok", "gpu", "none that nvidia-smi sees: everything runs on the CPU")
        return
    import torch

    if torch.cuda.is_available():
        yield Checked("ok", "gpu", f"{'; '.join(names)}; CUDA {torch.version.cuda}")
    else:
        mend = "Install torch and torchvision, as a pair, for CUDA and this driver: see pytorch.org"
        yield Checked("warn", "gpu", f"{'; '.join(names)}, which torch {torch.__version__} cannot use", mend)


def _folders(named: dict[str, Path]) -> Iterator[Checked]:
    """Whether each can be written, and what is left on its disk; none of them is made."""
    with suppress(ImportError):
        from fedmerge.data.cache import folder

        named = {**named, "cache": folder()}
    for what, path in {**named, "temporary": Path(tempfile.gettempdir())}.items():
        yield _folder(what, path)
    if (given := os.environ.get("FEDMERGE_DATA")) and not at_home(given).is_dir():
        yield Checked("warn", "FEDMERGE_DATA", f"'{given}', which is no folder", "Set it to the folder that holds your data sets")


def _folder(what: str, path: Path) -> Checked:
    absolute = path.absolute()
    try:
        there = next(place for place in (absolute, *absolute.parents) if place.exists())
        if not there.is_dir():
            return Checked("fail", what, f"'{path}': '{there}' is a file", "Move it, or choose another folder")
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free / GIB
    except OSError as error:
        of: Of = "warn" if what == "cache" else "fail"
        mend = {"cache": "Set FEDMERGE_CACHE to another folder", "temporary": "Set TMPDIR to another folder"}.get(what)
        return Checked(
            of, what, f"'{path}' cannot be written ({error.strerror})", mend or "Mend its rights, or work in another folder"
        )
    text = f"'{path}', {free:.1f} GiB free"
    if free < LEAST_DISK:
        return Checked("fail", what, text, f"Free some space: a run needs {LEAST_DISK:g} GiB or more")
    return Checked("warn", what, text, "Large models need more") if free < ENOUGH_DISK else Checked("ok", what, text)


def _ray() -> Iterator[Checked]:
    """What Ray and Flower need of this machine, or whether the cluster answers: for backend simulation alone."""
    if find_spec("ray") is None or find_spec("flwr") is None:
        return
    from fedmerge.adaptation.ray.cluster import head_at, see_to_sockets

    if given := os.environ.get("RAY_ADDRESS"):
        try:
            yield Checked("ok", "ray cluster", f"{head_at(given)} answers")
        except FedmergeError as error:
            yield Checked("warn", "ray cluster", _first_problem(error))
        return
    try:
        see_to_sockets()
        yield Checked("ok", "ray sockets", "their folder's path is short enough")
    except FedmergeError as error:
        yield Checked("warn", "ray sockets", _first_problem(error))
    with suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").total / GIB
        if shared < SHARED_MEMORY:
            yield Checked("warn", "ray memory", f"/dev/shm of {shared:.1f} GiB", "Give a container more: docker run --shm-size=4g")
        else:
            yield Checked("ok", "ray memory", f"/dev/shm of {shared:.1f} GiB")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= most < FILES:
        yield Checked("warn", "open files", f"at most {most}", f"Give more before a large run: ulimit -n {FILES}")


def _first_problem(error: FedmergeError) -> str:
    return str(getattr(error, "problems", [error])[0])
