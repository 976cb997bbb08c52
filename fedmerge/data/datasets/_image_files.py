"""What lies in an image folder `<root>/<domain>/<class>/*` (the layout of DomainBed), found without opening any image."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedmerge.data.datasets._base import same_names
from fedmerge.errors import Problem, first_of, folded, nearest, quoted

LAYOUT = "a folder with the layout <root>/<domain>/<class>/<image>"

LEFTOVERS = frozenset(
    (
        *("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("lost+found", "__pycache__"),
        *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot", "~snapshot"),  # network disks
    )
)
"""What operating systems, network disks and tools leave in folders, in small letters; no image of anybody's."""

PLAIN_ENDS = tuple(".png .jpg .jpeg .jpe .jfif .jp2 .tif .tiff .bmp .gif .webp .avif .pgm .ppm .pnm".split())  # noqa: SIM905
"""How names of images end that Pillow reads, in small letters."""

ENDS = (*PLAIN_ENDS, ".dcm", ".dicom", ".nii", ".nii.gz", ".mha", ".nrrd", ".svs", ".ndpi")
"""How names of all images end. Whether a file is one, only opening it tells."""

PARTS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout"))
"""Names of the parts of a data set, which are no classes."""


class ImageFile(NamedTuple):
    """One entry below a class folder. path: relative to the root, with forward slashes; regular: an ordinary file.

    device, inode: which file of this machine it is, whatever it is called; 0 where the system does not say. modified, changed: when
    its bytes were last written, and when it last changed at all, in ns: many programs set back the one, none the other.
    """

    domain: str
    label: str
    path: str
    size: int = 0
    modified: int = 0
    regular: bool = False
    device: int = 0
    inode: int = 0
    changed: int = 0
    patient: str = ""

    def seen(self, there: os.stat_result) -> ImageFile:
        """The same with what the system says of the file."""
        return self._replace(
            size=there.st_size,
            modified=there.st_mtime_ns,
            regular=stat.S_ISREG(there.st_mode),
            device=there.st_dev,
            inode=there.st_ino,
            changed=there.st_ctime_ns,
        )


def locate(root: str, hint: str) -> Path | Problem:
    """The folder that `root` names, with `~` and environment variables filled in, or what is wrong with it."""
    mend = f"The data: {hint}" if hint else ""
    full = os.path.expandvars(root)
    if unset := re.search(r"\$\{?(\w+)\}?", full):
        name = unset[1]
        first = f"Set {name} to the folder in which {Path(root.partition(unset[0])[2].lstrip('/') or 'the domains')} lies"
        return Problem("", "root", f"'{root}', but {name} is not set", LAYOUT, f"{first}. {mend}".strip())
    path = Path(full)
    try:
        path = path.expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (RuntimeError, ValueError) as error:
        return Problem("", "root", f"{quoted(path)} ({error})", LAYOUT, mend)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR) or path.is_symlink():
            return unreadable(error, path)
        if not path.is_absolute():
            first = f"A relative root is looked for in the folder where the command is given, {quoted(Path.cwd())}"
            mend = f"{first}: give it from there, or in full. {mend}".strip()
        return Problem("", "root", f"{quoted(path)}, which does not exist", LAYOUT, mend)
    return path if is_folder else Problem("", "root", f"{quoted(path)}, which is not a folder", LAYOUT, mend)


def domains_of(root: Path, held: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the domains, sorted; whatever else lies in the root is left alone.

    held: where some domains are chosen, so that the others may be broken. Raises OSError.
    """
    return _folders(root, lenient=bool(held))


def classes_of(root: Path, held: tuple[str, ...] = ()) -> dict[str, Path]:
    """Names of the classes of all domains, sorted, so that hospitals which share a root agree on them, and where each lies.

    held: the chosen domains; of the others those that this user may not read are passed over. Raises OSError.
    """
    found: dict[str, Path] = {}
    for domain in domains_of(root, held):
        try:
            labels = _folders(root / domain, lenient=bool(held) and domain not in held)
        except OSError:
            if not held or domain in held:
                raise
            continue
        for label in labels:
            if domain in held or label not in found:
                found[label] = root / domain / label
    return {label: found[label] for label in sorted(found)}


def items_of(root: Path, domain: str) -> list[ImageFile]:
    """What lies in the class folders of one domain and below them, sorted by path; hidden entries are left out. Raises OSError."""
    items = [item for label in _folders(root / domain) for item in _below(root, domain, label)]
    return sorted(items, key=lambda item: item.path)


def _below(root: Path, domain: str, label: str) -> Iterator[ImageFile]:
    """All files of one class, whatever folders they lie in. Links to folders are followed after all folders, each place once."""
    top = root / domain / label
    above = (*top.absolute().parents, *top.resolve().parents)
    read = {_place(folder) for folder in above}  # a link that leads there would read all classes
    left: deque[tuple[Path, str]] = deque([(top, f"{domain}/{label}")])
    while left:
        folder, path = left.popleft()
        if (place := _place(folder)) in read:
            yield ImageFile(domain, label, path)
            continue
        read.add(place)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if passed_over(entry.name):
                    continue
                if not _is_folder(entry, lenient=True):
                    yield _seen(ImageFile(domain, label, f"{path}/{entry.name}"), entry.stat)
                elif entry.is_symlink():
                    left.append((folder / entry.name, f"{path}/{entry.name}"))
                else:
                    left.appendleft((folder / entry.name, f"{path}/{entry.name}"))


def _place(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def loose(root: Path, domains: Sequence[str]) -> int:
    """Images, by the ends of their names, that lie in the root or in a domain and not in a class folder. Raises OSError."""
    count = 0
    for folder in (root, *(root / domain for domain in domains)):
        with os.scandir(folder) as entries:
            count += sum(_named_as_image(entry.name) for entry in entries if not _is_folder(entry, lenient=True))
    return count


def _named_as_image(name: str) -> bool:
    return not passed_over(name) and name.casefold().endswith(ENDS)


def passed_over(name: str) -> bool:
    """Whether an entry of a folder is hidden, or is what an operating system leaves there: it is neither read nor counted."""
    return name.startswith(".") or name.casefold() in LEFTOVERS


def unknown(root: Path, folders: tuple[str, ...], known: tuple[str, ...]) -> list[Problem]:
    """Folders that are not there or named twice. Raises OSError for one that is there and cannot be read."""
    missing = [name for name in folders if name not in known]
    for name in missing:
        if (root / name).is_symlink():
            (root / name).stat()
    problems = [Problem("", "folders", quoted(name), "a domain of the root", nearest(name, known)) for name in missing]
    twice = sorted({name for name in folders if folders.count(name) > 1})
    return problems + [Problem("", "folders", f"'{name}' twice", "every domain once") for name in twice]


def unfit_names(root: Path, folders: tuple[str, ...]) -> list[Problem]:
    """Domains and classes that cannot be written, or that a person would take for one. folders: the domains that are held.

    Raises OSError.
    """
    held = {folded(name) for name in folders} or {folded(name) for name in domains_of(root)}
    domains = {name: root / name for name in domains_of(root, folders) if folded(name) in held}
    classes = classes_of(root, folders)
    return (
        _unwritable([*domains.values(), *classes.values()])
        or same_names("root", "domain", domains, "Rename the folders, so that it has one name wherever it stands")
        + same_names("root", "class", classes, "Rename the folders, so that it has one name wherever it stands")
        or _parts({name: place for name, place in classes.items() if place.parent in domains.values()})
    )


def writable(name: str) -> bool:
    """Whether a name can be shown and written: not without letters, with control characters, or not UTF-8."""
    return bool(name.strip()) and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def _unwritable(folders: Sequence[Path]) -> list[Problem]:
    wrong = [folder for folder in folders if not writable(folder.name)]
    if not wrong:
        return []
    expected = "folders with names in UTF-8, without control characters"
    mend = "Rename it; for names from Windows: convmv -f latin1 -t utf8"
    return [Problem("", "root", first_of([*map(quoted, wrong)], 1), expected, mend)]


def _parts(classes: Mapping[str, Path]) -> list[Problem]:
    """Parts of a data set in place of classes: their images would be read, and the classes below taken for patients."""
    if not classes or any(folded(name) not in PARTS for name in classes):
        return []
    found = f"only the classes {', '.join(classes)}, which are parts of a data set, e.g. {quoted(next(iter(classes.values())))}"
    return [Problem("", "root", found, LAYOUT, "Make every part a domain, or move the class folders up")]


def unreadable(error: OSError, root: Path) -> Problem:
    """A folder or file that is asked for and cannot be opened."""
    mend = {
        errno.EACCES: "Give this user the right to read it (a folder needs x, too)",
        errno.ELOOP: "It is a link to itself: mend or remove it",
        errno.ENOENT: "It is a link that leads nowhere: mend or remove it",
    }
    place = Path(error.filename or root)
    if error.errno == errno.EACCES:  # the folder that has to be opened up, and not what lies in it
        place = next((folder for folder in reversed(place.parents) if not os.access(folder, os.X_OK)), place)
    found = f"{quoted(place)}, which cannot be read ({error.strerror})"
    return Problem("", "root", found, LAYOUT, mend.get(error.errno or 0, ""))


def looked_at(root: Path, row: ImageFile) -> ImageFile:
    """The row of a table with what the system says of its file; the row itself if there is none. Raises OSError."""
    return _seen(row, lambda: os.stat(os.path.join(root, row.path)))  # noqa: PTH116, PTH118 - half the time of a Path


def _seen(item: ImageFile, look: Callable[[], os.stat_result]) -> ImageFile:
    """Raises OSError where the folder, or what a link leads to, may not be looked into."""
    try:
        return item.seen(look())
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return item  # named among the broken files when the images are loaded


NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What the system says of a name that no file has, and of a link that leads to nothing, or to itself."""


def _folders(path: Path, lenient: bool = False) -> tuple[str, ...]:
    """Names of folders, sorted. Raises OSError, if not lenient also for a link that cannot be followed."""
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry in entries if not passed_over(entry.name) and _is_folder(entry, lenient)))


def _is_folder(entry: os.DirEntry[str], lenient: bool) -> bool:
    """Raises OSError, if not lenient, for a link that may once have led to a folder."""
    if not entry.is_symlink():
        return entry.is_dir(follow_symlinks=False)
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError:
        if lenient or _named_as_image(entry.name):
            return False
        raise
