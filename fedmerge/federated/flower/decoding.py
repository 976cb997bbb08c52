"""Arrays as they arrive in a message: read by numpy, never by pickle, as declared, and nothing may be left over.

Flower carries an array as the bytes of numpy's own format (NEP 1), with its type and shape declared beside it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from numpy.lib import format as numpy_format
from torch import Tensor

from fedmerge.errors import UploadRefused
from fedmerge.federated.messages import Reply, SiteTask
from fedmerge.federated.security.audit import Seal, Upload

PARTS = ("said", "weights", "scalars", "samples")
STATISTIC = "statistic."
PLAIN = "biuf"
"""Kinds of numpy types that are plain numbers: booleans, integers, floats. Objects would need pickle."""
HEADERS = {(1, 0): numpy_format.read_array_header_1_0, (2, 0): numpy_format.read_array_header_2_0}
"""numpy's readers of a header, by the version of its format."""


def reply_of(content: Mapping[str, Any], task: SiteTask, seconds: float) -> Reply:
    """What a message says: an upload, the site's own reason why there is none, or why it cannot be read. Its arrays leave it."""
    site = task.site.name
    try:
        said = dict(content["said"])
        if said.get("reason"):
            return Reply(task, None, " ".join(str(said["reason"]).split())[:2000], seconds)
        seal = Seal(str(said.get("statement", "")), str(said.get("signature", "")))
        return Reply(task, _upload(content, site, seal), "", seconds)
    except UploadRefused as refusal:
        return Reply(task, None, str(refusal), seconds, refused=True)
    except Exception as error:  # whatever a stranger's bytes break in here costs the others nothing
        reason = f"site '{site}': message: found one that cannot be read ({type(error).__name__}: {str(error)[:200]})"
        return Reply(task, None, f"{reason}; expected the records of an upload", seconds, refused=True)


def _upload(content: Mapping[str, Any], site: str, seal: Seal) -> Upload:
    names = list(content.keys())
    extra = sorted(name for name in names if name not in PARTS and not name.startswith(STATISTIC))
    missing = sorted({"weights", "scalars"} - set(names))
    if extra or missing:
        raise UploadRefused(f"site '{site}': message: found undeclared parts {extra or 'none'}; missing {missing or 'none'}")
    states = {name: _state(content[name], site) for name in names if name not in ("said", "scalars")}
    samples = states.pop("samples", None)
    if samples is not None and list(samples) != ["samples"]:
        raise UploadRefused(f"site '{site}': samples: found arrays {sorted(samples)}; expected one, 'samples'")
    scalars = {str(name): float(value) for name, value in content["scalars"].items()}
    weights = states.pop("weights")
    statistics = {name.removeprefix(STATISTIC): state for name, state in states.items()}
    return Upload(site, weights, scalars, samples["samples"] if samples else None, statistics, seal=seal)


def _state(record: MutableMapping[str, Any], site: str) -> dict[str, Tensor]:
    """The tensors of a record. Each array leaves it when it is read: bytes and tensors of a whole model are not held together."""
    return {str(name): array_of(record.pop(name), f"site '{site}': {name}") for name in list(record)}


def array_of(array: Any, where: str) -> Tensor:
    """The tensor of one serialized array: an object with `stype`, `dtype`, `shape` and the bytes `data`.

    Raises UploadRefused unless it is numpy's format, of plain numbers, as declared, and not a byte shorter or longer. The
    header alone tells all of this, before there is room for a single number.
    """
    data = bytes(array.data)
    if array.stype != "numpy.ndarray" or not data.startswith(numpy_format.MAGIC_PREFIX):
        raise UploadRefused(f"{where}: found bytes that are no array (pickle, archive or text); expected numpy's plain format")
    file = io.BytesIO(data)
    try:
        shape, _, dtype = HEADERS[numpy_format.read_magic(file)](file)
    except Exception as error:  # whatever a stranger's bytes break in numpy
        raise UploadRefused(f"{where}: found a header that cannot be read ({str(error)[:100]}); expected numpy's") from None
    if reason := _complaint(array, shape, dtype, len(data) - file.tell()):
        raise UploadRefused(f"{where}: found {reason}")
    file.seek(0)
    return torch.from_numpy(np.asarray(numpy_format.read_array(file, allow_pickle=False), order="C"))


def _complaint(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], left: int) -> str:
    """Why a header cannot be that of a declared array, or nothing. left: bytes after it."""
    if dtype.kind not in PLAIN or not dtype.isnative:
        kind = "objects, which only pickle could read" if dtype.hasobject else f"numbers of type {dtype}"
        return f"{kind}; expected plain numbers"
    if str(dtype) != array.dtype or tuple(shape) != tuple(array.shape):
        return f"{dtype} {tuple(shape)} in the bytes; declared {array.dtype} {tuple(array.shape)}"
    declared = math.prod(shape) * dtype.itemsize
    if left != declared or any(side < 0 for side in shape):
        return f"{left} bytes of numbers, {'cut off' if left < declared else 'more than it declares'}; expected {declared}"
    return ""


_GONE = re.compile(r"\b(ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError)\b")
"""What Ray calls it; the rest of its message is addresses."""


def failure(text: str) -> str:
    """The last line of what a client died of, without colors, quotes and paths."""
    if gone := _GONE.search(text):
        return f"its client failed: its process is gone ({gone.group()}), as when it is killed or its machine is lost"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.replace("\\n", "\n"))
    lines = [line.strip(" '\">") for line in plain.splitlines() if line.strip(" '\">")]
    last = re.sub(r"(/[\w.\-]+)+", "...", lines[-1] if lines else "no reason given")
    return f"its client failed: {last[:300]}"
