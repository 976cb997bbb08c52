"""What goes wrong at a hospital: in full in its own log, on its own disk; to others only what the error says that they may know.

The text of an error may name patients (files are called after them) or show values, so that nothing of it leaves by default: of
our own errors their `told`, of any other its type and the place in our code. Nothing is searched and struck out, for whoever
strikes out forgets something.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedmerge.data.cache import folder
from fedmerge.errors import DataError, FedmergeError, TargetError

PACKAGE = Path(__file__).resolve().parents[2]


def own_log(site: str) -> Path:
    """A hospital's own log, beside its decoded images: `FEDMERGE_CACHE`/<site>/site.log."""
    return folder() / site / "site.log"


def tell_site_log(site: str, error: Exception) -> str:
    """What others may know of an error; the whole of it goes into the site's own log."""
    _write(site, "".join(traceback.format_exception(error)))
    if isinstance(error, FedmergeError) and error.told:
        return error.told
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).resolve().parents]
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    return f"it failed with {type(error).__name__}{place}"


@contextmanager
def kept_privately(site: str) -> Iterator[None]:
    """Warnings of our code meanwhile go into the site's own log alone: standard error may be read elsewhere."""
    log = logging.getLogger("fedmerge")
    handler = _ToOwnLog(site)
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


@contextmanager
def discreet(target: str) -> Iterator[None]:
    """The target is a hospital, too: of an error about its images, or of one nobody foresaw, only what it tells leaves it.

    Errors about experts and scenario, which came from the server, go back to it as they are.
    """
    with kept_privately(target):
        try:
            yield
        except DataError as error:
            raise DataError(f"target '{target}': {tell_site_log(target, error)}") from None
        except FedmergeError:
            raise
        except Exception as error:
            raise TargetError(f"target '{target}': {tell_site_log(target, error)}") from None


def written_since(site: str, since: float) -> Path | None:
    """The site's own log, if it has been written to since (seconds of the epoch) on this machine."""
    file = own_log(site)
    with suppress(OSError):
        if file.stat().st_mtime >= since:
            return file
    return None


def where(site: str, since: float) -> str:
    """Words that lead to the site's own log, if it has been written to since on this machine."""
    file = written_since(site, since)
    return f" (in full, at the site: {file})" if file else ""


class _ToOwnLog(logging.Handler):
    def __init__(self, site: str) -> None:
        super().__init__(logging.WARNING)
        self.site = site

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.site, f"{record.levelname.lower()}: {record.getMessage()}\n")


def _write(site: str, text: str) -> None:
    """A log that cannot be written is no error."""
    with suppress(OSError):
        own_log(site).parent.mkdir(parents=True, exist_ok=True)
        with own_log(site).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")
