"""Keys from the command line: what they change, and what is said when they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmerge.errors import ScenarioError
from fedmerge.plan import Overrides, load
from fedmerge.report.grid import Grid, as_csv, as_latex, as_markdown
from fedmerge.settings import assign, parse, single
from fedmerge.sweep import cells_of
from tests.test_run import world


def test_values_are_yaml_with_commas_between() -> None:
    assert parse("stream.delta=0.01,1") == ("stream.delta", (0.01, 1))
    assert parse("stream={kind: iid, batch_size: 8},{kind: iid}") == ("stream", ({"kind": "iid", "batch_size": 8}, {"kind": "iid"}))
    assert parse("question='one, two',three") == ("question", ("one, two", "three"))
    assert parse("methods=[mean, eam]") == ("methods", (["mean", "eam"],))
    for wrong in ("stream.delta", "=3", "seed=", "seed={"):
        with pytest.raises(ScenarioError):
            parse(wrong)
    with pytest.raises(ScenarioError, match="several are for fedmerge sweep"):
        single("seed=1,2")


def test_a_key_is_changed_and_nothing_else() -> None:
    soft = {"eam": {"gamma": 2, "label": "soft"}}
    content = {"stream": {"kind": "iid"}, "methods": ["mean", "eam", soft]}
    assert assign(content, "stream.batch_size", 8)["stream"] == {"kind": "iid", "batch_size": 8}
    assert assign(content, "methods.eam.gamma", 5)["methods"] == ["mean", {"eam": {"gamma": 5}}, soft]
    assert assign(content, "methods.soft.gamma", 5)["methods"][2] == {"eam": {"gamma": 5, "label": "soft"}}
    assert content == {"stream": {"kind": "iid"}, "methods": ["mean", "eam", {"eam": {"gamma": 2, "label": "soft"}}]}
    with pytest.raises(ScenarioError, match="did you mean 'eam'"):
        assign(content, "methods.eamm.gamma", 5)
    with pytest.raises(ScenarioError, match="a mapping with keys below it"):
        assign(content, "stream.kind.size", 5)


def test_an_unknown_key_is_told_like_any_mistake(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    with pytest.raises(ScenarioError, match=r"stream.batchsize.*did you mean 'batch_size'"):
        load(file, Overrides(settings=(("stream.batchsize", 3),)))
    plan = load(file, Overrides(settings=(("stream", {"kind": "iid", "batch_size": 3}),), target="north"))
    assert plan.scenario.stream.kind() == "iid"
    assert (plan.target.name, [site.name for site in plan.sites]) == ("north", ["south"])


def test_cells_are_all_combinations(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    cells = cells_of(file, range(2), ["stream.batch_size=4,8", "methods.eam.gamma=1,5,9"], "")
    assert len(cells) == 12
    assert len({cell.name for cell in cells}) == 12
    assert [cell.target for cell in cells_of(file, range(1), [], "each")] == ["north", "south"]
    (named,) = cells_of(file, [3], ["stream={kind: domain_seq, within: {kind: temporal, order: sorted}}"], "north")
    assert named.name == "north-stream=domain_seq_within_temporal_order_sorted-seed3"
    with pytest.raises(ScenarioError, match="a key twice"):
        cells_of(file, range(1), ["seed=1", "seed=2"], "")


def test_tables_of_a_grid() -> None:
    def row(seed: int, gamma: int, eam: float) -> dict[str, object]:
        methods = {"mean": {"accuracy": 0.8, "ranked": True}, "eam": {"accuracy": eam, "ranked": True}}
        return {"seed": seed, "target": None, "settings": {"methods.eam.gamma": gamma}, "methods": methods}

    grid = Grid.of([row(0, 1, 0.9), row(1, 1, 0.8), row(0, 5, 0.7)])
    text = as_csv(grid).splitlines()
    assert text[0] == "methods.eam.gamma,method,seeds,accuracy,low,high,minus mean,minus mean low,minus mean high"
    assert text[1] == "1,eam,2,85.0,21.5,148.5,+5.0,-58.5,+68.5"
    assert "5,eam,1,70.0,one seed,one seed,-10.0,one seed,one seed" in text
    assert as_markdown(grid).count("\n") == 6
    assert r"methods.eam.gamma & method" in as_latex(grid)
