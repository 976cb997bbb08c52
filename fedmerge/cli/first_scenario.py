"""The verb `fedmerge init`: site files and a scenario for somebody's own images, with all that was assumed in words."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedmerge.data.image_sample import Look, look
from fedmerge.data.survey import ListedImage, Survey, survey
from fedmerge.errors import DataError, FolderError, folded, nearest, quoted
from fedmerge.experiment.experiment import load_experiment

HELD = frozenset(("test", "testing", "holdout"))
"""Parts that hospitals do not train on."""

TARGET_SHARE = 0.3
"""Of two hospitals' images, what the target sees; of one hospital's, what each of two parts keeps is half of the rest."""

MOST = 32
"""Images in a batch, where the target has enough for ten batches."""


@dataclass(frozen=True)
class Draft:
    """A site that is to be written. n: its images. source: what only this site's source says."""

    name: str
    title: str
    n: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Who trains, who is the target, and in how far that was assumed."""

    sites: tuple[Draft, ...]
    target: Draft
    said: list[str]


def first_scenario(folder: Path, images: Path, target: str | None) -> tuple[Path, list[str]]:
    """Write sites and a scenario for the images into `folder`; the scenario's file, and what was assumed.

    Raises UserError, and leaves nothing behind then.
    """
    found = survey(images)
    seen, name = look([found.root / row.path for row in found.rows]), _slug(images.resolve().stem, "images", r"^[a-z0-9]")
    plan = _planned(found, target)
    said = [seen.words, *found.said, *plan.said]
    texts = _texts(folder.resolve(), name, found, seen, plan, said)
    scenario = folder / "scenarios" / f"{name}.yaml"
    with _written(folder, texts):
        load_experiment(scenario)
    return scenario, said


def _planned(found: Survey, target: str | None) -> Plan:
    """Who trains and who is the target. Raises DataError where no hospital's images can be used, or none is called `target`."""
    said, hospitals = list[str](), dict[str, list[ListedImage]]()
    for site, rows in found.by_site().items():
        own = _of_parts(rows)
        if len({row.label for row in own}) > 1 and len({row.patient or row.path for row in own}) > 1:
            hospitals[site] = rows
        else:
            said.append(f"hospital {quoted(site)} is left out: its {len(own)} images show one class only, or one patient only")
    if not hospitals:
        raise DataError(
            f"--images: {quoted(found.root)}: found no hospital with two classes and two patients; expected one or more"
        )
    if target is not None and (target not in hospitals or len(hospitals) < 2):
        hint = nearest(target, hospitals) if len(hospitals) > 1 else "there is one hospital only"
        raise DataError(f"--target: found {quoted(target)}; expected one of several hospitals with images: {hint}")
    if len(hospitals) == 1:
        return _of_one(found, next(iter(hospitals)), next(iter(hospitals.values())), said)
    names = dict(zip(hospitals, _slugs(list(hospitals)), strict=True))
    if len(hospitals) == 2 and target is None:
        return _of_two(hospitals, names, said)
    classes = {row.label for rows in hospitals.values() for row in rows}
    whole = [site for site, rows in hospitals.items() if {row.label for row in rows} == classes] or list(hospitals)
    chosen = target or min(whole, key=lambda site: len(hospitals[site]))
    rest = [site for site in hospitals if site != chosen]
    if target is None:
        why = "it has the fewest images of the hospitals that have all classes"
        said.append(f"{quoted(chosen)} is the target and trains no expert: {why}; --target NAME chooses another")
    if len(rest) == 1:
        said.append(f"only {quoted(rest[0])} trains, so there is nothing to merge; it takes two hospitals that train, and a target")
    said += _unused(hospitals)
    sites = tuple(_draft(names[site], site, hospitals[site], _training(hospitals[site])) for site in rest)
    return Plan(sites, _draft(names[chosen], chosen, hospitals[chosen], {}), said)


def _of_one(found: Survey, site: str, rows: list[ListedImage], said: list[str]) -> Plan:
    """One hospital's images shared out: there is no federation yet, but it can be tried."""
    where = {"folders": [site]} if site else {}
    said.append(
        "there is only one hospital; for a first try its images are divided: part_1 and part_2 train, the target sees the rest. "
        "For a real federation add images of other hospitals, in ROOT/<hospital>/<class>/ or as a column 'site' of the table"
    )
    held = [row for row in rows if folded(row.split) in HELD]
    if held and len({row.label for row in held}) > 1:
        take = _training(rows).get("take", [])
        said.append(f"part_1 and part_2 share {', '.join(map(quoted, take))}; the target sees the other parts")
        kept = sorted({row.split for row in held})
        both = [{**where, "take": take, "split": _share(2, part, [0.5, 0.5])} for part in range(2)]
        n, last = (len(rows) - len(held)) // 2, Draft("target", "The target", len(held), {**where, "take": kept})
    else:
        shares = [round((1 - TARGET_SHARE) / 2, 2)] * 2 + [TARGET_SHARE]
        both = [{**where, "split": _share(3, part, shares)} for part in range(2)]
        n, third = int(shares[0] * len(rows)), {**where, "split": _share(3, 2, shares)}
        last = Draft("target", "The target", int(TARGET_SHARE * len(rows)), third)
    parts = [Draft(f"part_{number}", f"Part {number}", n, source) for number, source in enumerate(both, start=1)]
    return Plan(tuple(parts), last, said)


def _of_two(hospitals: dict[str, list[ListedImage]], names: dict[str, str], said: list[str]) -> Plan:
    """Two hospitals train, and the target sees what they hold back: with one of them as the target, nothing would be merged."""
    share, shares = TARGET_SHARE, [round(1 - TARGET_SHARE, 2), TARGET_SHARE]
    said.append(
        f"both hospitals train on {1 - share:.0%} of their images, and the target sees the rest of both, like a ward that "
        "sends images to both; --target NAME makes one of them the target, and the other trains alone"
    )
    said += _unused(hospitals)
    sites = []
    for site, rows in hospitals.items():
        sites.append(_draft(names[site], site, rows, {**_training(rows), "split": _share(2, 0, shares)}))
    n = int(share * sum(map(len, hospitals.values())))
    own = {"folders": list(hospitals), "split": _share(2, 1, shares)} | _training(
        [row for rows in hospitals.values() for row in rows]
    )
    return Plan(tuple(sites), Draft(_slugs([*hospitals, "target"])[-1], "The target, from both hospitals", n, own), said)


def _draft(name: str, site: str, rows: list[ListedImage], source: dict[str, Any]) -> Draft:
    return Draft(name, site, len(rows), {"folders": [site], **source})


def _share(parts: int, part: int, shares: list[float]) -> dict[str, Any]:
    return {"by": "quantity", "parts": parts, "part": part, "shares": shares}


def _of_parts(rows: Sequence[ListedImage]) -> list[ListedImage]:
    """What a hospital trains on, where parts are known."""
    own = [row for row in rows if folded(row.split) not in HELD]
    return own or list(rows)


def _training(rows: Sequence[ListedImage]) -> dict[str, Any]:
    """The key `take` of a hospital that trains."""
    parts = sorted({row.split for row in _of_parts(rows)} - {""})
    return {"take": parts} if parts else {}


def _unused(hospitals: dict[str, list[ListedImage]]) -> list[str]:
    """What is said of parts."""
    every = {row.split for rows in hospitals.values() for row in rows} - {""}
    trained = {row.split for rows in hospitals.values() for row in _of_parts(rows)} & every
    if not every - trained:
        return []
    each = ", ".join(map(quoted, sorted(every - trained)))
    return [f"hospitals train on {', '.join(map(quoted, sorted(trained)))}, and not on {each}, which a target sees, too"]


def _slug(name: str, instead: str, begins: str = r"^[a-z]") -> str:
    """A name as sites and scenarios may have it."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().casefold()
    plain = re.sub(r"[^a-z0-9_-]+", "_", plain).strip("_-")[:30]
    return plain if re.match(begins, plain) else f"{instead}_{plain}" if plain else instead


def _slugs(names: Sequence[str]) -> list[str]:
    """Names of sites, each once; `each` means something else in a scenario."""
    found: list[str] = []
    for name in names:
        plain, number = _slug(name, "site"), 2
        taken = [*found, "each"]
        while plain in taken:
            plain, number = f"{_slug(name, 'site')}_{number}", number + 1
        found.append(plain)
    return found


def _texts(folder: Path, name: str, found: Survey, seen: Look, plan: Plan, said: list[str]) -> dict[str, str]:
    """Every file that is written, below `folder`."""
    source, texts = {**found.source, **seen.keys}, dict[str, str]()
    if found.listed:
        source = {"kind": "table", "file": str(folder / "images.csv"), **source}
        texts["images.csv"] = _as_csv(found.rows)
    for site in (*plan.sites, plan.target):
        content = {"name": site.name, "title": site.title, "source": {**source, **site.source}, "validation": 0.2}
        who = "The target, which trains no expert" if site is plan.target else "A hospital"
        texts[f"sites/{site.name}.yaml"] = f"# {who}; written by `fedmerge init`.\n{_dumped(content)}"
    small = seen.side <= MOST
    kwargs = {
        "img_size": 32 if small else 48,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "in_chans": seen.channels,
    }
    said.append(
        f"the model is small, sees {kwargs['img_size']} x {kwargs['img_size']} pixels (model.kwargs.img_size) and starts from "
        "public phantom images; 'protocol: eam' is for a pretrained ViT and a GPU"
    )
    content = {
        "name": name,
        "question": "Which of the classes is it?",  # --target and --add-site change who trains
        "seed": 0,
        "protocol": "quick",
        "model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs},
        "sites": [site.name for site in plan.sites],
        "target": plan.target.name,
        "stream": {"kind": "dirichlet_batch", "delta": 0.1, "batch_size": max(4, min(MOST, plan.target.n // 10))},
        "methods": ["mean", "expert", "ensemble", "eam", "posterior"],
    }
    head = "".join(f"# - {line}\n" for line in said)
    texts[f"scenarios/{name}.yaml"] = f"# Written by `fedmerge init`, which has assumed:\n{head}{_dumped(content)}"
    return texts


def _dumped(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _as_csv(rows: Sequence[ListedImage]) -> str:
    """The rows, with a comma between the cells and every cell in quotes."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(ListedImage._fields)
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def _written(folder: Path, texts: dict[str, str]) -> Iterator[None]:
    """Files that stay if the block ends well. Raises FolderError if one of them is there already."""
    there = [name for name in texts if (folder / name).exists()]
    if there:
        raise FolderError(
            f"{folder}: found {', '.join(there)}; expected none of the files to write. Choose another folder, or move them"
        )
    made: list[Path] = []
    try:
        for name, text in texts.items():
            for parent in reversed((folder / name).parents):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
            with (folder / name).open("x", encoding="utf-8") as file:
                made.append(folder / name)
                file.write(text)
        yield
    except BaseException as error:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise FolderError(
                f"{folder}: found something else at this place ({error.strerror}); expected a new folder. Choose another name"
            ) from None
        raise
