"""The public data sets that can be read by name, from their own records: a table, one in full, or a page of Markdown."""

from __future__ import annotations

import inspect

from rich.table import Table

from fedmerge.cli.methods import fields_of
from fedmerge.data.datasets._base import SOURCES
from fedmerge.data.datasets._public import Published, published_by
from fedmerge.errors import DataError, nearest
from fedmerge.report.terminal import console

HEAD = """# Public data sets by name

The data sets of the papers that fedmerge reads as they were published: unpack one into a folder, and name it in a site's `source`.

```yaml
source: {kind: camelyon17, root: "${FEDMERGE_DATA}/wilds", folders: [hospital_0], take: [train, id_val]}
```

- `folders` chooses domains, `take` chooses official parts, and `split` divides them among hospitals.
- The number of images must be the published one. Another number is refused, and the message has both. `check_counts: false`
  allows it, if you have left images out on purpose. Where the published number could not be verified, a difference is only
  reported.
- fedmerge downloads nothing: "get it" says where to ask.
- The layouts are tested with small files of the same format (`tests/unit/data/test_public.py`), not with the data themselves.

MedMNIST-C has corruptions of MedMNIST's images: `stream: {kind: corruption, families: published, modality: ct}` takes all that it
publishes for OrganMNIST, with its constants (`scenarios/organmnist-corruption.yaml`). Other values of `modality`: pathology, blood,
dermatoscope, fundus, tissue, oct, ultrasound, chest, pneumonia.

`fedmerge datasets --markdown` prints this page.
"""


def records() -> dict[str, dict[str, Published]]:
    """What is published, by the name of the source and of the data set."""
    kinds = {name: SOURCES.load(name) for name in SOURCES.names}
    return {name: dict(found) for name, kind in kinds.items() if (found := published_by(kind))}


def dataset_table() -> None:
    """Print one row for each data set: how YAML names it, its images, classes and domains, and its licence."""
    out = console(width=160)
    shown = Table(title="Public data sets: one file each in fedmerge/data/datasets")
    for column in ("source", "images", "classes", "domains", "license"):
        shown.add_column(column, no_wrap=column == "source")
    for kind, every in records().items():
        for name, facts in every.items():
            domains = ", ".join(facts.images) or "each data set"
            shown.add_row(_written(kind, name), _count(facts), str(len(facts.classes) or "its own"), domains, facts.license)
    out.print(shown)
    out.print("`fedmerge datasets NAME` says where to get it, how it lies in its folder, and the keys of the source.", markup=False)


def describe_dataset(kind: str) -> str:
    """The records of one source, and its keys. Raises DataError for an unknown name."""
    if kind not in SOURCES.names:
        raise DataError(f"data set: found '{kind}'; expected a known one: {nearest(kind, SOURCES.names)}")
    source = SOURCES.load(kind)
    text = [f"{kind}: {inspect.getdoc(inspect.getmodule(source)) or ''}", "", inspect.getdoc(source) or ""]
    for name, facts in records().get(kind, {}).items():
        text += ["", _written(kind, name), *(f"  {key}: {value}" for key, value in _lines(facts))]
    return "\n".join([*text, "", "Fields:", *fields_of(source)])


def dataset_page() -> str:
    """All records as Markdown."""
    text = [HEAD]
    for kind, every in records().items():
        text.append(f"## {kind}\n\n{(inspect.getdoc(inspect.getmodule(SOURCES.load(kind))) or '').replace('<', '&lt;')}\n")
        for name, facts in every.items():
            lines = [f"- {key}: {_plain(value)}" for key, value in _lines(facts)]
            text.append("\n".join([f"`{_written(kind, name)}`\n", *lines, ""]))
    return "\n".join(text)


def _plain(value: str) -> str:
    """Text in which Markdown sees no tags."""
    return f"`{value}`" if "<" in value else value


def _written(kind: str, name: str) -> str:
    return f"kind: {kind}, dataset: {name}" if len(records()[kind]) > 1 else f"kind: {kind}"


def _count(facts: Published) -> str:
    whole = facts.total or sum(facts.images.values())
    return f"{whole:,}{' (not verified)' if facts.unverified else ''}" if whole else "not published" if facts.images else "its own"


def _lines(facts: Published) -> list[tuple[str, str]]:
    """What a record says, as a reader wants it; nothing of what it does not say."""
    domains = ", ".join(f"{name} ({number:,})" if number else name for name, number in facts.images.items())
    found = [
        ("title", facts.title),
        ("classes", ", ".join(facts.classes)),
        ("domains (images)", domains),
        ("images", _count(facts) if facts.images else ""),
        ("official parts", ", ".join(facts.parts)),
        ("kept together", facts.patients),
        ("layout of the root", facts.layout),
        ("license", facts.license),
        ("cite", facts.citation),
        ("get it", facts.where),
        ("not verified", facts.unverified),
    ]
    return [(key, value) for key, value in found if value]
