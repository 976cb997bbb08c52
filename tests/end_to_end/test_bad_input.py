"""What users get wrong: one clear message that names file and key, exit status 2, and nothing half-written."""

from __future__ import annotations

import html
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from fedmerge.cli.deployment.server_app import conduct
from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import load_experiment
from fedmerge.experiment.overrides import Overrides
from fedmerge.federated.model import ModelSpec, build
from tests.conftest import TINY
from tests.front_door import SCENARIO, command, done, fedmerge, simulate, world

Edit = Callable[[Path, dict[str, Any]], None]


def change(**keys: Any) -> Edit:
    """The scenario with other values."""

    def edit(root: Path, scenario: dict[str, Any]) -> None:
        scenario.update(keys)

    return edit


def site(name: str, **keys: Any) -> Edit:
    """One site's file with other values."""

    def edit(root: Path, scenario: dict[str, Any]) -> None:
        file = root / "sites" / f"{name}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))

    return edit


def album(*classes: str) -> Edit:
    """`north` reads an image folder with these classes."""

    def edit(root: Path, scenario: dict[str, Any]) -> None:
        (root / "album" / "ward").mkdir(parents=True)
        for label in classes:
            (root / "album" / "ward" / label).mkdir()
            Image.new("L", (16, 16)).save(root / "album" / "ward" / label / "0.png")
        site("north", source={"kind": "image_folder", "root": str(root / "album")})(root, scenario)

    return edit


MISTAKES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "a misspelled key": (change(trainign={"runs": 2}), ("tiny.yaml: trainign", "did you mean 'training'?")),
    "a misspelled key below": (change(training={"epoch": 2}), ("tiny.yaml: training.epoch", "did you mean 'epochs'?")),
    "a missing site file": (change(sites=["nort", "south"]), ("sites/nort.yaml", "No such file", "did you mean 'north.yaml'?")),
    "an unknown source": (site("north", source={"kind": "organ_fantom"}), ("north.yaml: source", "did you mean 'organ_phantom'?")),
    "the target among the sites": (change(sites=["north", "mercy"]), ("tiny.yaml: target", "also one of the sites")),
    "a site twice": (change(sites=["north", "north"]), ("tiny.yaml: sites", "'north' 2 times")),
    "other classes": (album("liver", "cat"), ("site 'north': source", "the classes of 'south'", "extra ['cat']")),
    "an empty image folder": (album(), ("north.yaml: source.root", "no image")),
    "one class": (album("liver"), ("north.yaml: source.root", "one class only (liver)")),
    "no runs": (change(training={"runs": 0}), ("tiny.yaml: training.runs", "found 0", "greater than or equal to 1")),
    "no images in a batch": (change(stream={"kind": "iid", "batch_size": 0}), ("tiny.yaml: stream.batch_size", "found 0")),
    "a delta of 0": (change(stream={"kind": "dirichlet_batch", "delta": 0}), ("tiny.yaml: stream.delta", "greater than 0")),
    "a schedule inside that is none": (
        change(stream={"kind": "domain_seq", "within": "temporl"}),
        ("tiny.yaml: stream.within", "did you mean 'temporal'?"),
    ),
    "a drift within one domain": (
        change(stream={"kind": "domain_seq", "within": "mixture_drift"}),
        ("tiny.yaml: stream.within.kind", "a drift over one domain"),
    ),
    "a drift over one domain": (
        site("mercy", source={"kind": "organ_phantom", "images": 80, "patients": 16, "planes": ["axial"]}),
        ("tiny.yaml: stream.kind", "a drift over one domain (axial)"),
    ),
    "an unknown method": (change(methods=["mean", "eaam"]), ("tiny.yaml: methods[1]", "did you mean 'eam'?")),
    "a method's misspelled key": (change(methods=[{"eam": {"gama": 3}}]), ("methods[0].eam.gama", "did you mean 'gamma'?")),
    "a statistic that nobody uploads": (
        change(methods=["mean", "fisher"], uploads=["gram"]),
        ("tiny.yaml: methods[1]", "needs the statistic 'fisher'", "uploads: [gram, fisher]"),
    ),
    "an unknown statistic": (change(uploads=["fischer"]), ("tiny.yaml: uploads[0]", "did you mean 'fisher'?")),
    "a statistic that no method needs": (change(uploads=["kfac"]), ("tiny.yaml: uploads[0]", "below 'federated' ask for it")),
    "a statistic twice": (change(uploads=["gram", {"gram": {"samples": 3}}]), ("tiny.yaml: uploads", "'gram' 2 times")),
    "other rounds than the method's": (
        change(methods=[{"regmean_pp": {"ratio": 0.5}}], uploads=["gram_rounds"]),
        ("methods[0].ratio", "found 0.5", "0.95, as in uploads.gram_rounds"),
    ),
    "other rounds than those of the method below": (
        change(methods=[{"lines": {"of": {"regmean_pp": {"ratio": 0.5}}}}], uploads=["gram_rounds"]),
        ("methods[0].lines.of.regmean_pp.ratio", "found 0.5", "as in uploads.gram_rounds"),
    ),
    "a method below that is unknown": (change(methods=[{"lame": {"of": "tiess"}}]), ("methods[0].lame.of", "did you mean 'ties'?")),
    "a method below that needs batches": (
        change(methods=[{"lines": {"of": "eam"}}]),
        ("lines.of", "not one model that is merged once"),
    ),
    "a statistic that only the method below needs": (
        change(methods=["mean", {"lame": {"of": "fisher"}}]),
        ("tiny.yaml: methods[1]", "needs the statistic 'fisher'", "uploads: [fisher]"),
    ),
    "RegMean++ at the target": (change(methods=[{"regmean_pp": {"mode": "target"}}]), ("regmean_pp.mode", "the merge is the mean")),
    "a generalist that nobody gave": (
        change(methods=[{"t3": {"generalist": "generalist"}}]),
        ("methods[0]", "expected that key in the scenario"),
    ),
    "a share above 1": (
        change(methods=[{"ties": {"keep": 1.5}}]),
        ("methods[0].ties.keep", "found 1.5", "less than"),
    ),
    "a join of who is there": (change(events=[{"at": 1, "join": "south"}]), ("events[0].join", "who is there already at batch 1")),
    "a leave of who is not there": (
        change(events=[{"at": 1, "leave": "nort"}]),
        ("tiny.yaml: events[0].leave", "not there at batch 1", "did you mean 'north'?"),
    ),
    "the last hospital leaves": (
        change(events=[{"at": 1, "leave": "north"}, {"at": 2, "leave": "south"}]),
        ("events[1]", "the last hospital leaving at batch 2"),
    ),
    "an event of two things": (
        change(events=[{"at": 1, "join": "east", "leave": "north"}]),
        ("events[0]", "join, leave, and replace"),
    ),
    "an event of an unknown hospital": (change(events=[{"at": 1, "join": "eest"}]), ("eest.yaml", "did you mean 'east.yaml'?")),
    "the target joins": (change(events=[{"at": 1, "join": "mercy"}]), ("tiny.yaml: target", "also one of the sites")),
    "more sites wanted than there are": (
        change(min_sites=3),
        ("tiny.yaml: min_sites", "found 3", "at most 2, the number of sites"),
    ),
    "rounds beside events": (
        change(events=[{"at": 1, "join": "east"}], uploads=["gram_rounds"]),
        ("tiny.yaml: uploads", "'gram_rounds', which is made in rounds"),
    ),
    "public images that are not there": (
        change(probe={"kind": "image_folder", "root": "/gone/from/here"}),
        ("tiny.yaml: probe.root", "found '/gone/from/here', which does not exist"),
    ),
    "an unknown schedule": (change(stream={"kind": "idd"}), ("tiny.yaml: stream", "did you mean 'iid'?")),
    "a flip where left is not right": (change(methods=[{"eam": {"augs": ["hflip"]}}]), ("augs", "left organ")),
    "a text for a number": (change(seed="three"), ("tiny.yaml: seed", "'three'")),
    "a missing key": (lambda root, scenario: scenario.__delitem__("target"), ("tiny.yaml: target", "required")),
}


NO_LINE = {"a missing site file", "an event of an unknown hospital", "other classes", "a missing key"}
"""What does not stand in any line."""

PARENT = {
    "a drift within one domain": "within",
    "other rounds than the method's": "regmean_pp",
    "a flip where left is not right": "eam",
}
"""Keys that the file does not have, and the key above them that it has."""


def without_lines(error: ScenarioError) -> str:
    return re.sub(r", line \d+", "", str(error))


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_found_before_anything_starts(what: str, tmp_path: Path) -> None:
    edit, words = MISTAKES[what]
    scenario = {**SCENARIO}
    file = world(tmp_path / "here")
    edit(tmp_path / "here", scenario)
    file.write_text(yaml.safe_dump(scenario))
    with pytest.raises(ScenarioError) as error:
        load_experiment(file)
    (problem,) = error.value.problems
    for word in words:
        assert word in without_lines(error.value)
    if what in NO_LINE:
        assert ", line" not in problem.where
        return
    place, _, number = problem.where.rpartition(", line ")
    line = Path(place).read_text().splitlines()[int(number) - 1]
    name = re.sub(r"\[\d+\]$", "", problem.key).rpartition(".")[2]
    assert line.lstrip().startswith("- ") if problem.key.endswith("]") else f"{name}:" in line or f"{PARENT.get(what)}:" in line


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("target:\n  site: mercy\n  max_bytes: wrong\n", ", line 3"),
        ("target: mercy\nseed: 3\ntarget_max_bytes: wrong\n", ", line 1"),
    ],
)
def test_what_a_target_has_is_found_where_it_stands(text: str, where: str, tmp_path: Path) -> None:
    """By the key that it has now; an older one has the line of what it stands below now."""
    file = world(tmp_path / "here")
    rest = yaml.safe_dump({key: value for key, value in SCENARIO.items() if key not in ("target", "seed")})
    file.write_text(text + rest)
    with pytest.raises(ScenarioError, match=rf"tiny\.yaml{where}: target\.max_bytes: found 'wrong'"):
        load_experiment(file)
    with pytest.raises(ScenarioError, match=r"tiny\.yaml, as the command line changes it: target\.max_bytes: found 'bad'"):
        load_experiment(file, Overrides(settings=(("target.max_bytes", "bad"),)))


def test_who_is_left_out_must_be_there(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    with pytest.raises(ScenarioError, match=r"--without: found 'nort'; expected a site .* did you mean 'north'"):
        load_experiment(file, Overrides(without=("nort",)))
    with pytest.raises(ScenarioError, match="at least one site that stays"):
        load_experiment(file, Overrides(without=("north", "south")))
    change(events=[{"at": 1, "join": "east"}, {"at": 2, "leave": "south"}])(tmp_path, scenario := {**SCENARIO})
    file.write_text(yaml.safe_dump(scenario))
    plan = load_experiment(file, Overrides(without=("east",)))
    assert (plan.founders, [event.words for event in plan.scenario.events]) == (("north", "south"), ["south leaves"])
    assert [site.name for site in plan.sites] == ["north", "south"]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    scenario = {**SCENARIO, "seed": -1, "sites": ["nort", "south"], "methods": ["eaam"], "color": "red"}
    site("south", validation=2)(tmp_path / "here", scenario)
    file.write_text(yaml.safe_dump(scenario))
    with pytest.raises(ScenarioError) as error:
        load_experiment(file)
    found = without_lines(error.value)
    assert "5 problems" in found
    for word in ("seed", "color", "nort.yaml", "eaam", "south.yaml: validation"):
        assert word in found


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_the_front_door_says_it_once_and_writes_nothing(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump({**SCENARIO, "trainign": {}}))
    before = sorted(path for path in tmp_path.rglob("*"))
    said = refused(command(tmp_path / "here"))  # a process of its own
    assert said.startswith("fedmerge: the scenario cannot run: 1 problem\n")
    assert said.count("trainign") == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert "did you mean 'tiny.yaml'?" in refused(simulate(tmp_path / "here", "scenarios/tinny.yaml"))
    assert "No such option" in refused(simulate(tmp_path / "here", "scenarios/tiny.yaml", "--sed", "3"))


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    deeper = ModelSpec(name=TINY["name"], kwargs={**TINY["kwargs"], "depth": 2})
    save_file(build(deeper, 11).state_dict(), tmp_path / "here" / "w.safetensors")
    scenario = {**SCENARIO, "initialization": {"kind": "checkpoint", "path": str(tmp_path / "here" / "w.safetensors")}}
    file.write_text(yaml.safe_dump(scenario))
    said = refused(simulate(tmp_path / "here", "scenarios/tiny.yaml"))
    assert "w.safetensors does not fit the model" in said
    assert "unexpected: blocks.1" in said
    assert not (tmp_path / "here" / "runs" / "tiny-3" / "summary.json").exists()


def test_a_generalist_that_does_not_fit(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    save_file({"head.weight": build(ModelSpec.model_validate(TINY), 3).state_dict()["head.weight"]}, tmp_path / "g.safetensors")
    given = {"generalist": str(tmp_path / "g.safetensors"), "methods": [{"t3": {"generalist": "generalist"}}]}
    file.write_text(yaml.safe_dump({**SCENARIO, **given}))
    said = refused(simulate(tmp_path / "here", "scenarios/tiny.yaml"))
    assert "generalist: g.safetensors does not fit the model" in said
    assert not list((tmp_path / "here").rglob("expert.safetensors"))


@pytest.mark.parametrize("seconds", ["abc", "", "nan", float("inf"), 0, -1, True])
def test_a_wait_for_hospitals_that_is_no_time(seconds: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before any hospital is asked, so that no grid is needed; an empty pool or run folder is the default one."""
    world(tmp_path / "here")
    config = {"root": str(tmp_path / "here"), "scenario": "scenarios/tiny.yaml", "pool": "", "out": "", "connect-s": seconds}
    with pytest.raises(ScenarioError) as error:
        conduct(None, config, simulated=False)
    assert f"--run-config: connect-s: found '{seconds}'; expected a finite number of seconds" in str(error.value)
    here = tmp_path / "here"
    assert f"pool {here / 'pool'}, run folder {here / 'runs' / 'tiny-3'}" in capsys.readouterr().out


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    world(tmp_path / "here")
    (tmp_path / "here" / "thesis").mkdir()
    (tmp_path / "here" / "thesis" / "chapter-1.tex").write_text("x")
    assert "found files that are no run" in refused(simulate(tmp_path / "here", "scenarios/tiny.yaml", "--out", "thesis"))
    assert [path.name for path in (tmp_path / "here" / "thesis").iterdir()] == ["chapter-1.tex"]


def albums(here: Path, **classes: str) -> Path:
    """A scenario whose hospitals and target have roots of their own, with these classes."""
    file = world(here)
    for name, labels in classes.items():
        for number, label in enumerate(labels.split()):
            (here / name / "ward" / label).mkdir(parents=True)
            Image.new("L", (16, 16), 20 * number).save(here / name / "ward" / label / "0.png")
        site(name, source={"kind": "image_folder", "root": str(here / name)})(here, {})
    file.write_text(yaml.safe_dump({**SCENARIO, "stream": {"kind": "iid"}}))
    return file


def test_a_class_that_one_hospital_lacks_or_writes_otherwise(tmp_path: Path) -> None:
    """What to do is said, for a hospital and for the target."""
    for name in ("south", "mercy"):
        three = dict.fromkeys(("north", "south", "mercy"), "ham mel n\u00e4vus")
        for number, (labels, words) in enumerate(
            {
                "ham mel": f"Make an empty folder 'n\u00e4vus' in '{tmp_path}/{name}0/{name}/ward'",
                "ham mel na\u0308vus": "as 'north' calls it: the names differ in Unicode form only",
                "Ham mel n\u00e4vus": "Rename 'Ham' to 'ham', as 'north' calls it: the names differ in case only",
                "ham mel n\u00e4vus other": "add them to the other sites too",
            }.items()
        ):
            file = albums(tmp_path / f"{name}{number}", **{**three, name: labels})
            with pytest.raises(ScenarioError, match=f"site '{name}'") as error:
                load_experiment(file)
            assert len(error.value.problems) == 1
            assert words in str(error.value)


def test_a_mistake_that_several_sites_have_is_told_once(tmp_path: Path) -> None:
    file = albums(tmp_path / "here", north="ham mel", south="ham mel", mercy="ham mel")
    for name in ("north", "south", "mercy"):
        site(name, source={"kind": "image_folder", "root": "gone"})(tmp_path / "here", {})
    with pytest.raises(ScenarioError, match=r"1 problem\n.*north.yaml, line \d \(and 2 more files\): source.root: found"):
        load_experiment(file)


def test_what_is_left_out_is_counted_on_the_terminal_and_in_the_report(tmp_path: Path) -> None:
    file = albums(tmp_path / "here", north="ham mel odd", south="ham mel odd", mercy="ham mel odd")
    for name in ("north", "south", "mercy"):
        (tmp_path / "here" / name / "ward" / "odd" / "0.png").unlink()
        for label in ("ham", "mel"):
            (tmp_path / "here" / name / "ward" / label / "patient").mkdir()
            for number in range(16):
                Image.new("L", (16, 16), 9 * number).save(tmp_path / "here" / name / "ward" / label / "patient" / f"{number}.png")
    Image.new("L", (16, 16)).save(tmp_path / "here" / "south" / "ward" / "beside.png")
    file.write_text(yaml.safe_dump({**SCENARIO, "stream": {"kind": "iid"}}))
    said = done(tmp_path / "here", "--out", "run")
    assert "site 'south': images left out, for they lie in no class folder: 1\n" in said
    assert "classes that no site has an image of: odd\n" in said
    page = html.unescape((tmp_path / "here" / "run" / "report.html").read_text())
    assert "site 'south': images left out, for they lie in no class folder: 1;" in page
    assert "; classes that no site has an image of: odd" in page


def test_a_name_that_is_not_utf_8_is_refused_by_every_verb(tmp_path: Path) -> None:
    file = albums(tmp_path / "here", **dict.fromkeys(("north", "south", "mercy"), "ham nev"))
    nev = tmp_path / "here" / "mercy" / "ward" / "nev"
    nev.rename(nev.with_name(os.fsdecode(b"n\xe4vus")))
    for words in (
        ["simulate", str(file)],
        ["plan", str(file)],
        ["sweep", str(file)],
        ["outline", str(file.parents[1] / "sites" / "mercy.yaml")],
    ):
        said = refused(fedmerge(tmp_path / "here", *words))
        assert said.count("ward/n\\xe4vus'; expected folders with names in UTF-8") == 1
    assert not (tmp_path / "here" / "pool").exists()


def test_a_folder_of_sites_that_may_not_be_read(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    sites = tmp_path / "here" / "sites"
    sites.chmod(0)
    try:
        if os.access(sites, os.X_OK):
            pytest.skip("this user may read every folder")
        with pytest.raises(ScenarioError, match=r"sites/north\.yaml: found Permission denied"):
            load_experiment(file)
    finally:
        sites.chmod(0o700)
