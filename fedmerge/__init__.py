"""fedmerge: hospitals share models instead of data, and an unseen hospital merges them per batch.

Importing it changes nothing: no environment variable, no thread count, and no library is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmerge.errors import FedmergeError
    from fedmerge.experiment.run import RunResult, run
    from fedmerge.merging.functional import Adapter, merge

__all__ = ["Adapter", "FedmergeError", "RunResult", "merge", "run"]

_HOMES = {
    "Adapter": "fedmerge.merging.functional",
    "FedmergeError": "fedmerge.errors",
    "RunResult": "fedmerge.experiment.run",
    "merge": "fedmerge.merging.functional",
    "run": "fedmerge.experiment.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("fedmerge")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmerge' has no attribute '{name}'; it offers {', '.join(__all__)}")
    with import_module("fedmerge.errors").extras_named():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
