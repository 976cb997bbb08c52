"""Keys from the command line: what they change, and what is said when they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmerge.errors import ScenarioError
from fedmerge.experiment.experiment import Overrides, load_experiment
from fedmerge.experiment.overrides import assign, overridden, parse, single
from fedmerge.experiment.sweep import cells_of
from fedmerge.report.sweep_table import DomainTable, Grid, as_csv, as_latex, as_markdown
from tests.front_door import SCENARIO, world


def test_values_are_yaml_with_commas_between() -> None:
    assert parse("stream.delta=0.01,1") == ("stream.delta", (0.01, 1))
    assert parse("stream={kind: iid, batch_size: 8},{kind: iid}") == ("stream", ({"kind": "iid", "batch_size": 8}, {"kind": "iid"}))
    assert parse("question='one, two',three") == ("question", ("one, two", "three"))
    assert parse("methods=[mean, eam]") == ("methods", (["mean", "eam"],))
    assert parse("question=it's,'why?',http://x # two") == ("question", ("it's", "why?", "http://x"))
    for wrong in ("stream.delta", "=3", "seed=", "seed={", "seed=1]", "seed=1],[2", "seed=why?", "seed=2001-99-99"):
        with pytest.raises(ScenarioError):
            parse(wrong)
    with pytest.raises(ScenarioError, match="several are for fedmerge sweep"):
        single("seed=1,2")
    for wrong, said in {
        "x=" + "[" * 3000 + "]" * 3000: "too deep to be read",
        "training={runs: 1, runs: 2}": "key 'runs' given twice",
        "training=&x {a: *x}": "an anchor within its own value",
    }.items():
        with pytest.raises(ScenarioError, match=said) as caught:
            parse(wrong)
        assert len(str(caught.value)) < 400
    assert parse("training={<<: {runs: 1}, epochs: 2}") == ("training", ({"runs": 1, "epochs": 2},))


@pytest.mark.parametrize("sites", ["a, b", 5, ["a", False]])
def test_each_site_in_turn_needs_a_list_of_names(sites: object, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "sites": sites}))
    with pytest.raises(ScenarioError, match=r"x\.yaml, line 2: sites: found .*; expected a list of names, e\.g\. \[a, b\]"):
        cells_of(tmp_path / "x.yaml", [], [], "each")


def test_a_target_whose_name_lacks_quotes(tmp_path: Path) -> None:
    file = world(tmp_path / "w")
    with pytest.raises(ScenarioError, match=r"target\.site: found False; expected text\. Put it in quotes"):
        load_experiment(file, Overrides(settings=(single("target=no"),)))


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


def test_the_fields_of_a_former_kind_go_with_it() -> None:
    drift = {"stream": {"kind": "mixture_drift", "drift": "smooth", "batch_size": 8}}
    assert assign(drift, "stream.kind", "iid")["stream"] == {"kind": "iid", "batch_size": 8}
    inner = {"stream": {"kind": "domain_seq", "within": {"kind": "dirichlet_batch", "delta": 1}, "size": 3}}
    assert assign(inner, "stream.within.kind", "iid")["stream"]["within"] == {"kind": "iid"}
    assert assign(inner, "stream.kind", "iid")["stream"] == {"kind": "iid", "size": 3}  # a mistake of the file stays one
    assert assign(drift, "stream.kind", ["iid"])["stream"]["drift"] == "smooth"
    proxy = {"initialization": {"kind": "proxy", "source": "organ_phantom", "head_init": "zero"}}
    assert assign(proxy, "initialization.kind", "pretrained")["initialization"] == {"kind": "pretrained", "head_init": "zero"}
    chosen = (("stream.delta", 1), ("stream.kind", "dirichlet_batch"))
    assert overridden(drift, Overrides(settings=chosen))["stream"] == {"kind": "dirichlet_batch", "batch_size": 8, "delta": 1}


def test_a_strategy_goes_by_its_row_or_its_kind() -> None:
    slow = {"fedavg": {"rounds": 20}}
    content = {"federated": ["fednova", {"fedavg": {"rounds": 2}}, slow, {"fedprox": {"label": "mu.0.1", "mu": 0.1}}, "krun"]}
    assert assign(content, "federated.fedavg-2.rounds", 3)["federated"][1:3] == [{"fedavg": {"rounds": 3}}, slow]
    assert assign(content, "federated.fedavg-20.lr", 0.1)["federated"][2] == {"fedavg": {"rounds": 20, "lr": 0.1}}
    for name in ("fednova", "fednova-5"):
        assert assign(content, f"federated.{name}.rounds", 3)["federated"][0] == {"fednova": {"rounds": 3}}
    for name in ("fedprox", "mu.0.1"):
        assert assign(content, f"federated.{name}.mu", 1)["federated"][3] == {"fedprox": {"label": "mu.0.1", "mu": 1}}
    assert assign(content, "federated", [])["federated"] == []
    kfac = {"federated": [{"fedfisher": {"information": "kfac"}}, "fedfisher"]}
    assert assign(kfac, "federated.fedfisher-1.samples", 9)["federated"][1] == {"fedfisher": {"samples": 9}}
    for key, words in {
        "federated.fedavg.lr": "federated.fedavg: found 'fedavg', of which there are 2; .*they are: fedavg-2, fedavg-20",
        "federated.fedavg-3.lr": "found 'fedavg-3'; expected one of the scenario's federated; did you mean 'fedavg-2",
    }.items():
        with pytest.raises(ScenarioError, match=words):
            assign(content, key, 1)
    with pytest.raises(ScenarioError, match="there are no federated"):
        assign({}, "federated.fedavg.lr", 1)


def test_settings_of_a_strategy_reach_the_plan_and_the_sweep(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump({**SCENARIO, "federated": [{"fedavg": {"rounds": 2}}]}))
    cells = cells_of(file, [0], ["federated.fedavg-2.rounds=1,3"], "")
    plans = [load_experiment(file, cell.overrides(())) for cell in cells]
    assert [plan.scenario.federated[0].key for plan in plans] == ["fedavg-1", "fedavg-3"]
    with pytest.raises(ScenarioError, match=r"federated\[0\].fedavg.mu.*an unknown key"):
        load_experiment(file, Overrides(settings=(("federated.fedavg.mu", 1),)))


def test_methods_neither_select_nor_drop_federated_rows(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump({**SCENARIO, "federated": [{"fedavg": {"rounds": 2}}]}))
    plan = load_experiment(file, Overrides(methods=("eam",)))
    assert ([one.key for one in plan.scenario.methods], [one.key for one in plan.scenario.federated]) == (["eam"], ["fedavg-2"])
    assert load_experiment(file, Overrides(methods=("eam",), settings=(("federated", []),))).scenario.federated == ()
    for name in ("fedavg-2", "fedavg"):
        with pytest.raises(ScenarioError, match=rf"--methods: found '{name}', which is below .*in every run"):
            load_experiment(file, Overrides(methods=("mean", name)))
    with pytest.raises(ScenarioError, match="no such method"):
        load_experiment(file, Overrides(methods=("eamm",)))


def test_what_no_option_changes_is_the_files(tmp_path: Path) -> None:
    """Also a key that is missing, whatever else the command line changes."""
    file = world(tmp_path / "here")
    file.write_text(yaml.safe_dump({key: value for key, value in SCENARIO.items() if key != "methods"}))
    for seed in (None, 7):
        with pytest.raises(ScenarioError, match=r"tiny\.yaml: methods: found nothing"):
            load_experiment(file, Overrides(seed=seed))
    with pytest.raises(ScenarioError, match=r"as the command line changes it: training\.augmentt: found an unknown key"):
        load_experiment(file, Overrides(methods=("mean",), settings=(("training.augmentt", "light"),)))


def test_a_site_that_is_given_twice_is_one_problem(tmp_path: Path) -> None:
    """No label would give its second row of `expert` a name of its own."""
    file = world(tmp_path / "here")
    with pytest.raises(ScenarioError, match="'north' 2 times; expected every site once") as error:
        load_experiment(file, Overrides(add_sites=(str(file.parents[1] / "sites" / "north.yaml"),)))
    assert len(error.value.problems) == 1


def test_an_unknown_key_is_told_like_any_mistake(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    with pytest.raises(ScenarioError, match=r"stream.batchsize.*did you mean 'batch_size'"):
        load_experiment(file, Overrides(settings=(("stream.batchsize", 3),)))
    with pytest.raises(ScenarioError, match=r"tiny\.yaml, as the command line changes it: seed: found 'x'"):
        load_experiment(file, Overrides(settings=(("seed", "x"),)))
    plan = load_experiment(file, Overrides(settings=(("stream", {"kind": "iid", "batch_size": 3}),), target="north"))
    assert plan.scenario.stream.kind() == "iid"
    assert (plan.target.name, [site.name for site in plan.sites]) == ("north", ["south"])


def test_cells_are_all_combinations(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    cells = cells_of(file, range(2), ["stream.batch_size=4,8", "methods.eam.gamma=1,5,9"], "")
    assert len(cells) == 12
    assert len({cell.name for cell in cells}) == 12
    assert [cell.target for cell in cells_of(file, range(1), [], "each")] == ["north", "south", "mercy"]
    (named,) = cells_of(file, [3], ["stream={kind: domain_seq, within: {kind: temporal, order: sorted}}"], "north")
    assert named.name == "north-stream=domain_seq_within_temporal_order_sorted-seed3"
    with pytest.raises(ScenarioError, match="a key twice"):
        cells_of(file, range(1), ["seed=1", "seed=2"], "")


def test_seeds_may_be_named_or_counted_and_not_both(tmp_path: Path) -> None:
    file = world(tmp_path / "here")
    assert [cell.name for cell in cells_of(file, (), ["seed=5,2"], "")] == ["seed5", "seed2"]
    with pytest.raises(ScenarioError, match="--set: seed: found 2 seeds, and --seeds 3; expected one of them"):
        cells_of(file, range(3), ["seed=1,2"], "")
    for odd in ("-1", "a", "true", "1.0"):
        with pytest.raises(ScenarioError, match=r"--set: seed: found .*; expected whole numbers, 0 or greater"):
            cells_of(file, (), [f"seed=3,{odd}"], "")


@pytest.mark.parametrize(
    ("key", "value", "given"),
    [
        ("seed", 7, {"seed": 0}),
        ("jobs", 2, {"jobs": 1}),
        ("backend", "local", {"backend": "simulation"}),
        ("methods", ["mean"], {"methods": ("dcs",)}),
        ("target", "south", {"target": "north"}),
        ("target.site", "south", {"target": "north"}),
    ],
)
def test_a_key_and_the_option_of_it_are_not_both_given(key: str, value: object, given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ScenarioError,
        match=f"--set: {key}: found .*, and --{key.partition('.')[0]}, which changes the same key; expected one of them",
    ):
        load_experiment(world(tmp_path / "here"), Overrides(settings=((key, value),), **given))


@pytest.mark.parametrize("target", ["", {"site": ""}])
def test_a_target_without_a_name(target: object, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="target: found an empty name; expected the hospital at which models are merged"):
        load_experiment(world(tmp_path / "here"), Overrides(settings=(("target", target),)))


def test_tables_of_a_grid() -> None:
    def row(seed: int, gamma: int, eam: float) -> dict[str, object]:
        rows = {"mean": (0.8, True), "eam": (eam, True), "majority class": (0.6, False)}
        methods = {key: {"accuracy": a, "balanced_accuracy": a / 2, "ranked": ranked} for key, (a, ranked) in rows.items()}
        return {"seed": seed, "target": None, "settings": {"methods.eam.gamma": gamma}, "methods": methods}

    grid = Grid.of([row(0, 1, 0.9), row(1, 1, 0.8), row(0, 5, 0.7)])
    text = as_csv(grid).splitlines()
    assert text[0] == "methods.eam.gamma,method,seeds,accuracy,low,high,balanced,minus mean,minus mean low,minus mean high"
    assert text[1] == "1,eam,2,85.0,21.5,148.5,42.5,+5.0,-58.5,+68.5"
    assert "5,eam,1,70.0,one seed,one seed,35.0,-10.0,one seed,one seed" in text
    assert text[3] == "1,majority class (not ranked),2,60.0,60.0,60.0,30.0,,,"  # last, and compared with nothing
    assert as_markdown(grid.header(), grid.cells()).count("\n") == 8
    assert r"methods.eam.gamma & method" in as_latex(grid.header(), grid.cells())


def test_the_table_over_domains_is_the_papers() -> None:
    def row(seed: int, target: str, mean: float) -> dict[str, object]:
        rows = {"mean": mean, "eam": 0.9, **({} if target == "art" else {"expert:art": 0.5})}
        methods = {key: {"accuracy": a, "balanced_accuracy": a, "ranked": key != "expert:art"} for key, a in rows.items()}
        return {"seed": seed, "target": target, "settings": {}, "methods": methods}

    table = DomainTable.of(Grid.of([row(0, "art", 0.5), row(1, "art", 0.6), row(0, "photo", 0.7), row(1, "photo", 0.8)]))
    assert table is not None
    assert table.cells() == [
        ["method", "art", "photo", "mean"],
        ["eam", "90.0 ± 0.0", "90.0 ± 0.0", "90.0 ± 0.0"],
        ["mean", "55.0 ± 5.0", "75.0 ± 5.0", "65.0 ± 5.0"],
        ["expert:art (not ranked)", "-", "50.0 ± 0.0", "-"],
    ]
    assert table.as_csv().splitlines()[0] == "method,art,photo,mean,art error,photo error,mean error"
    assert table.as_csv().splitlines()[3] == "expert:art (not ranked),,50.0,,,0.0,"
    once = DomainTable.of(Grid.of([row(0, "art", 0.5), row(0, "photo", 0.7)]))
    in_part = DomainTable.of(Grid.of([row(0, "art", 0.5), row(0, "photo", 0.7)], missing=("sketch-seed0",)))
    assert in_part is not None
    assert in_part.cells()[2] == ["mean", "50.0", "70.0", "-"]  # a mean over two of three domains would be another number
    assert once is not None
    assert once.cells()[2] == ["mean", "50.0", "70.0", "60.0"]
    assert DomainTable.of(Grid.of([row(0, "art", 0.5)])) is None  # one domain has no mean


def test_a_site_that_does_not_train_has_no_task() -> None:
    content = {"sites": ["a", "b", "c"], "target": "d", "classes": {"a": ["x", "y"], "b": ["y", "z"], "c": ["x", "z"]}}
    assert list(overridden(content, Overrides(without=("a",)))["classes"]) == ["b", "c"]
    assert list(overridden(content, Overrides(target="b"))["classes"]) == ["a", "c"]
    assert overridden({**content, "classes": ["x", "y"]}, Overrides(target="b"))["classes"] == ["x", "y"]
